"""Blocks of time, whose products `bptt` takes together, one block after another."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxrnn import checks
from jaxrnn.batches import Batch, ones_per_step, per_step, steps_shape
from jaxrnn.params import AnyArray, Params
from jaxrnn.sharding import Tree, full_as, match_varying_axes


def block_steps(params: Params, batch: Batch, one_kernel: bool = False) -> int:
    """K, the steps of a block, whose products `bptt` takes together.

    Its products have K B rows, and its widest array K B max(I, H, O) numbers. Except on a GPU:

    - K B is about 1.25 (I + H + O), so that adding its gradient to the sums costs little.
    - It is more while the block has at most 512 steps and its widest array 16,384 numbers, so that
      launches cost little.
    - The block has at most about T / 4 steps, or 2,048 numbers if these are more steps.
    - If its widest array has more than 16,384 numbers, K I is at most about T H / 2, and K O about
      T H: its inputs take half the memory of all states, its outputs as much as these.

    There is one block if T is at most 512 and the widest array of all steps has at most 32,768
    numbers: that takes less time, also to compile. There is one, too, if the inputs of a block,
    which are copied, would be at least four times as large as all states, or W_x, whose gradient
    each block copies, at least twice. Tokens count as I = 0.

    On a GPU a block has about 128 steps, and there is one block if each loop is `one_kernel`.
    """
    T, *batch_axes = steps_shape(batch.xs)
    if not all(isinstance(size, int) for size in (T, *batch_axes)):
        return T  # a symbol of jax.export
    if jax.default_backend() == "gpu":
        return T if one_kernel else near_divisor(T, 128)
    O, H = params.W_y.shape
    I = 0 if checks.is_integer(batch.xs) else batch.xs.shape[-1]
    B = max(1, math.prod(batch_axes))
    widest = max(I, H, O)
    small = min(2**14 // (B * widest), 512)
    K = max(-(-5 * (I + H + O) // (4 * B)), small)
    few = T <= 512 and T * B * widest <= 2**15
    if few or 4 * T * H <= K * I or params.W_x.shape[1] >= 2 * T * B:
        return T
    largest = max(T // 4, 2**11 // (B * widest))
    return near_divisor(T, max(1, min(K, largest, max(small, T * H // max(2 * I, O)))))


def forward_steps(T: int, K: int, h_0: Array) -> int:
    """The steps of a block of the forward pass: all, if the states fit the cache, else K."""
    return T if K == T or T * h_0.size <= 2**21 else K


def near_divisor(T: int, K: int) -> int:
    """The divisor of T nearest to min(K, T) by ratio, within a factor of two.

    If there is none, a number near K whose blocks share few steps.

    >>> near_divisor(1000, 32), near_divisor(61, 15), near_divisor(5, 10**12)
    (40, 16, 5)
    """
    if not isinstance(T, int) or T == 0:
        return T  # a symbol of jax.export, or no step
    K = min(K, T)

    def cost(k: int) -> tuple[bool, float]:
        shared = -T % k
        return shared > 0, shared / T + abs(math.log2(k / K)) / 10

    return min(range(-(-K // 2), min(2 * K, T) + 1), key=cost)


def scan_blocks(
    body: Callable[[Any, Batch, Array | None, Any], tuple[Any, Any]],
    carry: Any,
    batch: Batch,
    K: int,
    saved: Any = None,
    states: tuple[Array, Any] | None = None,
    *,
    reverse: bool = False,
) -> tuple[Any, Any]:
    """A scan over blocks of time: `carry, out = body(carry, block, last, saved)` for each.

    If K does not divide T, the first block shares steps with the second. Its own steps end with
    `last`, and the weights of the others are 0. `last` is None if K divides T.

    Args:
      body: applied to one block after the other.
      carry: what passes from block to block.
      batch: Batch of T steps.
      K: the steps of a block.
      saved: the outputs of an earlier call over the same blocks.
      states: h_0 and arrays of T steps or of all blocks (`join_blocks`), h_t first. The body gets
        the state before the block and the arrays of its steps as `saved`.
      reverse: from the last block to the first.

    Returns:
      The last carry, and the outputs of all blocks.
    """
    T = batch.xs.shape[0]
    if K == T:
        return body(carry, batch, None, states or saved)
    n = -(-T // K)

    def scan_body(carry: Any, inputs: Any) -> tuple[Any, Any]:
        k, saved = inputs
        start = jnp.maximum(T - (n - k) * K, 0)
        block = steps_from(start, batch, K)
        if states:
            h_0, arrays = states
            own, shared = T % K, len(arrays[0]) - T
            before = jnp.maximum(stored_at(start - 1, own, shared), 0)
            h = jnp.where(k == 0, h_0, at_step(before, arrays[0]))
            saved = h, steps_from(stored_at(start, own, shared), arrays, K)
        if T % K == 0:
            return body(carry, block, None, saved)
        last = jnp.where(k == 0, T % K, K) - 1
        weights = block.weights
        weights = ones_per_step(block.xs, jnp.float32) if weights is None else weights
        return body(carry, block._replace(weights=own_steps(weights, last)), last, saved)

    return lax.scan(scan_body, carry, (np.arange(n), saved), reverse=reverse)


def own_steps(xs: AnyArray, last: Array | None) -> Array:
    """x_t up to step `last`, then 0; all x_t if it is None."""
    xs = jnp.asarray(xs)
    if last is None:
        return xs
    own = jnp.arange(len(xs)) <= last
    return jnp.where(per_step(own, xs), xs, jnp.zeros((), xs.dtype))


def steps_from(start: Array, steps: Tree, K: int) -> Tree:
    """K steps of each array, from step `start`."""
    return jax.tree.map(lambda xs: lax.dynamic_slice_in_dim(xs, start, K), steps)


def at_step(t: Array | None, xs: Array) -> Array:
    """x_t, or that of the last step if t is None."""
    return xs[-1] if t is None else lax.dynamic_index_in_dim(xs, t, keepdims=False)


def stored_at(t: Array, own: int, shared: int) -> Array:
    """Where step t lies among joined blocks.

    The first block has `own` steps, then `shared` ones, which the second block has too.
    """
    return jnp.where(t < own, t, t + shared)


def join_blocks(blocks: Tree) -> Tree:
    """The steps of all blocks from the outputs of `scan_blocks`: (n, K, ...) -> (n K, ...).

    If K does not divide T, the steps that two blocks share are there twice.
    """
    return jax.tree.map(lambda xs: lax.collapse(xs, 0, 2), blocks)


def enter_at_last(dhs: Array, dh_next: Array, last: Array | None) -> tuple[Array, Array]:
    """dh_t of each step of a block, with dh_next added at step `last`.

    No gradient flows through the steps after `last`, so that dz_t is 0 there.
    """
    if last is None:
        return dhs, dh_next
    dh = at_step(last, dhs) + dh_next
    zeros = match_varying_axes(full_as(dh_next, 0), dh_next)
    return lax.dynamic_update_index_in_dim(dhs, dh, last, 0), zeros
