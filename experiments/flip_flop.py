"""Flip-flop: how does a network hold three bits, and which method finds its fixed points?

Each of three inputs is 0 except for pulses of +1 and -1 at random steps; each output holds the sign
of the last pulse of its input (Sussillo and Barak 2013). The trained rate network holds the eight
memories at stable fixed points, and passes saddles from one to the other. They are searched with
the input 0, from means of two states on trajectories, with noise, in two ways:

    Newton    `jaxrnn.fixed_points`
    Adam      on q = |h - F(h)|^2 / 2, as FixedPointFinder does (Golub and Sussillo 2018)

The signs of det(I - dF/dh) over all fixed points add up to 1: see `fixed_points`.

    python -m experiments.flip_flop --out runs/flip_flop
"""

import dataclasses
import itertools
import sys
import time
import warnings
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
from experiments.multi_seed import nan_if_skipped, shard_seeds, use_all_cores
from experiments.reports import Report, mean_and_spread
from jaxrnn import Batch, FixedPoints, Params, distinct, fixed_points, jacobian, stability

BITS = 3
PULSES = 0.05  # the probability of a pulse of an input at a step
START_NOISE = 0.1  # the standard deviation of what is added to a start
TOLERANCE = 1e-12  # the highest speed q of a fixed point
DISTANCE = 1e-4  # points at most this far apart are one


@dataclasses.dataclass(frozen=True)
class Config:
    """The fixed points of networks that hold three bits, found by Newton's method and by Adam."""

    hidden_size: int = 64
    """Hidden units, H."""
    leak: float = 0.5
    """alpha = dt / tau."""
    noise: float = 0.1
    """Standard deviation of the noise that is added to z_t in training."""
    length: int = 50
    """Steps of a training sequence, T; those that the searches start from have 4 T."""
    updates: int = 1_500
    """Updates of each network."""
    batch_size: int = 64
    """Sequences per update, B; all are new."""
    learning_rate: float = 3e-3
    """Initial learning rate of Adam in training; cosine decay to zero."""
    starts: int = 512
    """Searches in each network."""
    adam_steps: int = 5_000
    """Steps of Adam."""
    adam_rates: tuple[float, ...] = (0.01, 0.3)
    """Initial learning rates of Adam in the search; exponential decay to a thousandth."""
    seeds: int = 6
    """Number of networks."""
    seed: int = 0
    """Seed of all random numbers."""
    out: Path = Path("runs/flip_flop")
    """Folder for metrics.jsonl, figure.png and summary.json."""
    overwrite: bool = False
    """Discard the run that `out` holds."""
    smoke: bool = False
    """Use sizes that run in seconds, to check that everything works."""

    def __post_init__(self):
        counts = ("length", "updates", "batch_size", "starts", "adam_steps", "seeds")
        cli.expect_at_least(1, self, *counts)
        cli.expect_at_least(BITS, self, "hidden_size")
        cli.expect_at_least(0, self, "noise")
        cli.expect_positive(self, "leak", "learning_rate", "adam_rates")
        cli.expect(self, "leak", "at most 1", lambda leak: leak <= 1)
        cli.expect_seed(self)


SMOKE = {
    "hidden_size": 8,
    "length": 5,
    "updates": 4,
    "batch_size": 2,
    "starts": 8,
    "adam_steps": 3,
    "adam_rates": (0.3,),
    "seeds": 2,
}


def flip_flop_batch(key, T: int, B: int) -> Batch:
    """Pulses (T, B, 3) and the signs to hold. The first step sets all three bits."""
    key_when, key_sign = jax.random.split(key)
    pulse = jax.random.bernoulli(key_when, PULSES, (T, B, BITS)).at[0].set(True)
    xs = pulse * jax.random.rademacher(key_sign, (T, B, BITS), jnp.float32)

    def hold(bits, x):
        bits = jnp.where(x == 0, bits, x)
        return bits, bits

    return Batch(xs, lax.scan(hold, xs[0], xs)[1])


