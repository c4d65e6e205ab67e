"""The shapes that a kernel takes, from those of a loop over time, and back.

    carry (*batch, H)        -> (N, B, H)
    inputs (T, *batch, H)    -> (T, N, B, H), flags (T, *batch) -> (T, N, B)
    W_h (H, H)               -> (N, H, H)        b_h, alpha () or (H,) -> (N, 1, H)

of N networks with B sequences each: N is 1, except under `vmap` over W_h, b_h or alpha; any other
`vmap` adds sequences. Zeros make H a power of 2 and B a multiple of 16, and long sequences are cut
into pieces.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap

from jaxrnn.recurrence import LoopNetwork

Run: TypeAlias = Callable[[Any, Array, Any], tuple[Array, Any]]
"""(network, carry, inputs) -> the last carry, and the outputs of all steps."""

SEQUENCES = 16
"""The sequences of a tile: the rows of the smallest product of a tensor core."""

MOST_STEPS = 4096
"""Triton's loop slows down beyond twice as many steps."""


def with_flat_batch(run: Run) -> Run:
    """`run` of (N, B, H) for any batch axes and under any `vmap`."""

    def run_any(network: LoopNetwork, carry: Array, inputs: Any) -> tuple[Array, Any]:
        (W_h, units), (*batch, H) = network, carry.shape
        B = math.prod(batch)
        rows = jax.tree.map(lambda x: jnp.broadcast_to(x.reshape(-1), (H,))[None, None], units)
        flat = jax.tree.map(lambda x: x.reshape(len(x), 1, B, *x.shape[1 + len(batch) :]), inputs)
        last, outputs = vmappable(run)((W_h[None], rows), carry.reshape(1, B, H), flat)
        outputs = jax.tree.map(lambda x: x.reshape(len(x), *carry.shape), outputs)
        return last.reshape(carry.shape), outputs

    return run_any


def vmappable(run: Run) -> Run:
    """`run` with a rule for `vmap`: it adds networks if it maps one of them, else sequences."""
    call = custom_vmap(run)

    def first_of_zeros(x: Array, batched: bool) -> Array:
        return jnp.zeros((1, *x.shape[1:]), x.dtype) if batched else x

    def rule(
        size: int, batched: Any, network: LoopNetwork, carry: Array, inputs: Any
    ) -> tuple[Any, Any]:
        if size == 0:  # run one, and keep nothing of it
            arguments = network, carry, inputs
            one = jax.tree.map(first_of_zeros, arguments, tuple(batched))
            result, mapped = rule(1, batched, *one)
            return jax.tree.map(lambda x: x[:0], result), mapped
        axis = 0 if any(jax.tree.leaves(batched[0])) else 1  # of (N, B, H)

        def merge(axis: int, x: Array, batched: bool) -> Array:
            x = x if batched else jnp.broadcast_to(x, (size, *x.shape))
            x = jnp.moveaxis(x, 0, axis)
            return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

        def split(axis: int, x: Array) -> Array:
            return jnp.moveaxis(x.reshape(*x.shape[:axis], size, -1, *x.shape[axis + 1 :]), axis, 0)

        if axis == 0:
            network = jax.tree.map(partial(merge, 0), network, batched[0])
        carry = merge(axis, carry, batched[1])
        inputs = jax.tree.map(partial(merge, axis + 1), inputs, batched[2])
        last, outputs = call(network, carry, inputs)
        result = split(axis, last), jax.tree.map(partial(split, axis + 1), outputs)
        return result, jax.tree.map(lambda _: True, result)

    call.def_vmap(rule)
    return call


def padded(x: Array, *sizes: int) -> Array:
    """x with zeros appended to its last axes, so that they have these sizes."""
    added = [(0, new - old) for old, new in zip(x.shape[-len(sizes) :], sizes, strict=True)]
    return jnp.pad(x, [(0, 0)] * (x.ndim - len(sizes)) + added)


def with_whole_tiles(run: Run) -> Run:
    """`run` of whole tiles for any B and H, with flags as int32.

    Padding does not affect the others: its rows and columns of W_h are zero.
    """

    def run_any(network: LoopNetwork, carry: Array, inputs: Any) -> tuple[Array, Any]:
        (W_h, units), (_, B, H) = network, carry.shape
        rows, width = -(-B // SEQUENCES) * SEQUENCES, max(16, 1 << (H - 1).bit_length())

        def whole(x: Array) -> Array:
            if x.dtype == jnp.bool_:
                return padded(x.astype(jnp.int32), rows)
            return padded(x, rows, width)

        network = padded(W_h, width, width), jax.tree.map(lambda x: padded(x, width), units)
        last, outputs = run(network, whole(carry), jax.tree.map(whole, inputs))
        return last[:, :B, :H], jax.tree.map(lambda x: x[..., :B, :H], outputs)

    return run_any


def in_pieces(run: Run, *, reverse: bool) -> Run:
    """`run` of at most 8,191 steps, of arrays with at most 2**31 numbers, for any T."""

    def run_any(network: LoopNetwork, carry: Array, inputs: Any) -> tuple[Array, Any]:
        T = len(inputs[0])
        K = max(1, min(MOST_STEPS, 2**30 // carry.size))
        if T < 2 * K:
            return run(network, carry, inputs)
        rest = K + T % K
        pieces = jax.tree.map(lambda x: x[:-rest].reshape(-1, K, *x.shape[1:]), inputs)
        at_end = jax.tree.map(lambda x: x[-rest:], inputs)
        run_piece = partial(run, network)
        if reverse:
            carry, end = run_piece(carry, at_end)
            carry, outputs = lax.scan(run_piece, carry, pieces, reverse=True)
        else:
            carry, outputs = lax.scan(run_piece, carry, pieces)
            carry, end = run_piece(carry, at_end)
        return carry, jax.tree.map(
            lambda x, last: jnp.concatenate([x.reshape(-1, *last.shape[1:]), last]), outputs, end
        )

    return run_any
