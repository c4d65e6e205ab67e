"""What can a plain recurrent network read off MNIST-1D, and from which of its states?

MNIST-1D (Greydanus and Kobak 2020): generated curves of 40 samples, ten shapes that are stretched,
moved and blurred, 4,000 to train on and 1,000 to test. In the shuffled control the samples of all
curves come in one fixed random order. Three ways to start W_h:

    tanh                normal, of variance 1 / H
    orthogonal tanh     it neither shrinks nor grows what passes through it
    identity ReLU       the IRNN (Le, Jaitly and Hinton 2015)

and two readouts: the state after the last step, or that of the published GRU, which runs in both
directions and takes the states of all 40 steps into one linear layer, here with dropout. All else
is the same for all. The test figure is that after the last epoch.

    pip install -e '.[experiments,data]'
    python -m experiments.mnist_1d --out runs/mnist_1d
"""

import dataclasses
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
from experiments.multi_seed import share_out, use_all_cores
from experiments.reports import Report, mean_and_spread
from jaxrnn import Activation, Params, cross_entropy
from jaxrnn.params import Initializer

Name = Literal["tanh", "orthogonal tanh", "identity ReLU"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Test accuracy on MNIST-1D and its shuffled control, for three starts and two readouts."""

    starts: tuple[Name, ...] = get_args(Name)
    """Initialisations of W_h, and f."""
    hidden_size: int = 64
    """Hidden units, H, split evenly between directions if there are two."""
    epochs: int = 40
    """Passes over the training curves."""
    batch_size: int = 50
    """Curves in an update, B."""
    learning_rate: float = 2e-3
    """Initial learning rate of AdamW; it decays to zero along half a cosine."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    clip: float = 0.3
    """Threshold of the gradient's norm."""
    dropout: float = 0.5
    """Share of hidden units dropped in training if all steps are read out."""
    validate: bool = False
    """Hold out the last 500 training curves and test on them, as settings were chosen."""
    seeds: int = 6
    """Number of networks, trained in parallel."""
    seed: int = 0
    """Seed of all random numbers but the data."""
    out: Path = Path("runs/mnist_1d")
    """Folder for metrics.jsonl, figure.png and summary.json."""
    overwrite: bool = False
    """Discard the run that `out` holds."""
    smoke: bool = False
    """Use sizes that run in seconds, to check that everything works."""

    def __post_init__(self):
        cli.expect_values(self, "starts")
        cli.expect_at_least(1, self, "hidden_size", "epochs", "batch_size", "seeds")
        cli.expect_at_least(0, self, "weight_decay")
        cli.expect_positive(self, "learning_rate", "clip")
        cli.expect_share(self, "dropout")
        cli.expect_seed(self)


SMOKE = {"starts": ("identity ReLU",), "hidden_size": 4, "epochs": 1, "seeds": 2}

T, SHAPES = 40, 10

PUBLISHED = {
    "MNIST-1D": {"human": 96, "CNN": 94, "GRU": 91, "MLP": 68, "logistic": 32},
    "shuffled": {"MLP": 68, "GRU": 57, "CNN": 56, "logistic": 32},
}
"""Test accuracies in % (Greydanus and Kobak)."""


def load(config: Config, shuffled: bool) -> tuple:
    """Curves (T, N, 1) and their shapes (N,), those to train on and those to test on."""
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ImportError:
        raise InputError("mnist1d: not installed: pip install -e '.[data]'") from None
    settings = get_dataset_args()
    settings.shuffle_seq = shuffled
    made = make_dataset(settings)
    xs, labels, xs_test, labels_test = (made[of] for of in ("x", "y", "x_test", "y_test"))
    if config.validate:
        xs, labels, xs_test, labels_test = xs[:-500], labels[:-500], xs[-500:], labels[-500:]
    return tuple(map(jnp.asarray, (xs.T[..., None], labels, xs_test.T[..., None], labels_test)))


class Network(NamedTuple):
    """Hidden layers, whose own readouts have no rows, and the linear layer."""

    directions: list[Params]
    W_y: Array
    b_y: Array


def last_step(directions, xs, f):
    return jaxrnn.hidden_states(directions[0], xs, activation=f)[0]


def all_steps(directions, xs, f):
    forth, back = directions
    _, hs = jaxrnn.hidden_states(forth, xs, activation=f)
    _, hs_back = jaxrnn.hidden_states(back, xs[::-1], activation=f)
    hs = jnp.concatenate([hs, hs_back[::-1]], axis=-1)
    return hs.swapaxes(0, 1).reshape(xs.shape[1], -1)


class Readout(NamedTuple):
    """How many directions, and of how many steps the states are the features."""

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


STARTS: dict[Name, tuple[Activation, Initializer]] = {
    "tanh": (jaxrnn.tanh, jax.nn.initializers.lecun_normal()),
    "orthogonal tanh": (jaxrnn.tanh, jax.nn.initializers.orthogonal()),
    "identity ReLU": (jaxrnn.relu, jaxrnn.scaled_identity()),
}


def start(config: Config, key, W_h_init: Initializer, readout: Readout) -> Network:
    H = config.hidden_size // readout.directions
    key_y, *keys = jax.random.split(key, 1 + readout.directions)
    layers = [jaxrnn.init(key_layer, 1, H, 1, W_h_init=W_h_init) for key_layer in keys]
    directions = [layer._replace(W_y=layer.W_y[:0], b_y=layer.b_y[:0]) for layer in layers]
    size = readout.steps * readout.directions * H
    W_y = jax.random.normal(key_y, (SHAPES, size)) / size**0.5
    return Network(directions, W_y, jnp.zeros(SHAPES))


@partial(jax.jit, static_argnames=("config", "f", "readout"))
def train(config: Config, f: Activation, readout: Readout, networks, keys, data):
    """Trains all seeds on both data sets at once; their accuracies in training and test, %."""
    N, B = data[1].shape[1], config.batch_size
    updates = N // B
    rate = optax.cosine_decay_schedule(config.learning_rate, config.epochs * updates)
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip), optax.adamw(rate, weight_decay=config.weight_decay)
    )

    def outputs(network, xs, keep=1.0):
        features = readout.features(network.directions, xs, f) * keep
        return features @ network.W_y.T + network.b_y

    def loss(network, xs, labels, key):
        kept = jax.random.bernoulli(key, 1 - readout.dropout, (B, network.W_y.shape[1]))
        ys = outputs(network, xs, kept / (1 - readout.dropout))
        return cross_entropy.value(ys, labels).mean()

    def accuracy(network, xs, labels):
        return 100 * (outputs(network, xs).argmax(axis=-1) == labels).mean()

    def run(network, key, data):
        xs, labels, xs_test, labels_test = data

        def update(state, now):
            network, opt_state = state
            some, key = now
            grads = jax.grad(loss)(network, xs[:, some], labels[some], key)
            changes, opt_state = optimizer.update(grads, opt_state, network)
            return (optax.apply_updates(network, changes), opt_state), None

        def epoch(state, key):
            key_order, key_dropout = jax.random.split(key)
            order = jax.random.permutation(key_order, N)[: updates * B].reshape(updates, B)
            return lax.scan(update, state, (order, jax.random.split(key_dropout, updates)))

        state = network, optimizer.init(network)
        (network, _), _ = lax.scan(epoch, state, jax.random.split(key, config.epochs))
        return accuracy(network, xs, labels), accuracy(network, xs_test, labels_test)

    return jax.vmap(jax.vmap(run, (None, None, 0)), (0, 0, None))(networks, keys, data)


