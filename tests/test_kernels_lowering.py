"""The kernels lowered for CUDA on a machine without a GPU; where the scan stays.

What a GPU computes, and how fast, is checked by `python -m experiments.kernel_check` on one.
"""

import sys
import warnings
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

import jaxrnn
from jaxrnn import Activation, Batch, kernels
from jaxrnn.recurrence import scan
from tests.conftest import default_and_thorough
from tests.kernel_cases import gradient, small_case
from tests.reference import ACTIVATIONS, relative_errors

TRITON = "__gpu$xla.gpu.triton"


def two_gpus() -> AbstractMesh:
    """A mesh of GPUs that are not there. Later versions of JAX ask which GPU to lower for."""
    given = {}
    if jax.__version_info__ >= (0, 11):
        from jax.sharding import AbstractDevice

        given = {"abstract_device": AbstractDevice("NVIDIA H100", None, "gpu")}
    return AbstractMesh((2,), ("batch",), (AxisType.Auto,), **given)


def lowered(fn, *arguments) -> str:
    """The program of a machine with GPUs; later versions of JAX warn that they will drop the
    backend."""
    on_gpus = mock.patch.object(jax, "default_backend", return_value="gpu")
    with on_gpus, jax.sharding.use_abstract_mesh(two_gpus()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
        return jax.jit(fn).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def kernels_and_loops(fn, *arguments) -> tuple[int, int]:
    text = lowered(fn, *arguments)
    return text.count(TRITON), text.count("stablehlo.while")


def shapes(T=40, B=(5,), H=16, dtype=jnp.float32, options=False):
    params = jax.eval_shape(lambda: jaxrnn.init(jax.random.key(0), 3, H, 2, dtype=dtype))
    flags = jax.ShapeDtypeStruct((T, *B), jnp.bool_) if options else None
    xs, targets = (jax.ShapeDtypeStruct((T, *B, n), dtype) for n in (3, 2))
    return params, Batch(xs, targets, flags, flags)


@pytest.fixture(scope="module")
def small():
    return small_case()


CLASSES = [
    (dtype, H, name, options, leak)
    for dtype, sizes in (("float32", (1, 16, 33, 64, 128)), ("bfloat16", (1, 16, 33, 128, 256)))
    for H in sizes
    for name in ("tanh", "relu", "sigmoid", "identity")
    for options in (False, True)
    for leak in (None, 0.5)
]


@pytest.mark.parametrize(
    "of_shapes", default_and_thorough(CLASSES[5::34], CLASSES), ids=lambda values: repr(values)
)
def test_every_class_of_shapes_is_lowered_for_cuda(of_shapes):
    dtype, H, name, options, leak = of_shapes
    gradient_fn = gradient(kernels.loop, activation=ACTIVATIONS[name], leak=leak)
    arguments = shapes(H=H, dtype=jnp.dtype(dtype), options=options)
    assert kernels_and_loops(gradient_fn, *arguments) == (2, 0)


def test_long_sequences_take_several_launches():
    """Of 4,096 steps in a loop, and one of the rest."""
    for T, expected in [(8191, (2, 0)), (8192, (4, 2)), (20_000, (4, 2))]:
        assert kernels_and_loops(gradient(kernels.loop), *shapes(T)) == expected
    checkpointed = gradient(kernels.loop, checkpoint_every=100)
    assert kernels_and_loops(checkpointed, *shapes(1000)) == (3, 2)


def test_any_vmap_is_lowered_for_cuda(small):
    """Triton has three axes of blocks; the rule for vmap needs two."""
    params, batch = small
    fn = gradient(kernels.loop)
    params = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, 3, *x.shape)), params)
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), batch)
    for axes in [(None, 1), (0, None), (0, None), (None, 0)]:
        fn = jax.vmap(fn, in_axes=axes)
    assert kernels_and_loops(fn, params, batch) == (2, 0)


def test_the_batch_split_over_gpus_is_lowered_for_cuda():
    parallel = jaxrnn.data_parallel(gradient(kernels.loop), two_gpus())
    assert kernels_and_loops(parallel, *shapes(B=(4,), options=True)) == (2, 0)


