"""Gradient flow: how does the gradient shrink or grow on its way back through time?

Only the last step has a loss. Each step back multiplies the gradient by W_h^T diag(f'). Let |W_h|
be the largest singular value of W_h and rho its spectral radius; max f' = 1 (Bengio, Simard and
Frasconi 1994; Pascanu, Mikolov and Bengio 2013):

    |W_h| < 1     is sufficient for the gradient to vanish
    |W_h| > 1     is necessary for the gradient to explode
    rho^k         is the decay over k steps in a linear network, up to a factor

|dL/dh_t| is measured for Gaussian W_h scaled to rho, at initialisation, and during training on
temporal_order by gradient descent with clipping. Then, at one rho, the clipping threshold is varied
from one that slows down learning to no clipping.

    python -m experiments.gradient_flow --out runs/gradient_flow
"""

import dataclasses
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

import jaxrnn
from experiments import cli
from experiments.multi_seed import (
    shard_seeds,
    train_seeds,
    update_on_new_batches,
    use_all_cores,
)
from experiments.reports import Report, finite, mean_and_spread
from experiments.temporal_order import order_batch
from jaxrnn import Activation, Batch, Params


@dataclasses.dataclass(frozen=True)
class Config:
    """Norms of dL/dh_t against steps back, for tanh and ReLU; the effect of clipping."""

    radii: tuple[float, ...] = (0.5, 0.7, 0.9, 1.0, 1.1, 1.3, 1.5)
    """Initial spectral radii of W_h, rho."""
    trained_radii: tuple[float, ...] = (0.5, 1.0, 1.5)
    """Initial spectral radii of the networks that are trained."""
    clips: tuple[float | None, ...] = (0.01, 0.03, 0.1, 1.0, 10.0, 100.0, None)
    """Clipping thresholds for the norm of the gradient; None is no clipping."""
    clip: float = 1.0
    """Clipping threshold where the initial spectral radius varies."""
    clipped_radius: float = 1.5
    """Initial spectral radius where the clipping threshold varies."""
    length: int = 20
    """Sequence length T of the temporal order task."""
    updates: int = 2_500
    """Updates of each network."""
    check_every: int = 125
    """Updates between checks."""
    test_size: int = 200
    """Held-out sequences for loss and gradient norms."""
    batch_size: int = 20
    """Sequences per update, B; all are new."""
    hidden_size: int = 50
    """Hidden units, H."""
    learning_rate: float = 0.1
    """Learning rate of gradient descent; without clipping, some networks diverge at this one."""
    seeds: int = 6
    """Number of networks for each setting."""
    seed: int = 0
    """Seed of all random numbers."""
    out: Path = Path("runs/gradient_flow")
    """Folder for metrics.jsonl, figure.png and summary.json."""
    overwrite: bool = False
    """Discard the run that `out` holds."""
    smoke: bool = False
    """Use sizes that run in seconds, to check that everything works."""

    def __post_init__(self):
        cli.expect_values(self, "radii", "trained_radii", "clips")
        counts = ("length", "updates", "check_every", "test_size", "batch_size", "hidden_size")
        cli.expect_at_least(1, self, *counts, "seeds")
        cli.expect_at_least(2, self, "length")
        cli.expect_positive(self, "radii", "trained_radii", "clipped_radius")
        cli.expect_positive(self, "clips", "clip", "learning_rate")
        cli.expect_multiple(self, "updates", of="check_every")
        cli.expect_seed(self)


SMOKE = {
    "radii": (0.5, 1.5),
    "trained_radii": (1.5,),
    "clips": (1.0, None),
    "length": 10,
    "updates": 4,
    "check_every": 2,
    "test_size": 20,
    "batch_size": 2,
    "hidden_size": 8,
    "seeds": 2,
}

ACTIVATIONS = {"tanh": jaxrnn.tanh, "ReLU": jaxrnn.relu}

LEARNT = 0.1
"""The highest cross-entropy, in nats, of a network that has learnt the task; chance is ln 4."""


def init_networks(config: Config, radii) -> Params:
    """Gaussian W_h, stacked over radius and seed; for each seed, W_h differs in scale only."""
    keys, H = jax.random.split(jax.random.key(config.seed), config.seeds), config.hidden_size
    W_h_init = jax.nn.initializers.normal()
    params = jax.vmap(lambda key: jaxrnn.init(key, 6, H, 4, W_h_init=W_h_init))(keys)
    drawn_radii = np.abs(np.linalg.eigvals(params.W_h)).max(axis=-1)
    scales = (np.array(radii)[:, None] / drawn_radii).reshape(-1, 1, 1)
    params = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * len(radii)), params)
    return params._replace(W_h=scales * params.W_h)


