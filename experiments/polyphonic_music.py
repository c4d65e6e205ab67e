"""How well does a plain recurrent network predict the next notes of polyphonic music?

A piece is a piano roll: which of 88 notes sound at each step. Each note of the next step is a
sigmoid, so that a step costs

    NLL = -sum_o target_o log y_hat_o + (1 - target_o) log(1 - y_hat_o)

and a data set the mean over all steps of all its pieces but the first step of each, as in Bai,
Kolter and Koltun (2018). The data are those of Boulanger-Lewandowski, Bengio and Vincent (2012), as
.mat files with traindata, validdata and testdata. Three columns, as in table 1 of Pascanu, Mikolov
and Bengio (2013): gradient descent or Adam alone, with clipping, and with clipping and their
regulariser.

Pieces lie one after the other in parallel streams, none cut, with a reset where one begins; the
state is carried from window to window. The test figure is that of the epoch with the best
validation figure.

    python -m experiments.polyphonic_music --data JSB_Chorales.mat --out runs/jsb
"""

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import scipy.io
from jax import lax
from scipy.io.matlab import MatReadError
from tqdm import tqdm

import jaxrnn
from experiments import cli
from experiments.cli import InputError
from experiments.multi_seed import share_out, use_all_cores
from experiments.regularizer import regularizer
from experiments.reports import Report, finite, mean_and_spread
from jaxrnn import Activation, Batch, Params, binary_cross_entropy, relu, tanh

ACTIVATIONS = {"tanh": tanh, "relu": relu}
COLUMNS = ("alone", "+ clipping", "+ clipping + regulariser")


@dataclasses.dataclass(frozen=True)
class Config:
    """Negative log-likelihood of the next notes, in nats a step, for three ways to train."""

    data: Path | None = None
    """A .mat file of piano rolls, with traindata, validdata and testdata."""
    epochs: int = 20
    """Passes over the training pieces."""
    activation: Literal["tanh", "relu"] = "relu"
    """Activation f."""
    hidden_size: int = 467
    """Hidden units, H; 467 give 300,000 parameters, as published for JSB."""
    radius: float = 0.25
    """Initial spectral radius of W_h, a scaled orthogonal matrix."""
    batch_size: int = 4
    """Parallel streams of pieces, B."""
    window: int = 16
    """Steps of backpropagation through time, T."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam, or gradient descent with momentum 0.9."""
    learning_rates: tuple[float, float, float] = (0.002, 0.002, 0.002)
    """Initial learning rates of the three columns; they decay to zero along half a cosine."""
    clip: float = 0.5
    """Threshold of the gradient's norm."""
    regularizer: float = 0.1
    """Weight of the regulariser."""
    dropout: float = 0.2
    """Share of input notes dropped in training."""
    published: tuple[float, ...] = ()
    """Published results, drawn as lines beside ours."""
    seeds: int = 4
    """Number of networks, trained in parallel."""
    seed: int = 0
    """Seed of all random numbers."""
    out: Path = Path("runs/polyphonic_music")
    """Folder for metrics.jsonl, figure.png and summary.json."""
    overwrite: bool = False
    """Discard the run that `out` holds."""
    smoke: bool = False
    """Use sizes that run in seconds, to check that everything works."""

    def __post_init__(self):
        cli.expect_at_least(1, self, "epochs", "hidden_size", "batch_size", "window", "seeds")
        cli.expect_positive(self, "learning_rates", "radius", "clip")
        cli.expect_share(self, "dropout")
        cli.expect_seed(self)


SMOKE = {"epochs": 2, "hidden_size": 4, "batch_size": 2, "window": 8, "seeds": 2}


def read(path: Path | None) -> dict[str, list[np.ndarray]]:
    """The pieces of each part, (T_n, 88) of zeros and ones each."""
    if path is None:
        raise InputError("--data: expected a .mat file of piano rolls, got none")
    try:
        with path.open("rb") as opened:
            file = scipy.io.loadmat(opened)
        parts = {part: list(file[f"{part}data"][0]) for part in ("train", "valid", "test")}
    except OSError as error:
        raise InputError(f"{path}: expected a readable .mat file: {error.strerror}") from None
    except (KeyError, ValueError, IndexError, TypeError, MatReadError) as error:
        raise InputError(f"{path}: expected piano rolls as .mat, got: {error}") from None
    return {name: [np.asarray(piece, np.uint8) for piece in part] for name, part in parts.items()}


