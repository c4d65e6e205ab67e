"""A character-level language model, trained by truncated backpropagation through time.

The text is laid out in `batch_size` parallel streams. Each update sees the next `window` characters
of every stream and starts from the state that the last window ended in.

    python -m experiments.char_lm --text FILE --out DIR
    python -m experiments.char_lm --text FILE --out DIR --resume

The second goes on where the first was stopped and ends in the same bytes.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import jaxrnn
from experiments import runs
from experiments.runs import InputError, Run
from jaxrnn import Batch, Diverged, Params

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a character-level language model with a plain tanh network.

    Exit status: 0 done; 2 bad usage or input; 3 files that are damaged or cannot be written; 4 too
    many updates in a row without finite numbers; 130, 143 stopped by SIGINT, SIGTERM, and saved.
    """

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
    """The folder for config, metrics, checkpoints, summary, curve and sample."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`; the other settings must be what they were."""
    checkpoint_every_steps: int | None = None
    """Updates between checkpoints. By default as many as take 30 seconds."""
    devices: int = 1
    """Devices that the streams are split over; of a CPU, so many of its cores."""
    max_skipped: int = 10
    """Updates in a row without a finite loss and gradient after which the run is given up."""


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


def endless(stream: Batch, window: int, seen: int) -> Iterator[tuple[bool, Batch]]:
    """Windows of the stream, over and over, after the first `seen` of them; with each, whether it
    begins the text anew."""
    count = stream.xs.shape[0] // window
    for i in itertools.count(seen):
        start = i % count * window
        yield start == 0, jax.tree.map(lambda leaf, at=start: leaf[at : at + window], stream)


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


def bits(params: Params, data: Batch, config: Config) -> float:
    """Bits per character on held-out streams, the state carried along from zeros."""
    params = jax.device_put(params, jax.devices()[0])
    h_0 = jnp.zeros((config.batch_size, config.hidden_size))
    parts = jaxrnn.windows(data, 16 * config.window)
    return jaxrnn.evaluate(params, parts, h_0) / math.log(2)


