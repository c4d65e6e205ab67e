"""Small networks and data for the tests of the recipes, and plain versions of what they compute."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrnn import Batch, Params
from tests.reference import plain_loss

AGREEMENT = 1e-12


def draw(seed, *shape):
    return 0.5 * np.random.default_rng(seed).standard_normal(shape)


def network(seed, I, H, O=2):
    """Params with biases that are not zero."""
    shapes = Params(W_x=(H, I), W_h=(H, H), W_y=(O, H), b_h=(H,), b_y=(O,))
    return Params(*(jnp.asarray(draw([seed, n], *shape)) for n, shape in enumerate(shapes)))


def labelled_batch(T=6, B=4, I=2, seed=0):
    """Random inputs (T, B, I), each step with one of two labels."""
    return Batch(draw(seed, T, B, I), np.random.default_rng(seed).integers(0, 2, (T, B)))


def numpy_unroll(params, xs, *, drop=1.0):
    """hs and ys of one sequence (T, I) in NumPy; the recurrence reads drop * h."""
    W_x, W_h, W_y, b_h, b_y = (np.asarray(leaf) for leaf in params)
    h, hs = np.zeros(len(W_h)), []
    for x in xs:
        h = np.tanh(W_x @ x + W_h @ (drop * h) + b_h)
        hs.append(h)
    hs = np.array(hs).reshape(len(xs), len(W_h))
    return hs, hs @ W_y.T + b_y


def numpy_cross_entropy(ys, labels):
    """The cross-entropy of each step, (T,)."""
    return np.log(np.exp(ys).sum(axis=-1)) - ys[np.arange(len(ys)), labels]


@partial(jax.jit, static_argnums=0)
def plain_update(optimizer, params, opt_state, batch):
    (value, _), grads = jax.value_and_grad(plain_loss, has_aux=True)(params, batch)
    changes, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, changes), opt_state, value


def plain_training(params, batch, optimizer, updates):
    """params and losses of a Python loop over optax and autodiff of the plain scan."""
    opt_state, values = optimizer.init(params), []
    for _ in range(updates):
        params, opt_state, value = plain_update(optimizer, params, opt_state, batch)
        values.append(value)
    return params, jnp.stack(values)
