"""A character-level language model, trained by truncated backpropagation through time.

The text is laid out in `batch_size` parallel streams. Each update sees the next `window` characters
of every stream and starts from the state that the last window ended in.

    python -m experiments.char_lm --text FILE --out DIR
    python -m experiments.char_lm --text FILE --out DIR --resume
    python -m experiments.char_lm --out DIR --sample 500 --prompt TEXT --temperature 0.8

The second command continues a stopped run, bit-identically, or one with fewer `--steps`. The third
writes text from the trained network.
"""

import dataclasses
import hashlib
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import jaxrnn
from experiments import char_sample, cli, run_state
from experiments.char_data import endless_windows, read_text, split, streams
from experiments.cli import InputError
from experiments.run_state import Run
from jaxrnn import Batch, Diverged, Params

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a character-level language model with a plain tanh network, or samples from one.

    Exit status: 0 success; 2 bad usage or input; 3 files are damaged or cannot be written; 4
    diverged; 130, 143 stopped by SIGINT, SIGTERM after saving.
    """

    text: Path | None = None
    """UTF-8 text file. The default is CPython's own documentation, `pydoc_data.topics`."""
    steps: int = 1000
    """Number of updates, including those before a resume."""
    hidden_size: int = 256
    """Hidden units, H."""
    batch_size: int = 32
    """Parallel streams of text, B."""
    window: int = 64
    """Steps of backpropagation through time, T."""
    learning_rate: float = 2e-3
    """Learning rate of Adam; the gradient's norm is clipped at 1."""
    evaluate_every: int = 100
    """Updates between evaluations on the validation text."""
    seed: int = 0
    """Seed of the initial parameters and of the sample."""
    out: Path = Path("runs/char_lm")
    """Folder for config, metrics, checkpoints, summary, curve and sample."""
    resume: bool = False
    """Continue from the newest checkpoint in `out`, with the same settings; `steps` may grow."""
    overwrite: bool = False
    """Discard the run that `out` holds."""
    checkpoint_every_steps: int | None = None
    """Updates between checkpoints. The default is a checkpoint every 30 seconds."""
    devices: int = 1
    """Devices to split the streams over; on a CPU, each is one of its cores."""
    max_skipped: int = 10
    """Give up after this many consecutive updates without a finite loss and gradient."""
    sample: int | None = None
    """Write this many characters from the run in `out` instead of training."""
    prompt: str = ""
    """Text that the network reads before the sample; it is not printed."""
    temperature: float = 1.0
    """Divides the logits of the sample: below 1 favours likely characters."""

    def __post_init__(self):
        counts = ("steps", "hidden_size", "batch_size", "window", "evaluate_every", "devices")
        cli.expect_at_least(1, self, *counts, "checkpoint_every_steps", "max_skipped", "sample")
        cli.expect_positive(self, "learning_rate", "temperature")
        cli.expect_seed(self)
        if self.batch_size % self.devices:
            raise InputError(
                f"--devices: expected a divisor of batch_size {self.batch_size}, got {self.devices}"
            )
        if self.resume and self.overwrite:
            raise InputError("--overwrite: expected without --resume, got both")
        if self.sample is None and self.prompt:
            raise InputError("--prompt: expected together with --sample, got it alone")


def draw(rows: list[dict], valid_bpc: float, path: Path) -> None:
    """Bits per character over updates; `valid_bpc` is the final validation value."""
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    steps = [row["step"] for row in rows]
    ax.plot(steps, [row["train_bpc"] for row in rows], lw=0.8, alpha=0.6, label="training batch")
    points = {row["step"]: row["valid_bpc"] for row in rows if "valid_bpc" in row}
    points[steps[-1]] = valid_bpc
    ax.plot(list(points), list(points.values()), marker="o", ms=4, label="validation text")
    ax.set(xlabel="updates", ylabel="bits per character", title="Plain tanh RNN, characters")
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(path, dpi=150)
    plt.close(fig)


def bits(params: Params, data: Batch, config: Config) -> float:
    """Bits per character on held-out streams; the state is carried along, from zeros."""
    params = jax.device_put(params, jax.devices()[0])
    h_0 = jnp.zeros((config.batch_size, config.hidden_size))
    parts = jaxrnn.windows(data, 16 * config.window)
    return jaxrnn.evaluate(params, parts, h_0) / math.log(2)


def train(config: Config, vocabulary: str, stream: Batch, valid: Batch, run: Run) -> Params:
    """Trains until update config.steps and logs each update."""
    sizes = len(vocabulary), config.hidden_size, len(vocabulary)
    params = jaxrnn.init(jax.random.key(config.seed), *sizes)
    for data in (stream, valid):
        jaxrnn.check_values(params, data)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(config.learning_rate))
    zeros = np.zeros((config.batch_size, config.hidden_size), np.float32)
    mesh = jax.sharding.Mesh(jax.devices()[: config.devices], ("batch",))
    replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P("batch"))
    state = jaxrnn.init_state(params, optimizer, h=jnp.asarray(zeros))
    gradient_fn = jaxrnn.data_parallel(jaxrnn.bptt, mesh) if config.devices > 1 else jaxrnn.bptt
    update = jaxrnn.make_update(gradient_fn, optimizer)

    state = jax.device_put(run.restore(state), replicated)
    batches = endless_windows(stream, config.window, seen=run.step)
    with tqdm(total=config.steps, initial=run.step, unit="step", disable=None) as bar:
        for step in range(run.step + 1, config.steps + 1):
            first_of_pass, batch = next(batches)
            # The sharding that update returns, so that it compiles once.
            h = jax.device_put(zeros if first_of_pass else state.h, sharded)
            state, metrics = update(state._replace(h=h), batch)
            row = metrics_row(step, metrics)
            if step % config.evaluate_every == 0:
                with run.pause_step_clock():
                    row["valid_bpc"] = bits(state.params, valid, config)
            run.log(row)
            show_progress(bar, row)
            stop_if_diverged(run.rows, config.max_skipped)
            run.save_if_due(state, last=step == config.steps)
    return state.params


