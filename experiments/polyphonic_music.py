"""How well does a plain recurrent network predict the next notes of polyphonic music?

A piece is a piano roll: which of 88 notes sound at each step. The network predicts each note of the
next step by a sigmoid. The negative log-likelihood of a step is

    NLL = -sum_o [target_o log y_hat_o + (1 - target_o) log(1 - y_hat_o)]

and that of a data set is the mean over all steps of all pieces, except the first step of each piece
(Bai, Kolter and Koltun 2018). The data are those of Boulanger-Lewandowski, Bengio and Vincent
(2012), as .mat files with traindata, validdata and testdata. Three methods, as in table 1 of
Pascanu, Mikolov and Bengio (2013): gradient descent or Adam alone, with clipping, and with clipping
and their regulariser.

Pieces are concatenated to parallel streams, with a reset at the start of each piece, and the state
is carried from window to window. The test NLL is that of the epoch with the lowest validation NLL.

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
from jax import lax
from tqdm import tqdm

import jaxrnn
from experiments import cli
from experiments.multi_seed import nan_if_skipped, shard_seeds, stack, use_all_cores
from experiments.music_data import lay_out, read
from experiments.regularizer import regularizer
from experiments.reports import Report, finite, mean_and_spread
from jaxrnn import Activation, Batch, Params, TrainState, binary_cross_entropy, relu, tanh

ACTIVATIONS = {"tanh": tanh, "relu": relu}
METHODS = ("alone", "+ clipping", "+ clipping + regulariser")
UPDATES = 220
"""Updates of an epoch by default, however long the music is, so that one learning rate and one
number of epochs serve every file."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Negative log-likelihood of the next notes, in nats per step, for three training methods."""

    data: Path | None = None
    """A .mat file of piano rolls, with traindata, validdata and testdata."""
    epochs: int = 20
    """Passes over the training pieces."""
    activation: Literal["tanh", "relu"] = "relu"
    """Activation f."""
    hidden_size: int = 467
    """Hidden units, H; 467 give 300,000 parameters, the published number for JSB."""
    radius: float = 0.25
    """Initial spectral radius of W_h, a scaled orthogonal matrix."""
    batch_size: int | None = None
    """Parallel streams of pieces, B; by default, an epoch has about 220 updates."""
    window: int = 16
    """Steps of backpropagation through time, T."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam, or gradient descent with momentum 0.9."""
    learning_rates: tuple[float, float, float] = (0.002, 0.002, 0.002)
    """Initial learning rates of the three methods; cosine decay to zero."""
    clip: float = 0.5
    """Clipping threshold for the norm of the gradient."""
    regularizer: float = 0.1
    """Weight of the regulariser."""
    dropout: float = 0.2
    """Share of input notes dropped in training."""
    published: tuple[float, ...] = ()
    """Published results, drawn as lines in the figure."""
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
        cli.expect_at_least(0, self, "regularizer")
        cli.expect_share(self, "dropout")
        cli.expect_seed(self)


SMOKE = {"epochs": 2, "hidden_size": 4, "batch_size": 2, "window": 8, "seeds": 2}


def batch_size(config: Config, pieces: list[np.ndarray]) -> int:
    """B as given, or as it follows from the training pieces."""
    if config.batch_size is not None:
        return config.batch_size
    steps = sum(len(piece) - 1 for piece in pieces)
    return max(1, round(steps / (config.window * UPDATES)))


def as_floats(batch: Batch) -> Batch:
    return batch._replace(
        xs=batch.xs.astype(jnp.float32), targets=batch.targets.astype(jnp.float32)
    )


@partial(jax.jit, static_argnames="activation")
def mean_nll(params: Params, batches: Batch, *, activation: Activation):
    """The mean NLL of each seed over all steps of all windows, with the state carried."""

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


def make_gradient_fn(config: Config, method: str):
    """The gradient of the loss, with input dropout if there is a key, plus the regulariser's."""
    weight = config.regularizer if method == METHODS[2] else 0.0
    options: dict = {"activation": ACTIVATIONS[config.activation], "loss": binary_cross_entropy}

    def gradient_fn(params, batch, h, *, key=None):
        if key is not None:
            keep = jax.random.bernoulli(key, 1 - config.dropout, batch.xs.shape)
            batch = batch._replace(xs=batch.xs * keep / (1 - config.dropout))
        (value, h_T), grads = jaxrnn.bptt(params, batch, h, **options)
        if weight:
            omega_grads = jax.grad(regularizer)(params, batch, h, **options)
            grads = jax.tree.map(lambda d, d_omega: d + weight * d_omega, grads, omega_grads)
        return (value, h_T), grads

    return gradient_fn


def make_optimizer(config: Config, method: str, updates: int) -> optax.GradientTransformation:
    rate = optax.cosine_decay_schedule(config.learning_rates[METHODS.index(method)], updates)
    clip = optax.identity() if method == METHODS[0] else optax.clip_by_global_norm(config.clip)
    descent = optax.adam(rate) if config.optimizer == "adam" else optax.sgd(rate, momentum=0.9)
    return optax.chain(clip, descent)


