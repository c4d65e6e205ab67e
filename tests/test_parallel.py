"""The batch split over devices and processes: values, and reductions in the compiled program."""

import os
import re
import socket
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxrnn
from jaxrnn import Batch, influence, streams
from jaxrnn.jacobians import jacobian_products
from tests.conftest import FAST_COMPILATION, default_and_thorough
from tests.reference import plain_loss, random_case, relative_errors

AGREEMENT = 1e-12
ROOT = Path(__file__).parent.parent
by_autodiff = jax.value_and_grad(jaxrnn.sequence_loss, has_aux=True)


def unequal_case():
    """Eight sequences of 70 steps with masks: some devices count few steps or none."""
    case = random_case(
        1, T=70, batch_shape=(8,), sizes=(3, 5, 4), activation="tanh", loss="cross_entropy",
        labels=True, mask=True, reset=True, weights=True, h_0=True, tokens=False,
    )  # fmt: skip
    mask = jaxrnn.mask_from_lengths(jnp.array([0, 0, 1, 5, 70, 33, 2, 70]), 70)
    return case._replace(batch=case.batch._replace(mask=mask))


@pytest.fixture
def mesh():
    if len(jax.devices()) < 8:
        pytest.fail("tests/conftest.py asks for 8 CPU devices")
    return Mesh(jax.devices()[:8], ("batch",))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("given_h_0", default_and_thorough([True], [True, False]))
