"""Which of nine men says /ae/? Sequences of unequal length, and where to read them out.

JapaneseVowels (Kudo, Toyama and Shimbo 1999): utterances of two vowels as 7 to 29 steps of 12 LPC
cepstrum coefficients, 270 to train on and 370 to test. A batch is padded, and its mask holds the
state where a step does not exist, so that h_T is the state after each utterance's own last step.
Three networks, several seeds each, all seeds at once:

    last step             y = W_y h_T + b_y
    last steps of both    and a second network runs backwards in time; its y is added
    mean of both          the mean of y_t over the steps that exist, in both directions

Noise is added to the inputs in training. The test figure is that after the last epoch.

    pip install -e '.[experiments,data]'
    python -m experiments.japanese_vowels --out runs/japanese_vowels

With `--folds 5` the training utterances are cross-validated instead: so settings were chosen.
"""

import dataclasses
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import lax
from tqdm import tqdm

import jaxrnn
from experiments import cli
from experiments.cli import InputError
from experiments.multi_seed import share_out, use_all_cores
from experiments.reports import Report, mean_and_spread
from jaxrnn import Batch, Params, cross_entropy


@dataclasses.dataclass(frozen=True)
class Config:
    """Test errors on JapaneseVowels, for three ways to read a network out."""

    hidden_size: int = 128
    """Hidden units of each direction, H."""
    epochs: int = 40
    """Passes over the training utterances."""
    batch_size: int = 30
    """Utterances in an update, B."""
    learning_rate: float = 2e-3
    """Initial learning rate of AdamW; it decays to zero along half a cosine."""
    weight_decay: float = 0.1
    """Weight decay of AdamW."""
    clip: float = 1.0
    """Threshold of the gradient's norm."""
    noise: float = 0.3
    """Standard deviation of the input noise in training; that of the inputs is 1."""
    folds: int = 0
    """Folds to cross-validate the training utterances in; 0 uses the test set."""
    seeds: int = 10
    """Number of networks, trained in parallel."""
    seed: int = 0
    """Seed of all random numbers."""
    out: Path = Path("runs/japanese_vowels")
    """Folder for metrics.jsonl, figure.png and summary.json."""
    overwrite: bool = False
    """Discard the run that `out` holds."""
    smoke: bool = False
    """Use sizes that run in seconds, to check that everything works."""

    def __post_init__(self):
        cli.expect_at_least(1, self, "hidden_size", "epochs", "batch_size", "seeds")
        cli.expect_at_least(0, self, "folds", "weight_decay", "noise")
        cli.expect_positive(self, "learning_rate", "clip")
        cli.expect_seed(self)


SMOKE = {"hidden_size": 4, "epochs": 2, "seeds": 2}

I, SPEAKERS = 12, 9
TRAINING, TEST = 270, 370

PUBLISHED = {"Kudo et al. 1999": 0.941, "Toth and Oberhauser 2020": 0.986}
"""Accuracies."""


def load() -> Batch:
    """The training and then the test utterances, standardised by the training ones' steps."""
    try:
        from aeon.datasets import load_japanese_vowels
    except ImportError:
        raise InputError("aeon: not installed: pip install -e '.[data]'") from None
    training, speakers = load_japanese_vowels(split="train")
    test, test_speakers = load_japanese_vowels(split="test")
    steps = np.concatenate(training, axis=1)
    mean, deviation = steps.mean(axis=1), steps.std(axis=1)
    labels = np.concatenate([speakers, test_speakers]).astype(int) - 1
    sequences = [
        Batch(jnp.float32((x.T - mean) / deviation), jnp.asarray(np.full(x.shape[1], label)))
        for x, label in zip([*training, *test], labels, strict=True)
    ]
    return jax.tree.map(jnp.asarray, jaxrnn.pad(sequences))


def splits(folds: int) -> list[tuple]:
    """What to train on and what to test on, as indices; utterances are sorted by speaker."""
    if not folds:
        return [(np.arange(TRAINING), TRAINING + np.arange(TEST))]
    fold = np.arange(TRAINING) % folds
    return [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(folds)]


def start(config: Config, key) -> list[Params]:
    """The networks of both directions, seeds first; each column starts from them."""
    init = partial(jaxrnn.init, input_size=I, hidden_size=config.hidden_size, output_size=SPEAKERS)
    keys = jax.random.split(key, (2, config.seeds))
    return list(map(jax.jit(jax.vmap(init)), keys))


def last_step(params, xs, mask):
    h_T, _ = jaxrnn.hidden_states(params, xs, mask=mask)
    return h_T @ params.W_y.T + params.b_y


def mean_of_steps(params, xs, mask):
    _, ys = jaxrnn.unroll(params, xs, mask=mask)
    return ys.sum(axis=0) / mask.sum(axis=0)[:, None]


class Column(NamedTuple):
    """How each direction is read out, and how many directions there are."""

    name: str
    readout: Callable
    directions: int


COLUMNS = [
    Column("last step", last_step, 1),
    Column("last steps of both", last_step, 2),
    Column("mean of both", mean_of_steps, 2),
]


