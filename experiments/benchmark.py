"""Time and memory of one value and gradient, beside autodiff and the peers.

Every method gets the same weights and data and must first give the same loss and gradient. Then
they are timed in turn, a block of calls each, several rounds; the floor is the same matrix products
at the same shapes and nothing else. A peer that is not installed is left out.

    python -m experiments.benchmark --out runs/benchmark
"""

import dataclasses
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import jaxrnn
from experiments import cli
from jaxrnn import Batch, Params, forward

matplotlib.use("Agg")
import matplotlib.pyplot as plt


class Size(NamedTuple):
    """T steps, B sequences, I inputs (or tokens), H hidden, O outputs; a target at the last step
    alone, or at every one."""

    T: int
    B: int
    I: int
    H: int
    O: int
    tokens: bool = False
    last: bool = False

    def __str__(self):
        kinds = " tokens" * self.tokens + " last" * self.last
        return f"{self.T}, {self.B}, {self.I}, {self.H}, {self.O}{kinds}"


SIZES = {
    "table": [
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
    "small": [
        Size(9, 2, 3, 4, 5),
        Size(8, 2, 3, 4, 5, tokens=True),
        Size(9, 2, 3, 4, 5, last=True),
    ],
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Times value and gradient of jaxrnn and its peers, side by side in one run."""

    sizes: Literal["table", "small"] = "table"
    """All sizes, or three that take a second."""
    repeats: int = 9
    """Timed calls of each method at each size, at least 3, in three rounds."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of parameters and inputs."""
    precision: Literal["default", "highest"] = "default"
    """Of float32 products: on NVIDIA GPUs the default is TF32, the highest float32."""
    devices: int = 1
    """CPU devices over which one more row splits the batch."""
    out: Path = Path("runs/benchmark")
    """Folder for benchmark.jsonl and benchmark.png."""

    def __post_init__(self):
        cli.expect_at_least(1, self, "repeats", "devices")


Gradient = Callable[[Params, Batch], tuple[Any, Params]]


def mean_loss(ys: jax.Array, batch: Batch) -> jax.Array:
    """Cross-entropy in float32; a target at the last step alone needs no other output."""
    targets = batch.targets if batch.weights is None else batch.targets[-1:]
    return jaxrnn.cross_entropy.value(ys.astype(jnp.float32), targets).mean()


def read_out(params: Params, hs: jax.Array, batch: Batch) -> jax.Array:
    hs = hs if batch.weights is None else hs[-1:]
    return hs @ params.W_y.T + params.b_y


def one_hot(params: Params, xs: jax.Array) -> jax.Array:
    dtype = params.W_x.dtype
    return jax.nn.one_hot(xs, params.W_x.shape[1], dtype=dtype) if xs.ndim == 2 else xs


def zero_state(params: Params, batch: Batch) -> jax.Array:
    return jnp.zeros((batch.xs.shape[1], params.W_h.shape[0]), params.W_h.dtype)


def plain_scan(params: Params, batch: Batch) -> jax.Array:
    """What one writes first: a scan over the cell."""

    def body(h, x):
        h, y = jaxrnn.step(params, h, x)
        return h, (y if batch.weights is None else None)

    h_T, ys = lax.scan(body, zero_state(params, batch), batch.xs)
    return mean_loss(read_out(params, h_T[None], batch) if ys is None else ys, batch)


def hoisted_scan(params: Params, batch: Batch) -> jax.Array:
    """The same with the input product taken out of the loop, and the readout."""
    zs = one_hot(params, batch.xs) @ params.W_x.T + params.b_h

    def body(h, z):
        h = jnp.tanh(z + h @ params.W_h.T)
        return h, h

    _, hs = lax.scan(body, zero_state(params, batch), zs)
    return mean_loss(read_out(params, hs, batch), batch)


def flax_rnn(params: Params, batch: Batch) -> jax.Array:
    nnx: Any = importlib.import_module("flax.nnx")
    H, I = params.W_x.shape
    rnn = nnx.RNN(nnx.SimpleCell(I, H, dtype=params.W_h.dtype, rngs=nnx.Rngs(0)), time_major=True)
    rnn.cell.dense_i.kernel = nnx.Param(params.W_x.T)
    rnn.cell.dense_i.bias = nnx.Param(params.b_h)
    rnn.cell.dense_h.kernel = nnx.Param(params.W_h.T)
    hs = rnn(one_hot(params, batch.xs), initial_carry=zero_state(params, batch))
    return mean_loss(read_out(params, hs, batch), batch)


def haiku_rnn(params: Params, batch: Batch) -> jax.Array:
    """Its cell has ReLU and nothing else."""
    haiku: Any = importlib.import_module("haiku")

    def unroll(xs):
        cell = haiku.VanillaRNN(params.W_h.shape[0])
        return haiku.dynamic_unroll(cell, xs, zero_state(params, batch))[0]

    weights = {
        "vanilla_rnn/linear": {"w": params.W_x.T, "b": jnp.zeros_like(params.b_h)},
        "vanilla_rnn/linear_1": {"w": params.W_h.T, "b": params.b_h},
    }
    hs = haiku.transform(unroll).apply(weights, None, one_hot(params, batch.xs))
    return mean_loss(read_out(params, hs, batch), batch)


def floor(params: Params, batch: Batch, hs, ys, xs) -> tuple:
    """The products of value and gradient and nothing else: two chains of T, and those outside."""
    last = slice(None) if batch.weights is None else slice(-1, None)
    every = ((0, 1), (0, 1)), ((), ())

    def chain(W):
        unroll = forward.loop().unroll
        return lax.scan(lambda h, _: (h @ W, None), hs[0], length=hs.shape[0], unroll=unroll)[0]

    outer = [lax.dot_general(ys[last], hs[last], every), lax.dot_general(hs, hs, every)]
    inner = [hs[last] @ params.W_y.T, ys[last] @ params.W_y]
    if batch.xs.ndim == 3:
        outer, inner = [*outer, lax.dot_general(hs, xs, every)], [*inner, xs @ params.W_x.T]
    return chain(params.W_h.T), chain(params.W_h), outer, inner


def gradient_of(loss: Callable) -> Gradient:
    return jax.value_and_grad(lambda params, batch: loss(params, batch))


def by_hand(**keywords) -> Gradient:
    def value_and_grad(params, batch):
        (value, _), grads = jaxrnn.bptt(params, batch, **keywords)
        return value, grads

    return value_and_grad


def by_hand_in_parallel(mesh: jax.sharding.Mesh) -> Gradient:
    gradient_fn = jaxrnn.data_parallel(jaxrnn.bptt, mesh)

    def value_and_grad(params, batch):
        (value, _), grads = gradient_fn(params, batch)
        return value, grads

    return value_and_grad


class Method(NamedTuple):
    """A call that returns when the result is there, what it returns, and its temporary bytes."""

    call: Callable[[], Any]
    result: tuple[Any, Params] | None
    temporary: int | None
    compile_seconds: float | None


def compiled(fn: Callable, *arguments, is_gradient=True) -> Method:
    start = time.perf_counter()
    executable = jax.jit(fn).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = executable.memory_analysis()
    result = executable(*arguments)
    return Method(
        lambda: jax.block_until_ready(executable(*arguments)),
        result if is_gradient else None,
        memory.temp_size_in_bytes if memory else None,
        seconds,
    )


def torch_rnn(config: Config, params: Params, batch: Batch) -> Method:
    torch: Any = importlib.import_module("torch")
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    allow_tf32 = config.precision == "default"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow_tf32
    dtype = torch.bfloat16 if params.W_h.dtype == jnp.bfloat16 else torch.float32

    def tensor(leaf):
        kind = torch.int64 if leaf.dtype == jnp.int32 else dtype
        return torch.tensor(np.asarray(leaf.astype(jnp.float32)), device=device).to(kind)

    W_x, W_h, W_y, b_h, b_y = map(tensor, params)
    rnn = torch.nn.RNN(W_x.shape[1], W_h.shape[0]).to(device, dtype)
    linear = torch.nn.Linear(*W_y.shape[::-1]).to(device, dtype)
    loss_fn = torch.nn.CrossEntropyLoss()
    leaves = [rnn.weight_ih_l0, rnn.weight_hh_l0, linear.weight, rnn.bias_ih_l0, linear.bias]
    with torch.no_grad():
        rnn.bias_hh_l0.zero_()
        for leaf, value in zip(leaves, (W_x, W_h, W_y, b_h, b_y), strict=True):
            leaf.copy_(value)
    xs, targets, last = tensor(batch.xs), tensor(batch.targets), batch.weights is not None

    def call():
        inputs = torch.nn.functional.one_hot(xs, W_x.shape[1]).to(dtype) if xs.ndim == 2 else xs
        hs, _ = rnn(inputs)
        ys = linear(hs[-1:] if last else hs).float()
        value = loss_fn(ys.flatten(0, 1), (targets[-1:] if last else targets).flatten())
        grads = torch.autograd.grad(value, leaves)
        if device == "cuda":
            torch.cuda.synchronize()
        return value, grads

    value, grads = call()
    result = value.item(), Params(*(jnp.asarray(grad.float().cpu().numpy()) for grad in grads))
    return Method(call, result, None, None)


def installed(module: str, what: str) -> bool:
    found = importlib.util.find_spec(module) is not None
    if not found:
        print(f"{what} is not installed and left out", file=sys.stderr)
    return found


def methods(config: Config, size: Size, params: Params, batch: Batch, peers: dict) -> dict:
    """Every method, compiled, by name."""
    near_root = max(1, round(size.T**0.5))
    relu = partial(jaxrnn.sequence_loss, activation=jaxrnn.relu)
    made = {
        "plain scan": compiled(gradient_of(plain_scan), params, batch),
        "hoisted scan": compiled(gradient_of(hoisted_scan), params, batch),
        "sequence_loss": compiled(
            gradient_of(lambda params, batch: jaxrnn.sequence_loss(params, batch)[0]), params, batch
        ),
        "bptt": compiled(by_hand(), params, batch),
        "bptt, K": compiled(by_hand(checkpoint_every=near_root), params, batch),
    }
    if config.devices > 1 and size.B % config.devices == 0:
        mesh = jax.sharding.Mesh(jax.devices()[: config.devices], ("batch",))
        split = NamedSharding(mesh, P(None, "batch"))
        placed = jax.device_put(params, NamedSharding(mesh, P())), jax.device_put(batch, split)
        made[f"bptt x {config.devices}"] = compiled(by_hand_in_parallel(mesh), *placed)
    if peers["flax"]:
        made["Flax"] = compiled(gradient_of(flax_rnn), params, batch)
    if peers["torch"]:
        made["torch"] = torch_rnn(config, params, batch)
    expected = made["plain scan"].result
    made |= {"bptt, ReLU": compiled(by_hand(activation=jaxrnn.relu), params, batch)}
    if peers["haiku"]:
        made["Haiku, ReLU"] = compiled(gradient_of(haiku_rnn), params, batch)
    expected_relu = gradient_of(lambda params, batch: relu(params, batch)[0])(params, batch)
    for name, method in made.items():
        check_agreement(
            name, size, method.result, expected_relu if "ReLU" in name else expected, config
        )
    key = jax.random.key(1)
    shapes = [(size.T, size.B, width) for width in (size.H, size.O, size.I)]
    random = [jax.random.normal(key, shape, params.W_h.dtype) for shape in shapes]
    made["floor"] = compiled(floor, params, batch, *random, is_gradient=False)
    return made


def check_agreement(name, size, result, expected, config) -> None:
    """The same loss and gradient as the plain scan, to what the dtype allows."""
    exact = config.dtype == "float32" and (
        config.precision == "highest" or jax.default_backend() == "cpu"
    )
    tolerance = 1e-4 if exact else 0.05 if config.dtype == "float32" else 0.3
    for got, want in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        if not error <= tolerance:
            raise AssertionError(f"{name} at {size} differs from the plain scan by {error:.1e}")


def time_all(made: dict[str, Method], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call: blocks per method, since thread pools disturb each other."""
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(3):
        for name, method in made.items():
            method.call()
            for _ in range(-(-repeats // 3)):
                start = time.perf_counter()
                method.call()
                seconds[name].append(time.perf_counter() - start)
    return seconds


def data(size: Size, dtype: str) -> tuple[Params, Batch]:
    key_params, key_xs, key_targets = jax.random.split(jax.random.key(0), 3)
    params = jaxrnn.init(key_params, size.I, size.H, size.O, dtype=jnp.dtype(dtype))
    xs = jax.random.normal(key_xs, (size.T, size.B, size.I), jnp.dtype(dtype))
    if size.tokens:
        xs = jax.random.randint(key_xs, (size.T, size.B), 0, size.I)
    targets = jax.random.randint(key_targets, (size.T, size.B), 0, size.O)
    weights = jnp.zeros((size.T, size.B)).at[-1].set(1.0) if size.last else None
    return params, Batch(xs, targets, weights=weights)


def print_row(size: Size, rows: list[dict]) -> None:
    plain, lowest = rows[0]["min_ms"], next(r for r in rows if r["method"] == "floor")["min_ms"]
    print(f"\n{size}")
    print(f"  {'':16} {'min ms':>9} {'median':>9} {'speed':>7} {'floor x':>8} {'temp MB':>9}")
    for row in rows:
        memory = f"{row['temp_mb']:9.2f}" if row["temp_mb"] is not None else f"{'-':>9}"
        print(
            f"  {row['method']:16} {row['min_ms']:9.2f} {row['median_ms']:9.2f} "
            f"{plain / row['min_ms']:7.2f} {row['min_ms'] / lowest:8.2f} {memory}"
        )


def geometric_means(rows: list[dict], methods: list[str]) -> None:
    """How many times as fast as each other method, over the sizes that both have."""
    times = {(row["size"], row["method"]): row["min_ms"] for row in rows}
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    others = [row["method"] for row in rows if row["method"] != "floor"]
    print("\ntimes as fast, geometric mean (least) over sizes:")
    for method in methods:
        for other in dict.fromkeys(others):
            if ("ReLU" in other) != ("ReLU" in method) or other == method:
                continue
            both = [s for s in sizes if (s, method) in times and (s, other) in times]
            ratios = [times[s, other] / times[s, method] for s in both]
            if ratios:
                mean = np.exp(np.mean(np.log(ratios)))
                print(f"  {method:10} than {other:14} {mean:5.2f} ({min(ratios):.2f})")


def draw(rows: list[dict], path: Path) -> None:
    """Speed over the plain scan's, a bar for each method at each size."""
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    names = [
        n for n in dict.fromkeys(r["method"] for r in rows) if n not in ("plain scan", "floor")
    ]
    times = {(row["size"], row["method"]): row["min_ms"] for row in rows}
    fig, ax = plt.subplots(figsize=(9, 1 + 0.75 * len(sizes)), layout="constrained")
    height = 0.85 / len(names)
    for k, name in enumerate(names):
        present = [(i, s) for i, s in enumerate(sizes) if (s, name) in times]
        ax.barh(
            [i + (k - len(names) / 2) * height for i, _ in present],
            [times[s, "plain scan"] / times[s, name] for _, s in present],
            height,
            label=name,
        )
    ax.axvline(1, color="black", lw=1)
    ax.set(yticks=range(len(sizes)), yticklabels=sizes, xscale="log")
    ax.set(xlabel="times as fast as jax.grad of the plain scan", ylabel="T, B, I, H, O")
    ax.set_xticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
    ax.invert_yaxis()
    ax.legend(fontsize="small")
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main(config: Config) -> list[dict]:
    cli.use_devices(config.devices)
    jax.config.update("jax_default_matmul_precision", config.precision)
    names = {"flax": "Flax", "haiku": "Haiku", "torch": "torch"}
    peers = {module: installed(module, name) for module, name in names.items()}
    context = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "dtype": config.dtype,
        "precision": config.precision,
        "date": time.strftime("%Y-%m-%d"),
    }
    config.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    with open(config.out / "benchmark.jsonl", "w", buffering=1) as file:
        for size in tqdm(SIZES[config.sizes], unit="size", disable=None):
            made = methods(config, size, *data(size, config.dtype), peers)
            for name, seconds in time_all(made, config.repeats).items():
                row = {
                    "size": str(size),
                    "method": name,
                    "min_ms": 1e3 * min(seconds),
                    "median_ms": 1e3 * float(np.median(seconds)),
                    "temp_mb": None,
                    "compile_s": made[name].compile_seconds,
                }
                temporary = made[name].temporary
                row["temp_mb"] = None if temporary is None else temporary / 1e6
                rows.append(row)
                file.write(json.dumps(row | context) + "\n")
            print_row(size, [row for row in rows if row["size"] == str(size)])
    together = [f"bptt x {config.devices}"] if config.devices > 1 else []
    geometric_means(rows, ["bptt", "bptt, K", *together, "bptt, ReLU"])
    draw(rows, config.out / "benchmark.png")
    print(f"\n{context}; rows and figure are in {config.out}")
    return rows


if __name__ == "__main__":
    sys.exit(cli.exit_status(lambda: main(cli.parse(Config, None))))
