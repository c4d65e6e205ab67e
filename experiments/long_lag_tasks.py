"""The tasks temporal order and adding: settings, four training methods, and the figure.

Both tasks require the network to remember an input for T steps. The methods:

    tanh                    Adam
    + clipping              Adam, with the norm of the gradient clipped
    + regulariser           with clipping, and the regulariser of Pascanu et al. (2013)
    identity ReLU           the IRNN: W_h is initialised to the identity, f = ReLU, with clipping

A seed has solved the task at the first check with at most 1 % errors on 10,000 new sequences.
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
from experiments.initial_weights import init_identity, init_orthogonal, init_sparse
from experiments.multi_seed import stack, train_seeds, update_on_new_batches, use_all_cores
from experiments.regularizer import regularizer
from experiments.reports import Report
from jaxrnn import Activation, Batch, Loss, Params
from jaxrnn.batches import step_weights

Name = Literal["tanh", "+ clipping", "+ regulariser", "identity ReLU"]
Start = Literal["sparse", "orthogonal"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Success rate against the sequence length, for four training methods."""

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
    """Sequences per update, B; all are new."""
    learning_rate: float = 1e-3
    """Learning rate of Adam for tanh."""
    identity_learning_rate: float = 1e-4
    """Learning rate of Adam for the identity ReLU."""
    clip: float = 1.0
    """Clipping threshold for the norm of the gradient."""
    regularizer: float = 2.0
    """Weight of the regulariser."""
    start: Start = "sparse"
    """Initial W_h of tanh networks: sparse with spectral radius 0.95, or orthogonal."""
    methods: tuple[Name, ...] = get_args(Name)
    """Training methods."""
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
        cli.expect_at_least(2, self, "lengths")
        counts = ("updates", "hidden_size", "check_every", "test_size", "batch_size")
        cli.expect_at_least(1, self, *counts, "seeds")
        cli.expect_positive(self, "learning_rate", "identity_learning_rate", "clip")
        cli.expect_at_least(0, self, "regularizer")
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
"""The highest error rate of a network that has solved the task."""

CHUNK = 500
"""The most sequences tested at once: memory grows with their states."""


class Task(NamedTuple):
    """A task.

    Attributes:
      name: as in the figure.
      batch: (key, T, B) -> a Batch of new sequences.
      input_size: I.
      output_size: O.
      loss: the loss of the steps that count.
      wrong: (y, target) of such a step -> bool for each sequence.
      published: the method that solves the task in the source, for the figure.
    """

    name: str
    batch: Callable[..., Batch]
    input_size: int
    output_size: int
    loss: Loss
    wrong: Callable
    published: Name | None = None


class Method(NamedTuple):
    """A training method.

    Attributes:
      name: as in the figure.
      activation: f.
      init: (key, I, H, O) -> the initial Params.
      learning_rate: of Adam.
      clip: the clipping threshold, or None.
      regularizer: the weight of the regulariser.
    """

    name: Name
    activation: Activation
    init: Callable[..., Params]
    learning_rate: float
    clip: float | None
    regularizer: float = 0.0


def methods(config: Config) -> list[Method]:
    init = {"sparse": init_sparse, "orthogonal": init_orthogonal}[config.start]
    tanh = Method("tanh", jaxrnn.tanh, init, config.learning_rate, None)
    clipped = tanh._replace(name="+ clipping", clip=config.clip)
    regularized = clipped._replace(name="+ regulariser", regularizer=config.regularizer)
    rate = config.identity_learning_rate
    identity = Method("identity ReLU", jaxrnn.relu, init_identity, rate, config.clip)
    every = [tanh, clipped, regularized, identity]
    return [method for method in every if method.name in config.methods]


def init_networks(config: Config, task: Task, method: Method, key) -> Params:
    """The initial parameters of all seeds, stacked."""
    sizes = task.input_size, config.hidden_size, task.output_size
    return stack([method.init(key_n, *sizes) for key_n in jax.random.split(key, config.seeds)])


def make_gradient_fn(task: Task, method: Method):
    """The gradient of the loss, plus the regulariser if the method has one."""
    options: dict = {"activation": method.activation, "loss": task.loss}

    def objective(params, batch, h=None):
        value, h_T = jaxrnn.sequence_loss(params, batch, h, **options)
        return value + method.regularizer * regularizer(params, batch, h, **options), h_T

    if method.regularizer:
        return jax.value_and_grad(objective, has_aux=True)
    return partial(jaxrnn.bptt, **options)


def wrong_sequences(task: Task, params: Params, batch: Batch, f: Activation = jaxrnn.tanh):
    """(B,) bool: the output is wrong at a step that counts."""
    _, ys = jaxrnn.unroll(params, batch.xs, activation=f)
    counts = step_weights(batch, params.W_h.dtype) > 0
    return (jax.vmap(task.wrong)(ys, batch.targets) & counts).any(axis=0)


