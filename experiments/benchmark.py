"""What do value and gradient cost, in time and memory, beside autodiff and other libraries?

Every method gets the same weights and data and must first return the same loss and gradient. Then
all are timed in turn, call by call; torch has a process of its own. Peers that are not installed
are left out. `--baseline` times another checkout of jaxrnn instead of the peers.

    python -m experiments.benchmark --out runs/benchmark
"""

import dataclasses
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import jaxrnn
from experiments import cli, peers
from experiments.benchmark_report import compare, comparison_table, draw, table
from experiments.reports import Report
from jaxrnn import Batch, Params


class Size(NamedTuple):
    """T steps, B sequences, I inputs or tokens, H hidden units, O outputs.

    The targets are labels, at every step or at the last one alone; numbers if O = 1. With `leak`,
    h_t = 0.8 h_{t-1} + 0.2 f(z_t).
    """

    T: int
    B: int
    I: int
    H: int
    O: int
    tokens: bool = False
    last: bool = False
    leak: bool = False

    def __str__(self):
        kinds = " tokens" * self.tokens + " last" * self.last + " leak" * self.leak
        return f"{self.T}, {self.B}, {self.I}, {self.H}, {self.O}{kinds}"


GROUPS = {
    "typical": [
        Size(32, 128, 256, 256, 64),
        Size(64, 32, 65, 256, 65, tokens=True),
        Size(64, 32, 128, 1024, 128),
        Size(64, 1, 256, 1024, 256),
        Size(128, 32, 64, 128, 32),
        Size(128, 64, 256, 512, 256),
        Size(256, 8, 256, 32, 10, last=True),
        Size(256, 16, 1000, 128, 1000, tokens=True),
        Size(768, 64, 1, 100, 10),
        Size(784, 64, 1, 100, 10, last=True),
        Size(1024, 16, 8, 64, 8),
        Size(2048, 1, 16, 64, 16),
    ],
    "wide": [
        Size(16, 2048, 16, 64, 4),
        Size(8, 1024, 64, 256, 64),
        Size(32, 4096, 8, 32, 4),
    ],
    "tiny": [
        Size(1000, 1, 2, 4, 2),
        Size(10000, 1, 2, 4, 2),
        Size(10000, 1, 4, 8, 4),
        Size(10000, 4, 4, 16, 4),
        Size(1000, 4, 1, 1, 1),
    ],
    "smoke": [
        Size(9, 2, 3, 4, 5),
        Size(8, 2, 3, 4, 1, tokens=True, last=True),
    ],
}
GROUPS["leak"] = [size._replace(leak=True) for size in GROUPS["typical"]]
ROWS = [(group, size) for group, sizes in GROUPS.items() for size in sizes]


@dataclasses.dataclass(frozen=True)
class Config:
    """Time and memory of value and gradient: jaxrnn and its peers, measured in one run."""

    rows: tuple[str, ...] = ("typical", "wide", "tiny", "leak")
    """Rows of the table: groups of sizes, or the numbers that the table prints."""
    repeats: int = 9
    """Timed calls of each method at each size, at least."""
    seconds: float = 1.0
    """Time to spend on each size, at least: fast methods get more calls."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of parameters and inputs."""
    precision: Literal["default", "highest"] = "default"
    """Precision of float32 products: on NVIDIA GPUs the default is TF32, the highest float32."""
    devices: int = 1
    """CPU devices; above 1, `bptt x N` splits batches that they divide (not with `baseline`)."""
    baseline: Path | None = None
    """Another checkout of jaxrnn, which takes the place of the peers."""
    out: Path = Path("runs/benchmark")
    """Folder for metrics.jsonl, figure.png and summary.json."""
    overwrite: bool = False
    """Discard the run that `out` holds."""
    smoke: bool = False
    """Use sizes that run in seconds, to check that everything works."""

    def __post_init__(self):
        cli.expect_values(self, "rows")
        cli.expect_at_least(1, self, "repeats", "devices")
        cli.expect_at_least(0, self, "seconds")
        numbers = [str(number) for number in range(len(ROWS))]
        row = f"{', '.join(GROUPS)} or a number below {len(ROWS)}"
        cli.expect(self, "rows", row, lambda value: value in GROUPS or value in numbers)
        checkout = "a folder that holds jaxrnn/"
        cli.expect(self, "baseline", checkout, lambda path: (path / "jaxrnn/__init__.py").exists())


def chosen_rows(config: Config) -> list[int]:
    """The numbers of the rows to measure.

    >>> chosen_rows(Config(rows=("wide", "0")))
    [0, 12, 13, 14]
    """
    return [n for n, (group, _) in enumerate(ROWS) if {group, str(n)} & set(config.rows)]


SMOKE = {"rows": ("smoke",), "repeats": 1, "seconds": 0.0}


def make_data(size: Size, dtype: str) -> tuple[Params, Batch]:
    T, B, I, H, O, tokens, last, _ = size
    key_params, key_xs, key_targets = jax.random.split(jax.random.key(0), 3)
    params = jaxrnn.init(key_params, I, H, O, dtype=jnp.dtype(dtype))
    if tokens:
        xs = jax.random.randint(key_xs, (T, B), 0, I)
    else:
        xs = jax.random.normal(key_xs, (T, B, I), jnp.dtype(dtype))
    if O == 1:
        targets = jax.random.normal(key_targets, (T, B, 1))
    else:
        targets = jax.random.randint(key_targets, (T, B), 0, O)
    return params, Batch(xs, targets, weights=jnp.zeros((T, B)).at[-1].set(1) if last else None)


