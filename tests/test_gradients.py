"""The gradient by theta where params = to_params(theta); what a gradient function returns."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import jaxrnn
from jaxrnn import Batch, Params
from tests.conftest import default_and_thorough
from tests.reference import plain_loss, relative_errors

I, H, O, R = 3, 6, 2, 2
SIGNS = np.where(np.arange(H) < 4, 1.0, -1.0)
KEPT = np.random.default_rng(0).random((H, H)) < 0.5


def dale(theta: Params) -> Params:
    return theta._replace(W_h=jnp.abs(theta.W_h) * SIGNS)


def sparse(theta: Params) -> Params:
    return theta._replace(W_h=theta.W_h * KEPT)


def low_rank(theta) -> Params:
    return theta["rest"]._replace(W_h=theta["left"] @ theta["right"].T)


def frozen(theta) -> Params:
    return Params(W_h=jnp.asarray(KEPT, theta["W_x"].dtype), **theta)


def shared(theta) -> Params:
    block = theta["block"]
    return theta["rest"]._replace(W_h=jnp.kron(jnp.eye(2, dtype=block.dtype), block))


def start(to_params):
    params = jaxrnn.init(jax.random.key(0), I, H, O)
    normal = partial(jax.random.normal, jax.random.key(1))
    if to_params is low_rank:
        return {"rest": params, "left": normal((H, R)), "right": normal((H, R))}
    if to_params is frozen:
        return {name: leaf for name, leaf in params._asdict().items() if name != "W_h"}
    if to_params is shared:
        return {"rest": params, "block": normal((H // 2, H // 2))}
    return params


@pytest.fixture
def batch():
    xs = jax.random.normal(jax.random.key(2), (9, 8, I))
    return Batch(xs, (xs.sum(-1) > 0).astype(int))


FORMS = pytest.mark.parametrize(
    "to_params", default_and_thorough([dale, frozen], [dale, sparse, low_rank, frozen, shared])
)


@FORMS
def test_equals_autodiff_of_the_composition(to_params, batch):
    theta = start(to_params)
    by_theta = jax.jit(jaxrnn.reparametrized(partial(jaxrnn.bptt, leak=0.4), to_params))

    def loss(theta):
        return plain_loss(to_params(theta), batch, leak=0.4)

    expected = jax.jit(jax.value_and_grad(loss, has_aux=True))(theta)
    assert max(relative_errors(by_theta(theta, batch), expected)) <= 1e-5


@FORMS
def test_the_batch_may_be_split_over_devices(to_params, batch):
    theta = start(to_params)
    by_theta = jaxrnn.reparametrized(jaxrnn.bptt, to_params)
    mesh = Mesh(jax.devices()[:4], "batch")
    got = jax.jit(jaxrnn.data_parallel(by_theta, mesh))(theta, batch)
    assert max(relative_errors(got, jax.jit(by_theta)(theta, batch))) <= 1e-5


@FORMS
def test_fit_trains_theta(to_params, batch):
    gradient_fn = jaxrnn.reparametrized(jaxrnn.bptt, to_params)
    result = jaxrnn.fit(
        jax.random.key(3), start(to_params), batch, optimizer=optax.adam(1e-2), batch_size=4,
        gradient_fn=gradient_fn, max_epochs=3,
    )  # fmt: skip
    assert result.history[-1].train_loss < result.history[0].train_loss
    trained = to_params(result.best)
    assert jnp.isfinite(trained.W_h).all()


def test_a_gradient_of_another_dtype_is_cast_to_that_of_the_parameters(batch):
    def wide(params, batch, h=None):
        result, grads = jaxrnn.bptt(params, batch, h)
        return result, jax.tree.map(lambda d: d.astype(jnp.float32), grads)

    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), dale(start(dale)))
    got, expected = (
        jaxrnn.reparametrized(fn, lambda theta: theta)(half, batch) for fn in (wide, jaxrnn.bptt)
    )
    assert all(map(jnp.array_equal, jax.tree.leaves(got), jax.tree.leaves(expected)))


@pytest.mark.thorough
def test_a_key_reaches_the_gradient_function(batch):
    def noisy(params, batch, h=None, *, key):
        drive = jax.random.normal(key, (*batch.xs.shape[:-1], H))
        return jaxrnn.bptt(params, batch._replace(drive=drive), h)

    theta, key = start(dale), jax.random.key(5)
    got = jaxrnn.reparametrized(noisy, dale)(theta, batch, key=key)
    assert jnp.array_equal(got[0][0], noisy(dale(theta), batch, key=key)[0][0])


@pytest.mark.parametrize(
    ("gradient_fn", "to_params", "message"),
    [
        (None, dale, "gradient_fn: expected a function, got None"),
        (jaxrnn.bptt, 3, "to_params: expected a function, got 3"),
        (jaxrnn.bptt, lambda theta: theta._asdict(), "params: expected Params, got dict"),
        (jaxrnn.bptt, lambda theta: {}, r"to_params\(theta\): expected a pytree with at least one"),
        (
            jaxrnn.bptt,
            lambda theta: theta._replace(b_h=jnp.arange(H)),
            r"to_params\(theta\).*b_h: expected a floating-point dtype",
        ),
        (
            lambda *arguments: ((jnp.zeros(()), None), {}),
            dale,
            r"gradient_fn: expected \(\(value, h_T\), grads\) .*, got \(\(\(\), None\), \{\}\)",
        ),
    ],
)
def test_a_wrong_argument_is_named(gradient_fn, to_params, message, batch):
    with pytest.raises(TypeError, match=message):
        jaxrnn.reparametrized(gradient_fn, to_params)(start(dale), batch)


WRONG_GRADIENT_FNS = {
    "loss": jaxrnn.sequence_loss,
    "value_and_grad": jax.value_and_grad(lambda *a: jaxrnn.sequence_loss(*a)[0]),
    "grad": jax.grad(jaxrnn.sequence_loss, has_aux=True),
    "value that is no number": lambda p, b, h=None: (("x", h), p),
    "value that is no scalar": lambda p, b, h=None: ((jnp.zeros(3), h), p),
    "gradient of another structure": lambda p, b, h=None: ((jnp.zeros(()), h), tuple(p)),
    "gradient of another shape": lambda p, b, h=None: ((jnp.zeros(()), h), p._replace(b_y=p.b_h)),
    "state of another shape": lambda p, b, h=None: ((jnp.zeros(()), jnp.zeros(7)), p),
}


@pytest.mark.parametrize("name", WRONG_GRADIENT_FNS)
def test_what_a_gradient_function_returns_is_checked(name, batch):
    params = jaxrnn.init(jax.random.key(0), I, H, O)
    gradient_fn, optimizer = WRONG_GRADIENT_FNS[name], optax.sgd(0.1)
    h = jnp.zeros((*batch.xs.shape[1:-1], params.W_h.shape[0]))
    state = jaxrnn.init_state(params, optimizer, h)
    calls = [lambda: jaxrnn.make_update(gradient_fn, optimizer)(state, batch)]
    if name != "state of another shape":  # carried by none of these
        mesh = jax.sharding.Mesh(jax.devices()[:1], ("batch",))
        calls += [
            lambda: jax.eval_shape(jaxrnn.data_parallel(gradient_fn, mesh), params, batch),
            lambda: jaxrnn.fit(
                jax.random.key(0), params, batch, optimizer=optimizer, gradient_fn=gradient_fn
            ),
        ]
    for call in calls:
        message = r"^gradient_fn: expected \(\(value, h_T\), grads\) of shapes "
        with pytest.raises(TypeError, match=message):
            call()