def error_rate(config: Config, task: Task, T: int, f: Activation, params, key):
    """The share of wrong answers on new sequences, in chunks that fit in memory."""
    chunks = math.ceil(config.test_size / CHUNK)
    chunk_size = math.ceil(config.test_size / chunks)

    def chunk_error_rate(key):
        batch = task.batch(key, T, chunk_size)
        return wrong_sequences(task, params, batch, f).mean()

    return lax.map(chunk_error_rate, jax.random.split(key, chunks)).mean()


def train(config: Config, task: Task, T: int, method: Method):
    """Trains all seeds at once by Adam; yields as `train_networks`."""
    clip = optax.clip_by_global_norm(method.clip) if method.clip else optax.identity()
    optimizer = optax.chain(clip, optax.adam(method.learning_rate))
    gradient_fn = make_gradient_fn(task, method)
    yield from train_networks(config, task, T, method, gradient_fn, optimizer)


def train_networks(
    config: Config, task: Task, T: int, method: Method, gradient_fn, optimizer, *, random=False
):
    """Trains all seeds at once. Yields at each check the updates and the error rate of each seed.

    A network that has diverged outputs NaN, so it does not count as solved from then on. A random
    gradient function gets a key of its own for each seed.
    """
    update = jaxrnn.make_update(gradient_fn, optimizer)

    def make_batch(key):
        return task.batch(key, T, config.batch_size)

    def updates_and_check(state, key):
        key_train, key_test = jax.random.split(key)
        state = update_on_new_batches(update, make_batch, state, key_train, config.check_every)
        return state, error_rate(config, task, T, method.activation, state.params, key_test)

    key_init, key_train = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), T))
    networks = init_networks(config, task, method, key_init)
    keys = jax.random.split(jax.random.fold_in(key_train, 0), config.seeds) if random else None
    states = jax.vmap(lambda params, key: jaxrnn.init_state(params, optimizer, key=key))(
        networks, keys
    )
    schedule = config.updates, config.check_every
    for updates, errors in train_seeds(updates_and_check, states, key_train, *schedule):
        yield updates, errors.tolist()


def updates_until_solved(rows: list[dict], T: int, method: str) -> list[int | None]:
    """For each seed, the updates at the first check with at most 1 % errors, or None."""
    checks = [row for row in rows if (row["T"], row["method"]) == (T, method)]
    seeds = range(len(checks[0]["errors"]))
    return [
        next((row["updates"] for row in checks if row["errors"][seed] <= SOLVED), None)
        for seed in seeds
    ]


def last_step(T: int, B: int):
    """Weights (T, B) with which only the last step counts."""
    return jnp.zeros((T, B)).at[-1].set(1)


def draw(rows: list[dict], task: Task):
    """Against T: the share of seeds that solved the task, above, and the updates it took, below."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 6), layout="constrained")
    lengths, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("T", "method"))
    for n, name in enumerate(names):
        solved = [updates_until_solved(rows, T, name) for T in lengths]
        positions = np.arange(len(lengths)) + 0.2 * (n - (len(names) - 1) / 2)
        percentages = [100 * (len(seeds) - seeds.count(None)) / len(seeds) for seeds in solved]
        above.bar(positions, np.maximum(percentages, 0.8), 0.18, color=f"C{n}", label=name)
        for x, seeds in zip(positions, solved, strict=True):
            updates = [count for count in seeds if count is not None]
            below.plot([x] * len(updates), updates, "o", color=f"C{n}", alpha=0.6)
    above.axhline(100, color="black", linestyle="--", linewidth=0.8)
    above.text(-0.45, 102, f"solved in the paper: {task.published}", fontsize=8)
    above.set(ylabel=f"seeds that solved {task.name}, %", ylim=(0, 112))
    below.set(ylabel="updates until solved", xlabel="sequence length T")
    for ax in (above, below):
        ax.set_xticks(range(len(lengths)), [str(T) for T in lengths])
        ax.set_xlim(-0.5, len(lengths) - 0.5)
        ax.grid(axis="y", alpha=0.3)
    below.set_ylim(0, 1.05 * max(row["updates"] for row in rows))
    figure.legend(loc="outside upper center", ncols=4)
    return figure


def compare(config: Config, task: Task) -> dict:
    """Trains with each method at each T until all seeds have solved the task; the summary."""
    use_all_cores()
    report = Report(config)
    runs = [(T, method) for T in config.lengths for method in methods(config)]
    results = {}
    with tqdm(runs, unit="run", disable=None) as bar:
        for T, method in bar:
            name = f"T {T}, {method.name}"
            for updates, errors in train(config, task, T, method):
                report.log(T=T, method=method.name, updates=updates, errors=errors)
                solved = updates_until_solved(report.rows, T, method.name)
                count = len(solved) - solved.count(None)
                bar.set_description(f"{name}: {updates} updates, {count} solved")
                if count == len(solved):
                    break
            results[name] = f"{count} of {config.seeds}"
    summary = "; ".join(f"{name}: {count}" for name, count in results.items())
    return report.finish(summary, partial(draw, task=task), solved=results)
