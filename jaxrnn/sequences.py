"""Sequences of unequal length in one Batch, and long sequences in windows. Time comes first."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export

from jaxrnn import checks
from jaxrnn.batches import Batch, check_batch, check_flags, check_is_batch, steps_shape
from jaxrnn.params import AnyArray
from jaxrnn.sharding import gathered


def mask_from_lengths(lengths: Sequence[int] | AnyArray, T: int) -> Array:
    """mask[t, *b] = t < lengths[*b].

    Args:
      lengths: (*batch,) integers in 0..T.
      T: the padded length.

    Returns:
      mask, (T, *batch) bool.

    Raises:
      TypeError: lengths or T are not integers.
      ValueError: T is below 0, or a length lies outside 0..T. Under `jit` lengths are not checked.

    >>> mask_from_lengths(jnp.array([2, 0]), 3).astype(int).tolist()
    [[1, 0], [1, 0], [0, 0]]
    """
    if isinstance(lengths, Sequence):
        with checks.noted("The error is in lengths."):
            lengths = np.array(lengths, None if len(lengths) else int)
    _check_lengths(lengths, T)
    steps = jnp.arange(T).reshape(T, *(1 for _ in lengths.shape))
    return steps < lengths[None].astype(jnp.int32)


def _check_lengths(lengths: Any, T: Any) -> None:
    checks.check_array("lengths", lengths)
    if not checks.is_integer(lengths):
        raise TypeError(f"lengths: expected integers, got {lengths.dtype}")
    if export.is_symbolic_dim(T):
        return
    checks.check_size("T", T, minimum=0)
    if not isinstance(lengths, jax.core.Tracer):
        checks.check_range("lengths", np.asarray(lengths), True, int(T) + 1, "0..T")


def windows(batch: Batch, length: int) -> Iterator[Batch]:
    """Cuts a batch along time, for truncated backpropagation through time over a stream.

    Carry the state from one window to the next. The last window may be shorter.

    Args:
      batch: Batch.
      length: the steps of a window, at least 1.

    Returns:
      An iterator over Batches: steps [k * length, (k + 1) * length) for k = 0, 1, ...

    Raises:
      TypeError, ValueError: the fields of the batch do not fit one another, or length is not an
        integer of at least 1.

    >>> stream = Batch(xs=jnp.arange(5), targets=jnp.arange(1, 6))
    >>> [window.xs.tolist() for window in windows(stream, 2)]
    [[0, 1], [2, 3], [4]]
    """
    check_batch(None, batch, None)
    checks.check_size("length", length)
    starts = range(0, batch.xs.shape[0], length)
    return (jax.tree.map(lambda leaf, at=at: leaf[at : at + length], batch) for at in starts)


def _check_same_fields(sequences: Sequence[Batch]) -> None:
    if not isinstance(sequences, Sequence) or isinstance(sequences, Batch):
        raise TypeError(f"sequences: expected a list of Batches, got {type(sequences).__name__}")
    if not sequences:
        raise ValueError("sequences: expected at least one, got none")

    def kind(leaf: Any) -> tuple[Any, ...] | None:
        return None if leaf is None else (*leaf.shape[1:], str(leaf.dtype))

    for n, sequence in enumerate(sequences):
        check_is_batch(sequence, f"sequences[{n}]")
        for name, leaf, first in zip(Batch._fields, sequence, sequences[0], strict=True):
            field = f"sequences[{n}].{name}"
            if leaf is not None:
                checks.check_array(field, leaf)
                if leaf.shape[:1] != sequence.xs.shape[:1] or not leaf.shape:
                    raise ValueError(
                        f"{field}: expected as many steps as xs {sequence.xs.shape} has, got shape "
                        f"{leaf.shape}"
                    )
            if name == "mask":
                check_flags(field, leaf, steps_shape(sequence.xs))
            elif kind(leaf) != kind(first):
                raise ValueError(
                    f"{field}: expected {kind(first)} after the first axis as in sequences[0], got "
                    f"{kind(leaf)}"
                )


def pad(sequences: Sequence[Batch]) -> Batch:
    """Pads sequences of unequal length to the longest, T, with a mask of the steps that exist.

    It runs on the host, before any `jit`, and returns NumPy arrays.

    Args:
      sequences: N Batches, each (T_n, ...) with time first, T_n at least 0. All have the same
        fields, with the same dtypes and the same shapes after the first axis. Each may have a mask
        or not.

    Returns:
      Batch (T, N, ...) with a mask. Padding is zeros.

    Raises:
      TypeError, ValueError: no sequence, or one that differs from the first; the message names it.

    >>> batch = pad([Batch(np.ones((n, 1)), np.ones(n, int)) for n in (3, 0, 1)])
    >>> batch.xs.shape, batch.mask.astype(int).tolist()
    ((3, 3, 1), [[1, 0, 1], [1, 0, 0], [1, 0, 0]])
    """
    _check_same_fields(sequences)
    lengths = [sequence.xs.shape[0] for sequence in sequences]
    masks = [
        np.ones(steps_shape(sequence.xs), bool) if sequence.mask is None else sequence.mask
        for sequence in sequences
    ]

    def stack_padded(*leaves: Any) -> Any:
        padded = np.zeros((max(lengths), len(lengths), *leaves[0].shape[1:]), leaves[0].dtype)
        for n, leaf in enumerate(leaves):
            padded[: len(leaf), n] = leaf
        return padded

    padded: Batch = jax.tree.map(stack_padded, *(s._replace(mask=None) for s in sequences))
    return padded._replace(mask=stack_padded(*masks))


def unpad(padded: Any, lengths: Sequence[int] | AnyArray) -> list[Any]:
    """The inverse of `pad`, for a Batch, hs or ys.

    Args:
      padded: (T, N, ...), an array or any pytree of them.
      lengths: N integers in 0..T.

    Returns:
      padded[:lengths[n], n] for n in 0..N-1.

    Raises:
      ValueError: padded are not arrays (T, N, ...), the number of lengths is not N, or a length
        lies outside 0..T.

    >>> [ys.tolist() for ys in unpad(jnp.arange(6).reshape(3, 2), [3, 1])]
    [[0, 2, 4], [1]]
    """
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(padded)]
    if len({shape[:2] for shape in shapes}) != 1 or len(shapes[0]) < 2:
        raise ValueError(f"padded: expected arrays (T, N, ...), got shapes {shapes}")
    T, N = shapes[0][:2]
    steps = np.asarray(lengths)
    integers = steps.shape == (N,) and (checks.is_integer(steps) or N == 0)
    if not integers or (steps < 0).any() or (steps > T).any():
        raise ValueError(f"lengths: expected {N} integers in 0..{T}, got {lengths}")
    whole = jax.tree.map(lambda x: gathered(x) if isinstance(x, Array) else x, padded)
    return [
        jax.tree.map(lambda leaf, n=n, length=length: leaf[:length, n], whole)
        for n, length in enumerate(steps.tolist())
    ]


def buckets(lengths: Sequence[int] | AnyArray, *, padding: float = 0.1) -> list[np.ndarray]:
    """Groups sequences of similar length, so that little of each padded batch is padding.

    Sequences are taken from the longest to the shortest. A bucket is full when the next sequence
    would raise its share of padding, 1 - sum(T_n) / (N max(T_n)), above `padding`.

    Args:
      lengths: T_n, integers of at least 0.
      padding: the largest share of padding in a bucket, in [0, 1).

    Returns:
      Index arrays, from the longest sequences to the shortest. Each index is in exactly one.

    Raises:
      TypeError: padding is not a number.
      ValueError: padding lies outside [0, 1); lengths are not integers of at least 0.

    >>> [bucket.tolist() for bucket in buckets([10, 2, 9, 2])]
    [[0, 2], [1, 3]]
    """
    checks.check_number("padding", padding)
    if not 0 <= padding < 1:
        raise ValueError(f"padding: expected a share in [0, 1), got {padding}")
    T = np.asarray(lengths)
    if T.ndim != 1 or (T.size and not checks.is_integer(T)) or (T < 0).any():
        raise ValueError(f"lengths: expected integers of at least 0, got {lengths}")
    T = T.astype(int)  # sums would overflow in the dtype of short integers
    order = np.argsort(-T, kind="stable")
    found, start, total = [], 0, 0
    for stop, length in enumerate(T[order]):
        steps = (stop + 1 - start) * T[order[start]]
        # Exact integers on the left, so that padding=0 accepts a bucket of equal lengths.
        if steps - total - length > padding * steps:
            found.append(order[start:stop])
            start, total = stop, 0
        total += length
    return [*found, order[start:]] if len(order) else []
