"""Copy memory: up to which delay does a plain recurrent network beat a memoryless predictor?

The input is ten symbols of 8 kinds, T - 1 blanks, a marker and ten blanks: T + 20 steps. The target
is T + 10 blanks and then the ten symbols, each T + 10 steps after it was read (after Hochreiter and
Schmidhuber 1997, in the version of Arjovsky, Shah and Bengio 2016 and Bai, Kolter and Koltun 2018).
The loss is the mean cross-entropy over all steps. A memoryless predictor outputs blanks, and then
each symbol with probability 1/8:

    memoryless loss = 10 ln 8 / (T + 20)

Bai et al. report 0.0202 at T = 1000 for a plain network, close to the memoryless loss. Here T
increases from 1. For each T, the result is the lowest loss on new sequences within a fixed number
of updates, relative to the memoryless loss.

    python -m experiments.copy_memory --out runs/copy_memory
"""

import dataclasses
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

import jaxrnn
from experiments import cli
from experiments.multi_seed import train_seeds, update_on_new_batches, use_all_cores
from experiments.reports import Report, finite, mean_and_spread
from jaxrnn import Activation, Batch
from jaxrnn.params import Initializer

Name = Literal["orthogonal tanh", "identity ReLU"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Loss in the copy memory task against the delay, relative to a memoryless predictor."""

    lengths: tuple[int, ...] = (1, 2, 3, 5, 10, 20, 50, 100)
    """Delays T; a sequence has T + 20 steps."""
    updates: int = 5_000
    """Updates at each T."""
    check_every: int = 250
    """Updates between checks."""
    test_size: int = 500
    """New test sequences at each check."""
    batch_size: int = 20
    """Sequences per update, B; all are new."""
    hidden_size: int = 128
    """Hidden units, H."""
    learning_rate: float = 1e-3
    """Learning rate of Adam for tanh."""
    identity_learning_rate: float = 1e-3
    """Learning rate of Adam for the identity ReLU."""
    clip: float = 1.0
    """Clipping threshold for the norm of the gradient."""
    methods: tuple[Name, ...] = get_args(Name)
    """Initialisations of W_h, with f."""
    seeds: int = 4
    """Number of networks, trained in parallel."""
    seed: int = 0
    """Seed of all random numbers."""
    out: Path = Path("runs/copy_memory")
    """Folder for metrics.jsonl, figure.png and summary.json."""
    overwrite: bool = False
    """Discard the run that `out` holds."""
    smoke: bool = False
    """Use sizes that run in seconds, to check that everything works."""

    def __post_init__(self):
        cli.expect_values(self, "lengths", "methods")
        counts = ("lengths", "updates", "check_every", "test_size", "batch_size", "hidden_size")
        cli.expect_at_least(1, self, *counts, "seeds")
        cli.expect_positive(self, "learning_rate", "identity_learning_rate", "clip")
        cli.expect_multiple(self, "updates", of="check_every")
        cli.expect_seed(self)


SMOKE = {
    "lengths": (1,),
    "updates": 4,
    "check_every": 2,
    "test_size": 5,
    "batch_size": 2,
    "hidden_size": 5,
    "seeds": 2,
}

SYMBOLS, KINDS = 10, 8
BLANK, MARKER = 8, 9


def copy_batch(key, T: int, B: int) -> Batch:
    """New sequences; tokens 0 to 7 are the symbols."""
    symbols = jax.random.randint(key, (SYMBOLS, B), 0, KINDS)
    blanks = jnp.full((T + SYMBOLS, B), BLANK)
    xs = jnp.concatenate([symbols, blanks.at[T - 1].set(MARKER)])
    return Batch(xs, targets=jnp.concatenate([blanks, symbols]))


def memoryless_loss(T):
    return SYMBOLS * np.log(KINDS) / (T + 2 * SYMBOLS)


class Method(NamedTuple):
    """An initialisation of W_h, with f and the learning rate that go with it."""

    name: Name
    activation: Activation
    W_h_init: Initializer
    learning_rate: float


def methods(config: Config) -> list[Method]:
    rate, identity_rate = config.learning_rate, config.identity_learning_rate
    every = [
        Method("orthogonal tanh", jaxrnn.tanh, jax.nn.initializers.orthogonal(), rate),
        Method("identity ReLU", jaxrnn.relu, jaxrnn.scaled_identity(), identity_rate),
    ]
    return [method for method in every if method.name in config.methods]


def train(config: Config, T: int, method: Method):
    """Trains all seeds at once. Yields at each check the updates and the loss of each seed.

    The losses of a network that has diverged are NaN.
    """
    f = method.activation
    clip = optax.clip_by_global_norm(config.clip)
    optimizer = optax.chain(clip, optax.adam(method.learning_rate))
    update = jaxrnn.make_update(partial(jaxrnn.bptt, activation=f), optimizer)
    make_batch = partial(copy_batch, T=T, B=config.batch_size)

    def updates_and_check(state, key):
        key_train, key_test = jax.random.split(key)
        state = update_on_new_batches(update, make_batch, state, key_train, config.check_every)
        test_batch = copy_batch(key_test, T, config.test_size)
        value, _ = jaxrnn.sequence_loss(state.params, test_batch, activation=f)
        return state, value

    key_init, key_train = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), T))
    keys = jax.random.split(key_init, config.seeds)
    H = config.hidden_size
    networks = jax.vmap(lambda key: jaxrnn.init(key, 10, H, 9, W_h_init=method.W_h_init))(keys)
    states = jax.vmap(lambda params: jaxrnn.init_state(params, optimizer))(networks)
    schedule = config.updates, config.check_every
    for updates, losses in train_seeds(updates_and_check, states, key_train, *schedule):
        yield updates, losses.tolist()


def lowest_losses(rows: list[dict], T: int, method: str) -> np.ndarray:
    """The lowest loss of each seed over the checks; the loss has occasional spikes."""
    losses = [row["losses"] for row in rows if (row["T"], row["method"]) == (T, method)]
    return np.fmin.reduce(np.array(losses, float))


def draw_lengths(ax, rows: list[dict], names: list[str]):
    """The lowest loss against T, and the memoryless loss."""
    lengths = sorted({row["T"] for row in rows})
    published = {"markersize": 14, "markerfacecolor": "none", "label": "published, Bai et al. 2018"}
    ax.plot(1000, 0.0202, "k*", **published)
    for n, name in enumerate(names):
        losses = np.array([lowest_losses(rows, T, name) for T in lengths])
        ax.plot(lengths, np.median(losses, axis=1), ".-", color=f"C{n}", label=name)
        ax.plot(lengths, losses, "o", color=f"C{n}", alpha=0.5, markersize=4)
    T = np.geomspace(1, 1000, 100)
    ax.plot(T, memoryless_loss(T), "k--", label="memoryless, 10 ln 8 / (T + 20)")
    ax.set(xscale="log", yscale="log", ylim=(1e-5, 2), xlabel="delay T")
    ax.set(ylabel="cross-entropy, nats per step", title="lowest loss over the checks")
    ax.legend(loc="lower right", fontsize=9)


def draw_training(ax, rows: list[dict], name: str):
    """The loss relative to the memoryless loss against updates, for each T."""
    rows = [row for row in rows if row["method"] == name]
    lengths = sorted({row["T"] for row in rows})
    for T, color in zip(lengths, plt.cm.viridis(np.linspace(0, 0.9, len(lengths))), strict=True):
        updates = [row["updates"] for row in rows if row["T"] == T]
        losses = [row["losses"] for row in rows if row["T"] == T]
        ratios = np.array(losses, float) / memoryless_loss(T)
        ax.plot(updates, ratios, color=color, alpha=0.4, linewidth=0.7)
        ax.plot(updates, np.median(ratios, axis=1), color=color, linewidth=2, label=f"T = {T}")
    ax.axhline(1, color="k", linestyle="--")
    ax.set(ylim=(0, 1.15), xlabel="updates", ylabel="loss / memoryless loss", title=name)


def draw(rows: list[dict]):
    """Left: the lowest loss against T. Then for each method: the loss during training."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = plt.subplots(1, 1 + len(names), figsize=(15, 4.5), layout="constrained")
    draw_lengths(axes[0], rows, names)
    for ax, name in zip(axes[1:], names, strict=True):
        draw_training(ax, rows, name)
    axes[-1].legend(fontsize=9, ncols=4, loc="lower left")
    for ax in axes:
        ax.grid(alpha=0.3)
    return figure


def summarize(config: Config, rows: list[dict]) -> str:
    """The loss relative to the memoryless loss, for each method and T."""
    parts = []
    for method in methods(config):
        ratios = [lowest_losses(rows, T, method.name) / memoryless_loss(T) for T in config.lengths]
        spreads = [mean_and_spread(over_seeds.tolist(), 2) for over_seeds in ratios]
        at = [f"{spread} at T {T}" for spread, T in zip(spreads, config.lengths, strict=True)]
        parts.append(f"{method.name} {', '.join(at)}")
    return f"loss / memoryless loss: {'; '.join(parts)}"


def main(config: Config) -> dict:
    use_all_cores()
    report = Report(config)
    runs = [(T, method) for T in config.lengths for method in methods(config)]
    with tqdm(runs, unit="run", disable=None) as bar:
        for T, method in bar:
            for updates, losses in train(config, T, method):
                report.log(T=T, method=method.name, updates=updates, losses=finite(losses))
                ratio = statistics.fmean(losses) / memoryless_loss(T)
                bar.set_description(
                    f"T {T}, {method.name}: {updates} updates, {ratio:.0%} of memoryless"
                )
    return report.finish(summarize(config, report.rows), draw)


def run(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: main(cli.parse(Config, arguments, SMOKE)))


if __name__ == "__main__":
    sys.exit(run())
