"""Dropout: between layers, fixed over time, and on the recurrence.

A mask that is drawn anew at each step is (T, *batch, H); one that is fixed over time (Gal and
Ghahramani 2016) is (*batch, H) and broadcasts over T. On the recurrence it must be fixed, or the
state would be gone after a few steps; there it goes between the steps, so the loop is a scan.
Run: python -m experiments.recipes.dropout
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

import jaxrnn


def draw(key, rate, shape, dtype=jnp.float32):
    """1/(1 - rate) with probability 1 - rate, else 0: the mean of what it multiplies stays."""
    keep = jax.random.bernoulli(key, 1 - rate, shape)
    return jnp.where(keep, 1 / (1 - rate), 0).astype(dtype)


def unroll_with_dropout(layers, xs, drops, *, mask=None):
    """drops: one for what goes into each layer, (T, *batch, I) or (*batch, I)."""
    for layer, drop in zip(layers[:-1], drops[:-1], strict=True):
        _, xs = jaxrnn.hidden_states(layer, xs * drop, mask=mask)
    return jaxrnn.unroll(layers[-1], xs * drops[-1], mask=mask)


def unroll_with_recurrent_dropout(params, xs, h_0, drop):
    """h_t = f(W_x x_t + W_h (drop * h_{t-1}) + b_h), drop (*batch, H)."""
    return lax.scan(lambda h, x: jaxrnn.step(params, drop * h, x), h_0, xs)


def main() -> None:
    T, B, I, H = 10, 4, 3, 8
    key_1, key_2, key_each, key_fixed = jax.random.split(jax.random.key(0), 4)
    layers = [jaxrnn.init(key_1, I, H, 1), jaxrnn.init(key_2, H, H, 2)]
    drop = partial(draw, rate=0.2)
    drops = [drop(key_fixed, shape=(B, I)), drop(key_each, shape=(T, B, H))]
    _, ys = jax.jit(unroll_with_dropout)(layers, jnp.ones((T, B, I)), drops)
    print("each step apart:", ys.std(axis=0).mean())


if __name__ == "__main__":
    main()
