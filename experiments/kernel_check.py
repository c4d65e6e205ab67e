"""Are the kernels right on this GPU, and how fast beside the scan and cuDNN?

Every class of shapes is checked first: the error of value and gradient against float64 is at most
four times that of the scan in the same dtype. Then come the forward kernel alone, by the threads of
a block, and the sizes of the benchmark, where all methods are timed in turn.

    python -m experiments.kernel_check --out runs/kernel_check
    python -m experiments.kernel_check --interpret --out runs/kernel_check    # the checks, on a CPU
"""

import dataclasses
import itertools
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

import jaxrnn
from experiments import benchmark, cli, peers
from experiments.benchmark import ROWS, Size
from experiments.benchmark_report import geometric_mean
from experiments.reports import Report
from jaxrnn import Batch, Params, kernels
from jaxrnn.recurrence import recur, scan


class Class(NamedTuple):
    """What a kernel is compiled for."""

    dtype: str
    H: int
    activation: str
    options: bool
    """Whether there are a mask and resets."""
    leak: bool


CLASSES = [
    Class(dtype, H, activation, options, leak)
    for dtype, sizes in {"float32": (5, 32, 64, 128), "bfloat16": (5, 64, 128, 256)}.items()
    for H, activation in itertools.product(sizes, ("tanh", "relu", "sigmoid"))
    for options, leak in ((False, False), (True, False), (True, True))
]
SMOKE_CLASSES = [
    Class("float32", 5, "tanh", True, True),
    Class("bfloat16", 5, "relu", False, False),
]
WARPS = (4, 8)
METHODS = ("plain scan", "Flax", "torch", "sequence_loss, kernel", "bptt", "bptt, kernel")
"""The columns of the table."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Check the kernels against float64 on a GPU, and time them beside the scan and cuDNN."""

    rows: tuple[str, ...] = ("typical", "tiny")
    """Rows of the benchmark to time: groups of sizes, or their numbers."""
    repeats: int = 9
    """Timed calls of each method at each size, at least."""
    seconds: float = 0.5
    """Time to spend on each size, at least."""
    T: int = 200
    """Steps of the checks. The forward kernel alone is timed at ten times as many."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the timed parameters and inputs: float32, where products are TF32, or bfloat16."""
    interpret: bool = False
    """Only check, by Pallas's interpreter, on any machine: slow."""
    out: Path = Path("runs/kernel_check")
    """Folder for metrics.jsonl, figure.png and summary.json."""
    overwrite: bool = False
    """Discard the run that `out` holds."""
    smoke: bool = False
    """Few classes and sizes that run in seconds, to check that everything works."""

    def __post_init__(self):
        cli.expect_values(self, "rows")
        cli.expect_at_least(1, self, "repeats")
        cli.expect_at_least(kernels.FEWEST_STEPS, self, "T")
        cli.expect_at_least(0, self, "seconds")
        benchmark.Config(rows=self.rows)  # the same rows


SMOKE = {"rows": ("smoke",), "repeats": 1, "seconds": 0.0, "T": 20}


def make_case(of: Class, T: int) -> tuple[Params, Batch, Any]:
    """Random parameters, three sequences more than a tile, and the leak."""
    keys = jax.random.split(jax.random.key(0), 6)
    params = jaxrnn.init(keys[0], 3, of.H, 4, dtype=jnp.dtype(of.dtype))
    xs = jax.random.normal(keys[1], (T, 19, 3), params.W_h.dtype)
    mask, reset = (jax.random.bernoulli(key, 0.1, (T, 19)) for key in keys[2:4])
    batch = Batch(xs, jax.random.randint(keys[4], (T, 19), 0, 4))
    batch = batch._replace(mask=~mask, reset=reset) if of.options else batch
    return params, batch, jax.random.uniform(keys[5], (of.H,), xs.dtype) if of.leak else None


