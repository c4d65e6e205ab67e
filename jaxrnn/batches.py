"""Batch: input sequences, their targets, and which steps exist and count."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxrnn import checks
from jaxrnn.params import AnyArray, Params
from jaxrnn.sharding import Tree, full_as


class Batch(NamedTuple):
    """Input sequences with their targets, a pytree. T steps, zero or more batch axes.

    Attributes:
      xs: (T, *batch, I) numbers, or (T, *batch) integer tokens, which stand for one-hot inputs.
        Integers are always tokens: convert integer features, `xs.astype(jnp.float32)`.
      targets: (T, *batch, O), or (T, *batch) integer labels.
      mask: (T, *batch) bool, step t exists. Where it is False, the state is held, the step has no
        loss, and no other field is read.
      reset: (T, *batch) bool, step t is the first of a new sequence: h_{t-1} is replaced by zeros.
      weights: (T, *batch) float, at least 0: the weight of step t in the loss. The loss of a step
        that exists must be finite, also where its weight is 0.
      drive: (T, *batch, H) float, added to z_t: noise, a perturbation, an embedding.
    """

    xs: AnyArray
    targets: AnyArray
    mask: AnyArray | None = None
    reset: AnyArray | None = None
    weights: AnyArray | None = None
    drive: AnyArray | None = None


def steps_shape(xs: AnyArray) -> tuple[int, ...]:
    """(T, *batch) of an input sequence. Tokens have no feature axis."""
    return xs.shape if checks.is_integer(xs) else xs.shape[:-1]


def per_step(flags: AnyArray, xs: AnyArray) -> Array:
    """flags (T, *batch) with trailing axes of size 1, so that they broadcast over xs."""
    return jnp.reshape(flags, flags.shape + (1,) * (xs.ndim - flags.ndim))


def where_exists(mask: AnyArray | None, xs: AnyArray) -> Array:
    """xs where the mask is True, else 0."""
    xs = jnp.asarray(xs)  # 64-bit numbers of NumPy become 32-bit ones without a warning
    if mask is None:
        return xs
    return jnp.where(per_step(mask, xs), xs, jnp.zeros((), xs.dtype))


def ones_per_step(xs: AnyArray, dtype: DTypeLike) -> Array:
    """Ones (T, *batch), split over devices as the inputs are."""
    xs = jnp.asarray(xs)
    return full_as(xs if checks.is_integer(xs) else xs.any(axis=-1), 1, dtype)


def step_weights(batch: Batch, dtype: DTypeLike = jnp.float32) -> Array:
    """weights * mask, (T, *batch)."""
    if batch.weights is None:
        weights = ones_per_step(batch.xs, dtype)
    else:
        weights = jnp.asarray(batch.weights, dtype)
    return where_exists(batch.mask, weights)


def divide_by_count(sums: Tree, count: Array) -> Tree:
    """sums / count for each leaf of a pytree; 0 / 0 is 0."""
    count = jnp.where(count == 0, jnp.ones_like(count), count)
    return jax.tree.map(lambda leaf: leaf / count, sums)


def scaled_weights(batch: Batch, dtype: DTypeLike) -> tuple[Batch, Array | int]:
    """The batch with weights / s, and s, the largest weight; without weights the batch, and 1.

    The mean is the same, and weighted errors do not leave the range of their dtype.
    """
    if batch.weights is None:
        return batch, 1
    weights = step_weights(batch, dtype)
    s = jax.lax.stop_gradient(jnp.abs(weights).max(initial=0))
    s = jnp.where(s == 0, jnp.ones_like(s), s)
    return batch._replace(weights=weights / s), s


def mean_weights(batch: Batch, dtype: DTypeLike) -> Array:
    """weights * mask / sum(weights * mask): a sum over steps weighted by them is the mean."""
    weights = step_weights(batch, dtype)
    return divide_by_count(weights, weights.sum())


def check_is_batch(batch: Any, name: str = "batch") -> None:
    """Raises TypeError unless batch is a Batch."""
    if not isinstance(batch, Batch):
        raise TypeError(f"{name}: expected Batch(xs, targets), got {type(batch).__name__}")


def check_input(name: str, params: Params | None, x: Any, leading: str) -> None:
    """Raises unless x are tokens, or numbers with I features; any number if params is None."""
    checks.check_array(name, x)
    I = "I" if params is None else params.W_x.shape[1]
    if checks.is_integer(x):
        return
    if not checks.is_float(x.dtype):
        raise TypeError(
            f"{name}: expected a floating-point dtype, or integer tokens, got {x.dtype}"
        )
    if x.ndim < 1 or (params is not None and x.shape[-1] != I):
        raise ValueError(f"{name}: expected shape ({leading}, {I}), got {x.shape}")


def check_state(name: str, params: Params, h: Any, batch_shape: tuple[int, ...]) -> None:
    """Raises unless h is a state (*batch, H)."""
    checks.check_float_array(name, h)
    checks.check_shape(name, h, (*batch_shape, params.W_h.shape[0]), "*batch, H")


def check_step(params: Params, h: Any, x: Any, drive: Any) -> None:
    """Raises TypeError or ValueError unless state, input and drive of a step fit one another."""
    check_input("x", params, x, "*batch")
    checks.check_float_array("h", h)
    batch_shape = steps_shape(x)
    if checks.is_integer(x) and x.shape == (*h.shape[:-1], params.W_x.shape[1]):
        raise ValueError(features_message("x", x, "*batch"))
    check_state("h", params, h, batch_shape)
    check_drive(params, drive, batch_shape, "*batch as in x")


def check_flags(name: str, flags: Any, steps: tuple[int, ...]) -> None:
    """Raises TypeError or ValueError unless flags are None, or one bool for each step."""
    if flags is None:
        return
    checks.check_array(name, flags)
    if flags.dtype != jnp.bool_:
        raise TypeError(f"{name}: expected bool, got {flags.dtype}")
    checks.check_shape(name, flags, steps, "T, *batch as in xs")


def check_drive(params: Params | None, drive: Any, steps: tuple[int, ...], leading: str) -> None:
    """Raises unless drive is None, or one vector of H numbers for each step."""
    if drive is None:
        return
    checks.check_float_array("drive", drive)
    H = drive.shape[-1:] if params is None else (params.W_h.shape[0],)
    checks.check_shape("drive", drive, (*steps, *H), f"{leading}, H")


def check_sequence(
    params: Params | None,
    xs: Any,
    h_0: Any,
    drive: Any,
    mask: Any,
    reset: Any,
    targets: Any = None,
    weights: Any = None,
) -> None:
    """Raises TypeError or ValueError unless the arguments of `hidden_states` fit one another.

    Targets and weights, where there are any, help to tell tokens from numbers.
    """
    check_input("xs", params, xs, "T, *batch")
    check_tokens(params, Batch(xs, targets, mask, reset, weights, drive), h_0)
    shape = steps_shape(xs)
    if not shape:
        raise ValueError(f"xs: expected a time axis in front, got shape {xs.shape}")
    if h_0 is not None and params is not None:
        check_state("h_0", params, h_0, shape[1:])
    check_drive(params, drive, shape, "T, *batch as in xs")
    for name, flags in (("mask", mask), ("reset", reset)):
        check_flags(name, flags, shape)


def check_batch(params: Params | None, batch: Any, h_0: Any) -> None:
    """Raises TypeError or ValueError unless the batch fits the parameters and the state.

    Without Params, the fields of the batch still have to fit one another.
    """
    check_is_batch(batch)
    xs, targets, mask, reset, weights, drive = batch
    check_sequence(params, xs, h_0, drive, mask, reset, targets, weights)
    shape, O = steps_shape(xs), "O" if params is None else params.W_y.shape[0]
    checks.check_array("targets", targets)
    real = checks.is_integer(targets) or checks.is_float(targets.dtype)
    if not real and targets.dtype != jnp.bool_:
        raise TypeError(f"targets: expected real numbers, got {targets.dtype}")
    if targets.shape[: len(shape)] != shape:
        raise ValueError(
            f"targets: expected shape {shape} or {(*shape, O)}, one target for each step of xs, "
            f"got {targets.shape}"
        )
    if weights is not None:
        checks.check_float_array("weights", weights)
        checks.check_shape("weights", weights, shape, "T, *batch as in xs")


def fits_as_numbers(params: Params | None, batch: Batch, h_0: Any) -> bool:
    """Whether integer xs fit the other arguments as numbers (T, *batch, I)."""
    return batch.xs.ndim >= 2 and _fits(params, batch, h_0, batch.xs.ndim - 1)


def check_tokens(params: Params | None, batch: Batch, h_0: Any) -> None:
    """Raises ValueError where integer xs are numbers with a feature axis, or may be.

    Integers (T, batch) are tokens if they fit as such. Those of a higher rank, with Params, are
    tokens only if they do not fit as numbers: any other argument may decide.
    """
    xs = batch.xs
    if not checks.is_integer(xs):
        return
    ambiguous = params is not None and xs.ndim > 2
    if fits_as_numbers(params, batch, h_0) and (
        ambiguous or not _fits(params, batch, h_0, xs.ndim)
    ):
        raise ValueError(
            features_message("xs", xs, "T, *batch")
            + "; for tokens of this shape, give a mask or h_0"
        )


def features_message(name: str, x: Any, leading: str) -> str:
    """The message for integers that fit as numbers with a feature axis."""
    return (
        f"{name}: expected a floating-point dtype for inputs with a feature axis, got {x.dtype} of "
        f"shape {x.shape}. Integers are tokens ({leading}): convert features with "
        ".astype(jnp.float32)"
    )


def _fits(params: Params | None, batch: Batch, h_0: Any, rank: int) -> bool:
    """Whether (T, *batch) may be the first `rank` axes of xs."""
    steps, features = batch.xs.shape[:rank], batch.xs.shape[rank:]

    def has_shape(x: Any, *shapes: tuple[int, ...]) -> bool:
        return x is None or getattr(x, "shape", None) in shapes

    per_step = all(has_shape(x, steps) for x in (batch.mask, batch.reset, batch.weights))
    if params is None:
        return per_step and getattr(batch.targets, "shape", ())[:rank] == steps
    O, H, I = *params.W_y.shape, params.W_x.shape[1]
    targets = has_shape(batch.targets, steps, (*steps, O))
    state = has_shape(h_0, (*steps[1:], H))
    drive = has_shape(batch.drive, (*steps, H))
    return per_step and targets and state and drive and features in ((), (I,))