def init_states(config: Config, B: int, notes: int, optimizer) -> TrainState:
    """The states of all seeds, stacked."""
    key_init, key_dropout = jax.random.split(jax.random.key(config.seed))
    H = config.hidden_size
    orthogonal = jax.nn.initializers.orthogonal(config.radius)
    keys = (jax.random.split(key, config.seeds) for key in (key_init, key_dropout))
    states = []
    for key_init, key_dropout in zip(*keys, strict=True):
        params = jaxrnn.init(key_init, notes, H, notes, W_h_init=orthogonal)
        h = jnp.zeros((B, H))
        states.append(jaxrnn.init_state(params, optimizer, h, key=key_dropout))
    return stack(states)


def train(config: Config, method: str, pieces: dict[str, list[np.ndarray]]):
    """Yields after each epoch the training, validation and test NLL of all seeds."""
    B, T = batch_size(config, pieces["train"]), config.window
    rngs = [np.random.default_rng((config.seed, n)) for n in range(config.seeds)]
    windows = len(lay_out(rngs[0], pieces["train"], B, T).xs)  # for any order of the pieces
    valid, test = (lay_out(rngs[0], pieces[part], 16, T) for part in ("valid", "test"))
    evaluate = partial(mean_nll, activation=ACTIVATIONS[config.activation])
    optimizer = make_optimizer(config, method, windows * config.epochs)
    update = jaxrnn.make_update(make_gradient_fn(config, method), optimizer)

    @jax.jit
    @jax.vmap
    def run_epoch(state, batches):
        state = state._replace(h=jnp.zeros_like(state.h))
        state, metrics = lax.scan(lambda s, batch: update(s, as_floats(batch)), state, batches)
        counted = metrics.counted.sum()
        results = state.params, (metrics.loss * metrics.counted).sum() / counted
        params, loss = nan_if_skipped(results, metrics.skipped)
        return state._replace(params=params), loss

    state = shard_seeds(init_states(config, B, pieces["train"][0].shape[1], optimizer))
    for _ in range(config.epochs):
        layouts = [lay_out(rng, pieces["train"], B, T) for rng in rngs]
        batches = shard_seeds(jax.tree.map(lambda *leaves: np.stack(leaves), *layouts))
        state, losses = run_epoch(state, batches)
        results = losses, evaluate(state.params, valid), evaluate(state.params, test)
        yield [np.asarray(nll) for nll in results]


def best_test_nll(rows: list[dict]) -> list[float]:
    """For each seed the test NLL at the lowest validation NLL; NaN if every epoch diverged."""
    valid, test = (np.array([row[part] for row in rows], float) for part in ("valid", "test"))
    best = np.where(np.isnan(valid), np.inf, valid).argmin(axis=0)
    return test[best, np.arange(test.shape[1])].tolist()


def draw(rows: list[dict], published: tuple[float, ...] = ()):
    """Left: validation NLL over epochs, mean and range; right: test NLL, seeds as points."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 4.2), layout="constrained", width_ratios=(3, 2)
    )
    for n, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        of_method = [row for row in rows if row["method"] == method]
        epochs = [row["epoch"] for row in of_method]
        valid = np.array([row["valid"] for row in of_method], float)
        left.plot(epochs, valid.mean(axis=1), f"C{n}", label=method)
        left.fill_between(epochs, valid.min(axis=1), valid.max(axis=1), color=f"C{n}", alpha=0.2)
        test = best_test_nll(of_method)
        right.plot([n] * len(test), test, f"C{n}o", alpha=0.7)
    for value in published:
        right.axhline(value, color="k", lw=0.8, ls="--")
        right.annotate(f"published {value}", (2.4, value), ha="right", va="bottom", fontsize=8)
    left.set(xlabel="epochs", ylabel="NLL of validation pieces, nats per step")
    left.xaxis.get_major_locator().set_params(integer=True)
    lowest = np.fmin.reduce([row["valid"] for row in rows], axis=None, dtype=float)
    if np.isfinite(lowest):
        left.set_ylim(0.98 * lowest, 1.25 * lowest)
    left.legend()
    right.set(ylabel="NLL of test pieces, nats per step", xlim=(-0.5, len(METHODS) - 0.5))
    right.set_xticks(range(len(METHODS)), [method.replace(" + ", "\n+ ") for method in METHODS])
    for ax in (left, right):
        ax.grid(alpha=0.3)
    return figure


def main(config: Config) -> dict:
    pieces = read(config.data)
    use_all_cores()
    report = Report(config)
    results = {}
    for method in METHODS:
        bar = tqdm(train(config, method, pieces), total=config.epochs, unit="epoch", disable=None)
        for epoch, nlls in enumerate(bar, start=1):
            parts = zip(("train", "valid", "test"), map(finite, nlls), strict=True)
            report.log(method=method, epoch=epoch, **dict(parts))
            bar.set_description(f"{method}: validation NLL {nlls[1].mean():.2f}")
        of_method = [row for row in report.rows if row["method"] == method]
        results[method] = best_test_nll(of_method)
    name = {"adam": "Adam", "sgd": "gradient descent"}[config.optimizer]
    texts = [f"{method} {mean_and_spread(test, 2)}" for method, test in results.items()]
    return report.finish(
        f"{name}: {'; '.join(texts)}",
        partial(draw, published=config.published),
        test={method: finite(test) for method, test in results.items()},
        batch_size=batch_size(config, pieces["train"]),
    )


def run(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: main(cli.parse(Config, arguments, SMOKE)))


if __name__ == "__main__":
    sys.exit(run())
