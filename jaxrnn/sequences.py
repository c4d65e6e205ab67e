"""Sequences as the network takes them: time first, with masks for what is not there."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import checks


class Batch(NamedTuple):
    """Input sequences with their targets, a pytree. T steps, any batch axes (also none).

    Attributes:
      xs: (T, *batch, I) numbers, or (T, *batch) integer tokens, the same as one-hot inputs.
      targets: (T, *batch, O), or (T, *batch) integer labels.
      mask: (T, *batch) bool, a step exists. Where it does not, the state is held, the loss is not
        counted, and what xs and targets hold there is never read.
      reset: (T, *batch) bool, the state is set to zeros just before step t. Ignored where the mask
        is False.
      weights: (T, *batch) float, at least 0: how much the loss of step t counts.
    """

    xs: Array
    targets: Array
    mask: Array | None = None
    reset: Array | None = None
    weights: Array | None = None


def mask_from_lengths(lengths: Array, T: int) -> Array:
    """mask[t, *b] = t < lengths[*b].

    Args:
      lengths: (*batch,) integers in 0..T.
      T: the padded length.

    Returns:
      mask, (T, *batch) bool.

    Raises:
      TypeError: lengths are not integers.
      ValueError: a length outside 0..T, where its value is known (not under `jit`).

    >>> mask_from_lengths(jnp.array([2, 0]), 3).astype(int).tolist()
    [[1, 0], [1, 0], [0, 0]]
    """
    checks.check_lengths(lengths, T)
    steps = jnp.arange(T).reshape(T, *(1 for _ in lengths.shape))
    return steps < lengths


def windows(batch: Batch, length: int) -> Iterator[Batch]:
    """Cuts a batch along time, for truncated backpropagation through time over a stream.

    Carry the state from one window to the next. The last window may be shorter.

    Args:
      batch: Batch.
      length: the steps of a window, at least 1.

    Yields:
      Batch: steps [k * length, (k + 1) * length) for k = 0, 1, ...

    Raises:
      TypeError, ValueError: length is not an integer of at least 1.

    >>> stream = Batch(xs=jnp.arange(5), targets=jnp.arange(1, 6))
    >>> [window.xs.tolist() for window in windows(stream, 2)]
    [[0, 1], [2, 3], [4]]
    """
    checks.check_size("length", length)
    for start in range(0, batch.xs.shape[0], length):
        yield jax.tree.map(lambda leaf, at=start: leaf[at : at + length], batch)