def relative_norms(params: Params, batch: Batch, f: Activation):
    """|dL/dh_t| / |dL/dh_T| for each t, (T,): the median over sequences with a gradient at T."""
    dhs, _ = jaxrnn.gradient_flow(params, batch, activation=f)
    # Scaled before squaring, because the square of a vanishing gradient underflows.
    largest = jnp.maximum(jnp.abs(dhs).max(axis=-1), jnp.finfo(dhs.dtype).tiny)
    norms = largest * jnp.linalg.norm(dhs / largest[..., None], axis=-1)
    return jnp.nanmedian(jnp.where(norms[-1] > 0, norms / norms[-1], jnp.nan), axis=1)


def factor_per_step(ratios):
    """The geometric mean of the factor per step back, from relative norms (..., T) -> (...)."""
    return ratios[..., 0] ** (1 / (ratios.shape[-1] - 1))


def clipped_sgd(params: Params, grads: Params, learning_rate: float, threshold) -> Params:
    """Gradient descent with the norm of the gradient clipped."""
    scale = jnp.minimum(1, threshold / optax.tree.norm(grads))
    return jaxrnn.sgd(params, grads, learning_rate * scale)


def train(config: Config, f: Activation, test_batch: Batch, settings: list):
    """Trains a network for every setting (radius, threshold) and seed, all at once.

    Yields at each check the updates, and the loss on the test batch and the factor per step of each
    network, both (settings, seeds); NaN for networks that have diverged.
    """
    gradient_fn = partial(jaxrnn.bptt, activation=f)
    radii, clips = zip(*settings, strict=True)
    thresholds = jnp.repeat(jnp.array([jnp.inf if c is None else c for c in clips]), config.seeds)

    make_batch = partial(order_batch, T=config.length, B=config.batch_size)

    def updates_and_check(state, key, threshold):
        rule = partial(clipped_sgd, learning_rate=config.learning_rate, threshold=threshold)
        update = jaxrnn.make_update(gradient_fn, rule)
        state = update_on_new_batches(update, make_batch, state, key, config.check_every)
        value, _ = jaxrnn.sequence_loss(state.params, test_batch, activation=f)
        factor = factor_per_step(relative_norms(state.params, test_batch, f))
        return state, (value, factor)

    networks = init_networks(config, radii)
    # A rule has no state, so any rule initialises that of all thresholds.
    states = jax.vmap(lambda params: jaxrnn.init_state(params, clipped_sgd))(networks)
    arguments = jax.random.key(config.seed + 2), config.updates, config.check_every, thresholds
    for updates, results in train_seeds(updates_and_check, states, *arguments):
        yield updates, [values.reshape(len(settings), -1) for values in results]


def median(values):
    """The median over seeds of values (x, seeds), in which a diverged network is infinite."""
    return np.median(np.where(np.isnan(values), np.inf, values), axis=1)


def plot_seeds(ax, x, values, color, label=None):
    """Thin lines for seeds, a thick one for the median; values (x, seeds), NaN if diverged."""
    ax.plot(x, values, color=color, alpha=0.3, linewidth=0.7)
    ax.plot(x, median(values), color=color, linewidth=2, label=label)


def draw_initial(ax, rows: list[dict]):
    """The relative norms against steps back, and rho^k."""
    for row, color in zip(rows, plt.cm.plasma(np.linspace(0, 0.85, len(rows))), strict=True):
        ratios = np.array(row["relative_norms"]).T[::-1]
        steps_back = np.arange(len(ratios))
        plot_seeds(ax, steps_back, ratios, color, label=f"{row['radius']:g}")
        ax.plot(steps_back, row["radius"] ** steps_back, ":", color=color)
    ax.set(yscale="log", ylim=(1e-10, 1e7), xlabel="steps back, T - t", xticks=steps_back[::5])
    ax.set(ylabel="|dL/dh_t| / |dL/dh_T|", title=f"{rows[0]['activation']}, at initialisation")
    ax.legend(title="ρ; dotted: ρ^(T - t)", ncols=4, loc="upper left")


def draw_training(ax, rows: list[dict]):
    """The factor per step back against updates, for each initial spectral radius."""
    radii = sorted({row["radius"] for row in rows})
    for radius, color in zip(radii, plt.cm.plasma(np.linspace(0, 0.85, len(radii))), strict=True):
        of_radius = [row for row in rows if row["radius"] == radius]
        values = np.array([row["factors"] for row in of_radius], float)
        plot_seeds(ax, [row["updates"] for row in of_radius], values, color, f"{radius:g}")
    ax.axhline(1, color="k", linewidth=0.8)
    ax.set(ylim=(0, 1.5), xlabel="updates", ylabel="factor per step back")
    ax.set_title(f"{rows[0]['activation']}, training with clipping at {rows[0]['clip']:g}")
    ax.legend(title="initial ρ", loc="upper left", ncols=3)


