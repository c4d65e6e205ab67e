"""Reservoirs: do echo state networks predict as well as reservoirpy's, and in what time?

W_x, W_h and b_h of an echo state network are random and fixed; W_h is sparse. Its units leak, and
only the readout is learned, by ridge regression (Jaeger 2001). Both libraries get the same weights
and data, in float64, and their states must agree. Two tasks, several seeds each:

    Mackey-Glass    x(t + 1) from x(t), and 84 steps ahead in closed loop, where the network reads
                    its own predictions (Jaeger and Haas 2004)
    NARMA-10        y(t + 1) from the inputs so far (Atiya and Parlos 2000)

Errors are root mean squares divided by the standard deviation of the target (NRMSE). Then many long
sequences run through leaky units, the methods in turn. Without reservoirpy jaxrnn runs alone.

    pip install -e '.[experiments,reservoir]'
    python -m experiments.reservoir --out runs/reservoir
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

import jaxrnn
from experiments import cli
from experiments.echo_state import (
    HORIZON,
    TASKS,
    Steps,
    check_agreement,
    errors,
    has_reservoirpy,
    init_network,
    predict,
    predict_reservoirpy,
    reservoir_node,
    run_from_zero,
)
from experiments.reports import Report, mean_and_spread


@dataclasses.dataclass(frozen=True)
class Config:
    """Error and time of echo state networks, beside reservoirpy."""

    hidden_size: int = 500
    """Units of the echo state networks, H."""
    washout: int = 500
    """First steps that the readout is not fitted to."""
    training_steps: int = 4000
    """Steps before the test, the washout included."""
    test_steps: int = 2000
    """Steps of the test."""
    starts: int = 20
    """Number of closed loops, which start at different steps of the test."""
    loop_steps: int = 300
    """Steps of each closed loop."""
    timed_sizes: tuple[int, ...] = (100, 500)
    """Numbers of leaky units that many sequences run through."""
    sequences: int = 64
    """Number of these sequences."""
    sequence_steps: int = 5000
    """Length of these sequences."""
    repeats: int = 9
    """Timed calls of each method; 3 if the first takes more than 10 s."""
    seeds: int = 5
    """Number of networks and series of each task."""
    seed: int = 0
    """Seed of all random numbers."""
    out: Path = Path("runs/reservoir")
    """Folder for metrics.jsonl, figure.png and summary.json."""
    overwrite: bool = False
    """Discard the run that `out` holds."""
    smoke: bool = False
    """Use sizes that run in seconds, to check that everything works."""

    def __post_init__(self):
        cli.expect_values(self, "timed_sizes")
        cli.expect_at_least(10, self, "hidden_size", "timed_sizes")  # a sparse W_h is not 0
        cli.expect_at_least(1, self, "washout", "starts", "sequences", "sequence_steps")
        cli.expect_at_least(1, self, "repeats", "seeds")
        cli.expect_at_least(self.washout + 2, self, "training_steps")
        cli.expect_at_least(HORIZON, self, "loop_steps")
        cli.expect_at_least(self.loop_steps + self.starts + 1, self, "test_steps")
        cli.expect_seed(self)


SMOKE = {
    "hidden_size": 20, "washout": 20, "training_steps": 120, "test_steps": 100, "starts": 2,
    "loop_steps": 84, "timed_sizes": (10,), "sequences": 2, "sequence_steps": 20, "repeats": 1,
    "seeds": 2,
}  # fmt: skip

STEPS = "washout", "training_steps", "test_steps", "starts", "loop_steps"

SLOW_SECONDS, SLOW_REPEATS = 10, 3
"""A method whose first call takes longer is timed fewer times."""

COLORS = {"jaxrnn": "C0", "reservoirpy": "C1"}
ERRORS = {"one_step": "one step", "closed_loop": f"{HORIZON} steps, closed loop"}


def timed(call: Callable) -> tuple[float, Any]:
    """The seconds of a call, and its result."""
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - start, result


def compile_for(function: Callable, *arguments) -> tuple[float, Callable]:
    """The seconds of compilation, and the compiled function."""
    return timed(lambda: jax.jit(function).lower(*arguments).compile())


def compare_networks(config: Config, report: Report) -> None:
    """Logs errors and seconds of each network; the two libraries alternate."""
    steps = Steps(*(getattr(config, name) for name in STEPS))
    for n, task in enumerate(TASKS):
        compiled = None
        for seed in tqdm(range(config.seeds), desc=task.name, unit="network", disable=None):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), n), seed)
            rng = np.random.default_rng([config.seed, n, seed])
            xs, targets = task.series(rng, steps.training + steps.test)
            arguments = init_network(key, config.hidden_size, task), xs, targets
            if compiled is None:
                seconds, compiled = compile_for(partial(predict, steps, task), *arguments)
                report.log(task=task.name, compilation=seconds)
            calls = {"jaxrnn": compiled}
            if has_reservoirpy():
                calls["reservoirpy"] = partial(predict_reservoirpy, steps, task)
            runs = {name: timed(partial(call, *arguments)) for name, call in calls.items()}
            for method, (seconds, predicted) in runs.items():
                check_agreement(method, predicted.hs, runs["jaxrnn"][1].hs)
                row = {"method": method, "seed": seed, "seconds": seconds}
                row |= errors(steps, task, targets, predicted)
                if task.closed_loop and seed == 0:
                    first = steps.loop_starts()[0] + 1
                    row["loop"] = np.asarray(predicted.loops)[:, 0, 0].tolist()
                    row["target"] = targets[first : first + steps.loop, 0].tolist()
                report.log(task=task.name, **row)


def method_calls(config: Config, hidden_size: int) -> tuple[float, dict[str, Callable]]:
    """Seconds of compilation, and for each method a call that returns the states.

    Those of jaxrnn are (T, B, H), those of reservoirpy (B, T, H).
    """
    task = TASKS[0]
    params = init_network(jax.random.key(config.seed), hidden_size, task)
    shape = config.sequences, config.sequence_steps, 1
    xs = np.random.default_rng(config.seed).uniform(-0.5, 0.5, shape)

    def states(params, xs):
        return jaxrnn.hidden_states(params, xs, leak=task.leak)[1]

    arguments = params, jnp.asarray(xs.swapaxes(0, 1))
    seconds, compiled = compile_for(states, *arguments)
    calls: dict[str, Callable] = {"jaxrnn": partial(compiled, *arguments)}
    if has_reservoirpy():
        calls["reservoirpy"] = partial(run_from_zero, reservoir_node(params, task.leak), xs)
    return seconds, calls


def time_sequences(config: Config, report: Report) -> None:
    """Logs the seconds of each call; methods alternate."""
    for H in config.timed_sizes:
        seconds, calls = method_calls(config, H)
        report.log(H=H, compilation=seconds)
        times: dict[str, list[float]] = {name: [] for name in calls}
        last_states = {}
        for n in tqdm(range(config.repeats), desc=f"{H} units", unit="round", disable=None):
            for name, call in calls.items():
                if n >= SLOW_REPEATS and times[name][0] > SLOW_SECONDS:
                    continue
                seconds, states = timed(call)
                times[name].append(seconds)
                last = states[-1] if name == "jaxrnn" else states[:, -1]
                last_states[name] = np.array(last)  # all states are more than a gigabyte
                del states, last
        for name, all_seconds in times.items():
            check_agreement(name, last_states[name], last_states["jaxrnn"])
            report.log(H=H, method=name, times=all_seconds)


def values(rows: list[dict], task: str, method: str, key: str) -> list[float]:
    """One number of each network."""
    return [row[key] for row in rows if (row.get("task"), row.get("method")) == (task, method)]


def draw(rows: list[dict]):
    """A closed loop and its target; errors, networks as points; the times of many sequences."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    loops = [row for row in rows if "loop" in row]
    left.plot(loops[0]["target"], color="black", linewidth=3, alpha=0.4, label="target")
    for row, style in zip(loops, ("-", "--"), strict=False):
        left.plot(row["loop"], style, color=COLORS[row["method"]], label=row["method"])
    left.axvline(HORIZON - 1, color="grey", linestyle=":")
    left.set(xlabel="steps in closed loop", ylabel="x - 1", title="Mackey-Glass, one network")
    left.margins(y=0.2)
    left.legend(loc="lower center", ncols=3)

    judged = [(task.name, key) for task in TASKS for key in list(ERRORS)[: 1 + task.closed_loop]]
    for n, (task, key) in enumerate(judged):
        for method, offset in zip(COLORS, (-0.15, 0.15), strict=True):
            nrmse = values(rows, task, method, key)
            places = n + offset + np.linspace(-0.08, 0.08, len(nrmse))
            middle.plot(places, nrmse, "o", color=COLORS[method], alpha=0.6, label=method)
    middle.set_xticks(range(len(judged)), [f"{task}\n{ERRORS[key]}" for task, key in judged])
    middle.set(ylabel="NRMSE", yscale="log", title="errors, networks as points")
    middle.legend(*[both[: len(loops)] for both in middle.get_legend_handles_labels()])

    timings = [row for row in rows if "times" in row]
    sizes = list(dict.fromkeys(row["H"] for row in timings))
    methods = list(dict.fromkeys(row["method"] for row in timings))
    for n, row in enumerate(timings):
        which = methods.index(row["method"])
        at = sizes.index(row["H"]) + 0.34 * (which - (len(methods) - 1) / 2)
        least, median = min(row["times"]), statistics.median(row["times"])
        label = row["method"] if n < len(methods) else None
        right.bar([at], least, 0.3, color=COLORS[row["method"]], label=label)
        right.plot([at], [median], "_", color="black", markersize=18)
    right.set_xticks(range(len(sizes)), [f"{size} units" for size in sizes])
    right.set(ylabel="seconds", title="many sequences: minimum, and median as a line")
    right.legend()
    for ax in (middle, right):
        ax.grid(axis="y", alpha=0.3)
    return figure


