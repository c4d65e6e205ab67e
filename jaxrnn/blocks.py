"""Blocks of time, whose products `bptt` takes together, one block after another."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn import checks
from jaxrnn.batches import Batch, ones_per_step, per_step, steps_shape
from jaxrnn.params import Params


def block_steps(params: Params, batch: Batch, one_kernel: bool = False) -> int:
    """The steps of a block, whose products `bptt` takes together; see experiments/README.md.

    On a CPU, a block has about 1.25 (I + H + O) rows, so that adding its gradient to the sums costs
    little in comparison, or 16,384 numbers and 512 steps if that is more, so that launches cost
    little. It has at most a quarter of the steps or 2,048 numbers; its inputs take at most half of
    what all states take, its outputs as much. There is one block for up to 512 steps of 32,768
    numbers, which takes less time, also to compile. Each block copies its inputs; if these are four
    times as large as all states, there is one block. So there is if W_x is twice as large as all
    states, since each block copies its gradient. A GPU needs larger blocks, and one block if each
    loop is `one_kernel`.
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
    K = max(-(-5 * (I + H + O) // (4 * B)), min(2**14 // (B * widest), 512))
    few = T <= 512 and T * B * widest <= 2**15
    if few or 4 * T * H <= K * I or 2 * T * B <= I:
        return T
    largest = max(T // 4, 2**11 // (B * widest))
    return near_divisor(T, max(1, min(K, largest, T * H // max(2 * I, O))))


def forward_steps(T: int, K: int, h_0: Array) -> int:
    """The steps of a block of the forward pass: all, if the states fit the cache, else K."""
    return T if K == T or (T % K == 0 and T * h_0.size <= 2**21) else K


def near_divisor(T: int, K: int) -> int:
    """The divisor of T nearest to min(K, T), within a factor of two; min(K, T) if there is none.

    >>> near_divisor(1000, 32), near_divisor(997, 32), near_divisor(5, 10**12)
    (40, 32, 5)
    """
    if not isinstance(T, int):
        return T  # a symbol of jax.export
    K = min(K, T)
    divisors = [k for k in range(-(-K // 2), 2 * K + 1) if T % k == 0]
    return min(divisors, key=lambda k: max(k / K, K / k), default=K)


def scan_blocks(
    body: Callable[[Any, Batch, Any], tuple[Any, Any]],
    carry: Any,
    batch: Batch,
    block_steps: int,
    saved: Any = None,
    *,
    reverse: bool = False,
) -> tuple[Any, Any]:
    """A scan over blocks of time: `carry, out = body(carry, block, saved_for_block)` for each.

    Args:
      body: applied to one block after the other.
      carry: what passes from block to block.
      batch: Batch of T steps.
      block_steps: K, the steps of a block.
      saved: the outputs of an earlier call over the same blocks.
      reverse: from the last block to the first.

    Returns:
      The last carry, and the outputs of all blocks.
    """
    K, T = block_steps, batch.xs.shape[0]
    if K == T:
        return body(carry, batch, saved)

    def scan_body(carry: Any, inputs: Any) -> tuple[Any, Any]:
        k, saved_block = inputs
        return body(carry, block_at(k, batch, K), saved_block)

    return lax.scan(scan_body, carry, (jnp.arange(-(-T // K)), saved), reverse=reverse)


def split_blocks(saved: tuple[Array, tuple[Array, Any]], K: int) -> tuple[Array, Any]:
    """What `scan_blocks` would save of a forward pass by blocks of K steps, from that of all steps.

    Args:
      saved: h_0 and the states of all steps, h_t first.
      K: a divisor of T.

    Returns:
      The state before each block, (T / K, *batch, H), and the states (T / K, K, *batch, H).

    >>> hs = jnp.arange(1.0, 7.0)[:, None]
    >>> h_before, (hs_block, _) = split_blocks((jnp.zeros(1), (hs, None)), 2)
    >>> h_before.ravel().tolist(), hs_block[..., 0].tolist()
    ([0.0, 2.0, 4.0], [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    """
    h_0, states = saved
    h_before = jnp.concatenate([h_0[None], states[0][K - 1 : -1 : K]])
    return h_before, jax.tree.map(lambda x: x.reshape(-1, K, *x.shape[1:]), states)


def block_at(k: Array, batch: Batch, K: int) -> Batch:
    """Steps k K to (k + 1) K of the batch.

    If K does not divide T, the last block starts at T - K, and its mask excludes the steps that it
    shares with the block before.
    """
    T, start = batch.xs.shape[0], k * K
    block: Batch = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, K), batch)
    if T % K == 0:
        return block
    is_new = jnp.minimum(start, T - K) + jnp.arange(K) >= start
    mask = ones_per_step(block.xs, bool) if block.mask is None else block.mask
    return block._replace(mask=mask & per_step(is_new, mask))
