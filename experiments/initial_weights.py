"""The initial weights of the networks of long_lag_tasks: functions (key, I, H, O) -> Params."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxrnn
from jaxrnn import Params


def sparse(key, shape, dtype=jnp.float32):
    """W_h of Pascanu et al.: 15 normal weights into each unit, spectral radius 0.95."""
    key_weights, key_which = jax.random.split(key)
    kept = jax.random.uniform(key_which, shape).argsort(axis=1) < 15
    W_h = np.where(kept, jax.random.normal(key_weights, shape), 0)
    return jnp.asarray(0.95 * W_h / np.abs(np.linalg.eigvals(W_h)).max(), dtype)


def init_sparse(key, *sizes) -> Params:
    """A sparse W_h; W_x and W_y have standard deviation 0.01."""
    params = jaxrnn.init(key, *sizes, W_h_init=sparse)
    I, H, _ = sizes
    return params._replace(W_x=0.01 * I**0.5 * params.W_x, W_y=0.01 * H**0.5 * params.W_y)


def init_orthogonal(key, *sizes) -> Params:
    """W_h is orthogonal; W_x has standard deviation 0.1, W_y 0.01."""
    params = jaxrnn.init(key, *sizes, W_h_init=jax.nn.initializers.orthogonal())
    I, H, _ = sizes
    return params._replace(W_x=0.1 * I**0.5 * params.W_x, W_y=0.01 * H**0.5 * params.W_y)


def init_identity(key, *sizes) -> Params:
    """W_h is the identity; W_x has standard deviation 0.1."""
    params = jaxrnn.init(key, *sizes, W_h_init=jaxrnn.scaled_identity())
    return params._replace(W_x=0.1 * sizes[0] ** 0.5 * params.W_x)
