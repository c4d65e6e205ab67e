"""Inside `shard_map`, any array argument alone may vary over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxrnn
from jaxrnn import Batch
from jaxrnn.sharding import match_varying_axes


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


WEIGHTS = jaxrnn.Params(shape(4, 3), shape(4, 4), shape(2, 4), shape(4), shape(2))
ARGUMENTS = {
    "params": WEIGHTS,
    "xs": shape(5, 2, 3),
    "targets": shape(5, 2, dtype=jnp.int32),
    "mask": shape(5, 2, dtype=jnp.bool_),
    "reset": shape(5, 2, dtype=jnp.bool_),
    "weights": shape(5, 2),
    "drive": shape(5, 2, 4),
    "leak": shape(),
    "h_0": shape(2, 4),
    "v": WEIGHTS,
    "key": shape(2, dtype=jnp.uint32),
}
SEQUENCE = ("xs", "h_0", "drive", "mask", "reset", "leak")


def of_a_batch(function, **options):
    """The function of a batch, an initial state and a leak, from all arguments by name."""

    def call(arguments):
        batch = Batch(**{name: arguments[name] for name in Batch._fields})
        h_0, leak = arguments["h_0"], arguments["leak"]
        return function(arguments["params"], batch, h_0=h_0, leak=leak, **options)

    return call


def product(arguments):
    def along_v(params, batch, **options):
        return jaxrnn.gauss_newton_product(params, batch, arguments["v"], **options)

    return of_a_batch(along_v)(arguments)


def uoro(arguments):
    key = jax.random.wrap_key_data(arguments["key"])
    return of_a_batch(jaxrnn.uoro, key=key)(arguments)


def loss_by_leak(params, batch, h_0, leak):
    return jax.grad(lambda leak: jaxrnn.sequence_loss(params, batch, h_0, leak=leak)[0])(leak)


def states(arguments):
    return jaxrnn.hidden_states(arguments["params"], **{name: arguments[name] for name in SEQUENCE})


def exponents(arguments):
    options = {name: arguments[name] for name in ("xs", "h_0", "drive", "leak")}
    return jaxrnn.lyapunov_exponents(arguments["params"], **options)


FUNCTIONS = {
    "bptt": of_a_batch(jaxrnn.bptt),
    "checkpoints": of_a_batch(jaxrnn.bptt, checkpoint_every=2),
    "autodiff": of_a_batch(jax.value_and_grad(jaxrnn.sequence_loss, has_aux=True)),
    "leak by autodiff": of_a_batch(loss_by_leak),
    "gradient_flow": of_a_batch(jaxrnn.gradient_flow),
    "gauss_newton_product": product,
    "hidden_states": states,
    "lyapunov_exponents": exponents,
    "rtrl": of_a_batch(jaxrnn.rtrl),
    "snap1": of_a_batch(jaxrnn.snap1),
    "uoro": uoro,
}


def trace(call, varying, mesh):
    """Traces the call with one argument that each device has for itself, the others shared."""

    def of_one_device(own, shared):
        own = jax.tree.map(lambda x: x[0], own)
        return jax.tree.map(lambda x: x[None], call(shared | {varying: own}))

    shared = dict(ARGUMENTS)
    own = jax.tree.map(lambda x: shape(2, *x.shape, dtype=x.dtype), shared.pop(varying))
    split = jax.shard_map(of_one_device, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d"))
    return jax.eval_shape(split, own, shared)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_argument_varies(name):
    """The loops over time have a carry of one type, whichever it is."""
    mesh = Mesh(jax.devices()[:2], "d")
    for varying in ARGUMENTS:
        for leaf in jax.tree.leaves(trace(FUNCTIONS[name], varying, mesh)):
            assert leaf.shape[0] == 2


def test_a_sweep_over_leaks():
    """Each device has a leak of its own and the same batch."""
    params = jaxrnn.init(jax.random.key(0), 3, 4, 2)
    batch = Batch(jax.random.normal(jax.random.key(1), (5, 2, 3)), jnp.zeros((5, 2), int))

    def gradient(leak):
        (value, _), grads = jaxrnn.bptt(params, batch, leak=leak)
        return value, grads

    def of_one_device(leaks):
        return jax.tree.map(lambda x: x[None], gradient(leaks[0]))

    leaks = jnp.array([0.2, 0.5])
    mesh = Mesh(jax.devices()[:2], "d")
    sweep = jax.shard_map(of_one_device, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    for got, expected in zip(
        *map(jax.tree.leaves, (jax.jit(sweep)(leaks), jax.vmap(gradient)(leaks))), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_nothing_is_computed_outside_shard_map():
    jaxpr = jax.make_jaxpr(match_varying_axes)(jnp.zeros(3), jnp.ones(3))
    assert not jaxpr.eqns


def test_reparametrized_gives_the_gradient_of_the_share():
    """As bptt does, where autodiff sums the gradient of replicated parameters over the devices."""
    params = jaxrnn.init(jax.random.key(0), 3, 4, 2)
    batch = Batch(jax.random.normal(jax.random.key(1), (5, 4, 3)), jnp.zeros((5, 4), int))
    gradient = jaxrnn.reparametrized(jaxrnn.bptt, lambda t: t._replace(W_h=jnp.abs(t.W_h)))

    def mean(params, batch):
        return jax.tree.map(lambda d: jax.lax.pmean(d, "d"), gradient(params, batch)[1])

    mesh = Mesh(jax.devices()[:2], "d")
    shares = jax.shard_map(mean, mesh=mesh, in_specs=(P(), P(None, "d")), out_specs=P())
    for got, expected in zip(
        jax.jit(shares)(params, batch), gradient(params, batch)[1], strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-6)