def learned_slope(params, batch):
    """The gradient by a value that the activation reads."""

    def value(slope):
        activation = Activation(lambda z: jnp.tanh(slope * z))
        return gradient(kernels.loop, activation=activation)(params, batch)[0][0]

    return jax.grad(value)(0.5)


def array_slope(params, batch):
    slope = jnp.asarray(0.5)
    activation = Activation(lambda z: jnp.tanh(slope * z))
    return gradient(kernels.loop, activation=activation)(params, batch)


FALLBACKS = {
    "H": (gradient(kernels.loop), shapes(H=129)),
    "H in bfloat16": (gradient(kernels.loop), shapes(H=257, dtype=jnp.bfloat16)),
    "float16": (gradient(kernels.loop), shapes(dtype=jnp.float16)),
    "few steps": (gradient(kernels.loop), shapes(T=15)),
    "no sequences": (gradient(kernels.loop), shapes(B=(0,))),
    "gelu": (gradient(kernels.loop, activation=Activation(jax.nn.gelu)), shapes()),
    "maximum": (
        gradient(kernels.loop, activation=Activation(lambda z: jnp.maximum(z, 0))),
        shapes(),
    ),
    "learned slope": (learned_slope, shapes()),
    "slope in an array": (array_slope, shapes()),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_the_scan_stays_where_the_kernel_does_not_apply(name):
    """The reverse loop applies no activation, so it stays a kernel where only f is the reason."""
    fn, arguments = FALLBACKS[name]
    found, loops = kernels_and_loops(fn, *arguments)
    activation = name in ("gelu", "maximum", "slope in an array")
    assert (found, loops > 0) == (1 if activation else 0, True)


@pytest.mark.parametrize("precision", ["highest", "float32", "BF16_BF16_F32_X3"])
def test_the_scan_stays_if_products_are_to_be_precise(precision):
    with jax.default_matmul_precision(precision):
        assert kernels_and_loops(gradient(kernels.loop), *shapes())[0] == 0
    with jax.default_matmul_precision("default"):
        assert kernels_and_loops(gradient(kernels.loop), *shapes())[0] == 2


@pytest.mark.usefixtures("x64")
def test_the_scan_stays_in_float64():
    arguments = shapes(dtype=jnp.float64)
    assert kernels_and_loops(gradient(kernels.loop), *arguments)[0] == 0
    assert kernels_and_loops(gradient(kernels.loop), *shapes())[0] == 2


def test_the_scan_stays_without_the_backend(monkeypatch):
    monkeypatch.setattr(kernels, "pallas", lambda: None)
    assert kernels_and_loops(gradient(kernels.loop), *shapes())[0] == 0


def test_a_backend_that_is_missing_is_noticed(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas", None)
    assert kernels.pallas.__wrapped__() is None


def test_symbolic_sizes_take_the_scan(small):
    params, batch = small
    T, B = jax.export.symbolic_shape("T, B")
    symbolic = jax.tree.map(lambda x: jax.ShapeDtypeStruct((T, B, *x.shape[2:]), x.dtype), batch)
    fn = jax.jit(gradient(kernels.loop))
    exported = jax.export.export(fn, platforms=("cpu", "cuda"))(params, symbolic)
    assert TRITON not in exported.mlir_module()
    got = exported.call(params, batch)
    assert max(relative_errors(got, gradient(scan)(params, batch))) <= 1e-6


def test_on_a_cpu_the_program_is_that_of_the_scan():
    """Bit by bit, with its loops; the kernel, which no CPU can run, is not in it. It can be
    exported."""
    case = small_case(T=2000)
    with_kernel, plain = (jax.jit(gradient(loop)) for loop in (kernels.loop, scan))
    expected = plain(*case)
    loops = [fn.lower(*case).compile().as_text().count(" while(") for fn in (with_kernel, plain)]
    assert loops == [3, 3]  # forward, over blocks of the backward pass, over their steps
    jax.tree.map(np.testing.assert_array_equal, with_kernel(*case), expected)
    exported = jax.export.export(with_kernel)(*case).call(*case)
    assert max(relative_errors(exported, expected)) <= 1e-6