def draw_clipping(ax, rows: list[dict]):
    """The loss after the last update against the clipping threshold."""
    losses, positions = np.array([row["losses"] for row in rows], float), np.arange(len(rows))
    ax.plot(positions, losses, "o", color="C0", alpha=0.5)
    ax.plot(positions, median(losses), color="C0", label="median")
    ax.axhline(np.log(4), color="k", linestyle="--", label="chance, ln 4")
    for x in positions[np.isnan(losses).any(axis=1)]:
        ax.text(x + 0.45, 6, f"{np.isnan(losses[x]).sum()} diverged", color="C3", ha="right")
    labels = ["none" if row["clip"] is None else f"{row['clip']:g}" for row in rows]
    ax.set_xticks(positions, labels)
    ax.set(yscale="log", ylim=(1e-6, 20), xlim=(-0.5, len(rows) - 0.5))
    ax.set(xlabel="clipping threshold", ylabel=f"cross-entropy after {rows[0]['updates']} updates")
    ax.set_title(f"{rows[0]['activation']}, initial ρ = {rows[0]['radius']:g}")
    ax.legend(loc="lower left")


def rows_by_threshold(rows: list[dict], name: str) -> list[dict]:
    """The rows of an activation after the last update, one for each threshold."""
    # The settings with the clipped radius are trained last.
    last = (name, rows[-1]["radius"], rows[-1]["updates"])
    return [r for r in rows if (r["activation"], r["radius"], r.get("updates")) == last]


def draw(rows: list[dict], clip: float):
    """For each activation: at initialisation, during training, and against the threshold."""
    figure, axes = plt.subplots(2, 3, figsize=(16, 8), layout="constrained")
    for (left, middle, right), name in zip(axes, ACTIVATIONS, strict=True):
        initial = [row for row in rows if row["activation"] == name and "relative_norms" in row]
        trained = [row for row in rows if row["activation"] == name and "losses" in row]
        draw_initial(left, initial)
        draw_training(middle, [row for row in trained if row["clip"] == clip])
        draw_clipping(right, rows_by_threshold(rows, name))
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    return figure


def summarize(config: Config, rows: list[dict]) -> str:
    """The factors at the smallest and largest radius; how many networks learn and diverge."""
    radii = (min(config.radii), max(config.radii))
    initial = [row for row in rows if "relative_norms" in row and row["radius"] in radii]
    factors = "; ".join(
        f"{row['activation']}, ρ {row['radius']:g}: {mean_and_spread(row['factors'], 2)}"
        for row in initial
    )
    parts = [f"factor per step back: {factors}"]
    for row in rows_by_threshold(rows, "tanh") + rows_by_threshold(rows, "ReLU"):
        if row["clip"] in (config.clip, None):
            learnt = sum(loss is not None and loss < LEARNT for loss in row["losses"])
            clip = f"clipped at {row['clip']:g}" if row["clip"] else "unclipped"
            counts = f"{learnt} of {config.seeds} learn, {row['losses'].count(None)} diverge"
            parts.append(f"{row['activation']}, ρ {row['radius']:g}, {clip}: {counts}")
    return "; ".join(parts)


def main(config: Config) -> dict:
    use_all_cores()
    report = Report(config)
    test_batch = order_batch(jax.random.key(config.seed + 1), config.length, config.test_size)
    networks = shard_seeds(init_networks(config, config.radii))
    for name, f in ACTIVATIONS.items():
        measure = jax.jit(jax.vmap(partial(relative_norms, batch=test_batch, f=f)))
        by_radius = np.split(np.asarray(measure(networks)), len(config.radii))
        for radius, ratios in zip(config.radii, by_radius, strict=True):
            measured = {
                "relative_norms": ratios.tolist(),
                "factors": factor_per_step(ratios).tolist(),
            }
            report.log(activation=name, radius=radius, **measured)
    settings: list = [(r, config.clip) for r in config.trained_radii if r != config.clipped_radius]
    # The threshold of the other radii is among those of the clipped radius.
    thresholds = dict.fromkeys([*config.clips, config.clip])
    settings += [(config.clipped_radius, clip) for clip in thresholds]
    with tqdm(ACTIVATIONS.items(), unit="activation", disable=None) as bar:
        for name, f in bar:
            for updates, results in train(config, f, test_batch, settings):
                bar.set_description(f"{name}: {updates} updates")
                for (radius, clip), losses, factors in zip(settings, *results, strict=True):
                    measured = {"losses": finite(losses), "factors": finite(factors)}
                    report.log(
                        activation=name, radius=radius, clip=clip, updates=updates, **measured
                    )
    return report.finish(summarize(config, report.rows), partial(draw, clip=config.clip))


def run(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: main(cli.parse(Config, arguments, SMOKE)))


if __name__ == "__main__":
    sys.exit(run())
