"""Curvature without a backward pass: SOFO (Yu et al. 2024), in random subspaces.

Forward mode along K random directions, the rows of V (K, P), gives the loss in one pass over time,
and the gradient and the Gauss-Newton matrix of the loss along these directions:

    y_dot = J V^T        c = V g = y_dot^T dL/dy        M = V G V^T = y_dot^T H_L y_dot
    d = V^T (M + lambda s I)^-1 c        s = the largest eigenvalue of M

`sofo` returns d in the place of the gradient, so gradient descent on it, theta <- theta - eta d, is
a damped Newton step within the subspace. Nothing of an earlier step of time is read again, so
memory does not grow with T.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

import jaxrnn
from jaxrnn import Activation, Batch, Loss, Params
from jaxrnn.batches import divide_by_count, ones_per_step, step_weights
from jaxrnn.blocks import near_divisor, own_steps, scan_blocks
from jaxrnn.recurrence import initial_state

LEARNING_RATE = 0.3
"""eta, in hessian_free: a whole step follows the noise of its batch."""

BATCH_SIZE = 256
"""Sequences per update, B, in hessian_free."""

BLOCK = 8
"""About the steps whose tangents are in memory at once."""


class Projected(NamedTuple):
    """The loss, and its gradient c (K,) and Gauss-Newton matrix M (K, K) along K directions."""

    loss: Array
    c: Array
    M: Array


def project(
    params: Params,
    V: Params,
    batch: Batch,
    h_0: Array,
    *,
    activation: Activation = jaxrnn.tanh,
    loss: Loss = jaxrnn.cross_entropy,
) -> tuple[Projected, Array]:
    """The loss along directions of the parameters, by one pass over time.

    Args:
      params: Params.
      V: the directions, Params with a leading axis K.
      batch: Batch with a batch axis.
      h_0: (B, H).
      activation: f.
      loss: g and its loss, the mean over the steps that count.

    Returns:
      Projected, and h_T.

    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> batch = Batch(xs=jnp.ones((7, 4, 3)), targets=jnp.zeros((7, 4), int))
    >>> (value, _), grads = jaxrnn.bptt(params, batch)
    >>> along = jax.tree.map(lambda leaf: leaf[None], grads)
    >>> projected, _ = project(params, along, batch, jnp.zeros((4, 5)))
    >>> g = ravel_pytree(grads)[0]
    >>> bool(jnp.allclose(projected.c, g @ g)), bool(jnp.allclose(projected.loss, value))
    (True, True)
    """

    def advance(carry, block, last, _):
        h, h_dots, sums = carry
        mask = block.mask
        if last is not None:
            mask = own_steps(ones_per_step(block.xs, bool) if mask is None else mask, last)

        def along(v, h_dot):
            def run(params, h):
                return jaxrnn.unroll(
                    params, block.xs, h, activation=activation, mask=mask, reset=block.reset
                )

            return jax.jvp(run, (params, h), (v, h_dot))

        (h, ys), (h_dots, ys_dot) = jax.vmap(along, out_axes=(None, 0))(V, h_dots)
        weights = step_weights(block, ys.dtype)
        dys, curvature = jax.linearize(lambda ys: loss.error(ys, block.targets), ys)
        weighted = weights[..., None] * ys_dot
        terms = Projected(
            loss=(weights * loss.value(ys, block.targets)).sum(),
            c=jnp.einsum("ktbo,tbo->k", weighted, dys),
            M=jnp.einsum("ktbo,ltbo->kl", weighted, jax.vmap(curvature)(ys_dot)),
        )
        return (h, h_dots, jax.tree.map(jnp.add, sums, terms)), None

    K, dtype = len(V.b_h), h_0.dtype
    zeros = Projected(*(jnp.zeros(shape, dtype) for shape in ((), (K,), (K, K))))
    start = h_0, jnp.zeros((K, *h_0.shape), dtype), zeros
    steps = near_divisor(batch.xs.shape[0], BLOCK)
    (h_T, _, sums), _ = scan_blocks(advance, start, batch, steps)
    return divide_by_count(sums, step_weights(batch, dtype).sum()), h_T


def solve(M: Array, c: Array, damping: float) -> Array:
    """(M + lambda s I)^-1 c, where s is the largest eigenvalue of M; zeros if M = 0.

    >>> solve(jnp.diag(jnp.array([4.0, 2.0])), jnp.array([4.4, 1.2]), 0.1).tolist()
    [1.0, 0.5]
    """
    eigenvalues, U = jnp.linalg.eigh(M)
    shifted = eigenvalues.clip(0) + damping * eigenvalues[-1]
    return U @ jnp.where(shifted > 0, (U.T @ c) / jnp.where(shifted > 0, shifted, 1), 0)


def sofo(
    params: Params,
    batch: Batch,
    h_0: Array | None = None,
    *,
    key: Array | None = None,
    directions: int = 32,
    damping: float = 1e-2,
    activation: Activation = jaxrnn.tanh,
    loss: Loss = jaxrnn.cross_entropy,
) -> tuple[tuple[Array, Array], Params]:
    """(L, h_T), d: a gradient function, with d in the place of the gradient.

    Args:
      params: Params.
      batch: Batch with a batch axis.
      h_0: (B, H); zeros if None.
      key: a key for the directions, another for each update. If None, the gradient by `bptt`.
      directions: K.
      damping: lambda, relative to the largest curvature in the subspace.
      activation: f.
      loss: g and its loss.

    >>> xs = jax.random.normal(jax.random.key(0), (7, 8, 3))
    >>> batch = Batch(xs, targets=xs[..., :2].sum(axis=0, keepdims=True).repeat(7, axis=0))
    >>> params = jaxrnn.init(jax.random.key(1), input_size=3, hidden_size=5, output_size=2)
    >>> (before, _), d = sofo(params, batch, key=jax.random.key(2), loss=jaxrnn.squared_error)
    >>> new = jaxrnn.sgd(params, d, 0.3)
    >>> bool(jaxrnn.sequence_loss(new, batch, loss=jaxrnn.squared_error)[0] < before)
    True
    """
    if key is None:
        return jaxrnn.bptt(params, batch, h_0, activation=activation, loss=loss)
    theta, unravel = ravel_pytree(params)
    h_0 = initial_state(params, batch.xs, h_0, batch)
    V = jax.random.normal(key, (directions, theta.size), theta.dtype) / math.sqrt(theta.size)
    projected, h_T = project(
        params, jax.vmap(unravel)(V), batch, h_0, activation=activation, loss=loss
    )
    d = solve(projected.M, projected.c, damping) @ V
    return (projected.loss, h_T), unravel(d)
