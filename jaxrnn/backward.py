"""3. The backward pass: backpropagation through time, by hand (Werbos 1990).

    dy_t = (y_hat_t - target_t) / n
    dh_t = W_y^T dy_t + W_h^T dz_{t+1}        dz_t = f'(z_t) * dh_t        dz_{T+1} = 0
    dW_y = sum dy_t h_t^T        dW_x = sum dz_t x_t^T        dW_h = sum dz_t h_{t-1}^T
    db_y = sum dy_t              db_h = sum dz_t

The loss is the mean over n steps, those that count; the sums of each block are divided by n.
A leak alpha gives dz_t = alpha f'(z_t) * dh_t, and adds (1 - alpha) dh_{t+1} to dh_t.

A reverse scan gives dh and dz, then one contraction gives each weight's gradient. Both work on one
block of time after another, so that dh and dz are one block long. h_t, and f(z_t) with a leak, are
stored for all steps, unless `checkpoint_every` recomputes them.
"""

from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxrnn import checks
from jaxrnn.activations import Activation, tanh
from jaxrnn.batches import Batch, divide_by_count, scaled_weights, step_weights, where_exists
from jaxrnn.blocks import (
    at_step,
    block_steps,
    enter_at_last,
    forward_steps,
    join_blocks,
    near_divisor,
    scan_blocks,
)
from jaxrnn.losses import Loss, check_loss_arguments, cross_entropy, reads_traced_values
from jaxrnn.params import AnyArray, Params, as_leak, at_least_float32
from jaxrnn.products import input_zs, readout
from jaxrnn.recurrence import (
    Loop,
    derivatives,
    initial_state,
    previous,
    recur,
    reverse_scan,
    scan,
)
from jaxrnn.sharding import (
    explicit_sharding,
    full_as,
    match_varying_axes,
    replicated,
    scalar_as,
)

Output: TypeAlias = tuple[Array, Array, tuple[Array, Array]]
"""The weighted loss of a block, W_y^T dy_t of each step, and (dW_y, db_y)."""


def outer_sum(d: Array, x: Array, dtype: DTypeLike) -> Array:
    """sum_t d_t x_t^T over all steps and batch axes: (..., J), (..., I) -> (J, I)."""
    steps = tuple(range(d.ndim - 1))
    return lax.dot_general(
        d, x, ((steps, steps), ((), ())), preferred_element_type=dtype, out_sharding=replicated(d)
    )


def input_outer_sum(d: Array, xs: Array, input_size: int, dtype: DTypeLike) -> Array:
    """sum_t d_t x_t^T. For a token x, d_t is added to the column of that token."""
    if checks.is_integer(xs):
        columns = jnp.zeros((input_size, d.shape[-1]), dtype).at[xs.astype(jnp.int32)]
        return columns.add(d.astype(dtype), out_sharding=replicated(d)).T
    return outer_sum(d, xs.astype(d.dtype), dtype)


def bias_sum(d: Array, dtype: DTypeLike) -> Array:
    """sum_t d_t over all steps and batch axes."""
    return d.sum(axis=tuple(range(d.ndim - 1)), dtype=dtype)


def block_states(
    params: Params,
    block: Batch,
    h_0: Array,
    activation: Activation,
    leak: Array | None,
    loop: Loop = scan,
) -> tuple[Array, Array | None]:
    """The forward pass over a block from the state h_0 before it: h_t and f(z_t), as `recur`."""
    zs_x = input_zs(params, block.xs, block.drive, block.mask, bias=False)
    return recur(activation, params.W_h, zs_x, h_0, leak, block.mask, block.reset, loop, params.b_h)


def block_zs(params: Params, block: Batch, h_0: Array, hs: Array) -> Array:
    """z_t of each step of a block, from its states: one product instead of a loop."""
    zs_x = input_zs(params, block.xs, block.drive, block.mask)
    return zs_x + previous(hs, h_0, block.mask, block.reset) @ params.W_h.T


def block_output(params: Params, block: Batch, hs: Array, loss: Loss) -> Output:
    """The output layer over a block."""
    dtype = at_least_float32(params.W_h.dtype)
    hs_y, targets = (where_exists(block.mask, leaf) for leaf in (hs, block.targets))
    weights = step_weights(block, dtype)
    ys = readout(params, hs_y).astype(dtype)
    values = weights * loss.value(ys, targets).astype(dtype)
    dys = (weights[..., None] * loss.error(ys, targets)).astype(hs.dtype)
    # Where no step exists, a loss may be infinite: 0 times it is NaN.
    values, dys = (where_exists(block.mask, leaf) for leaf in (values, dys))
    return values.sum(), dys @ params.W_y, output_sums(block, hs, dys, dtype)