def lay_out(rng, pieces: list[np.ndarray], config: Config, windows: int = 0) -> Batch:
    """Whole pieces, in random order, in streams of like length, cut in (windows, T, B, ...).

    The target of a step is the next one of its piece. What is left at a stream's end is masked.
    """
    B, T, notes = config.batch_size, config.window, pieces[0].shape[1]
    streams: list[list[np.ndarray]] = [[] for _ in range(B)]
    lengths = np.zeros(B, int)
    for n in sorted(rng.permutation(len(pieces)), key=lambda n: -len(pieces[n])):
        shortest = lengths.argmin()
        streams[shortest].append(pieces[n])
        lengths[shortest] += len(pieces[n]) - 1
    windows = max(windows, -(-lengths.max() // T))
    xs, targets = np.zeros((2, windows * T, B, notes), np.uint8)
    mask, reset = np.zeros((2, windows * T, B), bool)
    for b, stream in enumerate(streams):
        at = 0
        for n in rng.permutation(len(stream)):
            piece, end = stream[n], at + len(stream[n]) - 1
            xs[at:end, b], targets[at:end, b] = piece[:-1], piece[1:]
            mask[at:end, b], reset[at, b] = True, True
            at = end
    flat = Batch(xs, targets, mask, reset)  # type: ignore[arg-type]
    return jax.tree.map(lambda leaf: leaf.reshape(windows, T, *leaf.shape[1:]), flat)


def as_floats(batch: Batch) -> Batch:
    return batch._replace(
        xs=batch.xs.astype(jnp.float32), targets=batch.targets.astype(jnp.float32)
    )


@partial(jax.jit, static_argnames="activation")
def nats(params: Params, batches: Batch, *, activation: Activation):
    """For each seed the mean over all steps of all windows, the state carried along."""

    def mean(params):
        def window(h, batch):
            value, h = jaxrnn.sequence_loss(
                params, as_floats(batch), h, activation=activation, loss=binary_cross_entropy
            )
            return h, (value * batch.mask.sum(), batch.mask.sum())

        h_0 = jnp.zeros((batches.xs.shape[2], params.W_h.shape[0]))
        _, (sums, counts) = lax.scan(window, h_0, batches)
        return sums.sum() / counts.sum()

    return jax.vmap(mean)(params)


def make_epoch(config: Config, column: str, updates: int):
    """The optimiser, and a function that trains all seeds, each on its own windows, once."""
    rate = optax.cosine_decay_schedule(config.learning_rates[COLUMNS.index(column)], updates)
    clip = optax.identity() if column == COLUMNS[0] else optax.clip_by_global_norm(config.clip)
    descend = optax.adam(rate) if config.optimizer == "adam" else optax.sgd(rate, momentum=0.9)
    optimizer = optax.chain(clip, descend)
    weight = config.regularizer if column == COLUMNS[2] else 0.0
    f, loss = ACTIVATIONS[config.activation], binary_cross_entropy

    def gradient(params, batch, h):
        (value, h_T), grads = jaxrnn.bptt(params, batch, h, activation=f, loss=loss)
        if weight:
            omega = jax.grad(regularizer)(params, batch, h, activation=f, loss=loss)
            grads = jax.tree.map(lambda d, d_omega: d + weight * d_omega, grads, omega)
        return value, h_T, grads

    def update(carry, inputs):
        (params, opt_state, h), (key, batch) = carry, inputs
        batch = as_floats(batch)
        kept = jax.random.bernoulli(key, 1 - config.dropout, batch.xs.shape)
        batch = batch._replace(xs=batch.xs * kept / (1 - config.dropout))
        value, h, grads = gradient(params, batch, h)
        changes, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, changes), opt_state, h), value

    @jax.jit
    @jax.vmap
    def epoch(params, opt_state, key, batches):
        h_0 = jnp.zeros((config.batch_size, config.hidden_size))
        keys = jax.random.split(key, batches.xs.shape[0])
        state, values = lax.scan(update, (params, opt_state, h_0), (keys, batches))
        return *state[:2], values.mean()

    return optimizer, epoch


