"""Hessian-free optimisation: does curvature teach a plain tanh network to remember for T steps?

A gradient that vanishes over T steps is small, and so is the curvature along it. Conjugate
gradients divide the one by the other (Martens 2010), and structural damping keeps the changes of
the hidden states in the range of the quadratic (Martens and Sutskever 2011). The networks and their
initial weights are those of temporal_order, the tasks those of temporal_order, adding and
memory_tasks. A seed has solved the task at the first update after which at most 1 % of 10,000 new
sequences are wrong. With `--compare`, first-order methods of long_lag_tasks, or SOFO in random
subspaces, train the same networks for the same time, all at once.

    python -m experiments.hessian_free --out runs/hessian_free
"""

import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from experiments import (
    adding,
    cli,
    hessian_free_compare,
    long_lag_tasks,
    memory_tasks,
    run_state,
    temporal_order,
)
from experiments.hessian_free_compare import train_for
from experiments.hessian_free_objective import objective
from experiments.hessian_free_report import draw, of_run, summarize
from experiments.hessian_free_update import (
    Rules,
    State,
    hessian_free_update,
    init_state,
)
from experiments.long_lag_tasks import CHUNK, SOLVED, Task, init_networks, wrong_sequences
from experiments.multi_seed import devices_for, use_all_cores
from experiments.reports import write_results
from experiments.run_state import Run
from jaxrnn import TrainState

