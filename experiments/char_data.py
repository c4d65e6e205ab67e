"""The text of the character model: reading, splitting, and windows of parallel streams."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from experiments.cli import InputError
from jaxrnn import Batch


def read_text(path: Path | None) -> str:
    """The text of a UTF-8 file, or of CPython's own documentation if there is no path.

    Raises:
      InputError: the file cannot be read as text.
    """
    if path is None:
        from pydoc_data import topics

        return "\n".join(topics.topics[name] for name in sorted(topics.topics))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, got a bad byte at {error.start}") from None
    except OSError as error:
        raise InputError(f"{path}: expected a readable text file, got: {error.strerror}") from None
    return text.removeprefix("\ufeff")  # a byte order mark is not text


def check_memory(H: int, V: int, steps: int) -> None:
    """XLA aborts the process if there is not enough memory for H units and V characters.

    Raises:
      InputError: there is not enough for that many steps at once.
    """
    needed = 4 * (5 * H * (H + 2 * V) + 2 * steps * (H + V)) / 1e9
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if needed > available:
        raise InputError(
            f"--hidden-size: expected a network for {available:.0f} GB of memory, got {H}, which "
            f"needs {needed:.0f} GB"
        )


def encode(text: str, vocabulary: str) -> np.ndarray:
    """Each character's index in the vocabulary, int32.

    Raises:
      KeyError: a character that the vocabulary lacks.

    >>> encode("abba", "ab").tolist()
    [0, 1, 1, 0]
    """
    index = {character: i for i, character in enumerate(vocabulary)}
    return np.array([index[character] for character in text], np.int32)


def split(
    text: str, path: Path | None, batch_size: int, window: int
) -> tuple[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The vocabulary and the encoded text: 90 % to train on, 5 % to validate, 5 % to test.

    Raises:
      InputError: the text from `path` is too short for one window of `batch_size` streams.
    """
    for_held_out = 20 * (batch_size + 1)  # one step of each stream in 5 % of the text
    for_training = -(-10 * (batch_size * window + 1) // 9)  # one window in 90 % of it
    needed = max(for_held_out, for_training)
    if len(text) < needed:
        raise InputError(
            f"{path or 'pydoc_data.topics'}: expected at least {needed} characters for "
            f"batch_size {batch_size} and window {window}, got {len(text)}"
        )
    vocabulary = "".join(sorted(set(text)))
    ids = encode(text, vocabulary)
    train, valid, test = np.split(ids, [len(ids) * 90 // 100, len(ids) * 95 // 100])
    return vocabulary, (train, valid, test)


def streams(ids: np.ndarray, batch_size: int) -> Batch:
    """The text as `batch_size` parallel streams, (T, B); each target is the next character.

    Fewer than `batch_size` characters at the end are dropped.
    """
    T = (len(ids) - 1) // batch_size
    used = T * batch_size
    xs, targets = ids[:used], ids[1 : used + 1]
    batch = Batch(xs, targets)
    return jax.tree.map(lambda leaf: leaf.reshape(batch_size, T).T, batch)


def endless_windows(stream: Batch, window: int, seen: int) -> Iterator[tuple[bool, Batch]]:
    """Consecutive windows of the stream, pass after pass, without the first `seen`.

    Yields:
      Whether the window is the first of a pass, and the window.
    """
    count = stream.xs.shape[0] // window
    for n in itertools.count(seen):
        start = n % count * window
        yield start == 0, jax.tree.map(lambda leaf, at=start: leaf[at : at + window], stream)
