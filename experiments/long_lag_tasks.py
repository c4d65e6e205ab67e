"""Can a plain recurrent network be trained to remember over T steps?

What temporal_order and adding share: the settings, four ways to train, training of all seeds at
once, the figure. The ways:

    tanh                    Adam, nothing else
    + clipping              the gradient's norm is cut at a threshold
    + regulariser           and the loss asks that gradients keep their norm through time
    identity ReLU           the IRNN: W_h starts as the identity, f = ReLU, with clipping

A seed counts as solved at the first check at which at most 1 % of 10,000 fresh sequences are wrong.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import lax
from tqdm import tqdm

import jaxrnn
from experiments import cli
from experiments.multi_seed import share_out, use_all_cores
from experiments.regularizer import regularizer
from experiments.reports import Report
from jaxrnn import Activation, Batch, Loss, Params

Name = Literal["tanh", "+ clipping", "+ regulariser", "identity ReLU"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Success rates against the lag, for four ways to train a plain recurrent network."""

    lengths: tuple[int, ...]
    """Sequence lengths T."""
    updates: int
    """Maximal number of updates at each T."""
    hidden_size: int
    """Hidden units, H."""
    out: Path
    """Folder for metrics.jsonl, figure.png and summary.json."""
    check_every: int = 1_000
    """Updates between checks."""
    test_size: int = 10_000
    """New test sequences at each check."""
    batch_size: int = 20
    """Sequences in an update, each of them new, B."""
    learning_rate: float = 1e-3
    """Learning rate of Adam for tanh."""
    identity_learning_rate: float = 1e-4
    """Of Adam for the identity ReLU; an update moves the spectral radius by up to H times it."""
    clip: float = 1.0
    """Threshold of the gradient's norm."""
    regularizer: float = 2.0
    """Weight of the regulariser."""
    methods: tuple[Name, ...] = get_args(Name)
    """Ways to train."""
    seeds: int = 6
    """Number of networks, trained in parallel."""
    seed: int = 0
    """Seed of all random numbers."""
    overwrite: bool = False
    """Discard the run that `out` holds."""
    smoke: bool = False
    """Use sizes that run in seconds, to check that everything works."""

    def __post_init__(self):
        cli.expect_values(self, "lengths", "methods")
        counts = ("lengths", "updates", "hidden_size", "check_every", "test_size", "batch_size")
        cli.expect_at_least(1, self, *counts, "seeds")
        cli.expect_positive(self, "learning_rate", "identity_learning_rate", "clip")
        cli.expect_multiple(self, "updates", of="check_every")
        cli.expect_seed(self)


SMOKE = {
    "lengths": (10,),
    "updates": 4,
    "hidden_size": 16,
    "check_every": 2,
    "test_size": 20,
    "batch_size": 2,
    "methods": ("+ regulariser", "identity ReLU"),
    "seeds": 2,
}

SOLVED = 0.01
"""The share of wrong answers at most."""

PART = 500
"""Sequences tested at a time, at most, as the states of all of them take memory."""


class Task(NamedTuple):
    """A problem: its batches, sizes and loss, which last outputs are wrong, who solved it."""

    name: str
    batch: Callable[..., Batch]
    input_size: int
    output_size: int
    loss: Loss
    wrong: Callable
    published: Name


class Method(NamedTuple):
    """How to start and to train; no threshold is no clipping, no weight no regulariser."""

    name: Name
    activation: Activation
    start: Callable[..., Params]
    learning_rate: float
    clip: float | None
    regularizer: float = 0.0


def sparse(key, shape, dtype=jnp.float32):
    """15 normal weights into each unit, scaled to spectral radius 0.95, as Pascanu et al. start."""
    key_weights, key_which = jax.random.split(key)
    kept = jax.random.uniform(key_which, shape).argsort(axis=1) < 15
    W_h = np.where(kept, jax.random.normal(key_weights, shape), 0)
    return jnp.asarray(0.95 * W_h / np.abs(np.linalg.eigvals(W_h)).max(), dtype)


def start_sparse(key, *sizes) -> Params:
    """The other weights are small: standard deviation 0.01."""
    params = jaxrnn.init(key, *sizes, W_h_init=sparse)
    I, H, _ = sizes
    return params._replace(W_x=0.01 * I**0.5 * params.W_x, W_y=0.01 * H**0.5 * params.W_y)


def start_identity(key, *sizes) -> Params:
    """W_x has standard deviation 0.1."""
    params = jaxrnn.init(key, *sizes, W_h_init=jaxrnn.scaled_identity())
    return params._replace(W_x=0.1 * sizes[0] ** 0.5 * params.W_x)


def methods(config: Config) -> list[Method]:
    tanh = Method("tanh", jaxrnn.tanh, start_sparse, config.learning_rate, None)
    clipped = tanh._replace(name="+ clipping", clip=config.clip)
    regularized = clipped._replace(name="+ regulariser", regularizer=config.regularizer)
    rate = config.identity_learning_rate
    identity = Method("identity ReLU", jaxrnn.relu, start_identity, rate, config.clip)
    every = [tanh, clipped, regularized, identity]
    return [method for method in every if method.name in config.methods]


