"""Three losses, each with its output function g."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxrnn import checks
from jaxrnn.activations import check_activation, has_traced_values, identity, sigmoid
from jaxrnn.batches import Batch, check_batch, mean_weights, steps_shape, where_exists
from jaxrnn.params import AnyArray, Params, at_least_float32, check_leak, check_params


class Loss(NamedTuple):
    """The output function g, the loss of one step, and its derivative with respect to y.

    Three are given. In each, g and the loss match: dl/dy = y_hat - target, where y is the output
    before g.

        cross_entropy           g = softmax     l = -sum_o target_o log y_hat_o
        squared_error           g = identity    l = sum_o (y_o - target_o)^2 / 2
        binary_cross_entropy    g = sigmoid     l = -sum_o [target_o log y_hat_o
                                                            + (1 - target_o) log(1 - y_hat_o)]

    Targets are (*batch, O): distributions, numbers, and numbers in [0, 1]. For `cross_entropy` they
    may be integer labels (*batch,), y must be finite, and with distributions whose sum is not 1,
    dl/dy is (sum_o target_o) y_hat - target.

    Attributes:
      g: y (*batch, O) -> y_hat (*batch, O).
      value: (y, target) -> l, (*batch,), summed over O.
      error: (y, target) -> dl/dy, (*batch, O); y_hat - target for a matched pair.

    >>> import jax.numpy as jnp
    >>> y, target = jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0])
    >>> float(squared_error.value(y, target)), squared_error.error(y, target).tolist()
    (2.0, [0.0, 2.0])
    """

    g: Callable[[Array], Array]
    value: Callable[[Array, Array], Array]
    error: Callable[[Array, Array], Array]


def check_loss(loss: Any, shape: tuple[int, ...], dtype: DTypeLike, targets: Any) -> None:
    """Raises TypeError or ValueError unless loss is a Loss that fits these ys and targets.

    The loss is traced, not computed.
    """
    if not all(callable(getattr(loss, part, None)) for part in ("g", "value", "error")):
        raise TypeError(f"loss: expected a Loss(g, value, error), got {loss!r}")
    ys = jax.ShapeDtypeStruct(shape, dtype)
    with checks.noted("The error is in loss.value."):
        value = jax.eval_shape(loss.value, ys, targets)
    checks.check_shape("loss.value", value, shape[:-1], "one loss for each y")
    with checks.noted("The error is in loss.error."):
        error = jax.eval_shape(loss.error, ys, targets)
    checks.check_shape("loss.error", error, shape, "one derivative for each y")


def reads_traced_values(loss: Loss, params: Params, batch: Batch) -> bool:
    """Whether a loss depends on values that are being traced, such as a scale that is learned."""
    shape = (*steps_shape(batch.xs), params.W_y.shape[0])
    ys = jax.ShapeDtypeStruct(shape, at_least_float32(params.W_y.dtype))
    return any(has_traced_values(part, ys, batch.targets) for part in (loss.value, loss.error))


def _distribution(y: Array, target: Array) -> tuple[Array, Array | int]:
    """A distribution unchanged, or integer labels as one-hot rows; and the sum of each row."""
    if checks.is_integer(target):
        checks.check_shape("targets", target, y.shape[:-1], "integer labels, one for each y")
        # one_hot counts in the dtype of the labels: 8 bits would wrap at 256.
        return jax.nn.one_hot(target.astype(jnp.int32), y.shape[-1], dtype=y.dtype), 1
    checks.check_shape("targets", target, y.shape, "a distribution for each y; labels are integers")
    target = target.astype(y.dtype)
    return target, target.sum(axis=-1, keepdims=True)


def _numbers(y: Array, target: Array) -> Array:
    checks.check_shape("targets", target, y.shape, "the shape of y")
    return target.astype(y.dtype)


def check_loss_arguments(
    params: Any, batch: Any, h_0: Any, activation: Any, leak: Any, loss: Any
) -> None:
    """Raises TypeError or ValueError unless the arguments of `sequence_loss` fit one another."""
    check_params(params)
    check_activation(activation, params.W_h.dtype)
    check_leak(leak, params)
    check_batch(params, batch, h_0)
    shape = (*steps_shape(batch.xs), params.W_y.shape[0])
    check_loss(loss, shape, at_least_float32(params.W_y.dtype), batch.targets)


# Functions of this module can be pickled, unlike lambdas and those that JAX wraps.
def _softmax(y: Array) -> Array:
    return jax.nn.softmax(y)


def _cross_entropy(y: Array, target: Array) -> Array:
    y = y - jax.lax.stop_gradient(y.max(axis=-1, keepdims=True))
    p, total = _distribution(y, target)
    log_sum = jnp.log(jnp.exp(y).sum(axis=-1, keepdims=True))
    return (total * log_sum)[..., 0] - (p * y).sum(axis=-1)


def _cross_entropy_error(y: Array, target: Array) -> Array:
    p, total = _distribution(y, target)
    return total * _softmax(y) - p


def _squared_error(y: Array, target: Array) -> Array:
    return ((y - _numbers(y, target)) ** 2).sum(axis=-1) / 2


def _squared_error_error(y: Array, target: Array) -> Array:
    return y - _numbers(y, target)


def _binary_cross_entropy(y: Array, target: Array) -> Array:
    t = _numbers(y, target)
    return (t * jax.nn.softplus(-y) + (1 - t) * jax.nn.softplus(y)).sum(axis=-1)


def _binary_cross_entropy_error(y: Array, target: Array) -> Array:
    return sigmoid.f(y) - _numbers(y, target)


cross_entropy = Loss(g=_softmax, value=_cross_entropy, error=_cross_entropy_error)
squared_error = Loss(g=identity.f, value=_squared_error, error=_squared_error_error)
binary_cross_entropy = Loss(
    g=sigmoid.f, value=_binary_cross_entropy, error=_binary_cross_entropy_error
)


def mean_loss(ys: AnyArray, batch: Batch, loss: Loss = cross_entropy) -> Array:
    """The mean loss over the steps that count.

        L = sum_t weights_t mask_t l(y_t, target_t) / sum_t weights_t mask_t

    over steps and batch axes. `sequence_loss` is `unroll` followed by `mean_loss`; other networks,
    such as a stack of layers, use it with outputs of their own.

    Args:
      ys: (T, *batch, O), the outputs before g; not read where the mask is False.
      batch: Batch; of xs, only the shape and dtype are read.
      loss: g and the loss l of a step.

    Returns:
      L, a scalar in float32 at least; 0 where no step counts.

    Raises:
      TypeError, ValueError: an argument has the wrong type, dtype or shape; the message names it.

    >>> ys = jnp.array([[2.0], [5.0]])
    >>> batch = Batch(xs=ys, targets=jnp.zeros((2, 1)), mask=jnp.array([True, False]))
    >>> mean_loss(ys, batch, squared_error).item()
    2.0
    """
    checks.check_float_array("ys", ys)
    check_batch(None, batch, None)
    checks.check_shape("ys", ys, (*steps_shape(batch.xs), *ys.shape[-1:]), "T, *batch as in xs, O")
    dtype = at_least_float32(ys.dtype)
    check_loss(loss, ys.shape, dtype, batch.targets)
    ys, targets = (where_exists(batch.mask, leaf) for leaf in (ys.astype(dtype), batch.targets))
    values = mean_weights(batch, dtype) * loss.value(ys, targets).astype(dtype)
    return where_exists(batch.mask, values).sum()
