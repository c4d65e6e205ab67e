"""Pieces of music as piano rolls: read from a file, and laid out in windows of parallel streams."""

from pathlib import Path

import jax
import numpy as np
import scipy.io
from scipy.io.matlab import MatReadError

from experiments.cli import InputError
from jaxrnn import Batch


def read(path: Path | None) -> dict[str, list[np.ndarray]]:
    """The pieces of each part, (T_n, 88) arrays of zeros and ones with T_n at least 2."""
    if path is None:
        raise InputError("--data: expected a .mat file of piano rolls, got none")
    try:
        with path.open("rb") as stream:
            file = scipy.io.loadmat(stream)
        parts = {part: list(file[f"{part}data"][0]) for part in ("train", "valid", "test")}
    except OSError as error:
        raise InputError(f"{path}: expected a readable .mat file: {error.strerror}") from None
    except (KeyError, ValueError, IndexError, TypeError, MatReadError) as error:
        raise InputError(f"{path}: expected piano rolls as .mat, got: {error}") from None
    found = {}
    for name, part in parts.items():
        found[name] = [np.asarray(piece, np.uint8) for piece in part if len(piece) > 1]
        if not found[name]:
            raise InputError(f"{path}: expected {name} pieces of two steps or more, got none")
        if not all(np.isin(piece, (0, 1)).all() for piece in part):
            raise InputError(f"{path}: expected zeros and ones in the {name} pieces, got others")
    return found


def lay_out(rng, pieces: list[np.ndarray], B: int, T: int) -> Batch:
    """Whole pieces, in random order, in streams of similar length: windows (windows, T, B, ...).

    The target of a step is the next step of its piece. The mask is False after the end of a stream.
    The number of windows is the same for any order.
    """
    notes = pieces[0].shape[1]
    streams: list[list[np.ndarray]] = [[] for _ in range(B)]
    lengths = np.zeros(B, int)
    for n in sorted(rng.permutation(len(pieces)), key=lambda n: -len(pieces[n])):
        shortest = lengths.argmin()
        streams[shortest].append(pieces[n])
        lengths[shortest] += len(pieces[n]) - 1
    windows = -(-lengths.max() // T)
    xs, targets = np.zeros((2, windows * T, B, notes), np.uint8)
    mask, reset = np.zeros((2, windows * T, B), bool)
    for b, stream in enumerate(streams):
        at = 0
        for n in rng.permutation(len(stream)):
            piece, end = stream[n], at + len(stream[n]) - 1
            xs[at:end, b], targets[at:end, b] = piece[:-1], piece[1:]
            mask[at:end, b], reset[at, b] = True, True
            at = end
    flat = Batch(xs, targets, mask, reset)
    return jax.tree.map(lambda leaf: leaf.reshape(windows, T, *leaf.shape[1:]), flat)