def block_output_if_any(params: Params, block: Batch, hs: Array, loss: Loss) -> Output:
    """`block_output`, or zeros if no step of the block counts, as with targets at the end alone.

    Its derivatives are those of `block_output`: that by the weights is not 0 where these are.
    """

    def nothing(hs: Array) -> Output:
        dtype = at_least_float32(params.W_h.dtype)
        sums = jnp.zeros(params.W_y.shape, dtype), jnp.zeros(params.b_y.shape, dtype)
        return match_varying_axes((jnp.zeros((), dtype), full_as(hs, 0), sums), hs)

    function = partial(block_output, loss=loss)

    @jax.custom_jvp
    def if_any(params: Params, block: Batch, hs: Array) -> Output:
        counts = (step_weights(block) != 0).any()
        return lax.cond(counts, partial(function, params, block), nothing, hs)

    if_any.defjvp(partial(jax.jvp, function))
    return if_any(params, block, hs)


def block_flow(
    params: Params,
    block: Batch,
    h_0: Array,
    states: tuple[Array, Array | None],
    dhs_y: Array,
    dh_next: Array,
    activation: Activation,
    leak: Array | None,
    loop: Loop = scan,
    last: Array | None = None,
) -> tuple[Array, Array, Array]:
    """The reverse loop over a block: dh_t and dz_t.

    Args:
      params: Params.
      block: Batch, the steps of the block.
      h_0: the state before the block, (*batch, H).
      states: what `block_states` returned for the block, (K, *batch, H) each.
      dhs_y: W_y^T dy_t of each step, (K, *batch, H).
      dh_next: the part of dh that comes from after the block, (*batch, H).
      activation: f.
      leak: alpha, or None.
      loop: what runs the steps.
      last: the last step of the block that is its own, as `scan_blocks` gives it.

    Returns:
      dh_next for the block before; dhs and dzs (K, *batch, H).
    """
    hs, fs = states
    f_primes = derivatives(activation, leak, hs, fs, partial(block_zs, params, block, h_0, hs))
    dhs_y, dh_next = enter_at_last(dhs_y, dh_next, last)
    dh_next, (dhs, dzs) = reverse_scan(
        params.W_h, dh_next, dhs_y, f_primes, leak, block.mask, block.reset, loop
    )
    return dh_next, dhs, dzs


def output_sums(block: Batch, hs: Array, dys: Array, dtype: DTypeLike) -> tuple[Array, Array]:
    """dW_y = sum dy_t h_t^T and db_y = sum dy_t over a block, not divided by the count."""
    return outer_sum(dys, where_exists(block.mask, hs), dtype), bias_sum(dys, dtype)


def hidden_sums(
    params: Params, block: Batch, h_0: Array, hs: Array, dzs: Array
) -> tuple[Array, Array, Array]:
    """dW_x = sum dz_t x_t^T, dW_h = sum dz_t h_{t-1}^T and db_h = sum dz_t over a block."""
    dtype = at_least_float32(params.W_h.dtype)
    xs = where_exists(block.mask, block.xs)
    hs_before = previous(hs, h_0, block.mask, block.reset)
    return (
        input_outer_sum(dzs, xs, params.W_x.shape[1], dtype),
        outer_sum(dzs, hs_before, dtype),
        bias_sum(dzs, dtype),
    )


