"""Where does the gradient go on its way back through time?

The error of the last step alone is sent back. A step multiplies it by W_h^T diag(f'). With |W_h|
the largest singular value, rho the largest |eigenvalue| and max f' = 1 (Bengio, Simard and Frasconi
1994; Pascanu, Mikolov and Bengio 2013):

    |W_h| < 1     is sufficient for the gradient to vanish
    |W_h| > 1     is necessary for it to explode
    rho^k         is how it goes over k steps in a linear network, but for a factor

|dL/dh_t| is measured for Gaussian W_h scaled to rho, at initialisation and while the network learns
temporal_order by gradient descent with clipping. Then the threshold is varied at one rho, from so
low that little is learnt in time to none at all.

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
from jax import lax
from tqdm import tqdm

import jaxrnn
from experiments import cli
from experiments.multi_seed import share_out, use_all_cores
from experiments.reports import Report, finite, mean_and_spread
from experiments.temporal_order import order_batch
from jaxrnn import Activation, Batch, Params


@dataclasses.dataclass(frozen=True)
class Config:
    """Norms of dL/dh_t against steps back, for tanh and ReLU; what clipping does."""

    radii: tuple[float, ...] = (0.5, 0.7, 0.9, 1.0, 1.1, 1.3, 1.5)
    """Spectral radii of W_h, rho, at initialisation."""
    trained_radii: tuple[float, ...] = (0.5, 1.0, 1.5)
    """Spectral radii to train from."""
    clips: tuple[float | None, ...] = (0.01, 0.03, 0.1, 1.0, 10.0, 100.0, None)
    """Thresholds of the gradient's norm; None is no clipping."""
    clip: float = 1.0
    """Threshold while the radius varies."""
    clipped_radius: float = 1.5
    """Spectral radius while the threshold varies."""
    length: int = 20
    """Sequence length T of the temporal order problem."""
    updates: int = 2_500
    """Updates of each network."""
    check_every: int = 125
    """Updates between checks."""
    test_size: int = 200
    """Held-out sequences to measure on."""
    batch_size: int = 20
    """Sequences in an update, each of them new, B."""
    hidden_size: int = 50
    """Hidden units, H."""
    learning_rate: float = 0.1
    """Learning rate of gradient descent, so high that it sometimes explodes without clipping."""
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
        cli.expect_positive(self, "radii", "trained_radii", "clipped_radius")
        cli.expect_positive(self, "clips", "clip", "learning_rate")
        cli.expect_multiple(self, "updates", of="check_every")
        cli.expect_seed(self)


SMOKE = {"clips": (1.0, None), "length": 10, "updates": 4, "check_every": 2, "seeds": 2}

ACTIVATIONS = {"tanh": jaxrnn.tanh, "ReLU": jaxrnn.relu}

LEARNT = 0.1  # nats at most; chance is ln 4


def start(config: Config, radii) -> Params:
    """Gaussian W_h for every radius and seed, the radius outermost; a seed's differ in scale."""
    keys, H = jax.random.split(jax.random.key(config.seed), config.seeds), config.hidden_size
    W_h_init = jax.nn.initializers.normal()
    params = jax.vmap(lambda key: jaxrnn.init(key, 6, H, 4, W_h_init=W_h_init))(keys)
    drawn = np.abs(np.linalg.eigvals(params.W_h)).max(axis=-1)
    scales = (np.array(radii)[:, None] / drawn).reshape(-1, 1, 1)
    params = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * len(radii)), params)
    return params._replace(W_h=scales * params.W_h)


def decay(params: Params, batch: Batch, f: Activation):
    """|dL/dh_t| / |dL/dh_T| for each t (T,), the median of the sequences that have an error."""
    dhs, _ = jaxrnn.gradient_flow(params, batch, activation=f)
    # The squares of what has vanished would underflow.
    largest = jnp.maximum(jnp.abs(dhs).max(axis=-1), jnp.finfo(dhs.dtype).tiny)
    norms = largest * jnp.linalg.norm(dhs / largest[..., None], axis=-1)
    return jnp.nanmedian(jnp.where(norms[-1] > 0, norms / norms[-1], jnp.nan), axis=1)


