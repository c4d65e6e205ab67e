"""A character-level language model, trained by truncated backpropagation through time.

The text is laid out in `batch_size` parallel streams. Each update sees the next `window` characters
of every stream and starts from the state that the last window ended in.

    python -m experiments.char_lm --text FILE --out DIR
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from jax import lax
from tqdm import tqdm

import jaxrnn
from jaxrnn import Batch, Params

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a character-level language model with a plain tanh network."""

    text: Path | None = None
    """A UTF-8 text file. By default CPython's own documentation, `pydoc_data.topics`."""
    steps: int = 1000
    """Updates."""
    hidden_size: int = 256
    """Hidden units, H."""
    batch_size: int = 32
    """Parallel streams that the text is laid out in, B."""
    window: int = 64
    """Steps of backpropagation through time, T."""
    learning_rate: float = 2e-3
    """Of Adam, after the gradient's norm is clipped at 1."""
    seed: int = 0
    """Of the initial parameters and the sample."""
    out: Path = Path("runs/char_lm")
    """The folder for config, metrics, summary, curve and sample."""


class InputError(Exception):
    """What the user gave cannot be used; the message is the one line to print."""


def read_text(path: Path | None) -> str:
    """The file's text, or CPython's own documentation."""
    if path is None:
        from pydoc_data import topics

        return "\n".join(topics.topics[name] for name in sorted(topics.topics))
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, got a bad byte at {error.start}") from None
    except OSError as error:
        raise InputError(f"{path}: expected a readable text file, got: {error.strerror}") from None


