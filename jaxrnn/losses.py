"""The output g and the loss that matches it: three matched pairs.

For each, the derivative of the loss by y, the output *before* g, is g(y) - target. That holds only
for the matched pair, so g and the loss come as one triple.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import checks


class Loss(NamedTuple):
    """g, the loss of one step, and its derivative by y.

    Attributes:
      g: y (*batch, O) -> y_hat (*batch, O).
      value: (y, target) -> l, (*batch,), summed over O.
      error: (y, target) -> dl/dy, (*batch, O); for a matched pair y_hat - target.

    >>> import jax.numpy as jnp
    >>> y, target = jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0])
    >>> float(squared_error.value(y, target)), squared_error.error(y, target).tolist()
    (2.0, [0.0, 2.0])
    """

    g: Callable[[Array], Array]
    value: Callable[[Array, Array], Array]
    error: Callable[[Array, Array], Array]


def _distribution(y: Array, target: Array) -> Array:
    """A distribution as it is; integer labels as one-hot rows."""
    if checks.is_integer(target):
        checks.check_shape("targets", target, y.shape[:-1], "integer labels, one for each y")
        return jax.nn.one_hot(target, y.shape[-1], dtype=y.dtype)
    checks.check_shape("targets", target, y.shape, "a distribution for each y")
    return target.astype(y.dtype)


def _real(y: Array, target: Array) -> Array:
    checks.check_shape("targets", target, y.shape, "the shape of y")
    return target.astype(y.dtype)


def _cross_entropy(y: Array, target: Array) -> Array:
    y = y - jax.lax.stop_gradient(y.max(axis=-1, keepdims=True))
    return jnp.log(jnp.exp(y).sum(axis=-1)) - (_distribution(y, target) * y).sum(axis=-1)


def _binary_cross_entropy(y: Array, target: Array) -> Array:
    t = _real(y, target)
    return (t * jax.nn.softplus(-y) + (1 - t) * jax.nn.softplus(y)).sum(axis=-1)


cross_entropy = Loss(
    g=jax.nn.softmax,
    value=_cross_entropy,
    error=lambda y, target: jax.nn.softmax(y) - _distribution(y, target),
)
"""g = softmax, l = -sum_o target_o log y_hat_o; targets are integer labels (*batch,) or
distributions (*batch, O)."""

squared_error = Loss(
    g=lambda y: y,
    value=lambda y, target: ((y - _real(y, target)) ** 2).sum(axis=-1) / 2,
    error=lambda y, target: y - _real(y, target),
)
"""g = identity, l = sum_o (y_o - target_o)^2 / 2; targets (*batch, O)."""

binary_cross_entropy = Loss(
    g=jax.nn.sigmoid,
    value=_binary_cross_entropy,
    error=lambda y, target: jax.nn.sigmoid(y) - _real(y, target),
)
"""g = sigmoid, l = -sum_o target_o log y_hat_o + (1 - target_o) log(1 - y_hat_o); targets
(*batch, O) in [0, 1]."""