def train(config: Config, vocabulary: list[str], stream: Batch, valid: Batch, run: Run) -> Params:
    """Trains up to config.steps updates; a line of metrics for each."""
    params = jaxrnn.init(
        jax.random.key(config.seed), len(vocabulary), config.hidden_size, len(vocabulary)
    )
    for data in (stream, valid):
        jaxrnn.check_values(params, data)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(config.learning_rate))
    zeros = np.zeros((config.batch_size, config.hidden_size), np.float32)
    mesh = jax.sharding.Mesh(jax.devices()[: config.devices], ("batch",))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("batch"))
    state = jaxrnn.init_state(params, optimizer, h=jnp.asarray(zeros))
    gradient_fn = jaxrnn.data_parallel(jaxrnn.bptt, mesh) if config.devices > 1 else jaxrnn.bptt
    update = jaxrnn.make_update(gradient_fn, optimizer)

    evaluate_every = max(1, config.steps // 10)
    batches = endless(stream, config.window, seen=run.step)
    with run, tqdm(total=config.steps, initial=run.step, unit="step", disable=None) as bar:
        state = jax.device_put(run.restore(state), whole)
        for number in range(run.step + 1, config.steps + 1):
            anew, batch = next(batches)
            h = zeros if anew else state.h  # where the update leaves it, so that it compiles once
            state = state._replace(h=jax.device_put(h, split))
            state, metrics = update(state, batch)
            row = report(number, metrics)
            if number % evaluate_every == 0 or number == config.steps:
                with run.aside():
                    row["valid_bpc"] = bits(state.params, valid, config)
                bar.set_postfix(valid=f"{row['valid_bpc']:.3f} bpc", refresh=False)
            run.log(row)
            stop_if_diverged(run.rows, config.max_skipped)
            run.keep(state, last=number == config.steps)
            bar.set_description(f"{row['train_bpc']:.3f} bpc", refresh=False)
            bar.update()
    return state.params


def summarize(config: Config, run: Run, params: Params, test_bpc: float) -> dict:
    recent = [row["train_bpc"] for row in run.rows[-100:] if "skipped" not in row]
    return {
        "train_bpc": sum(recent) / max(1, len(recent)),
        "valid_bpc": run.rows[-1]["valid_bpc"],
        "test_bpc": test_bpc,
        "steps": config.steps,
        "skipped": sum("skipped" in row for row in run.rows),
        "seconds": run.seconds,
        "milliseconds_per_step": 1e3 * run.seconds_of_steps / config.steps,
        "parameters": sum(leaf.size for leaf in params),
        "vocabulary": params.W_y.shape[0],
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


def report(number: int, metrics: jaxrnn.Metrics) -> dict:
    """A row of metrics; `skipped` is in it where the update was, with how many in a row were."""
    row = {
        "step": number,
        "train_bpc": metrics.loss.item() / math.log(2),
        "gradient_norm": metrics.gradient_norm.item(),
    }
    if skipped := metrics.skipped.item():
        row["skipped"] = skipped
    if skipped == 1:
        print(f"step {number}: skipped, as loss or gradient are not finite", file=sys.stderr)
    return row


def stop_if_diverged(rows: list[dict], max_skipped: int) -> None:
    if rows[-1].get("skipped", 0) >= max_skipped:
        norms = [row["gradient_norm"] for row in rows[-2 * max_skipped :]]
        raise Diverged(rows[-1]["step"], max_skipped, norms)


def check_learning_rate(config: Config) -> None:
    float32 = np.finfo(np.float32)
    if not float(float32.tiny) <= config.learning_rate <= float(float32.max):
        raise InputError(
            f"--learning-rate: expected above 0 in float32, got {config.learning_rate}"
        )


def check_memory(config: Config, vocabulary: list[str]) -> None:
    """XLA aborts the process where there is not enough."""
    H, V, steps = config.hidden_size, len(vocabulary), config.batch_size * config.window
    needed = 4 * (5 * H * (H + 2 * V) + 2 * steps * (H + V)) / 1e9
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if needed > there:
        raise InputError(
            f"--hidden-size: expected what {there:.0f} GB of memory can hold, got {H}, which needs "
            f"{needed:.0f} GB"
        )


def check_devices(config: Config) -> None:
    if config.batch_size % config.devices:
        raise InputError(
            f"--devices: expected a divisor of batch_size {config.batch_size}, got {config.devices}"
        )
    runs.find_devices(config.devices)


def settings_of(config: Config, text: str) -> dict:
    """What decides the result: a run that resumes must have the same."""
    settings = dataclasses.asdict(config)
    for name in ("out", "resume", "checkpoint_every_steps", "devices"):
        del settings[name]
    settings["text"] = f"SHA-256 {hashlib.sha256(text.encode()).hexdigest()}"
    return {"experiment": "char_lm", **settings}


def main(config: Config) -> dict:
    check_learning_rate(config)
    check_devices(config)
    text = read_text(config.text)
    vocabulary, parts = split(text, config)
    check_memory(config, vocabulary)
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{config.out}: expected a folder to write to: {error.strerror}") from None
    settings, every = settings_of(config, text), config.checkpoint_every_steps
    run = Run(config.out, settings, resume=config.resume, every_steps=every)
    flags = {key: str(v) if isinstance(v, Path) else v for key, v in vars(config).items()}
    runs.write_whole(config.out / "config.json", json.dumps(flags, indent=2) + "\n")
    stream, valid, test = (streams(part, config.batch_size) for part in parts)
    params = train(config, vocabulary, stream, valid, run)
    summary = summarize(config, run, params, bits(params, test, config))
    draw(run.rows, config.out / "curve.png")
    newline = jnp.array(vocabulary.index("\n") if "\n" in vocabulary else 0)
    drawn = sample(jax.random.key(config.seed + 1), params, newline, 600)
    written = "".join(vocabulary[i] for i in np.asarray(drawn))
    (config.out / "sample.txt").write_text(written + "\n", encoding="utf-8")
    runs.write_whole(config.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    for name in ("train_bpc", "valid_bpc", "test_bpc"):
        print(f"{name:<10} {summary[name]:.3f}")
    print(f"{config.steps} steps in {summary['seconds']:.1f} s; all of it is in {config.out}\n")
    print(written)
    return summary


def run(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return runs.exit_status(lambda: main(runs.parse(Config, arguments)))


if __name__ == "__main__":
    sys.exit(run())
