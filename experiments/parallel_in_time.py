"""Parallel in time: when does Newton's method find all states in few iterations, and at what cost?

`deer` solves the T equations h_t = F(h_{t-1}, x_t) at once, with the whole Jacobian (DEER; Lim et
al. 2024) or its diagonal (quasi-DEER; Gonzalez et al. 2024). Gonzalez et al. (NeurIPS 2025) find
few iterations where the largest Lyapunov exponent is below 0, so that nearby trajectories meet, and
about T above it. Here tanh networks with Gaussian W_h of several gains read white noise:

    iterations and time against the exponent, for several H at one T
    iterations and time against T, at one H

A run has succeeded if it ends below the cap of iterations and every state equals that of
`hidden_states`, to 1e-3. Others, such as those that rounding has led elsewhere, are open circles.

    python -m experiments.parallel_in_time --out runs/parallel_in_time
"""

import dataclasses
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

import jaxrnn
from experiments import cli
from experiments.deer import deer, diagonal, full
from experiments.reports import Report, mean_and_spread

METHODS = {"full": full, "diagonal": diagonal}
EQUAL = 1e-3
"""The largest difference of a unit from `hidden_states` in a run that has succeeded."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Newton's method over all steps at once, beside one step after the other."""

    gains: tuple[float, ...] = (0.5, 0.8, 1.0, 1.2, 1.5, 1.8, 2.2, 3.0)
    """Gains of W_h, whose elements have standard deviation gain / sqrt(H)."""
    hidden_sizes: tuple[int, ...] = (4, 16, 32)
    """Hidden units H, at --length."""
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    """Numbers of steps T, at --hidden-size."""
    hidden_size: int = 16
    """Hidden units where T varies."""
    length: int = 1024
    """Steps where H varies."""
    tolerance: float = 3e-6
    """The largest |h_t - F(h_{t-1}, x_t)| of a unit of a state that is found."""
    max_iterations: int = 200
    """The cap of iterations."""
    calls: int = 3
    """Timed calls, of which the fastest counts; 1 where a call takes more than a second."""
    seeds: int = 3
    """Networks of each gain and H."""
    seed: int = 0
    """Seed of all random numbers."""
    out: Path = Path("runs/parallel_in_time")
    """Folder for metrics.jsonl, figure.png and summary.json."""
    overwrite: bool = False
    """Discard the run that `out` holds."""
    smoke: bool = False
    """Use sizes that run in seconds, to check that everything works."""

    def __post_init__(self):
        cli.expect_values(self, "gains", "hidden_sizes", "lengths")
        counts = ("hidden_sizes", "lengths", "max_iterations", "calls", "seeds")
        cli.expect_at_least(1, self, *counts)
        cli.expect(self, "hidden_size", "one of --hidden-sizes", lambda H: H in self.hidden_sizes)
        cli.expect(self, "length", "one of --lengths", lambda T: T in self.lengths)
        cli.expect_positive(self, "gains", "tolerance")
        cli.expect_seed(self)


SMOKE = {
    "gains": (0.5, 3.0),
    "hidden_sizes": (4,),
    "lengths": (16, 32),
    "hidden_size": 4,
    "length": 32,
    "max_iterations": 10,
    "calls": 1,
    "seeds": 2,
}


def draw_network(config: Config, H: int, T: int, gain: float, n: int):
    """Params and xs (T, 1). W_h differs between gains in scale alone, xs between T in length."""
    key_init, key_xs = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), n))
    W_h_init = jax.nn.initializers.normal(gain / H**0.5)
    params = jaxrnn.init(key_init, 1, H, 1, W_h_init=W_h_init)
    return params, jax.random.normal(key_xs, (max(config.lengths), 1))[:T]


def timed(function, *arguments, calls: int):
    """The result, and the milliseconds of the fastest call after the one that compiles."""
    result = jax.block_until_ready(function(*arguments))
    seconds: list[float] = []
    while not seconds or (len(seconds) < calls and seconds[0] < 1):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - begin)
    return result, 1e3 * min(seconds)


