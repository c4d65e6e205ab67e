"""The Jacobian of a step, its products, and Lyapunov exponents."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxrnn
from jaxrnn.jacobians import jacobian, jacobian_products, lyapunov_exponents
from tests.conftest import default_and_thorough
from tests.recipe_cases import draw, network

LEAKS = {"no leak": None, "one leak": 0.3, "a leak for each unit": np.array([0.1, 0.5, 0.9, 1.0])}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("leak", LEAKS.values(), ids=LEAKS)
@pytest.mark.parametrize(
    "activation",
    default_and_thorough(["tanh", "gelu"], ["tanh", "relu", "sigmoid", "softplus", "gelu"]),
)
def test_the_jacobian_is_the_derivative_of_a_step_by_autodiff(activation, leak):
    f = jaxrnn.Activation(jax.nn.gelu) if activation == "gelu" else getattr(jaxrnn, activation)
    params, h, x = network(0, 2, 4), draw(1, 3, 5, 4), draw(2, 3, 5, 2)
    J = jax.jit(partial(jacobian, activation=f, leak=leak))(params, h, x)

    def next_state(h, x):
        return jaxrnn.step(params, h, x, activation=f, leak=leak)[0]

    expected = jax.jit(jax.vmap(jax.vmap(jax.jacrev(next_state))))(h, x)
    assert J.shape == (3, 5, 4, 4)
    np.testing.assert_allclose(J, expected, atol=1e-15)
    tokens = jacobian(params, h, jnp.ones((3, 5), int), activation=f, leak=leak)
    one_hot = jacobian(params, h, jnp.ones((3, 5, 1)) * np.eye(2)[1], activation=f, leak=leak)
    np.testing.assert_allclose(tokens, one_hot, atol=1e-15)
    driven = jacobian(params, h, x, activation=f, leak=leak, drive=jnp.ones((3, 5, 4)) / 2)
    shifted = jacobian(params._replace(b_h=params.b_h + 0.5), h, x, activation=f, leak=leak)
    np.testing.assert_allclose(driven, shifted, atol=1e-15)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", default_and_thorough(list(LEAKS)[1:2], LEAKS))
def test_products_are_the_derivatives_of_the_last_state_by_reverse_mode(name):
    leak = LEAKS[name]
    params, xs, h_0 = network(0, 2, 4), jnp.asarray(draw(0, 6, 2)), jnp.asarray(draw(1, 4))

    @jax.jit
    def both(params, xs, h_0):
        _, hs = jaxrnn.hidden_states(params, xs, h_0, leak=leak)
        expected = [
            jax.jacobian(lambda h, t=t: jaxrnn.hidden_states(params, xs[t:], h, leak=leak)[0])(h)
            for t, h in enumerate([h_0, *hs])
        ]
        Js = jacobian(params, jnp.concatenate([h_0[None], hs[:-1]]), xs, leak=leak)
        return jacobian_products(Js), expected

    products, expected = both(params, xs, h_0)
    assert products.shape == (7, 4, 4)
    np.testing.assert_allclose(products, expected, atol=1e-14)


@pytest.mark.usefixtures("x64")
def test_products_keep_batch_axes():
    Js = jnp.asarray(draw(0, 5, 2, 3, 4, 4))
    products = jacobian_products(Js)
    assert products.shape == (6, 2, 3, 4, 4)
    np.testing.assert_allclose(products[:, 1, 2], jacobian_products(Js[:, 1, 2]), atol=1e-15)
    np.testing.assert_array_equal(jacobian_products(Js[:0])[0, 0, 0], np.eye(4))


def symmetric_network(eigenvalues):
    """A network whose W_h has these eigenvalues, in a random basis."""
    size = len(eigenvalues)
    basis = np.linalg.qr(draw(0, size, size))[0]
    W_h = jnp.asarray(basis @ np.diag(eigenvalues) @ basis.T)
    return network(0, 2, size)._replace(W_h=W_h)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("leak", [None, 0.25])
def test_exponents_of_a_linear_network_are_the_logarithms_of_its_eigenvalues(leak):
    eigenvalues = np.array([1.2, 0.5, 0.1])
    params, alpha = symmetric_network(eigenvalues), leak or 1
    fn = jax.jit(partial(lyapunov_exponents, activation=jaxrnn.identity, leak=leak))
    exponents = fn(params, jnp.asarray(draw(1, 1000, 2)))
    np.testing.assert_allclose(exponents, np.log(1 - alpha + alpha * eigenvalues), atol=3e-3)


@pytest.mark.usefixtures("x64")
def test_the_sum_of_the_exponents_is_the_growth_of_volume():
    """Along a trajectory with h_0, leak and drive, for each sequence of a batch."""
    params, leak = network(0, 2, 4), np.array([0.1, 0.5, 0.9, 1.0])
    xs, h_0, drive = (jnp.asarray(draw(n, *shape)) for n, shape in enumerate(
        [(9, 3, 2), (3, 4), (9, 3, 4)]))  # fmt: skip
    options = {"leak": leak, "drive": drive}
    exponents = jax.jit(lyapunov_exponents)(params, xs, h_0, **options)
    assert exponents.shape == (3, 4)
    assert (np.diff(exponents) <= 0).all()
    _, hs = jaxrnn.hidden_states(params, xs, h_0, **options)
    for b in range(3):
        # drive_t is the input of a network that reads it through an identity.
        wider = params._replace(W_x=jnp.concatenate([params.W_x, jnp.eye(4)], axis=1))
        x = jnp.concatenate([xs, drive], axis=-1)[:, b]
        before = jnp.concatenate([h_0[None], hs[:-1]])[:, b]
        Js = np.asarray(jacobian(wider, before, x, leak=leak))
        log_volume = np.linalg.slogdet(np.linalg.multi_dot(Js[::-1])).logabsdet
        np.testing.assert_allclose(exponents[b].sum() * 9, log_volume)


def one_unit_is_off_at_first():
    """At the first step no unit that is on reads unit 0: from the identity, its column is lost."""
    W_h = jnp.array([[0.0, 0.5], [0.5, 0.45]])
    params = jaxrnn.Params(
        jnp.array([[0.0], [1.0]]), W_h, jnp.ones((1, 2)), jnp.ones(2), jnp.ones(1)
    )
    return params, jnp.zeros((300, 1)).at[0].set(-9.0)


def sparse_network():
    rng = np.random.default_rng(1)
    W_h = rng.normal(size=(12, 12)) * (rng.random((12, 12)) < 0.3) / np.sqrt(3)
    params = network(1, 2, 12)._replace(W_h=jnp.asarray(W_h), b_h=jnp.full(12, 0.3))
    return params, jnp.asarray(draw(1, 300, 2))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", [one_unit_is_off_at_first, sparse_network])
def test_the_largest_exponent_is_the_growth_of_the_product_of_the_jacobians(case):
    params, xs = case()
    _, hs = jaxrnn.hidden_states(params, xs, activation=jaxrnn.relu)
    before = jnp.concatenate([0 * hs[:1], hs[:-1]])
    product, growth = np.eye(hs.shape[-1]), 0.0
    for J in np.asarray(jacobian(params, before, xs, activation=jaxrnn.relu)):
        product = J @ product
        norm = np.linalg.norm(product, 2)
        product, growth = product / norm, growth + np.log(norm)
    exponents = jax.jit(partial(lyapunov_exponents, activation=jaxrnn.relu))(params, xs)
    np.testing.assert_allclose(exponents[0], growth / len(xs), atol=0.01)


def test_a_direction_that_is_lost_has_the_exponent_minus_infinity():
    W_h = jnp.array([[0.5, 0.1, 0.0], [0.1, 0.5, 0.0], [0.1, 0.1, 0.5]])
    params = jaxrnn.init(jax.random.key(0), 2, 3, 1)
    params = params._replace(W_h=W_h, b_h=jnp.array([9.0, 9.0, -99.0]))  # the last unit is off
    exponents = lyapunov_exponents(params, jnp.zeros((20, 2)), activation=jaxrnn.relu)
    assert np.isfinite(exponents[:2]).all()
    assert exponents[2] == -np.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: jacobian(p, jnp.ones(3), jnp.ones(2)), r"h: expected shape \(4,\)"),
        (lambda p: jacobian(p, jnp.ones(4), jnp.ones(3)), r"x: expected shape \(\*batch, 2\)"),
        (lambda p: jacobian(p, jnp.ones(4), jnp.ones(2), leak=0.0), r"leak: .*\(0, 1\], got 0.0"),
        (lambda p: jacobian_products(jnp.ones((4, 4))), r"Js: expected shape \(T, \*batch, H, H\)"),
        (lambda p: jacobian_products(jnp.ones((2, 3, 4))), r"Js: .*, got \(2, 3, 4\)"),
        (lambda p: lyapunov_exponents(p, jnp.ones((0, 2))), "xs: expected at least 1 step"),
        (lambda p: lyapunov_exponents(p, jnp.ones((5, 2)), leak=2.0), r"leak: .*\(0, 1\], got 2.0"),
        (lambda p: lyapunov_exponents(p, jnp.ones((5, 2)), drive=jnp.ones((5, 3))), "drive: "),
    ],
)
def test_a_wrong_value_is_named(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call(jaxrnn.init(jax.random.key(0), 2, 4, 1))


def test_a_wrong_type_is_named():
    params = jaxrnn.init(jax.random.key(0), 2, 4, 1, dtype=jnp.bfloat16)
    with pytest.raises(TypeError, match=r"^params: expected float32 or float64, got bfloat16$"):
        lyapunov_exponents(params, jnp.ones((5, 2)))
    with pytest.raises(TypeError, match=r"^Js: expected a floating-point dtype, got int32$"):
        jacobian_products(jnp.ones((2, 3, 3), jnp.int32))
    assert jacobian(params, jnp.ones(4), jnp.ones(2)).dtype == jnp.bfloat16


def test_lyapunov_exponents_in_shard_map():
    params = jaxrnn.init(jax.random.key(0), 2, 3, 1)
    xs = jax.random.normal(jax.random.key(1), (6, 4, 2))
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("batch",))
    specs = {"in_specs": P(None, "batch"), "out_specs": P("batch")}
    fn = jax.shard_map(partial(lyapunov_exponents, params), mesh=mesh, **specs)
    np.testing.assert_allclose(fn(xs), lyapunov_exponents(params, xs), rtol=1e-4, atol=1e-5)
