"""JapaneseVowels: which readout identifies a speaker best from utterances of unequal length?

JapaneseVowels (Kudo, Toyama and Shimbo 1999) has utterances of the vowels /ae/ by nine men, 7 to 29
steps of 12 LPC cepstrum coefficients: 270 for training and 370 for testing. They are padded to one
length. The state is held where the mask is False, so h_T is the state after the last step of each
utterance. Three readouts, several seeds each:

    last step             y = W_y h_T + b_y
    last steps of both    the sum of y for two networks, the second of which runs back in time
    mean of both          the mean of y_t over the steps that exist, summed over both directions

Noise is added to the inputs in training. Test errors are those after the last epoch.

    pip install -e '.[experiments,data]'
    python -m experiments.japanese_vowels --out runs/japanese_vowels

`--folds 5` cross-validates the training utterances instead; this chose the settings.
"""

import dataclasses
import math
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
from experiments.multi_seed import is_wrong_class, nan_if_skipped, shard_seeds, use_all_cores
from experiments.reports import Report, mean_and_spread
from jaxrnn import Batch, Params
from jaxrnn.epochs import shuffled_epoch


@dataclasses.dataclass(frozen=True)
class Config:
    """Test errors on JapaneseVowels for three readouts."""

    hidden_size: int = 128
    """Hidden units of each direction, H."""
    epochs: int = 40
    """Passes over the training utterances."""
    batch_size: int = 30
    """Utterances per update, B."""
    learning_rate: float = 2e-3
    """Initial learning rate of AdamW; cosine decay to zero."""
    weight_decay: float = 0.1
    """Weight decay of AdamW."""
    clip: float = 1.0
    """Clipping threshold for the norm of the gradient."""
    noise: float = 0.3
    """Standard deviation of the noise added to the inputs in training; theirs is 1."""
    folds: int = 0
    """Number of folds for cross-validation of the training utterances; 0 uses the test set."""
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
        cli.expect(self, "folds", "0 or at least 2", lambda folds: folds != 1)
        cli.expect_positive(self, "learning_rate", "clip")
        cli.expect_seed(self)


SMOKE = {"hidden_size": 4, "epochs": 2, "seeds": 2}

I, SPEAKERS = 12, 9
TRAINING, TEST = 270, 370

PUBLISHED = {"Kudo et al. 1999": 0.941, "Toth and Oberhauser 2020": 0.986}
"""Accuracies."""


def load() -> Batch:
    """The training utterances, then the test utterances; standardised by the training steps."""
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
    """The indices of the training and test utterances; utterances are sorted by speaker."""
    if not folds:
        return [(np.arange(TRAINING), TRAINING + np.arange(TEST))]
    fold = np.arange(TRAINING) % folds
    return [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(folds)]


def init_networks(config: Config, key) -> list[Params]:
    """The Params of each direction, stacked over seeds; all readouts share them."""
    init = partial(jaxrnn.init, input_size=I, hidden_size=config.hidden_size, output_size=SPEAKERS)
    keys = jax.random.split(key, (2, config.seeds))
    return list(map(jax.jit(jax.vmap(init)), keys))


def last_step(params: Params, xs, mask):
    h_T, _ = jaxrnn.hidden_states(params, xs, mask=mask)
    return jaxrnn.readout(params, h_T)


def mean_of_steps(params: Params, xs, mask):
    _, ys = jaxrnn.unroll(params, xs, mask=mask)
    return ys.sum(axis=0) / mask.sum(axis=0)[:, None]


class Readout(NamedTuple):
    """How the speaker is read out of the network.

    Attributes:
      name: as in the figure.
      outputs: (params, xs, mask) -> y (B, O) of one direction.
      directions: the number of directions, whose outputs are summed.
    """

    name: str
    outputs: Callable
    directions: int


READOUTS = [
    Readout("last step", last_step, 1),
    Readout("last steps of both", last_step, 2),
    Readout("mean of both", mean_of_steps, 2),
]


def outputs(readout: Readout, network: list[Params], xs, mask):
    """y (B, O). Back in time padding comes first, where the initial state, zero, is held."""
    y = readout.outputs(network[0], xs, mask)
    if readout.directions == 2:
        y += readout.outputs(network[1], xs[::-1], mask[::-1])
    return y


def speaker_loss(network, batch, h=None, *, key=None, readout: Readout, noise: float):
    """The mean cross-entropy of the utterances; with input noise if there is a key."""
    xs = batch.xs
    if key is not None:
        xs += noise * jax.random.normal(key, xs.shape)
    ys = outputs(readout, network, xs, batch.mask)
    first_steps = jax.tree.map(lambda leaf: leaf[:1], batch)  # every utterance has a first step
    return jaxrnn.mean_loss(ys[None], first_steps), None


