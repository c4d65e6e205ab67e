"""A character-level language model, trained by truncated backpropagation through time.

The text is laid out in `batch_size` parallel streams. Each update sees the next `window` characters
of every stream and starts from the state that the last window ended in.

    python -m experiments.char_lm --text FILE --out DIR
    python -m experiments.char_lm --text FILE --out DIR --resume
    python -m experiments.char_lm --out DIR --sample 500 --prompt TEXT --temperature 0.8

The second command continues a stopped run bit-identically. With more `--steps` it extends a
finished one. The third writes text from the trained network.
"""

import dataclasses
import hashlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import jaxrnn
from experiments import char_report, char_sample, cli, processes, run_state
from experiments.char_data import check_memory, endless_windows, read_text, split, streams
from experiments.cli import InputError
from experiments.run_state import Run
from jaxrnn import Batch, Diverged, Params


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a character-level language model with a plain tanh network, or samples from one.

    Exit status: 0 success; 2 bad usage or input; 3 files are damaged or cannot be written; 4
    diverged; 5 another process ended; 130, 143 stopped by SIGINT, SIGTERM after saving.
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
    """Devices of each process to split the streams over; on a CPU, each is one of its cores."""
    distributed: bool = False
    """Train over the processes that Slurm, Open MPI or another cluster has started."""
    coordinator: str | None = None
    """Host and port of process 0, without a cluster; with `processes` and `process`."""
    processes: int = 1
    """Number of processes, each started by a command of its own; process 0 writes to `out`."""
    process: int = 0
    """Number of this process, from 0."""
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
        cli.expect_at_least(
            1, self, *counts, "processes", "checkpoint_every_steps", "max_skipped", "sample"
        )
        cli.expect_positive(self, "learning_rate", "temperature")
        cli.expect_seed(self)
        cli.expect(self, "process", f"below {self.processes}", lambda n: 0 <= n < self.processes)
        if (self.coordinator is None) != (self.processes == 1):
            raise InputError("--processes: expected together with --coordinator, got one of them")
        self.check_devices(self.processes)
        if self.resume and self.overwrite:
            raise InputError("--overwrite: expected without --resume, got both")
        if self.sample is None and self.prompt:
            raise InputError("--prompt: expected together with --sample, got it alone")
        if self.sample is not None and (self.resume or self.overwrite):
            raise InputError("--sample: expected without --resume and --overwrite, got one of them")

    def check_devices(self, processes: int) -> None:
        if self.batch_size % (self.devices * processes):
            raise InputError(
                f"--devices: expected a divisor of batch_size {self.batch_size}"
                f"{f' / {processes} processes' if processes > 1 else ''}, got {self.devices}"
            )


def bits(params: Params, data: Batch, config: Config) -> float:
    """Bits per character on held-out streams; the state is carried along, from zeros."""
    params = jax.tree.map(np.asarray, params)
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
    count = config.devices * jax.process_count()
    mesh = jax.sharding.Mesh(jax.devices()[:count], ("batch",))
    replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P("batch"))
    state = jaxrnn.init_state(params, optimizer, h=jnp.asarray(zeros))
    gradient_fn = jaxrnn.data_parallel(jaxrnn.bptt, mesh) if count > 1 else jaxrnn.bptt
    update = jaxrnn.make_update(gradient_fn, optimizer)

    state = run.restore(state)
    state = jax.device_put(state._replace(h=None), replicated)._replace(h=state.h)
    batches = endless_windows(stream, config.window, seen=run.step)
    with tqdm(total=config.steps, initial=run.step, unit="step", disable=hides_progress()) as bar:
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


def hides_progress() -> bool | None:
    """None shows a bar on a terminal; of several processes, process 0 prints lines."""
    return None if jax.process_count() == 1 else True


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
        if bar.disable and jax.process_index() == 0:
            line = f"step {row['step']} of {bar.total}: {row['train_bpc']:.3f} bpc, {valid}"
            print(line, file=sys.stderr, flush=True)
    bar.set_description(f"{row['train_bpc']:.3f} bpc", refresh=False)
    bar.update()