@partial(jax.jit, static_argnames="config")
@partial(jax.vmap, in_axes=(None, 0))
def train(config: Config, key) -> Params:
    """Trains a network on new sequences at each update; NaN if it diverges."""
    key_init, key_batches, key_noise = jax.random.split(key, 3)
    rate = optax.cosine_decay_schedule(config.learning_rate, config.updates)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    def noisy_bptt(params, batch, h, *, key):
        noise = jax.random.normal(key, (*batch.xs.shape[:2], config.hidden_size))
        batch = batch._replace(drive=config.noise * noise)
        return jaxrnn.bptt(params, batch, h, leak=config.leak, loss=jaxrnn.squared_error)

    update = jaxrnn.make_update(noisy_bptt, optimizer)

    def update_on_new_batch(state, key):
        return update(state, flip_flop_batch(key, config.length, config.batch_size))

    W_h_init = jax.nn.initializers.normal(0.8 / config.hidden_size**0.5)
    params = jaxrnn.init(key_init, BITS, config.hidden_size, BITS, W_h_init=W_h_init)
    state = jaxrnn.init_state(params, optimizer, key=key_noise)
    keys = jax.random.split(key_batches, config.updates)
    state, metrics = lax.scan(update_on_new_batch, state, keys)
    return nan_if_skipped(state.params, metrics.skipped)


def adam(config: Config, rate: float, params: Params, h) -> FixedPoints:
    """Gradient descent on q with Adam, from all starts at once."""
    xs = jnp.zeros((len(h), BITS))
    optimizer = optax.adam(optax.exponential_decay(rate, config.adam_steps, decay_rate=1e-3))

    def speed(h):
        r = h - jaxrnn.step(params, h, xs, leak=config.leak)[0]
        return (r * r).sum(axis=-1) / 2

    def descend(carry, _):
        h, state = carry
        change, state = optimizer.update(jax.grad(lambda h: speed(h).sum())(h), state)
        return (h + change, state), None

    (h, _), _ = lax.scan(descend, (h, optimizer.init(h)), length=config.adam_steps)
    Js = jacobian(params, h, xs, leak=config.leak)
    return FixedPoints(h, speed(h), Js, speed(h) <= TOLERANCE)


def starts(config: Config, hs: np.ndarray, n: int) -> np.ndarray:
    """Means of two states of the trajectories hs (T, B, H), with noise, (N, H)."""
    rng = np.random.default_rng([config.seed, n])
    pairs = rng.integers(hs[..., 0].size, size=(config.starts, 2))
    noise = rng.standard_normal((config.starts, hs.shape[-1]))
    return hs.reshape(-1, hs.shape[-1])[pairs].mean(axis=1) + START_NOISE * noise


def measure(points: FixedPoints) -> dict:
    """Counts and properties of distinct fixed points."""
    kinds = stability(points.jacobian)
    signs, _ = np.linalg.slogdet(np.eye(points.h.shape[1]) - points.jacobian)
    return {
        "stable": int(kinds.stable.sum()),
        "saddles": [int((kinds.unstable_dim == k).sum()) for k in range(1, BITS + 1)],
        "points": len(points.h),
        "marginal": int(kinds.marginal.sum()),
        "largest_speed": float(points.speed.max(initial=0)),
        "largest_radius": float(np.abs(kinds.eigenvalues[kinds.stable]).max(initial=0)),
        "sum_of_signs": int(signs.sum()),
    }


def project(points: FixedPoints, hs: np.ndarray) -> dict:
    """Trajectories, fixed points and unstable directions in the first three components of hs."""
    center = hs.mean(axis=(0, 1))
    axes = np.linalg.svd((hs - center).reshape(-1, hs.shape[-1]), full_matrices=False)[2][:3].T
    eigenvalues, vectors = np.linalg.eig(points.jacobian)
    most_unstable = np.abs(eigenvalues).argmax(axis=-1)
    directions = np.take_along_axis(vectors, most_unstable[:, None, None], axis=-1)[..., 0].real
    return {
        "trajectories": np.round((hs[:, :24] - center) @ axes, 3).swapaxes(0, 1).tolist(),
        "at": ((points.h - center) @ axes).tolist(),
        "directions": (directions @ axes).tolist(),
        "unstable_dims": stability(points.jacobian).unstable_dim.tolist(),
    }


def search(config: Config, report: Report, params: Params, hs: np.ndarray):
    """Logs what each finder finds in each network; params and hs have a first axis of seeds."""
    by_adam = {f"Adam, {rate:g}": partial(adam, config, rate) for rate in config.adam_rates}
    newton = partial(fixed_points, x=jnp.zeros(BITS), leak=config.leak, tolerance=TOLERANCE)
    finders = {"Newton": newton, **by_adam}
    compiled: dict = {}
    with tqdm(range(config.seeds), unit="network", disable=None) as bar:
        for n, (name, finder) in itertools.product(bar, finders.items()):
            network = jax.tree.map(lambda leaf, n=n: jnp.asarray(leaf[n]), params)
            h = jnp.asarray(starts(config, hs[n], n))
            if name not in compiled:
                compiled[name] = jax.jit(finder).lower(network, h=h).compile()
            start = time.perf_counter()
            points = jax.block_until_ready(compiled[name](network, h=h))
            seconds, percent = time.perf_counter() - start, 100 * float(points.converged.mean())
            with warnings.catch_warnings(action="ignore"):  # finding nothing is a result here
                found = distinct(points, DISTANCE)
            report.log(network=n, finder=name, seconds=seconds, percent=percent, **measure(found))
            if name == "Newton" and n == 0 and len(found.h):
                report.log(**project(found, hs[n]))


