"""A batch that is split over a mesh by its type: explicit axes, with and without a set mesh."""

from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxrnn
from jaxrnn import Batch, influence, streams
from jaxrnn.jacobians import jacobian_products
from tests.conftest import default_and_thorough
from tests.reference import random_case, relative_errors

by_autodiff = jax.value_and_grad(jaxrnn.sequence_loss, has_aux=True)


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


def test_only_the_first_axis_of_a_mesh_splits_the_batch():
    mesh = jax.make_mesh((2, 4), ("batch", "model"), axis_types=(AxisType.Auto, AxisType.Explicit))
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    batch = Batch(jax.random.normal(jax.random.key(1), (7, 8, 3)), jnp.zeros((7, 8), int))
    got = jax.jit(jaxrnn.data_parallel(jaxrnn.bptt, mesh))(params, batch)
    assert max(relative_errors(got, jax.jit(jaxrnn.bptt)(params, batch))) <= 1e-5


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
        "uoro": partial(jaxrnn.uoro, key=jax.random.key(5), **options),
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


@pytest.mark.parametrize(
    "name",
    default_and_thorough(["bptt", "snap1"], ["bptt", "rtrl", "snap1", "uoro", "gradient_flow"]),
)
@pytest.mark.parametrize("tokens", default_and_thorough([False], [False, True]))
def test_explicit_sharding_under_vmap(name, tokens):
    """Over weights, and over tangents of the parameters: no mapped axis is split."""
    case = random_case(
        3, dtype=np.float32, T=7, batch_shape=(8,), sizes=(3, 5, 2), loss="cross_entropy",
        labels=True, mask=True, reset=True, weights=True, drive=True, tokens=tokens, h_0=False,
    )  # fmt: skip
    function = with_explicit_sharding()[name]

    @jax.jit
    def mapped(weights, batch):
        def value(w, params=case.params):
            return function(params, batch._replace(weights=w), None)

        def tangent(scale):
            v = jax.tree.map(lambda leaf: scale * leaf, case.params)
            return jax.jvp(partial(value, batch.weights), (case.params,), (v,))[1]

        return jax.vmap(value)(weights), jax.vmap(tangent)(jnp.arange(1.0, 4.0))

    weights = jax.random.uniform(jax.random.key(5), (3, 7, 8))
    expected = mapped(weights, case.batch)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        weights = jax.device_put(weights, NamedSharding(mesh, P(None, None, "batch")))
        batch = jax.device_put(case.batch, NamedSharding(mesh, P(None, "batch")))
        assert max(relative_errors(mapped(weights, batch), expected)) <= 1e-5


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


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("one_input", default_and_thorough([True], [True, False]))
@pytest.mark.parametrize("sets_mesh", default_and_thorough([False], [False, True]))
@pytest.mark.parametrize("compile", default_and_thorough([jax.jit], [jax.jit, lambda f: f]))
def test_starts_split_by_explicit_sharding_are_searched_on_their_devices(
    one_input, sets_mesh, compile
):
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2, dtype=jnp.float64)
    params = params._replace(W_h=2 * params.W_h)
    h, x = jax.random.normal(jax.random.key(1), (8, 5)), jnp.ones(3 if one_input else (8, 3))
    leak = jnp.full(5, 0.5)
    search = compile(lambda p, h, x, leak: jaxrnn.fixed_points(p, h, x, leak=leak))
    expected = search(params, h, x, leak)
    mesh = jax.make_mesh((8,), ("starts",), axis_types=(AxisType.Explicit,))
    whole = jax.device_put((params, leak), NamedSharding(mesh, P()))
    split = jax.device_put(h, NamedSharding(mesh, P("starts")))
    with jax.set_mesh(mesh) if sets_mesh else nullcontext():
        got = search(whole[0], split, x, whole[1])
    assert jax.typeof(got.h).sharding.spec[0] == "starts"
    np.testing.assert_array_equal(got.converged, expected.converged)
    np.testing.assert_allclose(got.h, expected.h, atol=1e-6)
    np.testing.assert_allclose(got.jacobian, expected.jacobian, atol=1e-6)


def test_unpad_takes_arrays_split_by_explicit_sharding():
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Explicit,))
    ys = jnp.arange(24.0).reshape(3, 8)
    split = jax.device_put(ys, NamedSharding(mesh, P(None, "batch")))
    lengths = jax.device_put(1 + jnp.arange(8) % 3, NamedSharding(mesh, P("batch")))
    for n, leaf in enumerate(jaxrnn.unpad(split, lengths)):
        assert jnp.array_equal(np.asarray(leaf), ys[: 1 + n % 3, n])


VMAPPED = {
    "bptt": lambda p, b: jaxrnn.bptt(p, b, checkpoint_every=2),
    "rtrl": jaxrnn.rtrl,
    "fixed_points": lambda p, b: jaxrnn.fixed_points(p, b.xs[0] @ jnp.ones((3, 5)), jnp.ones(3)).h,
}


@pytest.mark.parametrize("name", default_and_thorough(["bptt", "fixed_points"], VMAPPED))
def test_vmap_over_an_axis_split_by_explicit_sharding(name):
    """Blocks of time, some of which have no weights, and loops that begin with a number."""
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Explicit,))
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    xs = jax.random.normal(jax.random.key(1), (2, 7, 4, 3))
    batch = Batch(xs, jnp.zeros((2, 7, 4), int), weights=jnp.zeros((2, 7, 4)).at[:, -1].set(1.0))
    fn = jax.jit(jax.vmap(VMAPPED[name], in_axes=(None, 0)))
    expected = fn(params, batch)
    with jax.set_mesh(mesh):
        for spec in (P("batch"), P(None, None, "batch")):
            split = jax.device_put(batch, NamedSharding(mesh, spec))
            assert max(relative_errors(fn(params, split), expected)) <= 1e-5


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
