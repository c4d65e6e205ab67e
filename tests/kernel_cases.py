"""What the tests of the kernels run: a gradient with a given loop, and a small batch for it."""

from functools import partial

import jax
import jax.numpy as jnp

import jaxrnn
from jaxrnn import Batch


def gradient(loop, **keywords):
    return partial(jaxrnn.bptt, loss=jaxrnn.squared_error, loop=loop, **keywords)


def small_case(T=20):
    """Params, and a batch of 4 sequences with a mask and resets."""
    keys = jax.random.split(jax.random.key(0), 4)
    xs = jax.random.normal(keys[0], (T, 4, 3))
    mask, reset = (jax.random.bernoulli(key, 0.8, (T, 4)) for key in keys[1:3])
    batch = Batch(xs, jnp.sin(xs[..., :2]), mask, ~reset)
    return jaxrnn.init(keys[3], 3, 5, 2), batch
