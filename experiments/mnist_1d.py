"""MNIST-1D: which initialisation and which readout classify best with a plain recurrent network?

MNIST-1D (Greydanus and Kobak 2024) has generated curves of 40 samples, ten shapes that are
stretched, shifted and blurred: 4,000 for training and 1,000 for testing. In the shuffled control,
the samples of all curves are permuted by one fixed random permutation. Three initialisations:

    tanh                W_h normal with variance 1 / H
    orthogonal tanh     W_h orthogonal, so it preserves the norm of a state
    identity ReLU       the IRNN (Le, Jaitly and Hinton 2015)

Two readouts, with a linear layer each: of the state after the last step; or of the states of all 40
steps in both directions, as in the published GRU, here with dropout. The two directions share the
hidden units; all other settings are equal. Test accuracies are those after the last epoch.

    pip install -e '.[experiments,data]'
    python -m experiments.mnist_1d --out runs/mnist_1d
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import Array, lax
from tqdm import tqdm

import jaxrnn
from experiments import cli
from experiments.cli import InputError
from experiments.multi_seed import is_wrong_class, nan_if_skipped, shard_seeds, stack, use_all_cores
from experiments.reports import Report, mean_and_spread
from jaxrnn import Activation, Batch, Params
from jaxrnn.epochs import shuffled_epoch
from jaxrnn.params import Initializer

Name = Literal["tanh", "orthogonal tanh", "identity ReLU"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Test accuracy on MNIST-1D and its shuffled control: three initialisations, two readouts."""

    methods: tuple[Name, ...] = get_args(Name)
    """Initialisations of W_h, with f."""
    hidden_size: int = 64
    """Hidden units, H, shared between the directions if there are two."""
    epochs: int = 40
    """Passes over the training curves."""
    batch_size: int = 50
    """Curves per update, B."""
    learning_rate: float = 2e-3
    """Initial learning rate of AdamW; cosine decay to zero."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    clip: float = 0.3
    """Clipping threshold for the norm of the gradient."""
    dropout: float = 0.5
    """Share of hidden units dropped in training where all steps are read out."""
    validate: bool = False
    """Hold out the last 500 training curves and test on them; this chose the settings."""
    seeds: int = 6
    """Number of networks, trained in parallel."""
    seed: int = 0
    """Seed of all random numbers except the data."""
    out: Path = Path("runs/mnist_1d")
    """Folder for metrics.jsonl, figure.png and summary.json."""
    overwrite: bool = False
    """Discard the run that `out` holds."""
    smoke: bool = False
    """Use sizes that run in seconds, to check that everything works."""

    def __post_init__(self):
        cli.expect_values(self, "methods")
        cli.expect_at_least(1, self, "hidden_size", "epochs", "batch_size", "seeds")
        cli.expect(self, "hidden_size", "an even number", lambda size: size % 2 == 0)
        cli.expect_at_least(0, self, "weight_decay")
        cli.expect_positive(self, "learning_rate", "clip")
        cli.expect_share(self, "dropout")
        cli.expect_seed(self)


SMOKE = {"methods": ("identity ReLU",), "hidden_size": 4, "epochs": 1, "seeds": 2}

T, SHAPES = 40, 10

PUBLISHED = {
    "MNIST-1D": {"human": 96, "CNN": 94, "GRU": 91, "MLP": 68, "logistic": 32},
    "shuffled": {"MLP": 68, "GRU": 57, "CNN": 56, "logistic": 32},
}
"""Test accuracies in % (Greydanus and Kobak)."""


def load(config: Config, shuffled: bool) -> tuple[Batch, Batch]:
    """Training and test curves (T, N, 1), the label of a curve repeated at each step."""
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ImportError:
        raise InputError("mnist1d: not installed: pip install -e '.[data]'") from None
    arguments = get_dataset_args()
    arguments.shuffle_seq = shuffled
    made = make_dataset(arguments)
    curves, labels, test_curves, test_labels = (made[key] for key in ("x", "y", "x_test", "y_test"))
    if config.validate:
        curves, test_curves = curves[:-500], curves[-500:]
        labels, test_labels = labels[:-500], labels[-500:]
    return as_batch(curves, labels), as_batch(test_curves, test_labels)


def as_batch(curves: np.ndarray, labels: np.ndarray) -> Batch:
    return Batch(jnp.asarray(curves.T[..., None]), jnp.broadcast_to(labels, (T, len(labels))))


class Network(NamedTuple):
    """The hidden layers and the linear layer.

    Attributes:
      directions: Params of each direction, with no rows in their own W_y and b_y.
      W_y: (O, F), features to outputs.
      b_y: (O,), output bias.
    """

    directions: list[Params]
    W_y: Array
    b_y: Array


def last_step(directions: list[Params], xs: Array, f: Activation) -> Array:
    """h_T, (B, H)."""
    return jaxrnn.hidden_states(directions[0], xs, activation=f)[0]


def all_steps(directions: list[Params], xs: Array, f: Activation) -> Array:
    """The states of both directions at all steps, (B, T * 2 H)."""
    forward, backward = directions
    _, hs = jaxrnn.hidden_states(forward, xs, activation=f)
    _, hs_backward = jaxrnn.hidden_states(backward, xs[::-1], activation=f)
    hs = jnp.concatenate([hs, hs_backward[::-1]], axis=-1)
    return hs.swapaxes(0, 1).reshape(xs.shape[1], -1)


class Readout(NamedTuple):
    """The features of a sequence that the linear layer reads.

    Attributes:
      name: as in the figure.
      features: (directions, xs, f) -> (B, F).
      directions: the number of directions.
      steps: the number of steps whose states are features.
      dropout: the share of features dropped in training.
    """

    name: str
    features: Callable
    directions: int
    steps: int
    dropout: float


def readouts(config: Config) -> list[Readout]:
    return [
        Readout("last step", last_step, directions=1, steps=1, dropout=0.0),
        Readout("all steps", all_steps, directions=2, steps=T, dropout=config.dropout),
    ]


METHODS: dict[Name, tuple[Activation, Initializer]] = {
    "tanh": (jaxrnn.tanh, jax.nn.initializers.lecun_normal()),
    "orthogonal tanh": (jaxrnn.tanh, jax.nn.initializers.orthogonal()),
    "identity ReLU": (jaxrnn.relu, jaxrnn.scaled_identity()),
}


def init_network(config: Config, key, W_h_init: Initializer, readout: Readout) -> Network:
    H = config.hidden_size // readout.directions
    key_y, *keys = jax.random.split(key, 1 + readout.directions)
    layers = [jaxrnn.init(key_layer, 1, H, 1, W_h_init=W_h_init) for key_layer in keys]
    directions = [layer._replace(W_y=layer.W_y[:0], b_y=layer.b_y[:0]) for layer in layers]
    F = readout.steps * readout.directions * H
    W_y = jax.random.normal(key_y, (SHAPES, F)) / F**0.5
    return Network(directions, W_y, jnp.zeros(SHAPES))


def outputs(network, xs, *, f, readout, key=None):
    """The outputs (B, O); with dropout of the features if there is a key."""
    features = readout.features(network.directions, xs, f)
    if key is not None:
        keep = jax.random.bernoulli(key, 1 - readout.dropout, features.shape)
        features = features * keep / (1 - readout.dropout)
    return jaxrnn.readout(network, features)  # it reads W_y and b_y alone


def classification_loss(network, batch, h=None, *, key=None, **options):
    """The mean cross-entropy of the curves."""
    ys = outputs(network, batch.xs, key=key, **options)
    first_steps = jax.tree.map(lambda leaf: leaf[:1], batch)  # a label is the same at each step
    return jaxrnn.mean_loss(ys[None], first_steps), None


def accuracy(network, batch: Batch, **options):
    return 100 * (~is_wrong_class(outputs(network, batch.xs, **options), batch.targets[0])).mean()


@partial(jax.jit, static_argnames=("config", "f", "readout"))
def train(config: Config, f: Activation, readout: Readout, networks, keys, data):
    """Trains all seeds on both data sets at once; the training and test accuracies, in %."""
    updates = config.epochs * math.ceil(data[0].targets.shape[-1] / config.batch_size)
    rate = optax.cosine_decay_schedule(config.learning_rate, updates)
    clip, adamw = optax.clip_by_global_norm(config.clip), optax.adamw
    optimizer = optax.chain(clip, adamw(rate, weight_decay=config.weight_decay))
    options = {"f": f, "readout": readout}
    loss = partial(classification_loss, **options)
    update = jaxrnn.make_update(jax.value_and_grad(loss, has_aux=True), optimizer)

    def run(network, key, data):
        training_data, test_data = data

        def epoch(state, key):
            state, metrics = shuffled_epoch(update, state, training_data, key, config.batch_size)
            return state, metrics.skipped

        key_shuffle, key_dropout = jax.random.split(key)
        state = jaxrnn.init_state(network, optimizer, key=key_dropout)
        state, skipped = lax.scan(epoch, state, jax.random.split(key_shuffle, config.epochs))
        network = nan_if_skipped(state.params, skipped)
        return accuracy(network, training_data, **options), accuracy(network, test_data, **options)

    return jax.vmap(jax.vmap(run, (None, None, 0)), (0, 0, None))(networks, keys, data)


def draw(rows: list[dict]):
    """A panel for each data set: seeds as points, their means as bars, published as lines."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained", sharey=True)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    names = list(dict.fromkeys(row["readout"] for row in rows))
    for ax, (data, published) in zip(axes, PUBLISHED.items(), strict=True):
        for row in rows:
            n, position = names.index(row["readout"]), methods.index(row["method"])
            if row["data"] == data:
                x, label = position + 0.36 * (n - 0.5), None if position else row["readout"]
                offsets = np.linspace(-0.1, 0.1, len(row["test"]))
                ax.plot(x + offsets, row["test"], "o", color=f"C{n}", alpha=0.6, markersize=5)
                ax.hlines(np.mean(row["test"]), x - 0.15, x + 0.15, f"C{n}", lw=3, label=label)
        height = np.inf
        for name, percentage in published.items():
            ax.axhline(percentage, color="black", linestyle="--", linewidth=0.8, zorder=0)
            height = min(percentage + 1, height - 3.6)  # labels do not overlap
            ax.text(1.01, height, name, transform=ax.get_yaxis_transform(), va="center")
        ax.set_xticks(range(len(methods)), methods)
        ax.set(title=data, ylim=(0, 100), xlim=(-0.5, len(methods) - 0.5))
    axes[0].set_ylabel("test accuracy, %")
    axes[0].legend(loc="lower right", title="readout", framealpha=0.9)
    return figure


