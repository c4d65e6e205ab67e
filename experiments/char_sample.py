"""Text drawn from a trained character model.

    x_{t+1} ~ softmax(y_t / temperature)        h_{t+1}, y_{t+1} = step(h_t, x_{t+1})

The first y_t is the output after the prompt.
"""

import json
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxrnn
from experiments.char_data import encode
from experiments.cli import InputError
from jaxrnn import Params, checkpoints
from jaxrnn.checkpoints import CheckpointError

CHUNK = 256
"""Characters drawn by one compiled call."""


@jax.jit
def _draw_chunk(key, params, h, y, start, temperature):
    """Draws CHUNK characters, each fed back as the next input; key t is `fold_in(key, t)`."""

    def body(carry, t):
        h, y = carry
        logits = (y - y.max()) / temperature  # the largest is 0: a low temperature cannot overflow
        x = jax.random.categorical(jax.random.fold_in(key, t), logits)
        return jaxrnn.step(params, h, x), x

    return lax.scan(body, (h, y), start + jnp.arange(CHUNK))


def sample(
    key: jax.Array,
    params: Params,
    vocabulary: str,
    length: int,
    *,
    prompt: str = "",
    temperature: float = 1.0,
) -> Iterator[str]:
    """Draws `length` characters after the prompt.

    Args:
      key: `jax.random.key`.
      params: of a network over `vocabulary`.
      vocabulary: the characters, in the order of their indices.
      length: characters to draw; with the same key, a shorter sample is a prefix of a longer one.
      prompt: the network reads it first. An empty prompt stands for a line break, or for the first
        character of a vocabulary without one.
      temperature: divides the logits; near 0 the most likely character is always drawn.

    Yields:
      The characters in pieces of at most CHUNK.

    Raises:
      InputError: the prompt has a character that the vocabulary lacks.
    """
    prompt = prompt or ("\n" if "\n" in vocabulary else vocabulary[0])
    try:
        xs = jnp.asarray(encode(prompt, vocabulary))
    except KeyError as error:
        raise InputError(
            f"--prompt: expected characters of the training text, got {error.args[0]!r}"
        ) from None
    h, ys = jaxrnn.unroll(params, xs)
    carry = (h, ys[-1])
    for start in range(0, length, CHUNK):
        carry, drawn = _draw_chunk(key, params, *carry, start, temperature)
        yield "".join(vocabulary[i] for i in np.asarray(drawn)[: length - start])


def load(folder: Path) -> tuple[Params, str]:
    """The parameters and the vocabulary of the newest checkpoint of a char_lm run.

    Raises:
      InputError: the folder holds no such run.
      CheckpointError: its files are damaged.
    """
    found = checkpoints.newest(folder)
    note = found.note if found and isinstance(found.note, dict) else {}
    if found is None or note.get("settings", {}).get("experiment") != "char_lm":
        raise InputError(f"{folder}: expected a run of char_lm with a checkpoint, got none")
    params = Params(*(jnp.asarray(found.arrays[f"params.{name}"]) for name in Params._fields))
    path, size = folder / "vocabulary.json", params.W_y.shape[0]
    try:
        vocabulary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        vocabulary = None
    if not isinstance(vocabulary, str) or len(vocabulary) != size:
        raise CheckpointError(f"{path}: expected the {size} characters of the run, got others")
    return params, vocabulary


def escape_controls(text: str) -> str:
    r"""Escapes control characters except line breaks and tabs, so that no terminal obeys them.

    >>> escape_controls("a\tb\x1b[2J\n")
    'a\tb\\x1b[2J\n'
    """
    return "".join(
        repr(character)[1:-1]
        if unicodedata.category(character) == "Cc" and character not in "\n\t"
        else character
        for character in text
    )


def print_text(pieces: Iterable[str]) -> None:
    """Prints text as it is drawn; control characters are escaped on a terminal."""
    for piece in pieces:
        print(escape_controls(piece) if sys.stdout.isatty() else piece, end="", flush=True)
    print()
