"""What can be seen of an argument while tracing: rank, shape, dtype, static values.

Each message names the argument, what was expected and what came. Nothing here costs anything once
a function is compiled. What only values can show is `check_values`, on the host, once, before.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np


def is_integer(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.integer)


def _is_float(dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def check_array(name: str, x) -> None:
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        raise TypeError(f"{name}: expected an array, got {type(x).__name__}")


def check_shape(name: str, x, shape, meaning: str) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)} ({meaning}), got {x.shape}")


def check_size(name: str, size) -> None:
    if isinstance(size, bool) or not isinstance(size, int | np.integer):
        raise TypeError(f"{name}: expected an integer, got {size!r}")
    if size < 1:
        raise ValueError(f"{name}: expected at least 1, got {size}")


def check_init(key, input_size, hidden_size, output_size, dtype) -> None:
    check_size("input_size", input_size)
    check_size("hidden_size", hidden_size)
    check_size("output_size", output_size)
    if not _is_float(dtype):
        raise TypeError(f"dtype: expected a floating-point dtype, got {jnp.dtype(dtype).name}")
    check_key(key)


def check_key(key) -> None:
    check_array("key", key)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape != ():
        raise TypeError(
            f"key: expected one key from jax.random.key, got {key.dtype} of shape {key.shape}"
        )


def check_params(params) -> None:
    """One floating dtype, and shapes that fit one another."""
    if not hasattr(params, "_fields") or "W_h" not in params._fields:
        raise TypeError(f"params: expected Params, got {type(params).__name__}")
    for name, leaf in params._asdict().items():
        check_array(f"params.{name}", leaf)
        rank = 2 if name.startswith("W") else 1
        if leaf.ndim != rank:
            raise ValueError(f"params.{name}: expected rank {rank}, got shape {leaf.shape}")
        if not _is_float(leaf.dtype):
            raise TypeError(f"params.{name}: expected a floating-point dtype, got {leaf.dtype}")
        if leaf.dtype != params.W_h.dtype:
            raise TypeError(
                f"params.{name}: expected {params.W_h.dtype} as W_h has, got {leaf.dtype}"
            )
    H, I, O = params.W_h.shape[0], params.W_x.shape[1], params.W_y.shape[0]
    check_shape("params.W_h", params.W_h, (H, H), "H, H")
    check_shape("params.W_x", params.W_x, (H, I), "H, I with H of W_h")
    check_shape("params.W_y", params.W_y, (O, H), "O, H with H of W_h")
    check_shape("params.b_h", params.b_h, (H,), "H of W_h")
    check_shape("params.b_y", params.b_y, (O,), "O of W_y")


def _check_input(name: str, params, x, leading: str) -> None:
    check_array(name, x)
    I = params.W_x.shape[1]
    if is_integer(x):
        return
    if not _is_float(x.dtype):
        raise TypeError(
            f"{name}: expected a floating-point dtype, or integer tokens, got {x.dtype}"
        )
    if x.ndim < 1 or x.shape[-1] != I:
        raise ValueError(f"{name}: expected shape ({leading}, {I}) to fit W_x, got {x.shape}")


def _check_state(name: str, params, h, batch_shape) -> None:
    check_array(name, h)
    if not _is_float(h.dtype):
        raise TypeError(f"{name}: expected a floating-point dtype, got {h.dtype}")
    check_shape(name, h, (*batch_shape, params.W_h.shape[0]), "*batch, H")


def _check_flags(name: str, flags, steps_shape) -> None:
    if flags is None:
        return
    check_array(name, flags)
    if flags.dtype != jnp.bool_:
        raise TypeError(f"{name}: expected bool, got {flags.dtype}")
    check_shape(name, flags, steps_shape, "T, *batch as xs has")


def steps_shape(xs) -> tuple[int, ...]:
    """(T, *batch) of an input sequence: tokens have no feature axis."""
    return xs.shape if is_integer(xs) else xs.shape[:-1]


def _check_activation(activation) -> None:
    if not callable(getattr(activation, "f", None)) or not callable(
        getattr(activation, "df", None)
    ):
        raise TypeError(f"activation: expected an Activation(f, df), got {activation!r}")


def check_step(params, h, x, activation) -> None:
    check_params(params)
    _check_activation(activation)
    _check_input("x", params, x, "*batch")
    _check_state("h", params, h, steps_shape(x))


def check_sequence(params, xs, h_0, activation, mask, reset) -> None:
    check_params(params)
    _check_activation(activation)
    _check_sequence(params, xs, h_0, mask, reset)


def _check_sequence(params, xs, h_0, mask, reset) -> None:
    _check_input("xs", params, xs, "T, *batch")
    shape = steps_shape(xs)
    if not shape:
        raise ValueError(f"xs: expected a time axis in front, got shape {xs.shape}")
    if h_0 is not None:
        _check_state("h_0", params, h_0, shape[1:])
    _check_flags("mask", mask, shape)
    _check_flags("reset", reset, shape)


def check_batch(params, batch, h_0, activation, loss) -> None:
    check_params(params)
    _check_activation(activation)
    _check_fields(params, batch, h_0)
    if not all(callable(getattr(loss, part, None)) for part in ("g", "value", "error")):
        raise TypeError(f"loss: expected a Loss(g, value, error), got {loss!r}")


def check_is_batch(batch) -> None:
    if not hasattr(batch, "_fields") or "targets" not in batch._fields:
        raise TypeError(f"batch: expected Batch(xs, targets), got {type(batch).__name__}")


def _check_fields(params, batch, h_0) -> None:
    check_is_batch(batch)
    _check_sequence(params, batch.xs, h_0, batch.mask, batch.reset)
    check_array("targets", batch.targets)
    if not jnp.issubdtype(batch.targets.dtype, jnp.number) and batch.targets.dtype != jnp.bool_:
        raise TypeError(f"targets: expected numbers, got {batch.targets.dtype}")
    shape = steps_shape(batch.xs)
    if batch.targets.shape[: len(shape)] != shape:
        raise ValueError(
            f"targets: expected shape {shape} or {(*shape, params.W_y.shape[0])}, one target for "
            f"each step of xs, got {batch.targets.shape}"
        )
    if batch.weights is not None:
        check_array("weights", batch.weights)
        if not _is_float(batch.weights.dtype):
            raise TypeError(f"weights: expected a floating-point dtype, got {batch.weights.dtype}")
        check_shape("weights", batch.weights, shape, "T, *batch as xs has")


def check_checkpoint_every(checkpoint_every) -> None:
    if checkpoint_every is not None:
        check_size("checkpoint_every", checkpoint_every)


def check_lengths(lengths, T) -> None:
    """Their values too, where they are known already."""
    check_array("lengths", lengths)
    if not is_integer(lengths):
        raise TypeError(f"lengths: expected integers, got {lengths.dtype}")
    if isinstance(T, bool) or not isinstance(T, int | np.integer) or T < 0:
        raise ValueError(f"T: expected an integer of at least 0, got {T!r}")
    if not isinstance(lengths, jax.core.Tracer):
        lengths = np.asarray(lengths)
        _check_range("lengths", lengths, np.ones(lengths.shape, bool), int(T) + 1, "0..T")


def _check_range(name: str, values, counted, size: int, meaning: str) -> None:
    wrong = np.argwhere(((values < 0) | (values >= size)) & counted)
    if len(wrong):
        where = tuple(int(i) for i in wrong[0])
        raise ValueError(
            f"{name}: expected integers in [0, {size}) ({meaning}), got {int(values[where])} at "
            f"{where}; {len(wrong)} of {values.size} are not"
        )


def _per_value(counted, values):
    """(T, *batch) flags, for each value of a step."""
    return counted.reshape(counted.shape + (1,) * (values.ndim - counted.ndim))


def _check_finite(name: str, values, counted=True, where_counted="") -> None:
    wrong = np.argwhere(~np.isfinite(values.astype(np.float64)) & counted)
    if len(wrong):
        where = tuple(int(i) for i in wrong[0])
        raise ValueError(
            f"{name}: expected finite numbers{where_counted}, got {values[where]} at {where}; "
            f"{len(wrong)} of {values.size} are not"
        )


@np.errstate(over="ignore")
def _check_narrowing(name: str, values, counted=True) -> None:
    """Without x64, JAX takes 64 bits for 32 and says nothing."""
    narrow = values.astype(jax.dtypes.canonicalize_dtype(values.dtype))
    changed = np.argwhere((narrow.astype(values.dtype) != values) & counted)
    if not len(changed):
        return
    where = tuple(int(i) for i in changed[0])
    message = (
        f"{name}: expected values that {narrow.dtype} holds, as JAX turns {values.dtype} into it, "
        f"got {values[where].item()} at {where}, which becomes {narrow[where].item()}; "
        f"{len(changed)} of {values.size} change"
    )
    if is_integer(narrow) or not np.isfinite(narrow[tuple(changed.T)]).all():
        raise ValueError(message)
    warnings.warn(f"{message}. To agree, pass .astype({narrow.dtype})", stacklevel=4)


def check_values(params, batch, h_0=None) -> None:
    """Checks on the host what only values show; call it once on data, before any `jit`.

    JAX clamps an index past its end, a wrong label makes a finite, wrong gradient, and 64 bits
    become 32; nothing of that is ever said. Steps that the mask excludes are not looked at.

    Args:
      params: Params, whose sizes say how many tokens and labels there are.
      batch: Batch of concrete arrays, NumPy's or JAX's.
      h_0: (*batch, H), the state to start from; None for zeros.

    Raises:
      TypeError: a mask or reset that is not bool, targets or weights that are not numbers.
      ValueError: shapes that do not fit, tokens outside [0, I), integer labels outside [0, O),
        parameters, states, inputs, targets or weights that are not finite, negative weights, 64-bit
        values that 32 bits cannot hold. The message names the first such place.

    Warns:
      UserWarning: float64 values that are rounded when JAX takes them for float32.

    >>> import jax, jax.numpy as jnp, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), 3, 4, 2)
    >>> check_values(params, jaxrnn.Batch(jnp.array([0, 2]), jnp.array([0, 2])))
    Traceback (most recent call last):
    ValueError: targets: expected integers in [0, 2) (O labels), got 2 at (1,); 1 of 2 are not
    """
    check_params(params)
    _check_fields(params, batch, h_0)
    for name, leaf in params._asdict().items():
        _check_numbers(f"params.{name}", np.asarray(leaf))
    if h_0 is not None:
        _check_numbers("h_0", np.asarray(h_0))

    shape = steps_shape(batch.xs)
    mask = np.ones(shape, bool) if batch.mask is None else np.asarray(batch.mask)
    sizes = {"xs": (params.W_x.shape[1], "I tokens"), "targets": (params.W_y.shape[0], "O labels")}
    for name in ("xs", "targets", "weights"):
        if getattr(batch, name) is None:
            continue
        values = np.asarray(getattr(batch, name))
        if is_integer(values) and values.ndim == len(shape):
            _check_range(name, values, mask, *sizes[name])
        else:
            _check_numbers(name, values, _per_value(mask, values), " where the mask counts them")
    if batch.weights is not None and (np.asarray(batch.weights).astype(float) < 0)[mask].any():
        raise ValueError(f"weights: expected none below 0, got {np.asarray(batch.weights).min()}")


def _check_numbers(name: str, values, counted=True, where_counted="") -> None:
    _check_finite(name, values, counted, where_counted)
    _check_narrowing(name, values, counted)
