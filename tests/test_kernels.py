"""The loops as GPU kernels, run by Pallas's interpreter on the CPU, against the scan."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxrnn
from jaxrnn import kernels, tiles
from jaxrnn.recurrence import recur, reverse_scan, scan
from tests.conftest import default_and_thorough
from tests.faults import KERNEL, with_fault
from tests.kernel_cases import gradient, small_case
from tests.reference import random_case, relative_errors

interpreted = partial(kernels.loop, interpret=True)


@pytest.fixture(scope="module")
def small():
    return small_case()


@pytest.mark.parametrize(
    "drawn",
    default_and_thorough(
        [(0, "float32")],
        [(n, dtype) for n in range(24) for dtype in ("float32", "bfloat16")],
    ),
)
def test_the_interpreted_kernel_equals_the_scan(drawn):
    """Random networks, batches and options: the error of all results, summed, is at most twice the
    scan's."""
    structure, dtype = drawn
    T = int(np.random.default_rng(structure).integers(16, 50))
    case = random_case(structure, T=T, largest_size=20, dtype=np.float32, leak=structure % 3 == 0)
    leak, arguments = jax.tree.map(
        lambda x: x.astype(dtype) if x.dtype == "float32" else x, (case.leak, case.arguments)
    )
    options = case.keywords | {"checkpoint_every": 17 if structure % 4 == 1 else None}
    options.pop("leak", None)
    by_kernel, by_scan = (
        jax.jit(partial(jaxrnn.bptt, loop=loop, leak=leak, **options))(*arguments)
        for loop in (interpreted, scan)
    )
    with jax.enable_x64(True):
        leak, arguments = jax.tree.map(
            lambda x: x.astype("float64") if x.dtype == dtype else x, (leak, arguments)
        )
        expected = jax.jit(partial(jaxrnn.bptt, leak=leak, **options))(*arguments)
    error, scans = (sum(relative_errors(result, expected)) for result in (by_kernel, by_scan))
    assert error <= 2 * scans + 1e-6


def transformed(loop, params, batch):
    """Functions of jaxrnn under the transformations of JAX: name -> a call."""
    fn = gradient(loop, leak=0.5)
    loss = partial(jaxrnn.sequence_loss, loss=jaxrnn.squared_error, loop=loop)
    networks = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x, -x]), params)
    by_sequence = jax.vmap(fn, in_axes=(None, 1))

    def norm(params):
        return sum((d**2).sum() for d in fn(params, batch)[1])

    def value(params):
        return loss(params, batch)[0]

    def with_leak(leak):
        return jaxrnn.unroll(params, batch.xs, mask=batch.mask, leak=leak, loop=loop)

    tangent = params._replace(W_h=jnp.ones_like(params.W_h))
    leaks = jnp.linspace(0.2, 1, 10).reshape(2, 5)
    return {
        "vmap over sequences": lambda: by_sequence(params, batch),
        "vmap over networks": lambda: jax.vmap(by_sequence, in_axes=(0, None))(networks, batch),
        "vmap over leaks": lambda: jax.vmap(with_leak)(leaks),
        "grad of the loss": lambda: jax.grad(value)(params),
        "grad of bptt": lambda: jax.grad(norm)(params),
        "jvp": lambda: jax.jvp(lambda p: loss(p, batch), (params,), (tangent,)),
        "jvp of grad": lambda: jax.jvp(jax.grad(value), (params,), (tangent,)),
        "grad of vmap": lambda: jax.grad(
            lambda p: jax.vmap(lambda b: fn(p, b)[0][0], in_axes=1)(batch).sum()
        )(params),
        "one sequence": lambda: fn(params, jax.tree.map(lambda x: x[:, 0], batch)),
        "two batch axes": lambda: fn(
            params, jax.tree.map(lambda x: x.reshape(20, 2, 2, *x.shape[2:]), batch)
        ),
    }


