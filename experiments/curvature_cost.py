"""What does a product with the Gauss-Newton matrix cost, beside a gradient and the plain scan?

Conjugate gradients take many products from one linearisation, so ten are timed together, one after
the other, with the linearisation. The plain scan's are those of `jax.linearize` and
`jax.linear_transpose`. The sizes are those of the benchmark whose targets are at every step.

    python -m experiments.curvature_cost --out runs/curvature_cost
"""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from tqdm import tqdm

import jaxrnn
from experiments import cli
from experiments.benchmark import GROUPS, Size, compile_for, make_data, processor, time_in_turn
from experiments.benchmark_report import geometric_mean
from experiments.reports import Report
from jaxrnn import Batch, Params

PRODUCTS = 10
"""Products from one linearisation."""

SIZES = [size for size in GROUPS["typical"] if not size.last]


@dataclasses.dataclass(frozen=True)
class Config:
    """Time of a Gauss-Newton product, relative to a gradient and to the plain scan's product."""

    repeats: int = 9
    """Timed calls of each method at each size, at least."""
    seconds: float = 10.0
    """Time to spend on each size, at least: fast methods get more calls."""
    out: Path = Path("runs/curvature_cost")
    """Folder for metrics.jsonl, figure.png and summary.json."""
    overwrite: bool = False
    """Discard the run that `out` holds."""
    smoke: bool = False
    """Use sizes that run in seconds, to check that everything works."""

    def __post_init__(self):
        cli.expect_at_least(1, self, "repeats")
        cli.expect_at_least(0, self, "seconds")


SMOKE = {"repeats": 1, "seconds": 0.0}


def plain_gauss_newton(params: Params, batch: Batch):
    """v -> G v, from the derivatives of a scan over the cell."""

    def outputs(params):
        h_0 = jnp.zeros((batch.xs.shape[1], len(params.b_h)), params.b_h.dtype)
        return lax.scan(lambda h, x: jaxrnn.step(params, h, x), h_0, jnp.asarray(batch.xs))[1]

    ys, J = jax.linearize(outputs, params)
    J_transposed = jax.linear_transpose(J, params)
    _, H_L = jax.linearize(
        lambda ys: jaxrnn.cross_entropy.error(ys, jnp.asarray(batch.targets)), ys
    )
    steps = ys.shape[0] * ys.shape[1]
    return lambda v: jax.tree.map(lambda leaf: leaf / steps, J_transposed(H_L(J(v)))[0])


def products(gauss_newton):
    """(params, batch, v) -> the last of the products v <- G v / |G v|."""

    def run(params, batch, v):
        product = gauss_newton(params, batch)

        def again(_, v):
            Gv = product(v)
            norm = jnp.linalg.norm(ravel_pytree(Gv)[0])
            return jax.tree.map(lambda leaf: leaf / norm, Gv)

        return lax.fori_loop(0, PRODUCTS, again, v)

    return run


def measure(config: Config, size: Size) -> dict:
    """The minimum and the median of the milliseconds of a gradient and of each kind of product.

    Raises:
      AssertionError: the products differ.
    """
    params, batch = make_data(size, "float32")
    v = jax.tree.map(jnp.ones_like, params)
    ours, plain = (
        compile_for(products(fn), (params, batch, v))
        for fn in (jaxrnn.curvature.gauss_newton, plain_gauss_newton)
    )
    got, expected = (ravel_pytree(method.call())[0] for method in (ours, plain))
    error = float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))
    if not error <= 1e-3:
        raise AssertionError(f"the products of {size} differ by {error:.1e}")
    bptt = compile_for(jaxrnn.bptt, (params, batch))
    functions = {"bptt": bptt.call, "product": ours.call, "plain": plain.call}
    row: dict = {"size": str(size)}
    for name, times in time_in_turn(functions, config.repeats, config.seconds).items():
        count = 1 if name == "bptt" else PRODUCTS
        for statistic, value in (("min", min(times)), ("median", float(np.median(times)))):
            row[f"{name}_{statistic}_ms"] = 1e3 * value / count
        row["calls"] = len(times)
    return row


def ratios(rows: list[dict], statistic: str) -> dict[str, list[float]]:
    """For each size, a product's time over that of `bptt`, and the plain product's over ours."""
    times = {
        name: [row[f"{name}_{statistic}_ms"] for row in rows]
        for name in ("bptt", "product", "plain")
    }
    return {
        "product / bptt": [a / b for a, b in zip(times["product"], times["bptt"], strict=True)],
        "plain / product": [a / b for a, b in zip(times["plain"], times["product"], strict=True)],
    }


def draw(rows: list[dict]):
    """Both ratios at each size, from the medians."""
    fig, ax = plt.subplots(figsize=(8, 4), layout="constrained")
    for n, (name, values) in enumerate(ratios(rows, "median").items()):
        positions = np.arange(len(rows)) + 0.36 * (n - 0.5)
        ax.bar(positions, values, 0.34, color=f"C{n}", label=name)
    ax.axhline(1, color="black", linewidth=0.8)
    sizes = [row["size"] for row in rows]
    ax.set_xticks(range(len(rows)), sizes, rotation=30, ha="right", rotation_mode="anchor")
    ax.set(xlabel="T, B, I, H, O", ylabel="ratio of times")
    ax.legend()
    ax.grid(axis="y", alpha=0.3)
    return fig


def main(config: Config) -> dict:
    report = Report(config)
    sizes = [Size(9, 2, 3, 4, 5), Size(8, 2, 3, 4, 5, tokens=True)] if config.smoke else SIZES
    for size in tqdm(sizes, unit="size", disable=None):
        report.log(**measure(config, size))
    figures = {
        statistic: {
            name: round(geometric_mean(values), 2)
            for name, values in ratios(report.rows, statistic).items()
        }
        for statistic in ("min", "median")
    }
    ours = "; ".join(
        f"{name}: {figures['median'][name]:.2f} by medians, {figures['min'][name]:.2f} by minima"
        for name in figures["median"]
    )
    return report.finish(ours, draw, geometric_means=figures, processor=processor())


def run(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: main(cli.parse(Config, arguments, SMOKE)))


if __name__ == "__main__":
    sys.exit(run())