def rates(decays):
    """What a step back multiplies the gradient by, the geometric mean of all: (..., T) -> (...)."""
    return decays[..., 0] ** (1 / (decays.shape[-1] - 1))


def train(config: Config, f: Activation, batch: Batch, settings: list):
    """Trains a network for every (radius, threshold) and seed, all at once; batch is to measure on.

    Yields at each check the updates done, and losses and rates, each (settings, seeds).
    """
    T, B = config.length, config.batch_size
    radii, clips = zip(*settings, strict=True)
    thresholds = jnp.repeat(jnp.array([jnp.inf if c is None else c for c in clips]), config.seeds)

    @jax.jit
    @jax.vmap
    def updates_and_check(params, threshold, key):
        def update(params, key):
            _, grads = jaxrnn.bptt(params, order_batch(key, T, B), activation=f)
            scale = jnp.minimum(1, threshold / optax.tree.norm(grads))
            return jaxrnn.sgd(params, grads, config.learning_rate * scale), None

        params, _ = lax.scan(update, params, jax.random.split(key, config.check_every))
        value, _ = jaxrnn.sequence_loss(params, batch, activation=f)
        return params, (value, rates(decay(params, batch, f)))

    params, thresholds = share_out((start(config, radii), thresholds))
    for done in range(config.check_every, config.updates + 1, config.check_every):
        key_train = jax.random.fold_in(jax.random.key(config.seed + 2), done)
        keys = jax.random.split(key_train, len(thresholds))
        params, found = updates_and_check(params, thresholds, share_out(keys))
        yield done, [np.asarray(values).reshape(len(settings), -1) for values in found]


def band(ax, x, values, color, label=None):
    """Each seed thin, their median thick; values (x, seeds), NaN where a network has diverged."""
    ax.plot(x, values, color=color, alpha=0.3, linewidth=0.7)
    ax.plot(x, np.nanmedian(values, axis=1), color=color, linewidth=2, label=label)


def draw_start(ax, rows: list[dict]):
    """The decay against steps back, and rho^k."""
    for row, color in zip(rows, plt.cm.plasma(np.linspace(0, 0.85, len(rows))), strict=True):
        ratios = np.array(row["decay"]).T[::-1]
        back = np.arange(len(ratios))
        band(ax, back, ratios, color, label=f"{row['radius']:g}")
        ax.plot(back, row["radius"] ** back, ":", color=color)
    ax.set(yscale="log", ylim=(1e-10, 1e7), xlabel="steps back, T - t", xticks=back[::5])
    ax.set(ylabel="|dL/dh_t| / |dL/dh_T|", title=f"{rows[0]['activation']}, at initialisation")
    ax.legend(title="ρ; dotted: ρ^(T - t)", ncols=4, loc="upper left")


def draw_training(ax, rows: list[dict]):
    """The rate against updates, for each radius to start from."""
    radii = sorted({row["radius"] for row in rows})
    for radius, color in zip(radii, plt.cm.plasma(np.linspace(0, 0.85, len(radii))), strict=True):
        mine = [row for row in rows if row["radius"] == radius]
        values = np.array([row["rates"] for row in mine], float)
        band(ax, [row["updates"] for row in mine], values, color, f"ρ {radius:g}")
    ax.axhline(1, color="k", linewidth=0.8)
    ax.set(ylim=(0, 1.5), xlabel="updates", ylabel="factor per step back")
    ax.set_title(f"{rows[0]['activation']}, in training, threshold {rows[0]['clip']:g}")
    ax.legend(title="at first", loc="upper left", ncols=3)