def result(rows: list[dict]) -> str:
    """All numbers of the table, in words."""
    parts = []
    for task, key, unit, scale, digits in (
        ("Mackey-Glass", "one_step", "NRMSE in 1e-6, one step", 1e6, 1),
        ("Mackey-Glass", "closed_loop", f"NRMSE in 1e-3, {HORIZON} steps", 1e3, 2),
        ("NARMA-10", "one_step", "NRMSE", 1, 4),
    ):
        both = [
            f"{method} {mean_and_spread([scale * each for each in nrmse], digits)}"
            for method in COLORS
            if (nrmse := values(rows, task, method, key))
        ]
        parts.append(f"{task}, {unit}: {', '.join(both)}")
    for name in (task.name for task in TASKS):
        both = [
            f"{method} {statistics.median(seconds):.2f}"
            for method in COLORS
            if (seconds := values(rows, name, method, "seconds"))
        ]
        parts.append(f"{name}, seconds of a network, median: {', '.join(both)}")
    for row in rows:
        if "times" in row:
            least, median = min(row["times"]), statistics.median(row["times"])
            time_of = f"{least:.2f} s, median {median:.2f} s of {len(row['times'])}"
            parts.append(f"{row['H']} units, {row['method']}: {time_of}")
    return "; ".join(parts)


def main(config: Config) -> dict:
    if not has_reservoirpy():
        print("reservoirpy is not installed and left out", file=sys.stderr)
    report = Report(config)
    with jax.enable_x64(True):
        compare_networks(config, report)
        time_sequences(config, report)
    compilation = {
        str(row.get("task", row.get("H"))): round(row["compilation"], 2)
        for row in report.rows
        if "compilation" in row
    }
    return report.finish(result(report.rows), draw, compilation_seconds=compilation)


def run(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: main(cli.parse(Config, arguments, SMOKE)))


if __name__ == "__main__":
    sys.exit(run())