def select(batch: Batch, utterances: np.ndarray) -> Batch:
    return jax.tree.map(lambda leaf: leaf[:, utterances], batch)


def train(config: Config, readout: Readout, networks, batch: Batch, split, key):
    """Trains all seeds at once; the test errors of each seed after each epoch, (seeds, epochs)."""
    training_data, test_data = (select(batch, utterances) for utterances in split)
    updates = config.epochs * math.ceil(len(split[0]) / config.batch_size)
    rate = optax.cosine_decay_schedule(config.learning_rate, updates)
    clip, adamw = optax.clip_by_global_norm(config.clip), optax.adamw
    optimizer = optax.chain(clip, adamw(rate, weight_decay=config.weight_decay))
    loss = partial(speaker_loss, readout=readout, noise=config.noise)
    update = jaxrnn.make_update(jax.value_and_grad(loss, has_aux=True), optimizer)

    def epoch(state, key):
        state, metrics = shuffled_epoch(update, state, training_data, key, config.batch_size)
        network = nan_if_skipped(state.params, metrics.skipped)
        ys = outputs(readout, network, test_data.xs, test_data.mask)
        errors = is_wrong_class(ys, test_data.targets[0]).sum()
        return state._replace(params=network), errors

    def run(network, key):
        key_shuffle, key_noise = jax.random.split(key)
        state = jaxrnn.init_state(network, optimizer, key=key_noise)
        return lax.scan(epoch, state, jax.random.split(key_shuffle, config.epochs))[1]

    keys = jax.random.split(key, config.seeds)
    return jax.jit(jax.vmap(run))(*shard_seeds((networks[: readout.directions], keys)))


def draw(rows: list[dict]):
    """Left: errors after the last epoch, seeds as points; right: after each epoch, mean, range."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.5), layout="constrained")
    names = list(dict.fromkeys(row["readout"] for row in rows))
    for n, name in enumerate(names):
        of_readout = [row for row in rows if row["readout"] == name]
        errors = np.array([row["errors"] for row in of_readout])
        test_size = of_readout[0]["test_size"]
        offsets = np.linspace(-0.2, 0.2, errors.shape[1])
        left.plot(n + offsets, errors[-1], "o", color=f"C{n}", alpha=0.6)
        left.plot([n - 0.3, n + 0.3], [errors[-1].mean()] * 2, color=f"C{n}", linewidth=3)
        epochs, rates = [row["epoch"] for row in of_readout], 100 * errors / test_size
        right.plot(epochs, rates.mean(axis=1), color=f"C{n}", label=name)
        right.fill_between(epochs, rates.min(axis=1), rates.max(axis=1), color=f"C{n}", alpha=0.2)
    for name, accuracy in PUBLISHED.items():
        errors = (1 - accuracy) * test_size
        left.axhline(errors, color="black", linestyle="--", linewidth=1)
        left.text(0.01, errors - 0.2, name, transform=left.get_yaxis_transform(), va="top")
    left.set_xticks(range(len(names)), names)
    left.set(ylabel=f"errors of {test_size}", ylim=(0, None), xlim=(-0.5, len(names) - 0.5))
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
    batch = load()
    report = Report(config)
    test_size = TRAINING if config.folds else TEST
    results = {}
    key_init, key_train = jax.random.split(jax.random.key(config.seed))
    networks = init_networks(config, key_init)
    with tqdm(READOUTS, unit="network", disable=None) as bar:
        for n, readout in enumerate(bar):
            bar.set_description(readout.name)
            errors = np.zeros((config.seeds, config.epochs), int)
            for k, split in enumerate(splits(config.folds)):
                key = jax.random.fold_in(jax.random.fold_in(key_train, n), k)
                errors += np.asarray(train(config, readout, networks, batch, split, key))
            for epoch, by_seed in enumerate(errors.T.tolist(), start=1):
                report.log(readout=readout.name, epoch=epoch, errors=by_seed, test_size=test_size)
            results[readout.name] = by_seed
    parts = [
        f"{name} {mean_and_spread(errors, 1)} "
        f"(accuracy {1 - statistics.fmean(errors) / test_size:.3f})"
        for name, errors in results.items()
    ]
    return report.finish(f"errors of {test_size}: {'; '.join(parts)}", draw, errors=results)


def run(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: main(cli.parse(Config, arguments, SMOKE)))


if __name__ == "__main__":
    sys.exit(run())