class Compiled(NamedTuple):
    """A compiled function with its arguments; `call` returns when the result is computed."""

    call: Callable[[], Any]
    temp_mb: float | None
    compile_s: float


def compile_for(fn: Callable, arguments: tuple) -> Compiled:
    start = time.perf_counter()
    executable = jax.jit(fn).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = executable.memory_analysis()
    return Compiled(
        lambda: jax.block_until_ready(executable(*arguments)),
        memory.temp_size_in_bytes / 1e6 if memory else None,
        seconds,
    )


def check_agreement(config: Config, name: str, result: tuple, expected: tuple) -> None:
    """Loss and gradient equal those of the plain scan, as closely as the dtype allows.

    Raises:
      AssertionError: they do not.
    """
    tf32 = config.precision == "default" and jax.default_backend() == "gpu"
    tolerance = 0.3 if config.dtype == "bfloat16" else 0.05 if tf32 else 1e-4
    for got, want in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        if not error <= tolerance:
            raise AssertionError(f"{name} differs from the plain scan by {error:.1e}")


def time_in_turn(
    functions: dict[str, Callable], repeats: int, seconds: float
) -> dict[str, list[float]]:
    """The seconds of each call. The functions alternate, and an untimed call comes first, so that
    what another function left in the caches does not count."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    rounds, end = 0, time.perf_counter() + seconds
    while rounds < repeats or time.perf_counter() < end:
        for name, call in functions.items():
            call()
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return times


def time_torch(config: Config, params: Params, batch: Batch, calls: int, process: Executor):
    """Value, gradient and seconds of torch, whose calls follow each other in another process."""
    timed = partial(
        peers.time_torch,
        gpu=jax.default_backend() == "gpu",
        tf32=config.precision == "default",
    )
    return process.submit(timed, *jax.tree.map(np.asarray, (params, batch)), calls).result()


def measure(config: Config, size: Size, process: Executor) -> list[dict]:
    """A row for each method: the minimum and the median of its times, and its memory.

    Raises:
      AssertionError: a method returns another loss or gradient than the plain scan.
    """
    params, batch = make_data(size, config.dtype)
    leak = 0.2 if size.leak else None
    methods = peers.methods(params, batch, config.devices, config.baseline, leak)
    compiled = {name: compile_for(*method) for name, method in methods.items()}
    expected = {
        name: method.call() for name, method in compiled.items() if name.startswith("plain scan")
    }
    for name, method in compiled.items():
        reference = "plain scan, ReLU" if "ReLU" in name else "plain scan"
        check_agreement(config, name, method.call(), expected[reference])
    if config.baseline is None:
        steps, keys = (size.T, size.B), jax.random.split(jax.random.key(1))
        hs = jax.random.normal(keys[0], (*steps, size.H), params.W_h.dtype)
        ys = jax.random.normal(keys[1], (*steps, size.O), params.W_h.dtype)
        compiled["floor"] = compile_for(peers.floor, (params, batch, hs, ys))
    functions = {name: method.call for name, method in compiled.items()}
    times = time_in_turn(functions, config.repeats, config.seconds)
    calls = len(times["bptt"])
    if config.baseline is None and leak is None and peers.versions()["torch"]:
        value, grads, times["torch"] = time_torch(config, params, batch, calls, process)
        check_agreement(config, "torch", (value, grads), expected["plain scan"])
    return [
        {
            "method": name,
            "min_ms": 1e3 * min(seconds),
            "median_ms": 1e3 * float(np.median(seconds)),
            "calls": calls,
            "temp_mb": compiled[name].temp_mb if name in compiled else None,
            "compile_s": compiled[name].compile_s if name in compiled else None,
        }
        for name, seconds in times.items()
    ]


def processor() -> str:
    """The name of the CPU's model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main(config: Config) -> dict:
    """Measures every row; returns the summary."""
    cli.use_devices(config.devices)
    jax.config.update("jax_default_matmul_precision", config.precision)
    versions = peers.versions()
    for name in versions if config.baseline is None else ():
        if versions[name] is None:
            print(f"{name} is not installed and left out", file=sys.stderr)
    report = Report(config)
    with cli.own_process() as process:
        for number in tqdm(chosen_rows(config), unit="size", disable=None):
            group, size = ROWS[number]
            row = {"number": number, "group": group, "size": str(size)}
            rows = [row | measured for measured in measure(config, size, process)]
            for row in rows:
                report.log(**row)
            tqdm.write("\n" + table(rows))
    comparison = compare(report.rows)
    print("\n" + comparison_table(comparison))
    other = "bptt, baseline" if config.baseline else "plain scan"
    speeds = {group: found["speed"] for group, found in comparison[f"bptt / {other}"].items()}
    ours = ", ".join(f"{speed:.2f} ({group})" for group, speed in speeds.items())
    return report.finish(
        f"speed of bptt relative to the {other}: {ours}", draw,
        compared=comparison, peers=versions, processor=processor(),
    )  # fmt: skip


def run(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: main(cli.parse(Config, arguments, SMOKE)))


if __name__ == "__main__":
    sys.exit(run())
