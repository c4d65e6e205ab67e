"""Derivatives of fixed points: those of the implicit function theorem, in every mode and order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from jaxrnn import Activation, Params
from tests.recipe_cases import draw

pytestmark = pytest.mark.usefixtures("x64")

X = jnp.ones(2)


def contracting_network():
    """A network with one fixed point."""
    params = jaxrnn.init(jax.random.key(0), 2, 6, 2, dtype=jnp.float64)
    return params._replace(W_h=0.8 * params.W_h / jnp.linalg.norm(params.W_h, 2))


def points(params, starts=None, **options):
    starts = jnp.asarray(draw(1, 3, 6)) if starts is None else starts
    return jaxrnn.fixed_points(params, starts, X, tolerance=1e-24, **options)


@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev], ids=["forward", "reverse"])
@pytest.mark.parametrize("warm", [False, True], ids=["cold start", "warm start"])
def test_the_derivative_is_that_of_the_root_wherever_the_search_starts(mode, warm):
    """dh = (I - J)^{-1} f'(z) * db_h; a search that starts at the root takes no step."""
    params = contracting_network()
    found = points(params)
    starts = found.h if warm else None
    got = jax.jit(mode(lambda b_h: points(params._replace(b_h=b_h), starts).h))(params.b_h)
    f_prime = 1 - found.h**2
    expected = np.linalg.solve(np.eye(6) - found.jacobian, f_prime[:, :, None] * np.eye(6))
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_the_second_derivative_by_finite_differences():
    params = contracting_network()

    def slope(b_h):
        return jax.grad(lambda b_h: points(params._replace(b_h=b_h)).h[0].sum())(b_h)

    direction = jnp.asarray(draw(2, 6))
    _, got = jax.jit(lambda b_h: jax.jvp(slope, (b_h,), (direction,)))(params.b_h)
    after, before = (slope(params.b_h + step * direction) for step in (1e-5, -1e-5))
    np.testing.assert_allclose(got, (after - before) / 2e-5, atol=1e-8)


def test_the_derivative_by_what_the_activation_learns():
    """One unit: h = tanh(s w h + s b), so that dh/ds = f' (w h + b) / (1 - s w f')."""
    one, w, b, s = jnp.ones((1, 1)), 0.5, 0.3, 1.2
    params = Params(0 * one, w * one, one, jnp.full(1, b), jnp.zeros(1))

    def h_of(s):
        activation = Activation(lambda z: jnp.tanh(s * z))
        return jaxrnn.fixed_points(params, one, jnp.zeros(1), activation=activation).h[0, 0]

    h = h_of(s)
    expected = (1 - h**2) * (w * h + b) / (1 - s * w * (1 - h**2))
    for derivative in (jax.grad(h_of), jax.jacfwd(h_of)):
        np.testing.assert_allclose(derivative(s), expected, rtol=1e-10)


@pytest.mark.parametrize("mode", [jax.grad, jax.jacfwd], ids=["reverse", "forward"])
def test_a_start_that_does_not_converge_has_the_derivative_0_and_leaves_the_others(mode):
    """h_0 = relu(h_0 - 1) has the root 0; from above 1 the search stays at a slow point."""
    W_h, b_h = jnp.array([[1.0, 0.0], [0.0, 0.5]]), jnp.array([-1.0, 1.0])
    params = Params(jnp.ones((2, 1)), W_h, jnp.ones((1, 2)), b_h, jnp.zeros(1))
    starts = jnp.array([[0.0, 0.0], [3.0, 3.0]])

    def search(b_h):
        changed = params._replace(b_h=b_h)
        return jaxrnn.fixed_points(changed, starts, jnp.zeros(1), activation=jaxrnn.relu)

    assert search(b_h).converged.tolist() == [True, False]
    got = mode(lambda b_h: search(b_h).h.sum())(b_h)
    np.testing.assert_allclose(got, [0.0, 2.0], atol=1e-12)


def test_networks_split_by_shard_map_with_shared_starts():
    mesh = jax.make_mesh((2,), ("network",), axis_types=(jax.sharding.AxisType.Auto,))
    params = jax.vmap(lambda key: jaxrnn.init(key, 2, 6, 2))(jax.random.split(jax.random.key(0)))
    fn = jax.vmap(jax.grad(lambda params: (points(params).h ** 2).sum()))
    spec = jax.sharding.PartitionSpec("network")
    split = jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec)
    for got, expected in zip(jax.jit(split)(params), jax.jit(fn)(params), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-10)


def test_nothing_depends_on_the_start():
    params = contracting_network()
    slope = jax.grad(lambda starts: points(params, starts).h.sum())(jnp.asarray(draw(1, 3, 6)))
    assert not slope.any()