def stop_if_diverged(rows: list[dict], max_skipped: int) -> None:
    if rows[-1].get("skipped", 0) >= max_skipped:
        norms = [row["gradient_norm"] for row in rows[-2 * max_skipped :]]
        raise Diverged(rows[-1]["step"], max_skipped, norms)


def settings_of(config: Config, text: str) -> dict:
    """The settings that decide every step: a resumed run must have the same."""
    free = "steps out resume overwrite checkpoint_every_steps devices sample prompt temperature"
    settings = dataclasses.asdict(config)
    for name in f"{free} distributed coordinator processes process".split():
        del settings[name]
    settings["text"] = f"SHA-256 {hashlib.sha256(text.encode()).hexdigest()}"
    return {"experiment": "char_lm", **settings}


def open_run(config: Config, text: str) -> Run:
    """The run; of several processes, process 0 writes to the folder."""
    settings, kind = settings_of(config, text), Run
    if jax.process_count() > 1:
        processes.check_equal(settings | {"steps": config.steps})
        if jax.process_index() > 0:
            return processes.Follower(settings)
        kind = processes.Leader
    run_state.make_folder(config.out)
    run = kind(
        config.out,
        settings,
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


def train_and_report(config: Config) -> None:
    """Trains or resumes a run, writes its files and prints its summary."""
    if not processes.is_worker():
        cli.use_devices(config.devices)
    text = read_text(config.text)
    vocabulary, parts = split(text, config.text, config.batch_size, config.window)
    check_memory(config.hidden_size, len(vocabulary), config.batch_size * config.window)
    if processes.is_worker():  # after the checks of this process alone
        processes.connect(config.coordinator, config.processes, config.process, config.devices)
        config.check_devices(jax.process_count())
    run, out = open_run(config, text), config.out
    stream, valid, test = (streams(part, config.batch_size) for part in parts)
    flags = {key: str(v) if isinstance(v, Path) else v for key, v in vars(config).items()}
    with run:
        if jax.process_index() == 0:
            run_state.write_json(out / "config.json", flags)
            run_state.write_json(out / "vocabulary.json", vocabulary)
        params = train(config, vocabulary, stream, valid, run)
    if jax.process_index() == 0:
        report(config, run, params, vocabulary, valid, test)


def report(
    config: Config, run: Run, params: Params, vocabulary: str, valid: Batch, test: Batch
) -> None:
    """Writes the summary, the curve and a sample, and prints them."""
    out = config.out
    held_out = {"valid_bpc": bits(params, valid, config), "test_bpc": bits(params, test, config)}
    summary = char_report.summarize(config.steps, run, params, held_out)
    char_report.draw(run.rows, held_out["valid_bpc"], out / "curve.png")
    written = "".join(sample(config, params, vocabulary, 600))
    run_state.write_atomically(out / "sample.txt", written + "\n")
    run_state.write_json(out / "summary.json", summary)
    for name in ("train_bpc", "valid_bpc", "test_bpc"):
        print(f"{name:<10} {summary[name]:.3f}")
    print(f"{config.steps} steps in {summary['seconds']:.1f} s; results are in {out}\n")
    char_sample.print_text([written])


def main(config: Config, arguments: list[str]) -> None:
    several = config.distributed or config.coordinator is not None
    if config.sample is not None:
        params, vocabulary = char_sample.load(config.out)
        char_sample.print_text(sample(config, params, vocabulary, config.sample))
    elif several and not processes.is_worker():
        processes.supervise("experiments.char_lm", arguments)
    elif several:
        with processes.worker_streams(), processes.lost_if_another_ends():
            train_and_report(config)
    else:
        train_and_report(config)


def run(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return cli.exit_status(lambda: main(cli.parse(Config, arguments), arguments))


if __name__ == "__main__":
    sys.exit(processes.leave(run()))
