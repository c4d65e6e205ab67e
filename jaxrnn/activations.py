"""The activation f of the hidden units, and its derivative f'."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Activation(NamedTuple):
    """A pair of pure functions: f, and f' in terms of the value of f.

    The derivative of every f here follows from its value, so the backward pass needs the hidden
    states and never the pre-activations.

    Attributes:
      f: z -> h = f(z), elementwise, keeps the dtype.
      df: h -> f'(z), elementwise, keeps the dtype.

    >>> import jax.numpy as jnp
    >>> h = tanh.f(jnp.array(0.5))
    >>> bool(jnp.allclose(tanh.df(h), 1 - jnp.tanh(0.5) ** 2))
    True
    """

    f: Callable[[Array], Array]
    df: Callable[[Array], Array]


def check_activation(activation: Any) -> None:
    """Raises TypeError unless activation is a pair of functions."""
    parts = (getattr(activation, part, None) for part in ("f", "df"))
    if not all(map(callable, parts)):
        raise TypeError(f"activation: expected an Activation(f, df), got {activation!r}")


# Functions of this module can be pickled, unlike lambdas and those that JAX wraps.
def _tanh(z: Array) -> Array:
    return jnp.tanh(z)


def _relu(z: Array) -> Array:
    return jax.nn.relu(z)


def _sigmoid(z: Array) -> Array:
    return jax.nn.sigmoid(z)


def _identity(z: Array) -> Array:
    return z


def _tanh_prime(h: Array) -> Array:
    return 1 - h * h


def _relu_prime(h: Array) -> Array:
    return (h > 0).astype(h.dtype)


def _sigmoid_prime(h: Array) -> Array:
    return h * (1 - h)


def _identity_prime(h: Array) -> Array:
    return jnp.ones_like(h)


tanh = Activation(f=_tanh, df=_tanh_prime)
relu = Activation(f=_relu, df=_relu_prime)
sigmoid = Activation(f=_sigmoid, df=_sigmoid_prime)
identity = Activation(f=_identity, df=_identity_prime)