def error(result: Any, exact: Any) -> float:
    """The relative errors of value and gradient, summed."""
    leaves = [[np.asarray(x, np.float64) for x in jax.tree.leaves(t)] for t in (result, exact)]
    pairs = zip(*leaves, strict=True)
    return float(sum(np.linalg.norm(got - want) / np.linalg.norm(want) for got, want in pairs))


def check(of: Class, config: Config) -> dict[str, Any]:
    """The errors of the kernel and of the scan against float64.

    Raises:
      AssertionError: that of the kernel is more than four times that of the scan, or NaN in an
        input reaches other states.
    """
    params, batch, leak = make_case(of, config.T)
    activation = getattr(jaxrnn, of.activation)

    def gradient(params, batch, leak, loop):
        return jaxrnn.bptt(params, batch, activation=activation, leak=leak, loop=loop)

    loop = partial(kernels.loop, interpret=config.interpret)
    calls = [jax.jit(partial(gradient, loop=f)) for f in (loop, scan)]
    by_kernel, by_scan = (call(params, batch, leak) for call in calls)
    with jax.enable_x64(True):
        precise = jax.tree.map(
            lambda x: x.astype(jnp.float64) if x.dtype == of.dtype else x, (params, batch, leak)
        )
        exact = jax.jit(partial(gradient, loop=scan))(*precise)
    errors = {"error": error(by_kernel, exact), "scan_error": error(by_scan, exact)}
    if not errors["error"] <= 4 * errors["scan_error"] + 1e-6:
        raise AssertionError(f"{of}: the kernel's error is {errors}")
    spoilt = batch._replace(xs=jnp.asarray(batch.xs).at[-1, ::2].set(jnp.nan))
    (_, h_T), (_, expected) = (call(params, spoilt, leak)[0] for call in calls)
    if not np.array_equal(np.isnan(h_T), np.isnan(expected)):
        raise AssertionError(f"{of}: NaN in an input reaches other states than by the scan")
    return {"kind": "check", **of._asdict(), **errors}


def time_forward(H: int, config: Config) -> dict[str, Any]:
    """Microseconds of a step of the forward loop alone, 16 sequences, by the warps of a block."""
    T, keys = 10 * config.T, jax.random.split(jax.random.key(0), 3)
    W_h = jax.random.normal(keys[0], (H, H), jnp.dtype(config.dtype)) / H**0.5
    zs = jax.random.normal(keys[1], (T, 16, H), W_h.dtype)
    h_0 = jax.random.normal(keys[2], (16, H), W_h.dtype)
    loops = {f"{n} warps": partial(kernels.loop, num_warps=n) for n in WARPS} | {"scan": scan}
    compiled = {
        name: benchmark.compile_for(
            lambda W_h, zs, h_0, loop=loop: recur(
                jaxrnn.tanh, W_h, zs, h_0, None, None, None, loop
            )[0],
            (W_h, zs, h_0),
        ).call
        for name, loop in loops.items()
    }
    times = benchmark.time_in_turn(compiled, config.repeats, config.seconds)
    return {"kind": "forward", "H": H} | {name: 1e6 * min(s) / T for name, s in times.items()}


def time_size(size: Size, config: Config, process: Any) -> dict[str, Any]:
    """Milliseconds of value and gradient of each method; all agree with the plain scan."""
    params, batch = benchmark.make_data(size, config.dtype)
    leak = 0.2 if size.leak else None
    methods = peers.methods(params, batch, 1, None, leak)
    options: dict = {"loss": getattr(jaxrnn, peers.loss_name(batch)), "leak": leak}
    options |= {"loop": kernels.loop}
    autodiff = jax.value_and_grad(partial(jaxrnn.sequence_loss, **options), has_aux=True)
    here, bptt = (params, batch), partial(jaxrnn.bptt, **options)
    methods["sequence_loss, kernel"] = peers.without_state(autodiff), here
    methods["bptt, kernel"] = peers.without_state(bptt), here
    chosen = {name: method for name, method in methods.items() if name in METHODS}
    compiled = {name: benchmark.compile_for(*method).call for name, method in chosen.items()}
    expected = compiled["plain scan"]()
    settings = benchmark.Config(dtype=config.dtype)
    for name, call in compiled.items():
        benchmark.check_agreement(settings, name, call(), expected)
    times = benchmark.time_in_turn(compiled, config.repeats, config.seconds)
    if leak is None and peers.versions()["torch"]:
        calls = len(times["bptt"])
        *result, times["torch"] = benchmark.time_torch(settings, params, batch, calls, process)
        benchmark.check_agreement(settings, "torch", tuple(result), expected)
    return {"kind": "size", "size": str(size)} | {name: 1e3 * min(s) for name, s in times.items()}