def train(config: Config, column: str, pieces: dict[str, list[np.ndarray]]):
    """Yields after each epoch the training, validation and test figures of all seeds."""
    rngs = [np.random.default_rng((config.seed, n)) for n in range(config.seeds)]
    windows = lay_out(rngs[0], pieces["train"], config).xs.shape[0] + 1
    optimizer, epoch = make_epoch(config, column, windows * config.epochs)
    wide = dataclasses.replace(config, batch_size=16)
    evaluate = partial(nats, activation=ACTIVATIONS[config.activation])
    valid, test = (lay_out(rngs[0], pieces[part], wide) for part in ("valid", "test"))

    key_init, key_dropout = jax.random.split(jax.random.key(config.seed))
    notes, H = pieces["train"][0].shape[1], config.hidden_size
    orthogonal = jax.nn.initializers.orthogonal(config.radius)
    started = [
        jaxrnn.init(key, notes, H, notes, W_h_init=orthogonal)
        for key in jax.random.split(key_init, config.seeds)
    ]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *started)
    params, opt_state = share_out((params, jax.vmap(optimizer.init)(params)))
    for n in range(config.epochs):
        laid_out = [lay_out(rng, pieces["train"], config, windows) for rng in rngs]
        batches = share_out(jax.tree.map(lambda *leaves: np.stack(leaves), *laid_out))
        keys = share_out(jax.random.split(jax.random.fold_in(key_dropout, n), config.seeds))
        params, opt_state, values = epoch(params, opt_state, keys, batches)
        figures = (values, evaluate(params, valid), evaluate(params, test))
        yield [np.asarray(figure) for figure in figures]


def at_best(rows: list[dict]) -> list[float]:
    """For each seed the test figure of the epoch with the best validation figure, if one has."""
    valid, test = (np.array([row[part] for row in rows], float) for part in ("valid", "test"))
    best = np.where(np.isnan(valid), np.inf, valid).argmin(axis=0)
    return test[best, np.arange(test.shape[1])].tolist()


def draw(rows: list[dict], published: tuple[float, ...] = ()):
    """Left: validation figures over epochs; right: the test figures, a point a seed."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 4.2), layout="constrained", width_ratios=(3, 2)
    )
    for n, column in enumerate(dict.fromkeys(row["column"] for row in rows)):
        mine = [row for row in rows if row["column"] == column]
        epochs = [row["epoch"] for row in mine]
        valid = np.array([row["valid"] for row in mine], float)
        left.plot(epochs, valid.mean(axis=1), f"C{n}", label=column)
        left.fill_between(epochs, valid.min(axis=1), valid.max(axis=1), color=f"C{n}", alpha=0.2)
        tests = at_best(mine)
        right.plot([n] * len(tests), tests, f"C{n}o", alpha=0.7)
    for value in published:
        right.axhline(value, color="k", lw=0.8, ls="--")
        right.annotate(f"published {value}", (2.4, value), ha="right", va="bottom", fontsize=8)
    left.set(xlabel="epochs", ylabel="NLL on validation pieces, nats a step")
    left.xaxis.get_major_locator().set_params(integer=True)
    floor = np.fmin.reduce([row["valid"] for row in rows], axis=None, dtype=float)
    if np.isfinite(floor):
        left.set_ylim(0.98 * floor, 1.25 * floor)
    left.legend()
    right.set(ylabel="NLL on test pieces, nats a step", xlim=(-0.5, len(COLUMNS) - 0.5))
    right.set_xticks(range(len(COLUMNS)), [column.replace(" + ", "\n+ ") for column in COLUMNS])
    for ax in (left, right):
        ax.grid(alpha=0.3)
    return figure


def main(config: Config) -> dict:
    pieces = read(config.data)
    use_all_cores()
    report = Report(config)
    results = {}
    for column in COLUMNS:
        bar = tqdm(train(config, column, pieces), total=config.epochs, unit="epoch", disable=None)
        for epoch, figures in enumerate(bar, start=1):
            parts = zip(("train", "valid", "test"), map(finite, figures), strict=True)
            report.log(column=column, epoch=epoch, **dict(parts))
            bar.set_description(f"{column}: valid {figures[1].mean():.2f}")
        results[column] = at_best([row for row in report.rows if row["column"] == column])
    name = {"adam": "Adam", "sgd": "gradient descent"}[config.optimizer]
    found = "; ".join(f"{column} {mean_and_spread(r, 2)}" for column, r in results.items())
    return report.finish(
        f"{name}: {found}",
        partial(draw, published=config.published),
        test={column: finite(r) for column, r in results.items()},
    )


def run(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: main(cli.parse(Config, arguments, SMOKE)))


if __name__ == "__main__":
    sys.exit(run())