@pytest.mark.parametrize(
    "gradient_fn",
    [jaxrnn.bptt, partial(jaxrnn.bptt, checkpoint_every=9), by_autodiff],
    ids=["bptt", "recomputed", "autodiff"],
)
def test_eight_devices_give_the_value_and_gradient_of_one(gradient_fn, given_h_0, mesh):
    params, batch, h_0 = unequal_case().arguments
    h_0 = h_0 if given_h_0 else None
    parallel = jax.jit(jaxrnn.data_parallel(gradient_fn, mesh))
    expected = jax.jit(by_autodiff)(params, batch, h_0)
    assert max(relative_errors(parallel(params, batch, h_0), expected)) <= AGREEMENT


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
def test_two_processes_give_the_value_and_gradient_of_one(tmp_path):
    """`fit` and `check_values` take arrays that span them, too; one process saves."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"XLA_FLAGS": FAST_COMPILATION}
    command = [sys.executable, "-m", "tests.distributed_worker"]
    workers = [
        subprocess.Popen(
            [*command, str(number), "2", port, str(tmp_path)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    for number, (worker, output) in enumerate(zip(workers, outputs, strict=True)):
        assert worker.returncode == 0, output
        assert f"process {number} of 2: 4 devices agree" in output


def reductions(text: str) -> list[str]:
    """The collective operations of an HLO module, each with the computation that contains it."""
    found, computation = [], ""
    for line in text.splitlines():
        if line.endswith("{") and "(" in line:
            computation = line.split()[0]
        collective = r"= \(?\S.* (all-reduce|all-gather|all-to-all|collective-permute)(-start)?\("
        if re.search(collective, line):
            found.append((computation, re.search(collective, line)[1]))
    return found


def test_data_parallel_reduces_once_and_outside_every_loop(mesh):
    params, batch, h_0 = jax.tree.map(lambda leaf: leaf, unequal_case().arguments)
    for gradient_fn in (jaxrnn.bptt, by_autodiff):
        parallel = jax.jit(jaxrnn.data_parallel(gradient_fn, mesh))
        text = parallel.lower(params, batch, h_0).compile().as_text()
        assert text.count(" while(") >= 2
        assert reductions(text) == [("ENTRY", "all-reduce")]


def test_a_sharded_batch_under_plain_jit_reduces_once_and_outside_every_loop(mesh):
    """The plain scan, which reduces inside its loop, shows that the test can fail."""
    case = unequal_case()
    batch = Batch(
        *(jax.device_put(x, NamedSharding(mesh, P(None, "batch"))) for x in case.batch[:2])
    )
    text = jax.jit(by_autodiff).lower(case.params, batch).compile().as_text()
    assert reductions(text) == [("ENTRY", "all-reduce")]
    plain = jax.jit(jax.value_and_grad(plain_loss, has_aux=True))
    text = plain.lower(case.params, batch).compile().as_text()
    assert any(computation != "ENTRY" for computation, _ in reductions(text))


def test_an_explicit_mesh_gives_the_same_value_and_gradient():
    """`jax.make_mesh` makes explicit axes; the data are on one device, or split over the mesh."""
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Explicit,))
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    xs = jax.random.normal(jax.random.key(1), (7, 8, 3))
    batch = Batch(xs, jnp.zeros((7, 8), int))
    expected = jax.jit(jaxrnn.bptt)(params, batch)
    parallel = jax.jit(jaxrnn.data_parallel(jaxrnn.bptt, mesh))
    assert max(relative_errors(parallel(params, batch), expected)) <= 1e-5
    with jax.set_mesh(mesh):
        split = jax.device_put(batch, NamedSharding(mesh, P(None, "batch")))
        assert max(relative_errors(parallel(params, split), expected)) <= 1e-5
        loss = jax.jit(jax.value_and_grad(jaxrnn.sequence_loss, has_aux=True))
        assert max(relative_errors(loss(params, split), expected)) <= 1e-5


def with_explicit_sharding():
    """Calls of public functions: name -> function of (params, batch, h_0)."""
    options = {"leak": 0.5, "activation": jaxrnn.relu}
    adam = optax.adam(1e-2)

    def states(function, params, batch, h_0):
        fields = {"drive": batch.drive, "mask": batch.mask, "reset": batch.reset}
        return function(params, batch.xs, h_0, **fields, **options)

    def update(params, batch, h_0):
        step = jaxrnn.make_update(jaxrnn.bptt, adam)
        return step(jaxrnn.init_state(params, adam, h_0), batch)[1].loss

    def jacobians(params, batch, h_0):
        hs = jaxrnn.hidden_states(params, batch.xs, h_0)[1]
        return jaxrnn.jacobian(params, hs, batch.xs, **options)

    def online(params, batch, h_0):
        """One update for each step of a stream."""

        def learn(carry, step):
            params, stream = carry
            step = jax.tree.map(lambda leaf: leaf[None], step)
            arguments = params, step, stream
            (_, stream), grads = streams.stream_gradient(*arguments, influence=influence.diagonal)
            return (jaxrnn.sgd(params, grads, 0.1), stream), grads

        h_0 = jaxrnn.hidden_states(params, batch.xs[:1], h_0)[0]
        start = streams.start_stream(params, h_0, influence.diagonal)
        return jax.lax.scan(learn, (params, start), batch)[1]

    return {
        "bptt": jaxrnn.bptt,
        "bptt with options": partial(jaxrnn.bptt, **options),
        "bptt without df": partial(jaxrnn.bptt, activation=jaxrnn.Activation(jax.nn.gelu)),
        "rtrl": partial(jaxrnn.rtrl, **options),
        "snap1": jaxrnn.snap1,
        "uoro": lambda p, b, h: jaxrnn.uoro(p, b, h, key=jax.random.key(5), **options),
        "online": online,
        "gauss_newton_product": lambda p, b, h: jaxrnn.gauss_newton_product(p, b, p, h, **options),
        "jacobian": jacobians,
        "jacobian_products": lambda *arguments: jacobian_products(jacobians(*arguments)),
        "lyapunov_exponents": lambda p, b, h: jaxrnn.lyapunov_exponents(p, b.xs, h, **options)[
            :, :2
        ],
        "bptt, checkpoint_every": partial(jaxrnn.bptt, checkpoint_every=5),
        "sequence_loss": by_autodiff,
        "sequence_loss with options": partial(by_autodiff, **options),
        "gradient_flow": partial(jaxrnn.gradient_flow, **options),
        "hidden_states": partial(states, jaxrnn.hidden_states),
        "unroll": partial(states, jaxrnn.unroll),
        "update": update,
    }


@pytest.mark.parametrize(
    ("options", "tokens"),
    default_and_thorough(
        [(True, False)], [(False, False), (False, True), (True, False), (True, True)], unpack=True
    ),
)
@pytest.mark.parametrize(
    "name",
    default_and_thorough(
        ["bptt with options", "unroll", "rtrl", "lyapunov_exponents"], with_explicit_sharding()
    ),
)
@pytest.mark.parametrize("sets_mesh", default_and_thorough([False], [False, True]))
def test_explicit_sharding_gives_the_same_results(name, options, tokens, sets_mesh):
    """The batch is split over the mesh, and JAX propagates its sharding in the types.

    With options, the first state is whole on each device.
    """
    case = random_case(
        3, dtype=np.float32, T=37, batch_shape=(8,), sizes=(3, 5, 2), loss="cross_entropy",
        labels=True, mask=options, reset=options, weights=options, drive=options, tokens=tokens,
        h_0=False,
    )  # fmt: skip
    h_0 = jax.random.normal(jax.random.key(4), (8, 5)) if options else None
    function = jax.jit(with_explicit_sharding()[name])
    expected = function(case.params, case.batch, h_0)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Explicit,))
    params, h_0 = jax.device_put((case.params, h_0), NamedSharding(mesh, P()))
    batch = jax.device_put(case.batch, NamedSharding(mesh, P(None, "batch")))
    with jax.set_mesh(mesh) if sets_mesh else nullcontext():
        assert max(relative_errors(function(params, batch, h_0), expected)) <= 1e-5


@pytest.mark.parametrize("gradient_fn", [jaxrnn.bptt, None], ids=["bptt", "data_parallel"])
@pytest.mark.parametrize("sets_mesh", default_and_thorough([False], [False, True]))
def test_a_run_on_examples_split_by_explicit_sharding_equals_one_on_one_device(
    gradient_fn, sets_mesh
):
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Explicit,))
    gradient_fn = gradient_fn or jaxrnn.data_parallel(jaxrnn.bptt, mesh)
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    xs = jax.random.normal(jax.random.key(1), (7, 40, 3))
    batch = Batch(xs, jnp.ones((7, 40), int), mask=xs[..., 0] < 1)
    fit = partial(jaxrnn.fit, jax.random.key(2), optimizer=optax.sgd(0.1), max_epochs=2)
    expected = fit(params, batch, batch_size=16).best
    split = jax.device_put(batch, NamedSharding(mesh, P(None, "batch")))
    params = jax.device_put(params, NamedSharding(mesh, P()))
    with jax.set_mesh(mesh) if sets_mesh else nullcontext():
        got = fit(params, split, batch_size=16, gradient_fn=gradient_fn).best
        assert max(relative_errors(got, expected)) <= 1e-5
        with pytest.raises(ValueError, match=r"^batch_size: expected a multiple of the 8 parts"):
            fit(params, split, batch_size=20)


@pytest.mark.parametrize("function", [jaxrnn.bptt, jaxrnn.rtrl])
def test_h_0_may_be_on_one_device_beside_a_batch_split_by_explicit_sharding(function):
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    batch = Batch(jnp.ones((7, 8, 3)), jnp.zeros((7, 8), int))
    h_0 = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Explicit,))
    split = jax.device_put(batch, NamedSharding(mesh, P(None, "batch")))
    assert max(relative_errors(function(params, split, h_0), function(params, batch, h_0))) <= 1e-5


@pytest.mark.parametrize("name", ["bptt", "rtrl", "lyapunov_exponents"])
def test_an_activation_may_close_over_arrays_on_an_explicit_mesh(name):
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    batch = Batch(jax.random.normal(jax.random.key(1), (7, 8, 3)), jnp.zeros((7, 8), int))

    @jax.jit
    def result(slope, params, batch):
        activation = jaxrnn.Activation(lambda z: jnp.tanh(slope * z))
        if name == "lyapunov_exponents":
            return jaxrnn.lyapunov_exponents(params, batch.xs, activation=activation)[:, :2]
        return getattr(jaxrnn, name)(params, batch, activation=activation)

    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Explicit,))
    whole = jax.device_put((jnp.float32(0.7), params), NamedSharding(mesh, P()))
    split = jax.device_put(batch, NamedSharding(mesh, P(None, "batch")))
    assert max(relative_errors(result(*whole, split), result(0.7, params, batch))) <= 1e-5


def test_unpad_takes_arrays_split_by_explicit_sharding():
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Explicit,))
    ys = jnp.arange(24.0).reshape(3, 8)
    split = jax.device_put(ys, NamedSharding(mesh, P(None, "batch")))
    lengths = jax.device_put(1 + jnp.arange(8) % 3, NamedSharding(mesh, P("batch")))
    for n, leaf in enumerate(jaxrnn.unpad(split, lengths)):
        assert jnp.array_equal(np.asarray(leaf), ys[: 1 + n % 3, n])


@pytest.mark.parametrize(
    "function",
    [
        lambda params, batch: jaxrnn.rtrl(params, batch)[1].W_h,
        lambda params, batch: jaxrnn.lyapunov_exponents(params, batch.xs)[:, :2].mean(),
    ],
    ids=["rtrl", "lyapunov_exponents"],
)
def test_explicit_axes_beside_those_of_a_shard_map(function):
    """The batch is split over both axes of the mesh, of which `shard_map` takes one."""
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    batch = Batch(jax.random.normal(jax.random.key(1), (7, 8, 3)), jnp.zeros((7, 8), int))

    def mean(params, batch):
        return jax.lax.pmean(function(params, batch), "a")

    split = jax.shard_map(
        mean, mesh=mesh, in_specs=(P(), P(None, "a")), out_specs=P(), axis_names={"a"}
    )
    placed = jax.device_put(batch, NamedSharding(mesh, P(None, ("a", "b"))))
    whole = jax.device_put(params, NamedSharding(mesh, P()))
    assert max(relative_errors(jax.jit(split)(whole, placed), function(params, batch))) <= 1e-5


def test_gradient_flow_inside_shard_map(mesh):
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    xs = jax.random.normal(jax.random.key(1), (7, 8, 3))
    batch = Batch(xs, jnp.zeros((7, 8), int))
    split = P(None, mesh.axis_names[0])
    flow = jax.shard_map(jaxrnn.gradient_flow, mesh=mesh, in_specs=(P(), split), out_specs=split)
    # The mean over the sequence of each device is eight times the mean over all of them.
    expected = jax.tree.map(lambda leaf: 8 * leaf, jax.jit(jaxrnn.gradient_flow)(params, batch))
    assert max(relative_errors(jax.jit(flow)(params, batch), expected)) <= 1e-5


@pytest.mark.usefixtures("x64")
def test_sequence_loss_inside_shard_map(mesh):
    params, batch, _ = unequal_case().arguments
    batch = batch._replace(mask=None, weights=None)

    def mean(params, batch):
        return jax.lax.pmean(jaxrnn.sequence_loss(params, batch)[0], "batch")

    split = jax.shard_map(mean, mesh=mesh, in_specs=(P(), P(None, "batch")), out_specs=P())
    got = jax.jit(jax.value_and_grad(split))(params, batch)
    expected = jax.jit(jax.value_and_grad(lambda p, b: jaxrnn.sequence_loss(p, b)[0]))(
        params, batch
    )
    assert max(relative_errors(got, expected)) <= AGREEMENT


def test_a_tuple_is_not_a_batch(mesh):
    with pytest.raises(TypeError, match="batch: expected Batch"):
        jaxrnn.data_parallel(jaxrnn.bptt, mesh)(None, (1, 2))


@pytest.mark.parametrize("batch_shape", [(), (7,)])
def test_a_batch_that_the_devices_do_not_divide_is_rejected(batch_shape, mesh):
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    batch = Batch(jnp.ones((4, *batch_shape, 3)), jnp.zeros((4, *batch_shape), int))
    with pytest.raises(ValueError, match=r"^batch: .* first batch axis that is a multiple of 8"):
        jaxrnn.data_parallel(jaxrnn.bptt, mesh)(params, batch)


def test_updates_keep_the_states_sharded_and_the_parameters_replicated(mesh):
    rule = partial(jaxrnn.sgd, learning_rate=0.1)
    update = jaxrnn.make_update(jaxrnn.data_parallel(jaxrnn.bptt, mesh), rule)
    state = jaxrnn.init_state(jaxrnn.init(jax.random.key(0), 3, 5, 2), rule, h=jnp.zeros((8, 5)))
    batch = Batch(jnp.ones((4, 8, 3)), jnp.zeros((4, 8), int))
    for _ in range(3):
        state, metrics = update(state, batch)
    assert len(state.h.sharding.device_set) == 8
    assert state.params.W_h.is_fully_replicated
    assert np.isfinite(metrics.loss)