def split(text: str, config: Config) -> tuple[list[str], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The characters in use, and the text as integers: 90 % to train on, 5 % valid, 5 % test."""
    needed = math.ceil(20 * (config.batch_size + 1))  # one step of every stream in 5 % of it
    needed = max(needed, math.ceil((config.batch_size * config.window + 1) / 0.9))
    if len(text) < needed:
        raise InputError(
            f"{config.text or 'pydoc_data.topics'}: expected at least {needed} characters for "
            f"batch_size {config.batch_size} and window {config.window}, got {len(text)}"
        )
    vocabulary = sorted(set(text))
    index = {character: i for i, character in enumerate(vocabulary)}
    ids = np.array([index[character] for character in text], np.int32)
    train, valid, test = np.split(ids, [len(ids) * 90 // 100, len(ids) * 95 // 100])
    return vocabulary, (train, valid, test)


def streams(ids: np.ndarray, batch_size: int) -> Batch:
    """The text in `batch_size` parallel streams, (T, B), each step's target its next character.

    What is left over when the length does not divide by `batch_size` is dropped: fewer than
    `batch_size` characters.
    """
    T = (len(ids) - 1) // batch_size
    used = T * batch_size
    xs, targets = ids[:used], ids[1 : used + 1]
    batch = Batch(xs, targets)  # type: ignore[arg-type]
    return jax.tree.map(lambda leaf: leaf.reshape(batch_size, T).T, batch)


def endless(stream: Batch, window: int) -> Iterator[tuple[bool, Batch]]:
    """Windows of the stream, over and over; with each, whether it begins the text anew."""
    whole = stream.xs.shape[0] // window * window
    stream = jax.tree.map(lambda leaf: leaf[:whole], stream)
    while True:
        for i, batch in enumerate(jaxrnn.windows(stream, window)):
            yield i == 0, batch


@partial(jax.jit, static_argnames="length")
def sample(key: jax.Array, params: Params, first: jax.Array, length: int) -> jax.Array:
    """Draws x_{t+1} from softmax(y_t), the network running on what it has drawn itself."""

    def body(carry, key_t):
        h, x = carry
        h, y = jaxrnn.step(params, h, x)
        x = jax.random.categorical(key_t, y)
        return (h, x), x

    h_0 = jnp.zeros(params.W_h.shape[0])
    return lax.scan(body, (h_0, first), jax.random.split(key, length))[1]


def draw(curve: list[dict], path: Path) -> None:
    """Training and held-out bits per character over updates."""
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    steps = [row["step"] for row in curve]
    ax.plot(steps, [row["train_bpc"] for row in curve], lw=0.8, alpha=0.6, label="training batch")
    held_out = [row for row in curve if "valid_bpc" in row]
    ax.plot(
        [row["step"] for row in held_out],
        [row["valid_bpc"] for row in held_out],
        marker="o",
        ms=4,
        label="validation text",
    )
    ax.set(xlabel="updates", ylabel="bits per character", title="Plain tanh RNN, characters")
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(path, dpi=150)
    plt.close(fig)


def train(config: Config, vocabulary: list[str], parts, metrics_file) -> tuple[Params, dict]:
    """Trains for config.steps updates; a line of metrics for each."""
    stream, valid, test = (streams(part, config.batch_size) for part in parts)
    params = jaxrnn.init(
        jax.random.key(config.seed), len(vocabulary), config.hidden_size, len(vocabulary)
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(config.learning_rate))
    zeros = np.zeros((config.batch_size, config.hidden_size), np.float32)
    state = jaxrnn.init_state(params, optimizer, h=jnp.asarray(zeros))
    update = jaxrnn.make_update(jaxrnn.bptt, optimizer)

    def bits(data: Batch) -> float:
        parts = jaxrnn.windows(data, 16 * config.window)
        return jaxrnn.evaluate(state.params, parts, jnp.asarray(zeros)) / math.log(2)

    rows: list[dict] = []
    evaluate_every = max(1, config.steps // 10)
    start, evaluating = time.perf_counter(), 0.0
    batches = endless(stream, config.window)
    with tqdm(total=config.steps, unit="step", disable=None) as bar:
        for number in range(1, config.steps + 1):
            anew, batch = next(batches)
            if anew:
                state = state._replace(h=jnp.asarray(zeros))
            state, metrics = update(state, batch)
            row = {"step": number, "train_bpc": metrics.loss.item() / math.log(2)}
            row["gradient_norm"] = metrics.gradient_norm.item()
            if number % evaluate_every == 0 or number == config.steps:
                before = time.perf_counter()
                row["valid_bpc"] = bits(valid)
                evaluating += time.perf_counter() - before
                bar.set_postfix(valid=f"{row['valid_bpc']:.3f} bpc", refresh=False)
            rows.append(row)
            metrics_file.write(json.dumps(row) + "\n")
            bar.set_description(f"{row['train_bpc']:.3f} bpc", refresh=False)
            bar.update()
    seconds = time.perf_counter() - start
    recent = rows[-100:]
    summary = {
        "train_bpc": sum(row["train_bpc"] for row in recent) / len(recent),
        "valid_bpc": rows[-1]["valid_bpc"],
        "test_bpc": bits(test),
        "steps": config.steps,
        "seconds": seconds,
        "milliseconds_per_step": 1e3 * (seconds - evaluating) / config.steps,
        "parameters": sum(leaf.size for leaf in params),
        "vocabulary": len(vocabulary),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
    draw(rows, config.out / "curve.png")
    return state.params, summary


def check_config(config: Config) -> None:
    for name in ("steps", "hidden_size", "batch_size", "window"):
        if getattr(config, name) < 1:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag}: expected at least 1, got {getattr(config, name)}")
    if not 0 < config.learning_rate < math.inf:
        raise InputError(f"--learning-rate: expected above 0, got {config.learning_rate}")


def main(config: Config) -> dict:
    check_config(config)
    text = read_text(config.text)
    vocabulary, parts = split(text, config)
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{config.out}: expected a folder to write to: {error.strerror}") from None
    settings = {key: str(v) if isinstance(v, Path) else v for key, v in vars(config).items()}
    (config.out / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    with open(config.out / "metrics.jsonl", "w", buffering=1) as metrics_file:
        params, summary = train(config, vocabulary, parts, metrics_file)
    (config.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    newline = jnp.array(vocabulary.index("\n") if "\n" in vocabulary else 0)
    drawn = sample(jax.random.key(config.seed + 1), params, newline, 600)
    written = "".join(vocabulary[i] for i in np.asarray(drawn))
    (config.out / "sample.txt").write_text(written + "\n", encoding="utf-8")
    for name in ("train_bpc", "valid_bpc", "test_bpc"):
        print(f"{name:<10} {summary[name]:.3f}")
    print(f"{config.steps} steps in {summary['seconds']:.1f} s; all of it is in {config.out}\n")
    print(written)
    return summary


def run(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    try:
        main(tyro.cli(Config, args=arguments))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run())
