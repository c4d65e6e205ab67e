"""3. The backward pass: backpropagation through time, by hand (Werbos 1990).

    dy_t = y_hat_t - target_t
    dh_t = W_y^T dy_t + W_h^T dz_{t+1}        dz_t = f'(z_t) * dh_t        dz_{T+1} = 0
    dW_y = sum dy_t h_t^T        dW_x = sum dz_t x_t^T        dW_h = sum dz_t h_{t-1}^T
    db_y = sum dy_t              db_h = sum dz_t

Two halves: a reverse scan for dz, then one contraction per weight. Both go block by block of time,
so that nothing but the hidden states is ever T steps long, and these can be recomputed.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn import checks
from jaxrnn.activations import Activation, tanh
from jaxrnn.forward import (
    hold,
    initial_state,
    input_product,
    loop,
    previous,
    readout,
    recur,
    step_weights,
    sum_dtype,
    unless_reset,
    vary_as,
    where_exists,
)
from jaxrnn.losses import Loss, cross_entropy
from jaxrnn.params import Params
from jaxrnn.sequences import Batch


def outer_sum(d: Array, x: Array, dtype) -> Array:
    """sum_t d_t x_t^T over all steps and batch axes: (..., J), (..., I) -> (J, I)."""
    steps = tuple(range(d.ndim - 1))
    return lax.dot_general(d, x, ((steps, steps), ((), ())), preferred_element_type=dtype)


def input_outer_sum(d: Array, xs: Array, input_size: int, dtype) -> Array:
    """sum_t d_t x_t^T; where x is a token, d_t is added to that token's column."""
    if checks.is_integer(xs):
        return jnp.zeros((input_size, d.shape[-1]), dtype).at[xs].add(d.astype(dtype)).T
    return outer_sum(d, xs.astype(d.dtype), dtype)


def bias_sum(d: Array, dtype) -> Array:
    """sum_t d_t over all steps and batch axes."""
    return d.sum(axis=tuple(range(d.ndim - 1)), dtype=dtype)


def reverse_scan(W_h, dh, dhs, f_primes, mask, reset) -> tuple[Array, Array]:
    """dz_t = f'(z_t) * (dh_t + W_h^T dz_{t+1}), from the last step to the first.

    Args:
      W_h: (H, H).
      dh: W_h^T dz_{T+1}, (*batch, H): what flows in from the steps after.
      dhs: W_y^T dy_t, (T, *batch, H): what flows in from the outputs.
      f_primes: f'(z_t), (T, *batch, H).
      mask: (T, *batch) bool or None; what flows in passes by a step that does not exist.
      reset: (T, *batch) bool or None; nothing flows through a reset.

    Returns:
      W_h^T dz_1 (*batch, H), and dzs (T, *batch, H).
    """

    def body(dh, now):
        dh_y, f_prime, exists, cut = now
        dz = where_exists(exists, f_prime * (dh_y + dh))
        return hold(exists, unless_reset(cut, dz @ W_h), dh), dz

    return lax.scan(body, dh, (dhs, f_primes, mask, reset), reverse=True, unroll=loop().unroll)


def block_states(params: Params, block: Batch, h: Array, activation: Activation) -> Array:
    """The forward pass over a block that starts in state h: the state after each step."""
    zs = input_product(params, where_exists(block.mask, block.xs))
    return recur(activation, params.W_h, zs, h, block.mask, block.reset)