NAMES = (
    *("vmap over sequences", "vmap over networks", "vmap over leaks", "grad of the loss"),
    *("grad of bptt", "jvp", "jvp of grad", "grad of vmap", "one sequence", "two batch axes"),
)


@pytest.mark.parametrize("name", default_and_thorough(["vmap over leaks"], NAMES))
def test_transformations_equal_those_of_the_scan(name, small):
    by_kernel, by_scan = (transformed(loop, *small)[name] for loop in (interpreted, scan))
    assert max(relative_errors(jax.jit(by_kernel)(), jax.jit(by_scan)())) <= 1e-5


@pytest.mark.parametrize("axes", [(None, 1), (0, None)], ids=["sequences", "networks"])
def test_vmap_over_nothing(axes, small):
    params, batch = small
    if axes[0] is None:
        batch = jax.tree.map(lambda x: x[:, :0], batch)
    else:
        params = jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype), params)
    by_kernel, by_scan = (
        jax.jit(jax.vmap(gradient(loop), in_axes=axes))(params, batch)
        for loop in (interpreted, scan)
    )
    assert jax.tree.map(jnp.shape, by_kernel) == jax.tree.map(jnp.shape, by_scan)


def test_the_batch_split_over_devices(small):
    mesh = Mesh(jax.devices()[:2], ("batch",))
    parallel = jaxrnn.data_parallel(gradient(kernels.loop), mesh)
    assert max(relative_errors(jax.jit(parallel)(*small), gradient(scan)(*small))) <= 1e-5


@pytest.mark.thorough
def test_the_interpreted_kernel_inside_shard_map(small):
    """Without check_vma: Pallas's interpreter does not say which values vary over devices."""
    mesh, split = Mesh(jax.devices()[:2], ("batch",)), P(None, "batch")

    def states(loop):
        def fn(params, batch):
            return jaxrnn.hidden_states(params, batch.xs, mask=batch.mask, loop=loop)[1]

        specs = {"in_specs": (P(), split), "out_specs": split}
        return jax.jit(jax.shard_map(fn, mesh=mesh, check_vma=False, **specs))

    assert max(relative_errors(states(interpreted)(*small), states(scan)(*small))) <= 1e-6


def both_loops(loop):
    """Each result of the loops of two networks with every option, two tiles and three pieces."""
    T, B, H = 56, 20, 5
    keys = jax.random.split(jax.random.key(0), 7)
    W_h = 0.5 * jax.random.normal(keys[0], (2, H, H))
    zs, f_primes = (jax.random.normal(key, (2, T, B, H)) for key in keys[1:3])
    h, leak = jax.random.normal(keys[3], (2, B, H)), jax.random.uniform(keys[4], (2, H))
    mask, reset = (jax.random.bernoulli(key, 0.8, (T, B)) for key in keys[5:])

    def call(W_h, zs, f_primes, h, leak):
        forward = recur(jaxrnn.tanh, W_h, zs, h, leak, mask, ~reset, loop)
        return forward, reverse_scan(W_h, h, zs, f_primes, leak, mask, ~reset, loop)

    return jax.jit(jax.vmap(call))(W_h, zs, f_primes, h, leak)


@pytest.fixture(scope="module")
def expected():
    return both_loops(scan)


def loops_agree(module, expected) -> bool:
    return max(relative_errors(both_loops(partial(module.loop, interpret=True)), expected)) <= 1e-5


@pytest.mark.thorough
@pytest.mark.parametrize("fault", KERNEL)
def test_a_fault_in_the_kernel_is_caught(fault, expected):
    faulty = with_fault([tiles, kernels], *KERNEL[fault])
    faulty.MOST_STEPS = 16
    assert not loops_agree(faulty, expected), "this fault would have passed"


@pytest.mark.thorough
def test_without_a_fault_the_same_comparison_passes(expected, monkeypatch):
    monkeypatch.setattr(tiles, "MOST_STEPS", 16)
    assert loops_agree(kernels, expected)
