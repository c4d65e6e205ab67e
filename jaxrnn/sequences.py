"""Sequences as the network takes them: time first, with masks for what is not there.

The rule for resets: `reset[t]` says that step t is the first of a new sequence, so that nothing,
value or gradient, passes from step t-1 to step t.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrnn import checks


class Batch(NamedTuple):
    """Input sequences with their targets, a pytree. T steps, any batch axes (also none).

    Attributes:
      xs: (T, *batch, I) numbers, or (T, *batch) integer tokens, the same as one-hot inputs.
      targets: (T, *batch, O), or (T, *batch) integer labels.
      mask: (T, *batch) bool, a step exists. Where it does not, the state is held, the loss is not
        counted, and what xs and targets hold there is never read.
      reset: (T, *batch) bool, step t is the first of a new sequence: the state is set to zeros just
        before it. Ignored where the mask is False.
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


def _check_alike(sequences: Sequence[Batch]) -> None:
    if not sequences:
        raise ValueError("sequences: expected at least one, got none")

    def kind(leaf):
        return None if leaf is None else (*leaf.shape[1:], str(leaf.dtype))

    for n, sequence in enumerate(sequences):
        if not isinstance(sequence, Batch):
            raise TypeError(f"sequences[{n}]: expected a Batch, got {type(sequence).__name__}")
        for name, leaf, first in zip(Batch._fields, sequence, sequences[0], strict=True):
            where = f"sequences[{n}].{name}"
            if leaf is not None:
                checks.check_array(where, leaf)
                if leaf.shape[:1] != sequence.xs.shape[:1] or not leaf.shape:
                    raise ValueError(
                        f"{where}: expected as many steps as xs {sequence.xs.shape} has, got shape "
                        f"{leaf.shape}"
                    )
            if name != "mask" and kind(leaf) != kind(first):
                raise ValueError(
                    f"{where}: expected {kind(first)} after the first axis, as sequences[0] has, "
                    f"got {kind(leaf)}"
                )


def pad(sequences: Sequence[Batch]) -> Batch:
    """Lays sequences of unequal length side by side: T is the longest, the mask says what exists.

    On the host, before any `jit`: what it returns are NumPy arrays.

    Args:
      sequences: N Batches, each (T_n, ...) with time in front, T_n from 0. Those fields that one of
        them has all must have, with the same dtype and the same shape after the first axis.

    Returns:
      Batch (T, N, ...) with a mask; what it excludes is zeros.

    Raises:
      TypeError, ValueError: no sequence, or one unlike the first; the message names it.

    >>> batch = pad([Batch(np.ones((n, 1)), np.ones(n, int)) for n in (3, 0, 1)])
    >>> batch.xs.shape, batch.mask.astype(int).tolist()
    ((3, 3, 1), [[1, 0, 1], [1, 0, 0], [1, 0, 0]])
    """
    _check_alike(sequences)
    lengths = [sequence.xs.shape[0] for sequence in sequences]
    masks = [
        np.ones(checks.steps_shape(sequence.xs), bool) if sequence.mask is None else sequence.mask
        for sequence in sequences
    ]

    def side_by_side(*leaves):
        padded = np.zeros((max(lengths), len(lengths), *leaves[0].shape[1:]), leaves[0].dtype)
        for n, leaf in enumerate(leaves):
            padded[: len(leaf), n] = leaf
        return padded

    padded = jax.tree.map(side_by_side, *(s._replace(mask=None) for s in sequences))
    return padded._replace(mask=side_by_side(*masks))


def unpad(padded, lengths: Sequence[int]) -> list:
    """The sequences again: what `pad` does, undone, for a Batch, for hs or for ys.

    Args:
      padded: (T, N, ...), an array or any pytree of them.
      lengths: N integers in 0..T.

    Returns:
      N times padded[:length, n].

    Raises:
      ValueError: another number of lengths than N, or one that is not in 0..T.

    >>> [ys.tolist() for ys in unpad(jnp.arange(6).reshape(3, 2), [3, 1])]
    [[0, 2, 4], [1]]
    """
    T, N = jax.tree.leaves(padded)[0].shape[:2]
    if len(lengths) != N or not all(0 <= length <= T for length in lengths):
        raise ValueError(f"lengths: expected {N} integers in 0..{T}, got {list(lengths)}")
    return [
        jax.tree.map(lambda leaf, n=n, length=length: leaf[:length, n], padded)
        for n, length in enumerate(lengths)
    ]


def buckets(lengths: Sequence[int], *, padding: float = 0.1) -> list[np.ndarray]:
    """Puts sequences of like length together, so that little of each padded batch is padding.

    From the longest on, each bucket takes sequences until the next would carry the share of its
    steps that do not exist, 1 - sum(T_n) / (N max(T_n)), above `padding`.

    Args:
      lengths: the T_n, integers from 0.
      padding: the largest share allowed, in [0, 1).

    Returns:
      Index arrays, from the longest to the shortest; every index is in one of them.

    Raises:
      ValueError: padding is not in [0, 1).

    >>> [bucket.tolist() for bucket in buckets([10, 2, 9, 2])]
    [[0, 2], [1, 3]]
    """
    if not 0 <= padding < 1:
        raise ValueError(f"padding: expected a share in [0, 1), got {padding}")
    order = np.argsort(-np.asarray(lengths, int), kind="stable")
    found, start, total = [], 0, 0
    for stop, length in enumerate(lengths[n] for n in order):
        steps = (stop + 1 - start) * lengths[order[start]]
        # Whole numbers on the left: a bucket without padding passes a share of 0.
        if steps - total - length > padding * steps:
            found.append(order[start:stop])
            start, total = stop, 0
        total += length
    return [*found, order[start:]] if len(order) else []