def bptt(
    params: Params,
    batch: Batch,
    h_0: AnyArray | None = None,
    *,
    activation: Activation = tanh,
    leak: float | AnyArray | None = None,
    loss: Loss = cross_entropy,
    checkpoint_every: int | None = None,
    loop: Loop = scan,
) -> tuple[tuple[Array, Array], Params]:
    """The loss, the last state, and the gradient of the loss with respect to the parameters.

    A drop-in for `jax.value_and_grad(sequence_loss, has_aux=True)`: the same arguments, the same
    results, to rounding. Inside `jax.shard_map`, the gradient is that of the device's own share,
    where JAX sums the gradient of replicated parameters over the devices; see `data_parallel`.

    Args:
      params: Params.
      batch: Batch.
      h_0: (*batch, H); zeros if None. It is not in `grads`; `jax.grad(sequence_loss)` gives its
        gradient.
      activation: f.
      leak: alpha in (0, 1], a scalar or (H,); None is 1. Like h_0, it is not in `grads`.
      loss: g and the loss l of a step.
      checkpoint_every: K stores only about every K-th state and recomputes the others: one more
        forward pass, and memory proportional to T/K + K instead of T. The spacing is the divisor of
        T nearest to K by ratio, between K/2 and 2 K; if there is none, a number near K. It is also
        the length of a block, and each block makes a gradient of every weight: with few steps or
        large weights, K takes more memory than None. None, or a symbolic T of
        `jax.export`, stores all states.
      loop: what runs the steps, such as `kernels.loop`.

    Returns:
      (L, h_T), grads: a scalar in float32 at least, (*batch, H), and Params in the parameters'
      dtype, summed over time in float32 at least.

    Raises:
      TypeError, ValueError: a dtype, shape or setting does not fit; the message names the argument.

    >>> import jax, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> batch = Batch(xs=jnp.ones((7, 4, 3)), targets=jnp.zeros((7, 4), int))
    >>> (value, h_T), grads = bptt(params, batch)
    >>> auto = jax.grad(jaxrnn.sequence_loss, has_aux=True)(params, batch)[0]
    >>> bool(jnp.allclose(grads.W_h, auto.W_h, atol=1e-6))
    True
    """
    check_loss_arguments(params, batch, h_0, activation, leak, loss)
    checks.check_function("loop", loop)
    if checkpoint_every is not None:
        checks.check_size("checkpoint_every", checkpoint_every)
    h_0 = initial_state(params, batch.xs, h_0, (batch, leak))
    leak = as_leak(params, leak)
    dtype = at_least_float32(params.W_h.dtype)
    T = batch.xs.shape[0]
    if T == 0:
        return (jnp.zeros((), dtype), h_0), jax.tree.map(jnp.zeros_like, params)
    if checkpoint_every is not None:
        K = K_forward = near_divisor(T, checkpoint_every)
    else:
        K = block_steps(params, batch, loop is not scan)
        K_forward = forward_steps(T, K, h_0)
    batch, _ = scaled_weights(batch, dtype)
    count = step_weights(batch, dtype).sum()

    # On a GPU, a condition waits for the device. A condition over a mesh fails under vmap.
    can_skip = batch.weights is not None and K < T and jax.default_backend() == "cpu"
    can_skip = can_skip and explicit_sharding(h_0) is None
    can_skip = can_skip and not reads_traced_values(loss, params, batch)
    output = block_output_if_any if can_skip else block_output

    def forward(h: Array, block: Batch, last: Array | None, _: None) -> tuple[Array, Any]:
        states = block_states(params, block, h, activation, leak, loop)
        return at_step(last, states[0]), (states if checkpoint_every is None else (h, None))

    def backward(carry: Any, block: Batch, last: Array | None, saved: Any) -> tuple[Any, None]:
        dh_next, means = carry
        h, states = saved
        if states is None:
            states = block_states(params, block, h, activation, leak, loop)
        value, dhs_y, (dW_y, db_y) = output(params, block, states[0], loss)
        dh_next, _, dzs = block_flow(
            params, block, h, states, dhs_y, dh_next, activation, leak, loop, last
        )
        dW_x, dW_h, db_h = hidden_sums(params, block, h, states[0], dzs)
        sums = value, Params(dW_x, dW_h, dW_y, db_h, db_y)
        # Divided here, not after the last block: XLA makes one kernel of division and addition.
        return (dh_next, jax.tree.map(jnp.add, means, divide_by_count(sums, count))), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), params)
    zeros = scalar_as(h_0, jnp.zeros((), dtype)), zeros
    carry = match_varying_axes((full_as(h_0, 0), zeros), h_0)  # dz_{T+1} = 0
    h_T, saved = scan_blocks(forward, h_0, batch, K_forward)
    states = None
    if checkpoint_every is None:
        states, saved = (h_0, saved if K_forward == T else join_blocks(saved)), None
    (_, (value, grads)), _ = scan_blocks(backward, carry, batch, K, saved, states, reverse=True)
    return (value, h_T), jax.tree.map(lambda d, leaf: d.astype(leaf.dtype), grads, params)
