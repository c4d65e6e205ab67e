"""The batch split over devices and processes: values, and reductions in the compiled program."""

import os
import re
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxrnn
from jaxrnn import Batch
from tests.conftest import FAST_COMPILATION, default_and_thorough
from tests.recipe_cases import draw, network
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
    params, batch, h_0 = unequal_case().arguments
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


def test_what_is_no_gradient_function_or_mesh_is_named(mesh):
    with pytest.raises(TypeError, match=r"^gradient_fn: expected a function, got None$"):
        jaxrnn.data_parallel(None, mesh)
    with pytest.raises(TypeError, match=r"^mesh: expected a Mesh, got \["):
        jaxrnn.data_parallel(jaxrnn.bptt, jax.devices())


def test_a_tuple_is_not_a_batch(mesh):
    with pytest.raises(TypeError, match="batch: expected Batch"):
        jaxrnn.data_parallel(jaxrnn.bptt, mesh)(None, (1, 2))


@pytest.mark.parametrize("batch_shape", [(), (7,)])
def test_a_batch_that_the_devices_do_not_divide_is_rejected(batch_shape, mesh):
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    batch = Batch(jnp.ones((4, *batch_shape, 3)), jnp.zeros((4, *batch_shape), int))
    with pytest.raises(ValueError, match=r"^batch: .* first batch axis that is a multiple of 8"):
        jaxrnn.data_parallel(jaxrnn.bptt, mesh)(params, batch)


@pytest.mark.parametrize("name", ["train", "valid"])
def test_fit_refuses_what_the_devices_do_not_divide_before_the_first_update(name, mesh):
    def never_traced(params, grads):
        pytest.fail("an update was compiled")

    params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    good = Batch(jnp.ones((4, 8, 3)), jnp.zeros((4, 8), int))
    data = {"train": good} | {name: jax.tree.map(lambda leaf: leaf[:, :7], good)}
    gradient_fn = jaxrnn.data_parallel(jaxrnn.bptt, mesh)
    with pytest.raises(ValueError, match=r"^batch: .* a multiple of 8 devices") as raised:
        jaxrnn.fit(
            jax.random.key(0), params, **data, optimizer=never_traced, gradient_fn=gradient_fn
        )
    assert raised.value.__notes__[-1] == f"The batch is {name}."


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


@pytest.mark.thorough
def test_networks_split_over_devices_are_searched_without_communication():
    mesh = Mesh(jax.devices()[:2], "networks")
    split = P("networks")
    networks = [network(n, 2, 5)._replace(W_h=jnp.asarray(draw(n, 5, 5) / 2)) for n in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves).astype(jnp.float32), *networks)
    starts = jnp.asarray(draw(0, 2, 20, 5), jnp.float32)
    search = jax.vmap(lambda params, h: jaxrnn.fixed_points(params, h, jnp.zeros(2)))
    specs = {"in_specs": split, "out_specs": split}
    searched = jax.jit(jax.shard_map(search, mesh=mesh, **specs))
    assert "all-reduce" not in searched.lower(stacked, starts).compile().as_text()
    expected = jax.jit(search)(stacked, starts)
    assert expected.converged.all()
    np.testing.assert_allclose(searched(stacked, starts).h, expected.h, atol=1e-5)


def test_float16_over_devices_keeps_dtypes_and_sums_in_float32(mesh):
    """The sum of the shares, each of many steps, is beyond the range of float16."""
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2, dtype=jnp.float16)
    batch = Batch(jnp.ones((64, 8, 3)), jnp.full((64, 8, 2), 1000.0))
    gradient_fn = partial(jaxrnn.bptt, loss=jaxrnn.squared_error)
    (value, h_T), grads = jax.jit(jaxrnn.data_parallel(gradient_fn, mesh))(params, batch)
    (_, _), expected = gradient_fn(params, batch)
    assert {leaf.dtype for leaf in (h_T, *grads)} == {jnp.dtype(jnp.float16)}
    assert value.dtype == jnp.float32
    assert max(relative_errors(grads, expected)) <= 1e-2