TASKS = {task.name: task for task in (temporal_order.TASK, adding.TASK, *memory_tasks.TASKS)}
TaskName = Literal[
    "temporal order", "adding", "multiplication", "3-bit temporal order", "random permutation",
    "5-bit memorisation", "20-bit memorisation",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Hessian-free optimisation of tanh networks on tasks with long lags."""

    tasks: tuple[TaskName, ...] = ("temporal order",)
    """The tasks."""
    lengths: tuple[int, ...] = (200,)
    """Sequence lengths T."""
    updates: int = 60
    """Maximal number of updates of each network."""
    hidden_size: int = 50
    """Hidden units, H."""
    start: long_lag_tasks.Start = "sparse"
    """Initial W_h: sparse with spectral radius 0.95, or orthogonal."""
    batch_size: int = 512
    """Sequences per update, B; all are new."""
    gradient_batches: int = 16
    """Batches that loss and gradient are means over; the curvature is that of the first."""
    damping: float = 0.03
    """Initial damping, lambda."""
    structural: float = 0.1
    """Structural damping relative to lambda, mu."""
    cg_steps: int = 150
    """Maximal number of conjugate gradient steps of an update."""
    test_size: int = 10_000
    """New test sequences after each update."""
    compare: tuple[hessian_free_compare.Name, ...] = ()
    """Methods that train the same networks for the same time, all at once."""
    seeds: int = 6
    """Number of networks."""
    seed: int = 0
    """Seed of all random numbers."""
    out: Path = Path("runs/hessian_free")
    """Folder for metrics.jsonl, figure.png and summary.json."""
    resume: bool = False
    """Continue from the newest checkpoint in `out`, with the same settings."""
    overwrite: bool = False
    """Discard the run that `out` holds."""
    smoke: bool = False
    """Use sizes that run in seconds, to check that everything works."""

    def __post_init__(self):
        cli.expect_values(self, "tasks", "lengths")
        counts = ("lengths", "updates", "hidden_size", "batch_size", "cg_steps", "test_size")
        cli.expect_at_least(1, self, *counts, "gradient_batches", "seeds")
        cli.expect_at_least(10, self, "lengths")
        cli.expect_positive(self, "damping")
        cli.expect_at_least(0, self, "structural")
        cli.expect_seed(self)
        if self.resume and self.overwrite:
            raise cli.InputError("--overwrite: expected without --resume, got both")


SMOKE = {
    "lengths": (10,),
    "updates": 2,
    "hidden_size": 16,
    "batch_size": 8,
    "gradient_batches": 2,
    "cg_steps": 3,
    "test_size": 20,
    "seeds": 2,
}

HESSIAN_FREE = "Hessian-free"


def make_functions(config: Config, task: Task, T: int, unravel):
    """update(state, key) -> (state, metrics) and error_rate(theta, key), over all devices."""
    mesh = devices_for(config.batch_size, "batch")
    rules = Rules(config.structural, config.cg_steps)
    devices = mesh.shape["batch"]
    chunks = devices * math.ceil(config.test_size / CHUNK / devices)

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(None, None, "batch")), out_specs=P())
    def update(state, batches):
        return hessian_free_update(state, objective(task, batches, unravel), rules)

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P())
    def error_rate(theta, keys):
        def chunk_error_rate(key):
            batch = task.batch(key, T, math.ceil(config.test_size / chunks))
            return wrong_sequences(task, unravel(theta), batch).mean()

        return lax.pmean(lax.map(chunk_error_rate, keys).mean(), "batch")

    def on_new_batches(state, key):
        keys = jax.random.split(key, config.gradient_batches)
        return update(state, jax.vmap(lambda key: task.batch(key, T, config.batch_size))(keys))

    def on_new_sequences(theta, key):
        return error_rate(theta, jax.random.split(key, chunks))

    return NamedSharding(mesh, P()), jax.jit(on_new_batches), jax.jit(on_new_sequences)


def settings_of_networks(config: Config, T: int) -> long_lag_tasks.Config:
    """The settings of long_lag_tasks with the same networks."""
    return long_lag_tasks.Config(
        lengths=(T,), updates=1, check_every=1, methods=("tanh",), out=config.out,
        hidden_size=config.hidden_size, test_size=config.test_size, seeds=config.seeds,
        seed=config.seed, start=config.start,
    )  # fmt: skip


def networks(config: Config, task: Task, T: int) -> tuple[Array, Callable]:
    """The initial parameters of all seeds (seeds, P), as in long_lag_tasks, and their unravel."""
    settings = settings_of_networks(config, T)
    (tanh,) = long_lag_tasks.methods(settings)
    key_init, _ = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), T))
    params = init_networks(settings, task, tanh, key_init)
    unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], params))[1]
    return jax.vmap(lambda params: ravel_pytree(params)[0])(params), unravel


def is_trained(config: Config, rows: list[dict]) -> bool:
    """Whether the network with these rows has solved the task, or has had all its updates."""
    return bool(rows) and (rows[-1]["error"] <= SOLVED or rows[-1]["updates"] >= config.updates)


def train(config: Config, task: Task, T: int, rows: list[dict], state: State | None = None):
    """Trains one network after the other until it has solved the task.

    Goes on from the rows of a stopped run, with the state after the last of them. Yields after each
    update a row and the state; the row has the network's seed, updates and seconds, the error rate
    and the metrics of the update.
    """
    thetas, unravel = networks(config, task, T)
    _, key_train = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), T))
    replicated, update, error_rate = make_functions(config, task, T, unravel)
    for seed, theta in enumerate(thetas):
        done = of_run(rows, task.name, T, HESSIAN_FREE, seed)
        if is_trained(config, done):
            continue
        if state is None or not done:
            state = init_state(theta, config.damping)
        state = jax.device_put(state, replicated)
        start = time.monotonic() - (done[-1]["seconds"] if done else 0)
        while not is_trained(config, done):
            n = len(done) + 1
            key = jax.random.fold_in(jax.random.fold_in(key_train, seed), n)
            key_batch, key_test = jax.random.split(key)
            state, metrics = update(state, key_batch)
            error = error_rate(state.theta, key_test).item()
            row = {"task": task.name, "T": T, "method": HESSIAN_FREE, "seed": seed, "updates": n}
            row |= {"seconds": time.monotonic() - start, "error": error}
            row |= {name: value.item() for name, value in metrics._asdict().items()}
            done.append(row)
            yield row, state


def checkpoint(step: int, state: State) -> TrainState:
    """What a checkpoint holds. No update is skipped: one without a finite loss is rejected."""
    zero = jnp.zeros((), int)
    return TrainState(zero + step, params=state, opt_state=(), skipped=zero)


def compare(config: Config, task: Task, T: int, run: Run, bar: tqdm, state: TrainState) -> None:
    """Trains by each method of `compare` as long as Hessian-free optimisation has taken."""
    seeds = [of_run(run.rows, task.name, T, HESSIAN_FREE, seed) for seed in range(config.seeds)]
    limit = sum(rows[-1]["seconds"] for rows in seeds)
    settings = settings_of_networks(config, T)
    for method in config.compare:
        if of_run(run.rows, task.name, T, method, 0):
            continue
        checks: list[dict] = []
        for rows in train_for(limit, settings, task, T, method):
            checks += rows
            bar.set_description(f"{task.name}, T {T}, {method}: {rows[0]['seconds']:.0f} s")
            run.save_if_due(state, last=False)
        for row in checks:  # all or none, so that a resumed run repeats them
            run.log({"step": run.step + 1, "task": task.name} | row)


def train_all(config: Config, run: Run, bar: tqdm) -> None:
    """Trains for each task and T by all methods, and logs each update."""
    first = {"task": config.tasks[0], "T": config.lengths[0]}
    last: dict = run.rows[-1] if run.rows else first
    theta = networks(config, TASKS[last["task"]], last["T"])[0][0]
    state = run.restore(checkpoint(0, init_state(theta, config.damping)))
    for n, (name, T) in enumerate(itertools.product(config.tasks, config.lengths)):
        task = TASKS[name]
        for row, latest in train(config, task, T, run.rows, state.params):
            run.log({"step": run.step + 1} | row)
            state = checkpoint(run.step, latest)
            bar.set_description(
                f"{name}, T {T}, update {row['updates']}: loss {row['new_loss']:.4f}, "
                f"damping {row['damping']:.1e}, {row['cg_steps']} CG steps"
            )
            bar.update(n * config.seeds + row["seed"] - bar.n)
            run.save_if_due(state, last=False)
        compare(config, task, T, run, bar, state)
    bar.update(bar.total - bar.n)
    run.save_if_due(state, last=True)


def main(config: Config) -> dict:
    use_all_cores()
    run_state.make_folder(config.out)
    settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    decisive = {k: v for k, v in settings.items() if k not in ("out", "overwrite", "resume")}
    run = Run(config.out, decisive, resume=config.resume, overwrite=config.overwrite)
    count = len(config.tasks) * len(config.lengths) * config.seeds
    with run, tqdm(total=count, unit="network", disable=None) as bar:
        train_all(config, run, bar)
    ours, figures = summarize(run.rows)
    summary = write_results(config, run.seconds, ours, draw, **figures)
    run_state.discard_checkpoints(config.out)  # there is nothing left to resume
    return summary


def run(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: main(cli.parse(Config, arguments, SMOKE)))


if __name__ == "__main__":
    sys.exit(run())