def table(rows: list[dict]) -> str:
    """The table of the README: milliseconds of each method at each size.

    >>> print(table([{"size": "8, 1, 2, 4, 2", "plain scan": 3.14159, "bptt": 12.0}]))
    | T, B, I, H, O | plain scan | bptt |
    |---|---|---|
    | 8, 1, 2, 4, 2 | 3.14 | 12.0 |
    """

    def cell(milliseconds: float | None) -> str:
        if milliseconds is None:
            return "-"
        shown = np.format_float_positional(milliseconds, 3, unique=False, fractional=False)
        return shown.rstrip(".")

    names = [name for name in METHODS if any(name in row for row in rows)]
    lines = [["T, B, I, H, O", *names]]
    lines += [[row["size"], *(cell(row.get(name)) for name in names)] for row in rows]
    marked = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([marked[0], "|---" * len(lines[0]) + "|", *marked[1:]])


def draw(rows: list[dict]) -> Figure:
    """The time of each method at each size; the errors if nothing was timed."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    sizes = [row for row in rows if row["kind"] == "size"]
    for name in METHODS if sizes else ():
        axes.plot([row.get(name, np.nan) for row in sizes], "o-", label=name)
    if not sizes:
        for name in ("error", "scan_error"):
            axes.plot([row[name] for row in rows], "o", label=name)
    axes.set(yscale="log", xlabel="size" if sizes else "class of shapes")
    axes.set_ylabel("milliseconds" if sizes else "relative error")
    axes.legend()
    return figure


def has_gpu() -> bool:
    return jax.default_backend() == "gpu"


def main(config: Config) -> dict:
    """Checks, then times; returns the summary."""
    if not (config.interpret or has_gpu()):
        raise cli.InputError(
            f"kernel_check: expected an NVIDIA GPU, got a {jax.default_backend()}; "
            "--interpret checks the values on any machine"
        )
    report = Report(config)
    for of in tqdm(SMOKE_CLASSES if config.smoke else CLASSES, unit="class", disable=None):
        report.log(**check(of, config))
    worst = max(row["error"] / row["scan_error"] for row in report.rows if row["scan_error"])
    ours = f"{len(report.rows)} classes agree with float64; at most {worst:.2f} x the scan's error"
    if config.interpret:
        return report.finish(ours, draw)
    for H in (32, 64, kernels.LARGEST_H[config.dtype]):
        report.log(**time_forward(H, config))
        print(report.rows[-1])
    with cli.own_process() as process:
        for number in tqdm(
            benchmark.chosen_rows(benchmark.Config(rows=config.rows)), unit="size", disable=None
        ):
            report.log(**time_size(ROWS[number][1], config, process))
    sizes = [row for row in report.rows if row["kind"] == "size"]
    print("\n" + table(sizes))
    speed = geometric_mean([row["bptt"] / row["bptt, kernel"] for row in sizes])
    ours += f"; bptt is {speed:.2f} times as fast with the kernel"
    return report.finish(ours, draw, table=table(sizes), device=jax.devices()[0].device_kind)


def run(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: main(cli.parse(Config, arguments, SMOKE)))


if __name__ == "__main__":
    sys.exit(run())
