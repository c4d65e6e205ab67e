"""The hidden activation f, each a pair of pure functions."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Activation(NamedTuple):
    """f and its derivative, written in terms of f's own output.

    Every f here has a derivative that can be read off its value, so the backward pass needs the
    hidden states alone and never the pre-activations.

    Attributes:
      f: z -> h = f(z), elementwise, dtype kept.
      df: h -> f'(z), elementwise, dtype kept.

    >>> import jax.numpy as jnp
    >>> h = tanh.f(jnp.array(0.5))
    >>> bool(jnp.allclose(tanh.df(h), 1 - jnp.tanh(0.5) ** 2))
    True
    """

    f: Callable[[Array], Array]
    df: Callable[[Array], Array]


tanh = Activation(f=jnp.tanh, df=lambda h: 1 - h * h)
relu = Activation(f=jax.nn.relu, df=lambda h: (h > 0).astype(h.dtype))
sigmoid = Activation(f=jax.nn.sigmoid, df=lambda h: h * (1 - h))
identity = Activation(f=lambda z: z, df=jnp.ones_like)