def measure(config: Config, report: Report, H: int, T: int):
    """Logs all gains and seeds at one H and T."""
    solvers = {
        name: jax.jit(
            partial(
                deer,
                linear=linear,
                tolerance=config.tolerance,
                max_iterations=config.max_iterations,
            )
        )
        for name, linear in METHODS.items()
    }
    unroll, exponents = jax.jit(jaxrnn.hidden_states), jax.jit(jaxrnn.lyapunov_exponents)
    for gain in config.gains:
        for n in range(config.seeds):
            params, xs = draw_network(config, H, T, gain, n)
            (_, hs), milliseconds = timed(unroll, params, xs, calls=config.calls)
            network = {"H": H, "T": T, "gain": gain, "exponent": float(exponents(params, xs)[0])}
            report.log(**network, method="unroll", milliseconds=milliseconds)
            for name, solver in solvers.items():
                arguments = params, xs, jnp.zeros(H)
                solution, milliseconds = timed(solver, *arguments, calls=config.calls)
                error = float(jnp.abs(solution.hs - hs).max())
                report.log(
                    **network,
                    method=name,
                    milliseconds=milliseconds,
                    iterations=int(solution.iterations),
                    found=float(solution.found.mean()),
                    error=error,
                    succeeded=bool(solution.found.all()) and error <= EQUAL,
                )


def chosen(rows: list[dict], method: str, **fixed) -> list[dict]:
    """The rows of a method in which these fields have these values."""
    return [row for row in rows if row["method"] == method and fixed.items() <= row.items()]


def colors(rows: list[dict]) -> dict[float, tuple]:
    gains = sorted({row["gain"] for row in rows})
    return dict(zip(gains, plt.cm.plasma(np.linspace(0, 0.9, len(gains))), strict=True))


def draw_exponents(ax, rows: list[dict], config: Config):
    """Iterations against the exponent, a point for each network; open if it has not succeeded."""
    for method, color in zip(METHODS, ("C0", "C1"), strict=True):
        for H, marker in zip(config.hidden_sizes, "o^sDv" * len(config.hidden_sizes), strict=False):
            found = chosen(rows, method, H=H, T=config.length)
            for row in found:
                face = color if row["succeeded"] else "none"
                at = row["exponent"], row["iterations"]
                ax.plot(*at, marker, color=color, markerfacecolor=face, alpha=0.8)
            ax.plot([], [], marker, color=color, label=f"{method}, H = {H}")
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set(xlabel="largest Lyapunov exponent, nats per step")
    ax.set_title(f"T = {config.length}; open: at the cap, or not equal")
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.93))


def count_iterations(ax, config: Config):
    """An axis of iterations, and the cap."""
    ax.set(yscale="log", ylabel="iterations")
    ticks = [n * 10**k for k in range(6) for n in (1, 2, 5) if n * 10**k < config.max_iterations]
    ax.set_yticks([*ticks, config.max_iterations], [*map(str, ticks), "cap"])
    ax.minorticks_off()
    ax.axhline(config.max_iterations, color="black", linestyle=":")


def draw_lengths(ax, rows: list[dict], config: Config, field: str):
    """A field against T: the median over networks, a line for each gain and method."""
    for gain, color in colors(rows).items():
        for method, style in zip(METHODS, ("o-", "s--"), strict=True):
            of_gain = chosen(rows, method, H=config.hidden_size, gain=gain)
            lengths = sorted({row["T"] for row in of_gain})
            of_T = [[row for row in of_gain if row["T"] == T] for T in lengths]
            medians = [np.median([row[field] for row in seeds]) for seeds in of_T]
            ax.plot(lengths, medians, style[1:], color=color)
            for T, y, seeds in zip(lengths, medians, of_T, strict=True):
                face = color if all(row["succeeded"] for row in seeds) else "white"
                ax.plot(T, y, style[0], color=color, markerfacecolor=face)
    ax.set(xscale="log", yscale="log", xlabel="steps, T")
    ax.set_xticks(config.lengths, [str(T) for T in config.lengths])
    ax.xaxis.minorticks_off()