def main(config: Config) -> dict:
    use_all_cores()
    data = stack([load(config, False), load(config, True)])
    report = Report(config)
    runs = [(readout, name) for readout in readouts(config) for name in config.methods]
    key, results = jax.random.key(config.seed), []
    with tqdm(runs, unit="run", disable=None) as bar:
        for n, (readout, name) in enumerate(bar):
            bar.set_description(f"{readout.name}, {name}")
            f, W_h_init = METHODS[name]
            keys = jax.random.split(jax.random.fold_in(key, n), (2, config.seeds))
            networks = [init_network(config, key_init, W_h_init, readout) for key_init in keys[0]]
            seeds = shard_seeds((stack(networks), keys[1]))
            accuracies = train(config, f, readout, *seeds, data)
            training, test = np.asarray(accuracies).swapaxes(1, 2)
            for k, curves in enumerate(PUBLISHED):
                row = {"data": curves, "readout": readout.name, "method": name}
                report.log(**row, test=test[k].tolist(), training=training[k].tolist())
            both = " / ".join(mean_and_spread(over_seeds.tolist(), 1) for over_seeds in test)
            results.append(f"{readout.name}, {name} {both}")
    return report.finish(f"{' / '.join(PUBLISHED)}, %: {'; '.join(results)}", draw)


def run(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: main(cli.parse(Config, arguments, SMOKE)))


if __name__ == "__main__":
    sys.exit(run())