KINDS = [("o", "C2", "stable"), ("X", "C3", "saddle of index 1, unstable direction"),
         ("s", "C1", "saddle of index 2"), ("D", "black", "saddle of index 3")]  # fmt: skip


def draw_points(ax, row: dict):
    """The trajectories, the fixed points by their index, and a line for each unstable direction."""
    for trajectory in np.array(row["trajectories"]):
        ax.plot(*trajectory.T, color="C0", alpha=0.25, linewidth=0.6)
    at, dims = np.array(row["at"]), np.array(row["unstable_dims"], int)
    for k, (marker, color, label) in enumerate(KINDS):
        ax.plot(*at[dims == k].T, marker, color=color, markersize=7, label=label)
    directions = np.array(row["directions"])
    for point, line in zip(at[dims == 1], directions[dims == 1], strict=True):
        step = 0.08 * np.ptp(at, axis=0).max() * line / np.linalg.norm(line)
        ax.plot(*np.array([point - step, point + step]).T, color="C3", linewidth=2)
    ax.set(xlabel="component 1", ylabel="component 2", zlabel="component 3", title="one network")
    ax.set_box_aspect((1, 1, 0.9), zoom=1.05)
    ax.legend(loc="upper left")


def draw_finders(ax, rows: list[dict]):
    """Distinct fixed points against seconds, a point for each network."""
    for n, name in enumerate(dict.fromkeys(row["finder"] for row in rows)):
        found = [(row["seconds"], row["points"]) for row in rows if row["finder"] == name]
        ax.plot(*zip(*found, strict=True), "os^v"[n % 4], alpha=0.7, label=name)
    ax.set(xlim=(0, None), xlabel="seconds per network", ylim=(0, None), ylabel="fixed points")
    ax.legend(loc="lower left", title="finder, learning rate")
    ax.grid(alpha=0.3)


def draw(rows: list[dict]):
    """The first network's trajectories and fixed points; what each finder finds in what time."""
    figure = plt.figure(figsize=(13, 7), layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=(2, 1))
    for row in rows:
        if "trajectories" in row:
            draw_points(figure.add_subplot(grid[0], projection="3d", elev=15, azim=40), row)
    draw_finders(figure.add_subplot(grid[1]), [row for row in rows if "finder" in row])
    return figure


def summarize(rows: list[dict]) -> str:
    """For each finder: seconds, the share of searches that converge, stable points and saddles."""
    parts = []
    for name in dict.fromkeys(row["finder"] for row in rows):
        of_finder = [row for row in rows if row["finder"] == name]
        seconds = mean_and_spread([row["seconds"] for row in of_finder], 2)
        counts = np.array([[row["percent"], row["stable"], *row["saddles"]] for row in of_finder])
        percent, stable, *saddles = (mean_and_spread(count, 1) for count in counts.T.tolist())
        found = f"{percent} % converge, {stable} stable, saddles {' / '.join(saddles)}"
        parts.append(f"{name}: {seconds} s, {found}")
    return "; ".join(parts)


def main(config: Config) -> dict:
    use_all_cores()
    report = Report(config)
    key_train, key_test = jax.random.split(jax.random.key(config.seed))
    trained = train(config, shard_seeds(jax.random.split(key_train, config.seeds)))
    test = flip_flop_batch(key_test, 4 * config.length, config.batch_size)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), trained)
        run_all = jax.vmap(partial(jaxrnn.hidden_states, leak=config.leak), in_axes=(0, None))
        hs = np.asarray(jax.jit(run_all)(params, test.xs)[1])
        search(config, report, params, hs)
    ys = hs @ params.W_y.swapaxes(1, 2)[:, None] + params.b_y[:, None, None]
    wrong = (np.sign(ys) != np.asarray(test.targets)).mean(axis=(1, 2, 3))
    rows = [row for row in report.rows if "finder" in row]
    networks = [row for row in rows if row["finder"] == "Newton"]
    return report.finish(summarize(rows), draw, networks=networks, wrong_bits=wrong.tolist())


def run(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: main(cli.parse(Config, arguments, SMOKE)))


if __name__ == "__main__":
    sys.exit(run())