def outputs(column: Column, network, xs, mask):
    """y (N, 9). Back in time padding comes first, and the zeros of h_0 are held through it."""
    y = column.readout(network[0], xs, mask)
    if column.directions == 2:
        y += column.readout(network[1], xs[::-1], mask[::-1])
    return y


def train(config: Config, column: Column, networks, batch: Batch, split, key):
    """Trains all seeds at once; the errors of each seed after each epoch, (seeds, epochs)."""
    train_on, test_on = split
    B, updates = config.batch_size, len(train_on) // config.batch_size
    rate = optax.cosine_decay_schedule(config.learning_rate, config.epochs * updates)
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip), optax.adamw(rate, weight_decay=config.weight_decay)
    )

    def those(indices) -> Batch:
        return jax.tree.map(lambda leaf: leaf[:, indices], batch)

    def loss(network, some, key):
        noise = config.noise * jax.random.normal(key, some.xs.shape)
        y = outputs(column, network, some.xs + noise, some.mask)
        return cross_entropy.value(y, some.targets[0]).mean()

    def update(state, now):
        network, opt_state = state
        indices, key = now
        grads = jax.grad(loss)(network, those(indices), key)
        changes, opt_state = optimizer.update(grads, opt_state, network)
        return (optax.apply_updates(network, changes), opt_state), None

    def epoch(state, key):
        key_order, key_noise = jax.random.split(key)
        order = jax.random.permutation(key_order, train_on)[: updates * B].reshape(updates, B)
        state, _ = lax.scan(update, state, (order, jax.random.split(key_noise, updates)))
        test = those(test_on)
        wrong = outputs(column, state[0], test.xs, test.mask).argmax(axis=-1) != test.targets[0]
        return state, wrong.sum()

    def run(network, key):
        state = network, optimizer.init(network)
        return lax.scan(epoch, state, jax.random.split(key, config.epochs))[1]

    keys = jax.random.split(key, config.seeds)
    return jax.jit(jax.vmap(run))(*share_out((networks[: column.directions], keys)))


def draw(rows: list[dict]):
    """Left: errors after the last epoch, a point a seed; right: after each epoch, their range."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.5), layout="constrained")
    names = list(dict.fromkeys(row["column"] for row in rows))
    for n, name in enumerate(names):
        mine = [row for row in rows if row["column"] == name]
        errors, of = np.array([row["errors"] for row in mine]), mine[0]["of"]
        side = np.linspace(-0.2, 0.2, errors.shape[1])
        left.plot(n + side, errors[-1], "o", color=f"C{n}", alpha=0.6)
        left.plot([n - 0.3, n + 0.3], [errors[-1].mean()] * 2, color=f"C{n}", linewidth=3)
        epochs, shares = [row["epoch"] for row in mine], 100 * errors / of
        right.plot(epochs, shares.mean(axis=1), color=f"C{n}", label=name)
        right.fill_between(epochs, shares.min(axis=1), shares.max(axis=1), color=f"C{n}", alpha=0.2)
    for name, accuracy in PUBLISHED.items():
        left.axhline((1 - accuracy) * of, color="black", linestyle="--", linewidth=1)
        at = left.get_yaxis_transform()
        left.text(0.01, (1 - accuracy) * of - 0.2, name, transform=at, va="top")
    left.set_xticks(range(len(names)), names)
    left.set(ylabel=f"errors of {of}", ylim=(0, None), xlim=(-0.5, len(names) - 0.5))
    left.set_title("after the last epoch: seeds and their mean")
    right.set(xlabel="epochs", ylabel="errors, %", yscale="log")
    right.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    right.set_title("mean and range over seeds")
    right.legend()
    for ax in (left, right):
        ax.grid(axis="y", alpha=0.3)
    return figure


def main(config: Config) -> dict:
    use_all_cores()
    report = Report(config)
    batch = load()
    of = TRAINING if config.folds else TEST
    found = {}
    key_start, key_train = jax.random.split(jax.random.key(config.seed))
    networks = start(config, key_start)
    with tqdm(COLUMNS, unit="network", disable=None) as bar:
        for n, column in enumerate(bar):
            bar.set_description(column.name)
            errors = np.zeros((config.seeds, config.epochs), int)
            for k, split in enumerate(splits(config.folds)):
                key = jax.random.fold_in(jax.random.fold_in(key_train, n), k)
                errors += np.asarray(train(config, column, networks, batch, split, key))
            for epoch, errors_then in enumerate(errors.T.tolist(), start=1):
                report.log(column=column.name, epoch=epoch, errors=errors_then, of=of)
            found[column.name] = errors_then
    ours = f"errors of {of}: " + "; ".join(
        f"{name} {mean_and_spread(errors, 1)} (accuracy {1 - statistics.fmean(errors) / of:.3f})"
        for name, errors in found.items()
    )
    return report.finish(ours, draw, errors=found)


def run(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: main(cli.parse(Config, arguments, SMOKE)))


if __name__ == "__main__":
    sys.exit(run())
