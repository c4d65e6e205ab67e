"""Dropout between layers and on the recurrence, with new masks at each update.

A gradient function that takes `key=` may be random. `fit(gradient_key=...)` calls it with another
key at each update, and without a key to evaluate, so evaluation has no dropout. The key of update n
follows from n, so a resumed run draws the masks of an uninterrupted one.

A mask drawn for each step is (T, *batch, I); a mask shared by all steps (Gal and Ghahramani 2016)
is (*batch, I). On the recurrence it is shared: independent masks erase the state in a few steps.
Run: python -m experiments.recipes.dropout
"""

import jax
import jax.numpy as jnp
import optax
from jax import lax

import jaxrnn
from experiments.recipes.stack import init_stack
from jaxrnn import Batch


def draw(key, rate, shape, dtype=jnp.float32):
    """1 / (1 - rate) with probability 1 - rate, else 0, so that the mean is 1."""
    keep = jax.random.bernoulli(key, 1 - rate, shape)
    return keep.astype(dtype) / (1 - rate)


def unroll_with_dropout(layers, xs, drops, *, mask=None, reset=None):
    """drops: a factor for the inputs of each layer, (T, *batch, I) or (*batch, I)."""
    for layer, drop in zip(layers[:-1], drops[:-1], strict=True):
        _, xs = jaxrnn.hidden_states(layer, xs * drop, mask=mask, reset=reset)
    return jaxrnn.unroll(layers[-1], xs * drops[-1], mask=mask, reset=reset)


def unroll_with_recurrent_dropout(params, xs, h_0, drop):
    """h_t = f(W_x x_t + W_h (drop * h_{t-1}) + b_h), drop (*batch, H)."""
    return lax.scan(lambda h, x: jaxrnn.step(params, drop * h, x), h_0, xs)


def loss(layers, batch, h=None, *, key=None, rate=0.2):
    """(mean loss, None): random with a key, deterministic without. It does not read `drive`."""
    drops = [1.0] * len(layers)
    if key is not None:
        keys = jax.random.split(key, len(layers))
        axes, sizes = batch.xs.shape[1:-1], [layer.W_x.shape[1] for layer in layers]
        drops = [draw(k, rate, (*axes, I)) for k, I in zip(keys, sizes, strict=True)]
    _, ys = unroll_with_dropout(layers, batch.xs, drops, mask=batch.mask, reset=batch.reset)
    return jaxrnn.mean_loss(ys, batch), None


gradient_fn = jax.value_and_grad(loss, has_aux=True)


def main() -> None:
    # Is the sum of all inputs so far positive?
    key_init, key_data, key_fit, key_dropout = jax.random.split(jax.random.key(0), 4)
    xs = jax.random.normal(key_data, (20, 512, 10))
    data = Batch(xs, (xs.sum(axis=-1).cumsum(axis=0) > 0).astype(int))
    train, valid = (jax.tree.map(lambda x, n=n: x[:, n::2], data) for n in (0, 1))
    result = jaxrnn.fit(
        key_fit, init_stack(key_init, 10, [32, 32], 2), train, valid,
        optimizer=optax.adam(1e-2), gradient_fn=gradient_fn, gradient_key=key_dropout,
        batch_size=16, max_epochs=8,
    )  # fmt: skip
    print("held-out loss:", [round(epoch.valid_loss, 3) for epoch in result.history])


if __name__ == "__main__":
    main()