def draw_clipping(ax, rows: list[dict]):
    """The loss after the last update against the threshold."""
    losses, at = np.array([row["losses"] for row in rows], float), np.arange(len(rows))
    ax.plot(at, losses, "o", color="C0", alpha=0.5)
    ax.plot(at, np.nanmedian(losses, axis=1), color="C0", label="median")
    ax.axhline(np.log(4), color="k", linestyle="--", label="chance, ln 4")
    for x in at[np.isnan(losses).any(axis=1)]:
        ax.text(x, 6, f"{np.isnan(losses[x]).sum()} NaN", color="C3", ha="center")
    ax.set_xticks(at, ["none" if row["clip"] is None else f"{row['clip']:g}" for row in rows])
    ax.set(yscale="log", ylim=(1e-6, 20), xlim=(-0.5, len(rows) - 0.5))
    ax.set(xlabel="clipping threshold", ylabel=f"cross-entropy after {rows[0]['updates']} updates")
    ax.set_title(f"{rows[0]['activation']}, ρ = {rows[0]['radius']:g} at first")
    ax.legend(loc="lower left")


def by_threshold(rows: list[dict], name: str) -> list[dict]:
    """Where the threshold varies, which is what was trained last, after the last update."""
    end = (name, rows[-1]["radius"], rows[-1]["updates"])
    return [r for r in rows if (r["activation"], r["radius"], r.get("updates")) == end]


def draw(rows: list[dict]):
    """A row for each activation: at initialisation, in training, and what the threshold does."""
    figure, axes = plt.subplots(2, 3, figsize=(16, 8), layout="constrained")
    for (left, middle, right), name in zip(axes, ACTIVATIONS, strict=True):
        mine = [row for row in rows if row["activation"] == name]
        trained = [row for row in mine if "losses" in row]
        draw_start(left, [row for row in mine if "decay" in row])
        draw_training(middle, [row for row in trained if row["clip"] == trained[0]["clip"]])
        draw_clipping(right, by_threshold(rows, name))
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    return figure


def ours(config: Config, rows: list[dict]) -> str:
    """The rates at the least and the greatest radius; how many learn with clipping and without."""
    ends = (config.radii[0], config.radii[-1])
    starts = [row for row in rows if "decay" in row and row["radius"] in ends]
    factors = [(mean_and_spread(r["rates"], 2), r["activation"], r["radius"]) for r in starts]
    listed = ", ".join(f"{factor} ({name}, ρ {radius:g})" for factor, name, radius in factors)
    told = [f"a step back multiplies the gradient by {listed}"]
    for row in by_threshold(rows, "tanh") + by_threshold(rows, "ReLU"):
        if row["clip"] in (config.clip, None):
            learnt = sum(loss is not None and loss < LEARNT for loss in row["losses"])
            clip = f"clipped at {row['clip']:g}" if row["clip"] else "unclipped"
            fate = f"{learnt} of {config.seeds} learn, {row['losses'].count(None)} NaN"
            told.append(f"{row['activation']}, ρ {row['radius']:g}, {clip}: {fate}")
    return "; ".join(told)


def main(config: Config) -> dict:
    use_all_cores()
    report = Report(config)
    batch = order_batch(jax.random.key(config.seed + 1), config.length, config.test_size)
    params = share_out(start(config, config.radii))
    for name, f in ACTIVATIONS.items():
        decays = np.asarray(jax.jit(jax.vmap(partial(decay, batch=batch, f=f)))(params))
        for radius, mine in zip(config.radii, np.split(decays, len(config.radii)), strict=True):
            both = {"decay": mine.tolist(), "rates": rates(mine).tolist()}
            report.log(activation=name, radius=radius, **both)
    settings: list = [(r, config.clip) for r in config.trained_radii if r != config.clipped_radius]
    settings += [(config.clipped_radius, clip) for clip in config.clips]
    with tqdm(ACTIVATIONS.items(), unit="activation", disable=None) as bar:
        for name, f in bar:
            for done, found in train(config, f, batch, settings):
                bar.set_description(f"{name}: {done} updates")
                for (radius, clip), losses, factors in zip(settings, *found, strict=True):
                    both = {"losses": finite(losses), "rates": finite(factors)}
                    report.log(activation=name, radius=radius, clip=clip, updates=done, **both)
    return report.finish(ours(config, report.rows), draw)


def run(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: main(cli.parse(Config, arguments, SMOKE)))


if __name__ == "__main__":
    sys.exit(run())
