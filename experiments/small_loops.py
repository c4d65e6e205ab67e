"""How long does a loop over a small network take on a CPU, with XLA's default and as one kernel?

XLA compiles a loop into one kernel if its instructions access less than 1,024 bytes together;
otherwise each step launches kernels. A flag raises this threshold, for a process as a whole. So two
processes, one with the flag, time value and gradient by the plain scan and by `bptt`, in turn.

    python -m experiments.small_loops --out runs/small_loops
"""

import contextlib
import dataclasses
import functools
import os
import sys
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from experiments import cli, peers
from experiments.benchmark import Size, compile_for, make_data, processor, time_in_turn
from experiments.benchmark_report import geometric_mean
from experiments.reports import Report

FLAG = "--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold=65536"
KINDS = {"default": "", "raised": FLAG}
"""The thresholds, and the flags that set them."""

DTYPES = ("float32", "float64")
METHODS = ("plain scan", "bptt")


@dataclasses.dataclass(frozen=True)
class Config:
    """Time of value and gradient of small networks, with XLA's default and with larger kernels."""

    steps: int = 10_000
    """T, the steps of a sequence."""
    batch_sizes: tuple[int, ...] = (1, 4)
    """B, sequences at once."""
    hidden_sizes: tuple[int, ...] = (1, 4, 8, 16)
    """H, hidden units; there is one input and one output."""
    rounds: int = 3
    """Turns of each process, of at least nine calls of each method."""
    out: Path = Path("runs/small_loops")
    """Folder for metrics.jsonl, figure.png and summary.json."""
    overwrite: bool = False
    """Discard the run that `out` holds."""
    smoke: bool = False
    """Use sizes that run in seconds, to check that everything works."""

    def __post_init__(self):
        cli.expect_values(self, "batch_sizes", "hidden_sizes")
        cli.expect_at_least(1, self, "steps", "rounds", "batch_sizes", "hidden_sizes")


SMOKE = {"steps": 20, "batch_sizes": (1,), "hidden_sizes": (1, 4), "rounds": 1}


def use_flags(flags: str) -> None:
    """Sets the flags of XLA in a process that has not used it yet."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()


@functools.lru_cache(maxsize=1)
def compiled(size: Size, dtype: str) -> dict:
    """The functions to time, by method; compiled in the first turn of a process."""
    arguments = make_data(size, dtype)
    methods = peers.methods(*arguments, devices=1, baseline=None, leak=None)
    return {name: compile_for(*methods[name]).call for name in METHODS}


def best_ms(size: Size, dtype: str) -> dict[str, float]:
    """The least milliseconds of a call, by method."""
    with jax.enable_x64(dtype == "float64"):
        times = time_in_turn(compiled(size, dtype), repeats=9, seconds=0.0)
    return {name: 1e3 * min(seconds) for name, seconds in times.items()}


def measure(config: Config, size: Size, dtype: str, processes: dict) -> dict:
    """A line of metrics.jsonl: the least milliseconds by method and threshold."""
    row = {"B": size.B, "H": size.H, "dtype": dtype}
    for _ in range(config.rounds):
        for threshold, process in processes.items():
            for name, ms in process.submit(best_ms, size, dtype).result().items():
                key = f"{name}, {threshold}"
                row[key] = min(ms, row.get(key, np.inf))
    return row


def speedups(rows: list[dict], method: str) -> list[float]:
    return [row[f"{method}, default"] / row[f"{method}, raised"] for row in rows]


def beside_scan(rows: list[dict], dtype: str) -> dict[str, float]:
    """How many times as fast as the plain scan `bptt` is by default."""
    chosen = [row for row in rows if row["dtype"] == dtype]
    ratios = [row["plain scan, default"] / row["bptt, default"] for row in chosen]
    return {"geometric_mean": round(geometric_mean(ratios), 2), "least": round(min(ratios), 2)}


def draw(rows: list[dict]):
    """How many times as fast each method is with the raised threshold."""
    fig, ax = plt.subplots(figsize=(8, 4), layout="constrained")
    for n, name in enumerate(METHODS):
        positions = np.arange(len(rows)) + 0.36 * (n - 0.5)
        ax.bar(positions, speedups(rows, name), 0.34, color=f"C{n}", label=name)
    ax.axhline(1, color="black", linewidth=0.8)
    sizes = [f"{row['B']}, {row['H']}, {row['dtype']}" for row in rows]
    ax.set_xticks(range(len(rows)), sizes, rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="B, H, dtype", ylabel="times as fast as by default")
    ax.legend()
    ax.grid(axis="y", alpha=0.3)
    return fig


def table(rows: list[dict]) -> list[str]:
    """A line for each size: the milliseconds of both methods and thresholds, in both dtypes."""
    lines: dict[tuple[int, int], list[str]] = {}
    for row in rows:
        cells = [f"{row[f'{name}, {kind}']:.2f}" for name in METHODS for kind in KINDS]
        lines.setdefault((row["B"], row["H"]), []).extend(cells)
    return [f"{B}, {H}: {' '.join(cells)}" for (B, H), cells in lines.items()]


def main(config: Config) -> dict:
    """Measures every size; returns the summary."""
    report = Report(config)
    sizes = [
        Size(config.steps, B, 1, H, 1) for B in config.batch_sizes for H in config.hidden_sizes
    ]
    with contextlib.ExitStack() as stack:
        processes = {
            name: stack.enter_context(cli.own_process(use_flags, flags))
            for name, flags in KINDS.items()
        }
        for size in tqdm(sizes, unit="size", disable=None):
            for dtype in DTYPES:
                report.log(**measure(config, size, dtype, processes))
    most = {name: round(max(speedups(report.rows, name)), 1) for name in METHODS}
    fastest = ", ".join(f"{name} {speed}" for name, speed in most.items())
    scan = {dtype: beside_scan(report.rows, dtype) for dtype in DTYPES}
    columns = "ms of the scan and of bptt, default and raised, in float32 and float64"
    ours = f"B, H: {columns}; {'; '.join(table(report.rows))}. Largest speedup: {fastest}"
    return report.finish(ours, draw, at_most=most, beside_scan=scan, processor=processor())


def run(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: main(cli.parse(Config, arguments, SMOKE)))


if __name__ == "__main__":
    sys.exit(run())
