"""The methods of the benchmark: scans by hand, Flax, Haiku, torch, a floor, older versions.

Each takes jaxrnn's own parameters and batch and computes the same mean loss: cross-entropy if the
targets are integers, else squared error. A batch with weights counts the last step alone.
"""

import importlib
import importlib.metadata
import re
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxrnn
from jaxrnn import Activation, Batch, Params
from jaxrnn.params import AnyArray

Gradient = Callable[[Params, Batch], tuple[Any, Params]]
"""(params, batch) -> value, grads."""

PACKAGES = {"Flax": "flax", "Haiku": "dm-haiku", "torch": "torch"}
"""The package on PyPI that each peer needs."""


def versions() -> dict[str, str | None]:
    """The version of each peer; None if it is not installed."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {name: version(package) for name, package in PACKAGES.items()}


def loss_name(batch: Batch) -> str:
    """Softmax over one class has no gradient, so one output is a regression."""
    integer = jnp.issubdtype(batch.targets.dtype, jnp.integer)
    return "cross_entropy" if integer else "squared_error"


def counted(steps: AnyArray, batch: Batch) -> AnyArray:
    """The steps that count: all, or the last alone."""
    return steps if batch.weights is None else steps[-1:]


def mean_loss(ys: Array, batch: Batch) -> Array:
    """The mean loss, in float32, of the outputs of the steps that count."""
    loss = getattr(jaxrnn, loss_name(batch))
    return loss.value(ys.astype(jnp.float32), counted(batch.targets, batch)).mean()


def readout(params: Params, hs: AnyArray) -> Array:
    return jnp.asarray(hs) @ params.W_y.T + params.b_y


def vectors(params: Params, xs: AnyArray) -> AnyArray:
    """xs, or the one-hot vectors of tokens xs."""
    I = params.W_x.shape[1]
    return jax.nn.one_hot(xs, I, dtype=params.W_x.dtype) if xs.ndim == 2 else xs


def zero_state(params: Params, batch: Batch) -> Array:
    return jnp.zeros((batch.xs.shape[1], params.W_h.shape[0]), params.W_h.dtype)


def plain_scan(
    params: Params,
    batch: Batch,
    activation: Activation = jaxrnn.tanh,
    leak: float | None = None,
) -> Array:
    """A scan over the cell: the usual first version."""

    def body(h, x):
        h, y = jaxrnn.step(params, h, x, activation=activation, leak=leak)
        return h, (y if batch.weights is None else None)

    h_T, ys = lax.scan(body, zero_state(params, batch), batch.xs)
    return mean_loss(readout(params, h_T[None]) if ys is None else ys, batch)


def hoisted_scan(params: Params, batch: Batch) -> Array:
    """The plain scan with the products with W_x and W_y outside the loop."""
    zs = vectors(params, batch.xs) @ params.W_x.T + params.b_h

    def body(h, z):
        h = jnp.tanh(z + h @ params.W_h.T)
        return h, h

    _, hs = lax.scan(body, zero_state(params, batch), zs)
    return mean_loss(readout(params, counted(hs, batch)), batch)


def flax_rnn(params: Params, batch: Batch) -> Array:
    """`flax.nnx.RNN` over a `SimpleCell`, which is tanh."""
    nnx: Any = importlib.import_module("flax.nnx")
    H, I = params.W_x.shape
    rnn = nnx.RNN(nnx.SimpleCell(I, H, dtype=params.W_h.dtype, rngs=nnx.Rngs(0)), time_major=True)
    rnn.cell.dense_i.kernel = nnx.Param(params.W_x.T)
    rnn.cell.dense_i.bias = nnx.Param(params.b_h)
    rnn.cell.dense_h.kernel = nnx.Param(params.W_h.T)
    hs = rnn(vectors(params, batch.xs), initial_carry=zero_state(params, batch))
    return mean_loss(readout(params, counted(hs, batch)), batch)


def haiku_rnn(params: Params, batch: Batch) -> Array:
    """`haiku.dynamic_unroll` of a `VanillaRNN`, which is ReLU."""
    haiku: Any = importlib.import_module("haiku")

    def unroll(xs):
        cell = haiku.VanillaRNN(params.W_h.shape[0])
        return haiku.dynamic_unroll(cell, xs, zero_state(params, batch))[0]

    weights = {
        "vanilla_rnn/linear": {"w": params.W_x.T, "b": jnp.zeros_like(params.b_h)},
        "vanilla_rnn/linear_1": {"w": params.W_h.T, "b": params.b_h},
    }
    hs = haiku.transform(unroll).apply(weights, None, vectors(params, batch.xs))
    return mean_loss(readout(params, counted(hs, batch)), batch)


def floor(params: Params, batch: Batch, hs: Array, ys: Array) -> list[Array]:
    """The matrix products of value and gradient, and nothing else.

    Two chains of T products with W_h, one for each direction of time, and the products outside the
    loops. hs (T, B, H) and ys (T, B, O) stand for any arrays of these shapes.
    """
    hs_counted, ys_counted = counted(hs, batch), counted(ys, batch)
    over_steps = ((0, 1), (0, 1)), ((), ())
    unroll = 8 if jax.default_backend() == "gpu" else 1  # as jaxrnn's own loops

    def chain(W):
        return lax.scan(lambda h, _: (h @ W, None), hs[0], length=len(hs), unroll=unroll)[0]

    products = [
        chain(params.W_h.T),
        chain(params.W_h),
        hs_counted @ params.W_y.T,
        ys_counted @ params.W_y,
        lax.dot_general(ys_counted, hs_counted, over_steps),
        lax.dot_general(hs, hs, over_steps),
    ]
    if batch.xs.ndim == 3:
        products += [batch.xs @ params.W_x.T, lax.dot_general(hs, batch.xs, over_steps)]
    return products


def torch_layers(params: Params, device: str) -> tuple[Any, Any, list]:
    """`torch.nn.RNN`, the readout, and their parameters in the order of Params, of NumPy arrays."""
    torch: Any = importlib.import_module("torch")
    dtype = torch.float32 if params.W_h.dtype == np.float32 else torch.bfloat16
    (H, I), O = params.W_x.shape, len(params.b_y)
    rnn, linear = torch.nn.RNN(I, H).to(device, dtype), torch.nn.Linear(H, O).to(device, dtype)
    leaves = [rnn.weight_ih_l0, rnn.weight_hh_l0, linear.weight, rnn.bias_ih_l0, linear.bias]
    with torch.no_grad():
        rnn.bias_hh_l0.zero_()
        for leaf, value in zip(leaves, params, strict=True):
            leaf.copy_(torch.tensor(value.astype(np.float32)))
    return rnn, linear, leaves


def time_torch(
    params: Params, batch: Batch, repeats: int, *, gpu: bool, tf32: bool
) -> tuple[float, Params, list[float]]:
    """Value, gradient and the seconds of each call of `torch.nn.RNN`.

    Run it in a process of its own: the thread pools of torch and XLA disturb each other. Arguments
    and results are NumPy arrays, so that the process makes no use of JAX.
    """
    torch: Any = importlib.import_module("torch")
    device = "cuda" if gpu and torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    rnn, linear, leaves = torch_layers(params, device)
    I, dtype = rnn.input_size, rnn.weight_hh_l0.dtype

    def tensor(leaf):
        if np.issubdtype(leaf.dtype, np.integer):
            return torch.tensor(leaf, device=device, dtype=torch.int64)
        return torch.tensor(leaf.astype(np.float32), device=device, dtype=dtype)

    xs, targets = tensor(batch.xs), counted(tensor(batch.targets), batch)

    def call():
        hs, _ = rnn(torch.nn.functional.one_hot(xs, I).to(dtype) if xs.ndim == 2 else xs)
        ys = linear(counted(hs, batch)).float()
        if loss_name(batch) == "cross_entropy":
            value = torch.nn.functional.cross_entropy(ys.flatten(0, 1), targets.flatten())
        else:
            value = (ys - targets).square().sum(dim=-1).mean() / 2
        grads = torch.autograd.grad(value, leaves)
        if device == "cuda":
            torch.cuda.synchronize()
        return value, grads

    value, grads = call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return value.item(), Params(*(grad.float().cpu().numpy() for grad in grads)), seconds


def without_state(gradient_fn: Callable) -> Gradient:
    """The gradient function of (params, batch) that does not return the last state."""

    def value_and_grad(params, batch):
        (value, _), grads = gradient_fn(params, batch)
        return value, grads

    return value_and_grad


def gradients_of(
    library: ModuleType, batch: Batch, leak: float | None = None
) -> dict[str, Gradient]:
    """The gradients of jaxrnn, or of another version of it, by name."""
    options: dict = {"loss": getattr(library, loss_name(batch))}
    if leak is not None:
        options["leak"] = leak
    bptt = partial(library.bptt, **options)
    autodiff = jax.value_and_grad(partial(library.sequence_loss, **options), has_aux=True)
    near_root = max(1, round(len(batch.xs) ** 0.5))
    return {
        "sequence_loss": without_state(autodiff),
        "bptt": without_state(bptt),
        "bptt, K": without_state(partial(bptt, checkpoint_every=near_root)),
    }


def load_baseline(checkout: Path) -> ModuleType:
    """The package jaxrnn in another checkout, imported as `jaxrnn_baseline`."""
    name, package = "jaxrnn_baseline", checkout / "jaxrnn"
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        del sys.modules[module]
    with tempfile.TemporaryDirectory() as folder:
        for source in package.rglob("*.py"):
            copy = Path(folder, name, source.relative_to(package))
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(re.sub(r"\bjaxrnn\b", name, source.read_text("utf-8")), "utf-8")
        sys.path.insert(0, folder)
        try:
            importlib.invalidate_caches()
            return importlib.import_module(name)
        finally:
            sys.path.remove(folder)


def methods(
    params: Params, batch: Batch, devices: int, baseline: Path | None, leak: float | None
) -> dict[str, tuple[Callable, tuple]]:
    """Each gradient function that is timed in this process, with its arguments, by name.

    "bptt, K" stores the state of every K-th step, K near sqrt(T). With a baseline or a leak, no
    peer but the plain scan. Haiku's cell has no activation but ReLU.
    """
    here, loss = (params, batch), getattr(jaxrnn, loss_name(batch))
    plain = jax.value_and_grad(partial(plain_scan, leak=leak))
    made: dict[str, tuple[Callable, tuple]] = {"plain scan": (plain, here)}
    made |= {name: (fn, here) for name, fn in gradients_of(jaxrnn, batch, leak).items()}
    if baseline:
        old = load_baseline(baseline)
        there = old.Params(*params), old.Batch(batch.xs, batch.targets, weights=batch.weights)
        for name, fn in gradients_of(old, batch, leak).items():
            made[f"{name}, baseline"] = fn, there
        return made
    if devices > 1 and batch.xs.shape[1] % devices:
        print(f"bptt x {devices}: left out, {devices} does not divide B", file=sys.stderr)
    elif devices > 1:
        mesh = Mesh(jax.devices()[:devices], ("batch",))
        parallel = jaxrnn.data_parallel(partial(jaxrnn.bptt, loss=loss, leak=leak), mesh)
        replicated, by_sequence = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "batch"))
        placed = jax.device_put(params, replicated), jax.device_put(batch, by_sequence)
        made[f"bptt x {devices}"] = without_state(parallel), placed
    if leak is not None:
        return made
    made["hoisted scan"] = jax.value_and_grad(hoisted_scan), here
    installed = versions()
    if installed["Flax"]:
        made["Flax"] = jax.value_and_grad(flax_rnn), here
    if installed["Haiku"]:
        relu = jaxrnn.relu
        made["plain scan, ReLU"] = jax.value_and_grad(partial(plain_scan, activation=relu)), here
        made["bptt, ReLU"] = without_state(partial(jaxrnn.bptt, activation=relu, loss=loss)), here
        made["Haiku, ReLU"] = jax.value_and_grad(haiku_rnn), here
    return made
