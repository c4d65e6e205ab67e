"""Hessian-free optimisation: does curvature teach a plain tanh network to remember for T steps?

A gradient that vanishes over T steps is small, and so is the curvature along it. Conjugate
gradients divide the one by the other (Martens 2010), and structural damping keeps the hidden states
from changing more than a quadratic holds for (Martens and Sutskever 2011). The tasks, the networks
and their initial weights are those of temporal_order and adding. A seed has solved the task at the
first update after which at most 1 % of 10,000 new sequences are wrong. A first-order method of
long_lag_tasks trains the same networks for the same time, all at once.

    python -m experiments.hessian_free --out runs/hessian_free
"""

import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import jax
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import jaxrnn
from experiments import adding, cli, long_lag_tasks, temporal_order
from experiments.hessian_free_report import draw, summarize
from experiments.hessian_free_update import Objective, Rules, hessian_free_update, init_state
from experiments.long_lag_tasks import CHUNK, SOLVED, Name, Task, init_networks
from experiments.multi_seed import use_all_cores
from experiments.reports import Report
from jaxrnn import Batch, curvature

TASKS = {task.name: task for task in (temporal_order.TASK, adding.TASK)}


@dataclasses.dataclass(frozen=True)
class Config:
    """Hessian-free optimisation of tanh networks on tasks with long lags."""

    task: Literal["temporal order", "adding"] = "temporal order"
    """The task."""
    lengths: tuple[int, ...] = (200,)
    """Sequence lengths T."""
    updates: int = 40
    """Maximal number of updates of each network."""
    hidden_size: int = 50
    """Hidden units, H."""
    batch_size: int = 1024
    """Sequences per update, B; all are new."""
    damping: float = 0.1
    """Initial damping, lambda."""
    structural: float = 0.1
    """Structural damping relative to lambda, mu."""
    cg_steps: int = 150
    """Maximal number of conjugate gradient steps of an update."""
    test_size: int = 10_000
    """New test sequences after each update."""
    first_order: Name | None = "+ clipping"
    """Method of long_lag_tasks that trains for the same time; None leaves it out."""
    seeds: int = 6
    """Number of networks."""
    seed: int = 0
    """Seed of all random numbers."""
    out: Path = Path("runs/hessian_free")
    """Folder for metrics.jsonl, figure.png and summary.json."""
    overwrite: bool = False
    """Discard the run that `out` holds."""
    smoke: bool = False
    """Use sizes that run in seconds, to check that everything works."""

    def __post_init__(self):
        cli.expect_values(self, "lengths")
        counts = ("lengths", "updates", "hidden_size", "batch_size", "cg_steps", "test_size")
        cli.expect_at_least(1, self, *counts, "seeds")
        cli.expect_at_least(10, self, "lengths")
        cli.expect_positive(self, "damping")
        cli.expect_at_least(0, self, "structural")
        cli.expect_seed(self)


SMOKE = {
    "lengths": (10,),
    "updates": 2,
    "hidden_size": 16,
    "batch_size": 8,
    "cg_steps": 3,
    "test_size": 20,
    "seeds": 2,
}

HESSIAN_FREE = "Hessian-free"

CHECK_EVERY = 500
"""Updates between checks of the first-order method."""


def objective(task: Task, batch: Batch, unravel) -> Objective:
    """The loss of a batch, each device with its share of the sequences: means over `batch`.

    All shares count the same number of steps, so the mean of their means is that of the batch.
    """

    def local(theta):
        return unravel(lax.pcast(theta, "batch", to="varying"))

    def value(theta):
        return lax.pmean(jaxrnn.sequence_loss(local(theta), batch, loss=task.loss)[0], "batch")

    def value_and_gradient(theta):
        (f, _), grads = jaxrnn.bptt(local(theta), batch, loss=task.loss)
        return lax.pmean((f, ravel_pytree(grads)[0]), "batch")

    def gauss_newton(theta):
        product = curvature.gauss_newton(local(theta), batch, loss=task.loss)

        def of_all(v, structural=None):
            return lax.pmean(ravel_pytree(product(local(v), structural))[0], "batch")

        return of_all

    return Objective(value, value_and_gradient, gauss_newton)


def wrong_sequences(task: Task, params, batch: Batch) -> Array:
    """(B,) bool: the output is wrong at a step that counts."""
    _, ys = jaxrnn.unroll(params, batch.xs)
    wrong = jax.vmap(task.wrong)(ys, batch.targets)
    return (wrong & (batch.weights > 0)).any(axis=0)


def devices_for(size: int) -> Mesh:
    """As many devices as divide the size."""
    count = max(n for n in range(1, len(jax.devices()) + 1) if size % n == 0)
    return Mesh(jax.devices()[:count], ("batch",))


