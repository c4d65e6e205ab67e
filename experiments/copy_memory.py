"""Over how many blanks does a plain recurrent network carry ten symbols?

Ten symbols of 8 kinds, T - 1 blanks, a marker, ten blanks: T + 20 steps in all. The network answers
blanks, and from the marker on the ten symbols, so that each is carried over T + 10 steps (after
Hochreiter and Schmidhuber 1997, as Arjovsky, Shah and Bengio 2016 and Bai, Kolter and Koltun 2018
have it). The loss is the mean cross-entropy of all steps. Who counts steps but remembers nothing
answers blanks, then each symbol with probability 1/8:

    memoryless = 10 ln 8 / (T + 20)

Bai et al. report 0.0202 at T = 1000 for a plain network, which is this line. Here T goes up from 1,
to see at which T the loss on fresh sequences, the lowest in a fixed number of updates, comes down
from the line to nothing, and from which T on it stays on it.

    python -m experiments.copy_memory --out runs/copy_memory
"""

import dataclasses
import statistics
import sys
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
from experiments.reports import Report, finite, mean_and_spread
from jaxrnn import Activation, Batch
from jaxrnn.params import Initializer

Name = Literal["orthogonal tanh", "identity ReLU"]


@dataclasses.dataclass(frozen=True)
class Config:
    """The loss in the copy memory task against T, beside that of an answer without memory."""

    lengths: tuple[int, ...] = (1, 2, 3, 5, 10, 20, 50, 100)
    """Delays T; a sequence has T + 20 steps."""
    updates: int = 5_000
    """Updates at each T."""
    check_every: int = 250
    """Updates between checks."""
    test_size: int = 500
    """New test sequences at each check."""
    batch_size: int = 20
    """Sequences in an update, each of them new, B."""
    hidden_size: int = 128
    """Hidden units, H."""
    learning_rate: float = 1e-3
    """Learning rate of Adam for tanh."""
    identity_learning_rate: float = 1e-3
    """Learning rate of Adam for the identity ReLU."""
    clip: float = 1.0
    """Threshold of the gradient's norm."""
    methods: tuple[Name, ...] = get_args(Name)
    """Initialisation of W_h, and f."""
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
    """Tokens 0 to 7 are the symbols."""
    symbols = jax.random.randint(key, (SYMBOLS, B), 0, KINDS)
    blanks = jnp.full((T + SYMBOLS, B), BLANK)
    xs = jnp.concatenate([symbols, blanks.at[T - 1].set(MARKER)])
    return Batch(xs, targets=jnp.concatenate([blanks, symbols]))


def memoryless(T):
    return SYMBOLS * np.log(KINDS) / (T + 2 * SYMBOLS)


class Method(NamedTuple):
    """f, how W_h starts, and the learning rate."""

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
    """Trains all seeds at once; yields at each check the updates done and each seed's loss."""
    f, B = method.activation, config.batch_size
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip), optax.adam(method.learning_rate)
    )

    def update(state, key):
        params, opt_state = state
        _, grads = jaxrnn.bptt(params, copy_batch(key, T, B), activation=f)
        changes, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, changes), opt_state), None

    @jax.jit
    @jax.vmap
    def updates_and_check(state, key):
        key_train, key_test = jax.random.split(key)
        state, _ = lax.scan(update, state, jax.random.split(key_train, config.check_every))
        batch = copy_batch(key_test, T, config.test_size)
        value, _ = jaxrnn.sequence_loss(state[0], batch, activation=f)
        return state, value

    key_start, key_train = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), T))
    keys = jax.random.split(key_start, config.seeds)
    H = config.hidden_size
    params = jax.vmap(lambda key: jaxrnn.init(key, 10, H, 9, W_h_init=method.W_h_init))(keys)
    state = share_out((params, jax.vmap(optimizer.init)(params)))
    for done in range(config.check_every, config.updates + 1, config.check_every):
        keys = jax.random.split(jax.random.fold_in(key_train, done), config.seeds)
        state, losses = updates_and_check(state, share_out(keys))
        yield done, np.asarray(losses).tolist()