def draw(rows: list[dict], config: Config):
    """Iterations against the exponent and against T, and times against T."""
    figure, axes = plt.subplots(1, 3, figsize=(17, 5.5), layout="constrained")
    draw_exponents(axes[0], rows, config)
    draw_lengths(axes[1], rows, config, "iterations")
    draw_lengths(axes[2], rows, config, "milliseconds")
    sequential = [
        np.median(
            [row["milliseconds"] for row in chosen(rows, "unroll", H=config.hidden_size, T=T)]
        )
        for T in config.lengths
    ]
    axes[2].plot(config.lengths, sequential, "k", linewidth=3, label="hidden_states")
    axes[1].set_title(f"H = {config.hidden_size}; open: at the cap, or not equal")
    count_iterations(axes[0], config)
    count_iterations(axes[1], config)
    axes[2].set(ylabel="milliseconds", title=f"H = {config.hidden_size}, beside hidden_states")
    for gain, color in colors(rows).items():
        axes[2].plot([], [], color=color, label=f"gain {gain:g}")
    for method, style in zip(METHODS, ("o-", "s--"), strict=True):
        axes[2].plot([], [], style, color="grey", label=method)
    axes[2].legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    for ax in axes:
        ax.grid(alpha=0.3)
    return figure


def speeds(rows: list[dict]) -> dict[str, float | None]:
    """For each method, its highest speed relative to `unroll` among the runs that succeeded."""
    unroll = {}
    best: dict[str, float | None] = dict.fromkeys(METHODS)
    for row in rows:  # a network's row of unroll comes first
        if row["method"] == "unroll":
            unroll = row
        elif row["succeeded"]:
            speed = unroll["milliseconds"] / row["milliseconds"]
            best[row["method"]] = max(best[row["method"]] or 0.0, speed)
    return best


def summarize(config: Config, rows: list[dict]) -> str:
    """For each gain at one H and T: growth per step, iterations, successes and times."""
    parts = []
    for gain in config.gains:
        fixed = {"H": config.hidden_size, "T": config.length, "gain": gain}
        unroll = chosen(rows, "unroll", **fixed)
        growth = mean_and_spread([np.exp(row["exponent"]) for row in unroll], 2)
        part = f"gain {gain:g}: growth {growth} per step, unroll {milliseconds(unroll)} ms"
        for method in METHODS:
            runs = chosen(rows, method, **fixed)
            iterations = mean_and_spread([row["iterations"] for row in runs], 0)
            succeeded = sum(row["succeeded"] for row in runs)
            part += f", {method} {iterations} iterations, {succeeded} of {len(runs)} equal, "
            part += f"{milliseconds(runs)} ms"
        parts.append(part)
    best = ", ".join(
        f"{method} {'none' if speed is None else f'{speed:.3f}'}"
        for method, speed in speeds(rows).items()
    )
    return f"{'; '.join(parts)}; at best, times as fast as unroll: {best}"


def milliseconds(rows: list[dict]) -> str:
    return f"{np.median([row['milliseconds'] for row in rows]):.2f}"


def main(config: Config) -> dict:
    report = Report(config)
    sizes = [(H, config.length) for H in config.hidden_sizes]
    sizes += [(config.hidden_size, T) for T in config.lengths if config.length != T]
    with tqdm(sizes, unit="size", disable=None) as bar:
        for H, T in bar:
            bar.set_description(f"H {H}, T {T}")
            measure(config, report, H, T)
    drawn = partial(draw, config=config)
    figures = {
        "speeds": speeds(report.rows),
        "largest_error": max((r["error"] for r in report.rows if r.get("succeeded")), default=None),
        "succeeded": sum(row.get("succeeded", False) for row in report.rows),
        "runs": sum("succeeded" in row for row in report.rows),
    }
    return report.finish(summarize(config, report.rows), drawn, **figures)


def run(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: main(cli.parse(Config, arguments, SMOKE)))


if __name__ == "__main__":
    sys.exit(run())