def draw(rows: list[dict]):
    """A panel for each data set: a point a seed, a bar for their mean, lines for the published."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained", sharey=True)
    starts = list(dict.fromkeys(row["start"] for row in rows))
    names = list(dict.fromkeys(row["readout"] for row in rows))
    for ax, (data, published) in zip(axes, PUBLISHED.items(), strict=True):
        for row in rows:
            n, at = names.index(row["readout"]), starts.index(row["start"])
            if row["data"] == data:
                x, label = at + 0.36 * (n - 0.5), None if at else row["readout"]
                side = np.linspace(-0.1, 0.1, len(row["test"]))
                ax.plot(x + side, row["test"], "o", color=f"C{n}", alpha=0.6, markersize=5)
                ax.hlines(np.mean(row["test"]), x - 0.15, x + 0.15, f"C{n}", lw=3, label=label)
        height = np.inf
        for name, accuracy in published.items():
            ax.axhline(accuracy, color="black", linestyle="--", linewidth=0.8, zorder=0)
            height = min(accuracy + 1, height - 3.6)
            ax.text(1.01, height, name, transform=ax.get_yaxis_transform(), va="center")
        ax.set_xticks(range(len(starts)), starts)
        ax.set(title=data, ylim=(0, 100), xlim=(-0.5, len(starts) - 0.5))
    axes[0].set_ylabel("test accuracy, %")
    axes[0].legend(loc="lower right", title="readout", framealpha=0.9)
    return figure


def main(config: Config) -> dict:
    use_all_cores()
    report = Report(config)
    data = jax.tree.map(lambda *leaves: jnp.stack(leaves), load(config, False), load(config, True))
    todo = [(readout, name) for readout in readouts(config) for name in config.starts]
    key, found = jax.random.key(config.seed), []
    with tqdm(todo, unit="run", disable=None) as bar:
        for n, (readout, name) in enumerate(bar):
            bar.set_description(f"{readout.name}, {name}")
            f, W_h_init = STARTS[name]
            keys = jax.random.split(jax.random.fold_in(key, n), (2, config.seeds))
            networks = [start(config, key_start, W_h_init, readout) for key_start in keys[0]]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *networks)
            accuracies = train(config, f, readout, *share_out((stacked, keys[1])), data)
            training, test = np.asarray(accuracies).swapaxes(1, 2)
            for k, curves in enumerate(PUBLISHED):
                row = {"data": curves, "readout": readout.name, "start": name}
                report.log(**row, test=test[k].tolist(), training=training[k].tolist())
            ours = " / ".join(mean_and_spread(of_seeds.tolist(), 1) for of_seeds in test)
            found.append(f"{readout.name}, {name} {ours}")
    return report.finish(f"{' / '.join(PUBLISHED)}, %: {'; '.join(found)}", draw)


def run(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: main(cli.parse(Config, arguments, SMOKE)))


if __name__ == "__main__":
    sys.exit(run())