def lowest_losses(rows: list[dict], T: int, method: str) -> np.ndarray:
    """Each seed's loss at its best check; at others it may have leapt."""
    mine = [row["losses"] for row in rows if (row["T"], row["method"]) == (T, method)]
    return np.fmin.reduce(np.array(mine, float))


def draw_lengths(ax, rows: list[dict], names: list[str]):
    """The loss at the best check against T, and the line."""
    lengths = sorted({row["T"] for row in rows})
    for n, name in enumerate(names):
        losses = np.array([lowest_losses(rows, T, name) for T in lengths])
        ax.plot(lengths, np.median(losses, axis=1), color=f"C{n}", label=name)
        ax.plot(lengths, losses, "o", color=f"C{n}", alpha=0.5, markersize=4)
    T = np.geomspace(1, 1000, 100)
    ax.plot(T, memoryless(T), "k--", label="memoryless, 10 ln 8 / (T + 20)")
    ax.plot(1000, 0.0202, "k*", markersize=10, label="published, Bai et al. 2018")
    ax.set(xscale="log", yscale="log", ylim=(1e-5, 2), xlabel="T")
    ax.set(ylabel="cross-entropy, nats per step", title="at the best check")
    ax.legend(loc="lower right", fontsize=9)


def draw_curve(ax, rows: list[dict], name: str):
    """The loss over the memoryless loss against updates, for each T."""
    mine = [row for row in rows if row["method"] == name]
    lengths = sorted({row["T"] for row in mine})
    for T, color in zip(lengths, plt.cm.viridis(np.linspace(0, 0.9, len(lengths))), strict=True):
        updates = [row["updates"] for row in mine if row["T"] == T]
        losses = [row["losses"] for row in mine if row["T"] == T]
        shares = np.array(losses, float) / memoryless(T)
        ax.plot(updates, shares, color=color, alpha=0.4, linewidth=0.7)
        ax.plot(updates, np.median(shares, axis=1), color=color, linewidth=2, label=f"T = {T}")
    ax.axhline(1, color="k", linestyle="--")
    ax.set(ylim=(0, 1.15), xlabel="updates", ylabel="loss / memoryless loss", title=name)


def draw(rows: list[dict]):
    """Left: the loss against T; beside it, how each method gets there."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = plt.subplots(1, 1 + len(names), figsize=(15, 4.5), layout="constrained")
    draw_lengths(axes[0], rows, names)
    for ax, name in zip(axes[1:], names, strict=True):
        draw_curve(ax, rows, name)
    axes[-1].legend(fontsize=9, ncols=4, loc="lower left")
    for ax in axes:
        ax.grid(alpha=0.3)
    return figure


def main(config: Config) -> dict:
    use_all_cores()
    report = Report(config)
    to_do = [(T, method) for T in config.lengths for method in methods(config)]
    with tqdm(to_do, unit="run", disable=None) as bar:
        for T, method in bar:
            for done, losses in train(config, T, method):
                report.log(T=T, method=method.name, updates=done, losses=finite(losses))
                share = statistics.fmean(losses) / memoryless(T)
                bar.set_description(
                    f"T {T}, {method.name}: {done} updates, {share:.0%} of the line"
                )
    return report.finish(ours(config, report.rows), draw)


def ours(config: Config, rows: list[dict]) -> str:
    """The loss as a share of the memoryless one at each T, for each method."""
    told = []
    for method in methods(config):
        shares = [lowest_losses(rows, T, method.name) / memoryless(T) for T in config.lengths]
        spreads = [mean_and_spread(of_seeds.tolist(), 2) for of_seeds in shares]
        at = [f"{spread} at T {T}" for spread, T in zip(spreads, config.lengths, strict=True)]
        told.append(f"{method.name} {', '.join(at)}")
    return f"loss / memoryless: {'; '.join(told)}"


def run(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: main(cli.parse(Config, arguments, SMOKE)))


if __name__ == "__main__":
    sys.exit(run())