def train(config: Config, task: Task, T: int, method: Method):
    """Trains all seeds at once; yields at each check the updates done and each seed's errors."""
    f, loss, B, H = method.activation, task.loss, config.batch_size, config.hidden_size
    clip = optax.clip_by_global_norm(method.clip) if method.clip else optax.identity()
    optimizer = optax.chain(clip, optax.adam(method.learning_rate))

    def objective(params, batch):
        value, _ = jaxrnn.sequence_loss(params, batch, activation=f, loss=loss)
        return value + method.regularizer * regularizer(params, batch, activation=f, loss=loss)

    def gradient(params, batch):
        if method.regularizer:
            return jax.grad(objective)(params, batch)
        return jaxrnn.bptt(params, batch, activation=f, loss=loss)[1]

    def update(state, key):
        params, opt_state = state
        grads = gradient(params, task.batch(key, T, B))
        changes, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, changes), opt_state), None

    parts = math.ceil(config.test_size / PART)
    size = math.ceil(config.test_size / parts)

    def share_wrong(params, key):
        batch = task.batch(key, T, size)
        h_T, _ = jaxrnn.hidden_states(params, batch.xs, activation=f)
        return task.wrong(h_T @ params.W_y.T + params.b_y, batch.targets[-1]).mean()

    @jax.jit
    @jax.vmap
    def updates_and_check(state, key):
        key_train, key_test = jax.random.split(key)
        state, _ = lax.scan(update, state, jax.random.split(key_train, config.check_every))
        errors = lax.map(partial(share_wrong, state[0]), jax.random.split(key_test, parts))
        return state, errors.mean()

    key_start, key_train = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), T))
    started = [
        method.start(key, task.input_size, H, task.output_size)
        for key in jax.random.split(key_start, config.seeds)
    ]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *started)
    state = share_out((params, jax.vmap(optimizer.init)(params)))
    for done in range(config.check_every, config.updates + 1, config.check_every):
        keys = jax.random.split(jax.random.fold_in(key_train, done), config.seeds)
        state, errors = updates_and_check(state, share_out(keys))
        yield done, np.asarray(errors).tolist()


def solved_after(rows: list[dict], T: int, method: str) -> list[int | None]:
    """The updates after which each seed had at most 1 % errors for the first time, or None."""
    mine = [row for row in rows if (row["T"], row["method"]) == (T, method)]
    seeds = range(len(mine[0]["errors"]))
    return [
        next((row["updates"] for row in mine if row["errors"][seed] <= SOLVED), None)
        for seed in seeds
    ]


def last_step(T: int, B: int):
    """Weights by which the last step alone counts."""
    return jnp.zeros((T, B)).at[-1].set(1)


def draw(rows: list[dict], task: Task):
    """Above the share of seeds that solved it, against T; below, how fast they did."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 6), layout="constrained")
    lengths, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("T", "method"))
    for n, name in enumerate(names):
        solved = [solved_after(rows, T, name) for T in lengths]
        at = np.arange(len(lengths)) + 0.2 * (n - (len(names) - 1) / 2)
        shares = [100 * (len(s) - s.count(None)) / len(s) for s in solved]
        above.bar(at, np.maximum(shares, 0.8), 0.18, color=f"C{n}", label=name)
        for x, updates in zip(at, solved, strict=True):
            there = [u for u in updates if u is not None]
            below.plot([x] * len(there), there, "o", color=f"C{n}", alpha=0.6)
    above.axhline(100, color="black", linestyle="--", linewidth=0.8)
    above.text(-0.45, 102, f"published, {task.published}", fontsize=8)
    above.set(ylabel=f"seeds that solved {task.name}, %", ylim=(0, 112))
    below.set(ylabel="updates until solved", xlabel="T, steps")
    for ax in (above, below):
        ax.set_xticks(range(len(lengths)), [str(T) for T in lengths])
        ax.set_xlim(-0.5, len(lengths) - 0.5)
        ax.grid(axis="y", alpha=0.3)
    below.set_ylim(0, 1.05 * max(row["updates"] for row in rows))
    figure.legend(loc="outside upper center", ncols=4)
    return figure


def compare(config: Config, task: Task) -> dict:
    """Trains each way at each T, until all seeds have solved it; returns the summary."""
    use_all_cores()
    report = Report(config)
    every = [(T, method) for T in config.lengths for method in methods(config)]
    found = {}
    with tqdm(every, unit="run", disable=None) as bar:
        for T, method in bar:
            name = f"T {T}, {method.name}"
            for done, errors in train(config, task, T, method):
                report.log(T=T, method=method.name, updates=done, errors=errors)
                solved = solved_after(report.rows, T, method.name)
                count = len(solved) - solved.count(None)
                bar.set_description(f"{name}: {done} updates, {count} solved")
                if count == len(solved):
                    break
            found[name] = f"{count} of {config.seeds}"
    ours = "; ".join(f"{name}: {count}" for name, count in found.items())
    return report.finish(ours, partial(draw, task=task), solved=found)