def make_functions(config: Config, task: Task, T: int, unravel):
    """update(state, key) -> (state, metrics) and error_rate(theta, key), over all devices."""
    mesh = devices_for(config.batch_size)
    rules = Rules(config.structural, config.cg_steps)
    devices = mesh.shape["batch"]
    chunks = devices * math.ceil(config.test_size / CHUNK / devices)

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(None, "batch")), out_specs=P())
    def update(state, batch):
        return hessian_free_update(state, objective(task, batch, unravel), rules)

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P())
    def error_rate(theta, keys):
        def chunk_error_rate(key):
            batch = task.batch(key, T, math.ceil(config.test_size / chunks))
            return wrong_sequences(task, unravel(theta), batch).mean()

        return lax.pmean(lax.map(chunk_error_rate, keys).mean(), "batch")

    def on_new_batch(state, key):
        return update(state, task.batch(key, T, config.batch_size))

    def on_new_sequences(theta, key):
        return error_rate(theta, jax.random.split(key, chunks))

    return NamedSharding(mesh, P()), jax.jit(on_new_batch), jax.jit(on_new_sequences)


def first_order_config(config: Config, T: int, method: Name) -> long_lag_tasks.Config:
    """The settings of long_lag_tasks with the same networks; time ends the updates."""
    return long_lag_tasks.Config(
        lengths=(T,), updates=10**6 * CHECK_EVERY, check_every=CHECK_EVERY, methods=(method,),
        out=config.out, hidden_size=config.hidden_size, test_size=config.test_size,
        seeds=config.seeds, seed=config.seed,
    )  # fmt: skip


def train(config: Config, task: Task, T: int) -> Iterator[dict]:
    """Trains one network after the other until it has solved the task.

    Yields a row after each update: seed, updates, seconds since the network's start, error rate and
    the metrics of the update.
    """
    key_init, key_train = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), T))
    (tanh,) = long_lag_tasks.methods(first_order_config(config, T, "tanh"))
    networks = init_networks(config, task, tanh, key_init)
    thetas = jax.vmap(lambda params: ravel_pytree(params)[0])(networks)
    unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], networks))[1]
    replicated, update, error_rate = make_functions(config, task, T, unravel)
    for seed, theta in enumerate(thetas):
        start = time.monotonic()
        state = jax.device_put(init_state(theta, config.damping), replicated)
        for n in range(1, config.updates + 1):
            key = jax.random.fold_in(jax.random.fold_in(key_train, seed), n)
            key_batch, key_test = jax.random.split(key)
            state, metrics = update(state, key_batch)
            error = error_rate(state.theta, key_test).item()
            measured = {name: value.item() for name, value in metrics._asdict().items()}
            seconds = time.monotonic() - start
            yield {"seed": seed, "updates": n, "seconds": seconds, "error": error, **measured}
            if error <= SOLVED:
                break


def train_first_order(config: Config, task: Task, T: int, limit: float) -> Iterator[dict]:
    """Trains all networks at once by the first-order method until the time is up.

    Yields a row for each seed at each check.
    """
    settings, start = first_order_config(config, T, config.first_order), time.monotonic()
    (method,) = long_lag_tasks.methods(settings)
    for updates, errors in long_lag_tasks.train(settings, task, T, method):
        seconds = time.monotonic() - start
        for seed, error in enumerate(errors):
            yield {"seed": seed, "updates": updates, "seconds": seconds, "error": error}
        if seconds >= limit or max(errors) <= SOLVED:
            break


def main(config: Config) -> dict:
    use_all_cores()
    report, task = Report(config), TASKS[config.task]
    with tqdm(total=len(config.lengths) * config.seeds, unit="network", disable=None) as bar:
        for n, T in enumerate(config.lengths):
            start = time.monotonic()
            for row in train(config, task, T):
                report.log(T=T, method=HESSIAN_FREE, **row)
                bar.set_description(
                    f"T {T}, update {row['updates']}: loss {row['new_loss']:.4f}, "
                    f"damping {row['damping']:.1e}, {row['cg_steps']} CG steps"
                )
                bar.update(n * config.seeds + row["seed"] - bar.n)
            limit = time.monotonic() - start
            if config.first_order:
                for row in train_first_order(config, task, T, limit):
                    report.log(T=T, method=config.first_order, **row)
                    bar.set_description(f"T {T}, {config.first_order}: {row['seconds']:.0f} s")
    ours, figures = summarize(report.rows)
    return report.finish(ours, partial(draw, task=task), **figures)


def run(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: main(cli.parse(Config, arguments, SMOKE)))


if __name__ == "__main__":
    sys.exit(run())