def block_gradient(params, block, h, hs, dh, activation, loss) -> tuple[Array, tuple]:
    """The backward pass over a block: the algorithm, but for the division by the steps counted.

    Args:
      params: Params.
      block: Batch, the block's steps.
      h: the state before the block, (*batch, H).
      hs: the state after each of its steps, (K, *batch, H).
      dh: W_h^T dz of the step after the block, (*batch, H).
      activation: f.
      loss: g and its loss.

    Returns:
      W_h^T dz of the block's first step, and the sums over the block of the weighted loss and of
      the gradient's terms.
    """
    dtype = sum_dtype(params)
    xs, targets = (where_exists(block.mask, leaf) for leaf in (block.xs, block.targets))
    weights = step_weights(block, dtype)
    ys = readout(params, hs).astype(dtype)
    value = (weights * loss.value(ys, targets)).sum()
    dys = (weights[..., None] * loss.error(ys, targets)).astype(hs.dtype)

    dhs, f_primes = dys @ params.W_y, activation.df(hs)
    dh, dzs = reverse_scan(params.W_h, dh, dhs, f_primes, block.mask, block.reset)

    grads = Params(
        W_x=input_outer_sum(dzs, xs, params.W_x.shape[1], dtype),
        W_h=outer_sum(dzs, previous(hs, h, block.reset), dtype),
        W_y=outer_sum(dys, hs, dtype),
        b_h=bias_sum(dzs, dtype),
        b_y=bias_sum(dys, dtype),
    )
    return dh, (value, grads)


def bptt(
    params: Params,
    batch: Batch,
    h_0: Array | None = None,
    *,
    activation: Activation = tanh,
    loss: Loss = cross_entropy,
    checkpoint_every: int | None = None,
) -> tuple[tuple[Array, Array], Params]:
    """Loss, last state and the gradient of the loss by the parameters.

    Takes and returns what `jax.value_and_grad(sequence_loss, has_aux=True)` does, to rounding.

    Args:
      params: Params.
      batch: Batch.
      h_0: (*batch, H); zeros if None. No gradient flows into it (take `sequence_loss` for that).
      activation: f.
      loss: g and its loss.
      checkpoint_every: K keeps the state of every K-th step alone and recomputes those between:
        one more pass over the recurrence, and memory like T/K + K instead of T. None keeps all.

    Returns:
      (L, h_T), grads: a scalar in float32 at least, (*batch, H), and Params in the parameters'
      dtype, summed over time in float32 at least.

    Raises:
      TypeError, ValueError: a dtype or shape that does not fit; the message names it.

    >>> import jax, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> batch = Batch(xs=jnp.ones((7, 4, 3)), targets=jnp.zeros((7, 4), int))
    >>> (value, h_T), grads = bptt(params, batch)
    >>> auto = jax.grad(jaxrnn.sequence_loss, has_aux=True)(params, batch)[0]
    >>> bool(jnp.allclose(grads.W_h, auto.W_h, atol=1e-6))
    True
    """
    checks.check_batch(params, batch, h_0, activation, loss)
    checks.check_checkpoint_every(checkpoint_every)
    h_0 = initial_state(params, batch.xs, h_0)
    dtype = sum_dtype(params)
    T = batch.xs.shape[0]
    if T == 0:
        return (jnp.zeros((), dtype), h_0), jax.tree.map(jnp.zeros_like, params)
    K = min(checkpoint_every or loop().block, T)

    def steps(k):
        return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, k * K, K), batch)

    def forward(h, block):
        hs = block_states(params, block, h, activation)
        return hs[-1], (h, hs if checkpoint_every is None else None)

    def backward(carry, block, kept):
        dh, sums = carry
        h, hs = kept
        hs = block_states(params, block, h, activation) if hs is None else hs
        dh, block_sums = block_gradient(params, block, h, hs, dh, activation, loss)
        return dh, jax.tree.map(jnp.add, sums, block_sums)

    nothing = jnp.zeros((), dtype), jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), params)
    carry = vary_as((jnp.zeros_like(h_0), nothing), h_0)
    blocks, rest = jnp.arange(T // K), jax.tree.map(lambda leaf: leaf[T // K * K :], batch)

    h_T, kept = lax.scan(lambda h, k: forward(h, steps(k)), h_0, blocks)
    if T % K:
        h_T, kept_rest = forward(h_T, rest)
        carry = backward(carry, rest, kept_rest)
    (_, sums), _ = lax.scan(
        lambda carry, now: (backward(carry, steps(now[0]), now[1]), None),
        carry,
        (blocks, kept),
        reverse=True,
    )
    total = step_weights(batch, dtype).sum()
    value, grads = jax.tree.map(lambda sum: sum / jnp.where(total == 0, 1, total), sums)
    return (value, h_T), jax.tree.map(lambda d, leaf: d.astype(leaf.dtype), grads, params)