def metrics_row(step: int, metrics: jaxrnn.Metrics) -> dict:
    """A line of metrics; a skipped update adds `skipped`, the number of consecutive ones."""
    row = {
        "step": step,
        "train_bpc": metrics.loss.item() / math.log(2),
        "gradient_norm": metrics.gradient_norm.item(),
    }
    if skipped := metrics.skipped.item():
        row["skipped"] = skipped
    return row


def show_progress(bar: tqdm, row: dict) -> None:
    """Advances the bar; without a terminal, each evaluation prints a line to stderr instead."""
    if row.get("skipped") == 1:
        message = f"step {row['step']}: update skipped, loss or gradient is not finite"
        tqdm.write(message, sys.stderr)
    if "valid_bpc" in row:
        valid = f"validation {row['valid_bpc']:.3f} bpc"
        bar.set_postfix_str(valid, refresh=False)
        if bar.disable:
            line = f"step {row['step']} of {bar.total}: {row['train_bpc']:.3f} bpc, {valid}"
            print(line, file=sys.stderr, flush=True)
    bar.set_description(f"{row['train_bpc']:.3f} bpc", refresh=False)
    bar.update()


def stop_if_diverged(rows: list[dict], max_skipped: int) -> None:
    if rows[-1].get("skipped", 0) >= max_skipped:
        norms = [row["gradient_norm"] for row in rows[-2 * max_skipped :]]
        raise Diverged(rows[-1]["step"], max_skipped, norms)


def summarize(config: Config, run: Run, params: Params, held_out: dict[str, float]) -> dict:
    recent = [row["train_bpc"] for row in run.rows[-100:] if "skipped" not in row]
    return {
        "train_bpc": sum(recent) / max(1, len(recent)),
        **held_out,
        "steps": config.steps,
        "skipped": sum("skipped" in row for row in run.rows),
        "seconds": run.seconds,
        "milliseconds_per_step": 1e3 * run.seconds_of_steps / config.steps,
        "parameters": sum(leaf.size for leaf in params),
        "vocabulary": params.W_y.shape[0],
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


def check_memory(config: Config, vocabulary: str) -> None:
    """XLA aborts the process if there is not enough memory."""
    H, V, steps = config.hidden_size, len(vocabulary), config.batch_size * config.window
    needed = 4 * (5 * H * (H + 2 * V) + 2 * steps * (H + V)) / 1e9
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if needed > available:
        raise InputError(
            f"--hidden-size: expected a network for {available:.0f} GB of memory, got {H}, which "
            f"needs {needed:.0f} GB"
        )


def settings_of(config: Config, text: str) -> dict:
    """The settings that decide every step: a resumed run must have the same."""
    free = "steps out resume overwrite checkpoint_every_steps devices sample prompt temperature"
    settings = dataclasses.asdict(config)
    for name in free.split():
        del settings[name]
    settings["text"] = f"SHA-256 {hashlib.sha256(text.encode()).hexdigest()}"
    return {"experiment": "char_lm", **settings}


def open_run(config: Config, text: str) -> Run:
    run_state.make_folder(config.out)
    run = Run(
        config.out,
        settings_of(config, text),
        resume=config.resume,
        overwrite=config.overwrite,
        every_steps=config.checkpoint_every_steps,
    )
    if config.steps < run.step:
        raise InputError(
            f"--steps: expected at least the {run.step} that the run in {config.out} has done, "
            f"got {config.steps}"
        )
    return run


def sample(config: Config, params: Params, vocabulary: str, length: int) -> Iterator[str]:
    key = jax.random.key(config.seed + 1)
    temperature, prompt = config.temperature, config.prompt
    return char_sample.sample(
        key, params, vocabulary, length, prompt=prompt, temperature=temperature
    )


def train_and_report(config: Config) -> dict:
    """Trains or resumes a run, writes its files and prints its summary."""
    cli.use_devices(config.devices)
    text = read_text(config.text)
    vocabulary, parts = split(text, config.text, config.batch_size, config.window)
    check_memory(config, vocabulary)
    run, out = open_run(config, text), config.out
    stream, valid, test = (streams(part, config.batch_size) for part in parts)
    flags = {key: str(v) if isinstance(v, Path) else v for key, v in vars(config).items()}
    with run:
        run_state.write_json(out / "config.json", flags)
        run_state.write_json(out / "vocabulary.json", vocabulary)
        params = train(config, vocabulary, stream, valid, run)
    held_out = {"valid_bpc": bits(params, valid, config), "test_bpc": bits(params, test, config)}
    summary = summarize(config, run, params, held_out)
    draw(run.rows, held_out["valid_bpc"], out / "curve.png")
    written = "".join(sample(config, params, vocabulary, 600))
    run_state.write_atomically(out / "sample.txt", written + "\n")
    run_state.write_json(out / "summary.json", summary)
    for name in ("train_bpc", "valid_bpc", "test_bpc"):
        print(f"{name:<10} {summary[name]:.3f}")
    print(f"{config.steps} steps in {summary['seconds']:.1f} s; results are in {out}\n")
    char_sample.print_text([written])
    return summary


def main(config: Config) -> None:
    if config.sample is None:
        train_and_report(config)
    else:
        params, vocabulary = char_sample.load(config.out)
        char_sample.print_text(sample(config, params, vocabulary, config.sample))


def run(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: main(cli.parse(Config, arguments)))


if __name__ == "__main__":
    sys.exit(run())
