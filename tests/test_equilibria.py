"""Fixed points of networks in which they are known, and what marks a search that finds none."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from jaxrnn import Params
from jaxrnn.equilibria import FixedPoints, distinct, fixed_points, stability
from tests.conftest import default_and_thorough
from tests.recipe_cases import draw, network


def units(W_h, b_h=None):
    """A network with this W_h and b_h, and one input and output, which are zero."""
    W_h = jnp.asarray(W_h)
    H = len(W_h)
    b_h = jnp.zeros(H, W_h.dtype) if b_h is None else jnp.asarray(b_h)
    zeros = jnp.zeros((H, 1), W_h.dtype)
    return Params(W_x=zeros, W_h=W_h, W_y=zeros.T, b_h=b_h, b_y=zeros[0])


def find(params, h, x=None, **options):
    x = jnp.zeros(params.W_x.shape[1]) if x is None else x
    return jax.jit(partial(fixed_points, **options))(params, h, x)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("tokens", [False, True], ids=["numbers", "tokens"])
@pytest.mark.parametrize("each", [False, True], ids=["one input", "an input for each start"])
def test_a_linear_network_has_one_fixed_point_for_each_input(tokens, each):
    params, h = network(0, 2, 4), draw(1, 3, 4)
    x = np.array([1, 0, 1]) if tokens else draw(2, 3, 2)
    x = x if each else x[0]
    points = find(params, h, x, activation=jaxrnn.identity)
    one_hot = np.eye(2)[x] if tokens else x
    inputs = one_hot @ params.W_x.T + params.b_h
    expected = np.linalg.solve(np.eye(4) - params.W_h, np.broadcast_to(inputs, (3, 4)).T).T
    np.testing.assert_allclose(points.h, expected, rtol=1e-13)
    assert points.converged.all()
    np.testing.assert_allclose(points.jacobian, np.broadcast_to(params.W_h, (3, 4, 4)))


@pytest.mark.usefixtures("x64")
def test_one_tanh_unit_has_three_fixed_points_if_its_weight_is_above_1():
    points = find(units([[2.0]]), np.linspace(-3, 3, 50)[:, None])
    found = distinct(points, 1e-6)
    h = np.sort(found.h[:, 0])
    np.testing.assert_allclose(h, [-h[2], 0, h[2]], atol=1e-14)
    np.testing.assert_allclose(np.tanh(2 * h), h, atol=1e-15)
    np.testing.assert_allclose(found.jacobian[:, 0, 0], 2 * (1 - found.h[:, 0] ** 2))
    kinds = stability(found.jacobian)
    np.testing.assert_array_equal(kinds.stable, abs(found.h[:, 0]) > 0.1)
    np.testing.assert_array_equal(kinds.unstable_dim, abs(found.h[:, 0]) < 0.1)
    (only,) = distinct(find(units([[0.8]]), np.linspace(-3, 3, 50)[:, None]), 1e-6).h
    np.testing.assert_allclose(only, 0, atol=1e-10)


@pytest.mark.usefixtures("x64")
def test_a_hopfield_network_has_a_stable_fixed_point_at_each_pattern_and_its_opposite():
    """Orthogonal patterns v in W_h = (beta / H) sum v v^T: h = m v with m = tanh(beta m)."""
    patterns = np.array([[1, 1, 1, 1, 1, 1, 1, 1], [1, -1, 1, -1, 1, -1, 1, -1]])
    params = units(2.0 / 8 * patterns.T @ patterns)
    starts = np.concatenate([patterns, -patterns]) + draw(0, 4, 8) / 2
    found = find(params, starts)
    m = find(units([[2.0]]), np.ones((1, 1))).h[0, 0]
    np.testing.assert_allclose(found.h, m * np.concatenate([patterns, -patterns]), atol=1e-13)
    assert stability(found.jacobian).stable.all()
    np.testing.assert_allclose(
        stability(found.jacobian).eigenvalues[:, :2], 2 * (1 - m**2), rtol=1e-6
    )


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
def test_a_search_ends_at_the_precision_of_its_dtype():
    params = network(0, 2, 30)
    params = params._replace(W_h=2 * params.W_h / 30**0.5)
    points = find(params, draw(1, 40, 30))
    assert points.converged.all()
    assert points.speed.max() < 1e-20
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    found = find(single, draw(1, 40, 30))
    assert found.h.dtype == found.speed.dtype == found.jacobian.dtype == jnp.float32
    assert found.converged.all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "activation",
    default_and_thorough(["tanh"], ["tanh", "relu", "sigmoid", "softplus"]),
)
@pytest.mark.parametrize("steps", default_and_thorough([2], [1, 2, 30]))
def test_the_speed_never_rises_and_tells_what_has_converged(activation, steps):
    f, starts = getattr(jaxrnn, activation), 3 * draw(1, 50, 6)
    params = network(0, 2, 6)._replace(W_h=jnp.asarray(3 * draw(2, 6, 6)))
    points = find(params, starts, activation=f, steps=steps)

    def speed(h):
        r = h - jaxrnn.step(params, h, jnp.zeros((50, 2)), activation=f)[0]
        return (r**2).sum(axis=-1) / 2

    np.testing.assert_allclose(points.speed, speed(points.h), rtol=1e-9, atol=1e-25)
    assert (points.speed <= speed(starts)).all()
    np.testing.assert_array_equal(points.converged, points.speed <= 1e-12)
    assert steps == 30 or not points.converged.all()


@pytest.mark.usefixtures("x64")
def test_a_search_that_finds_nothing_is_marked_and_distinct_is_empty():
    """h = relu(h + 1) has no solution, and A = 0 for every h above -1."""
    params = units([[1.0]], [1.0])
    points = find(params, np.array([[0.5], [2.0]]), activation=jaxrnn.relu)
    assert not points.converged.any()
    np.testing.assert_array_equal(points.speed, 0.5)
    with pytest.warns(UserWarning, match=r"^points: expected one that converged, got none of \d"):
        nothing = distinct(points, 1e-3)
    assert [leaf.shape for leaf in nothing] == [(0, 1), (0,), (0, 1, 1), (0,)]
    assert stability(nothing.jacobian).eigenvalues.shape == (0, 1)


@pytest.mark.usefixtures("x64")
def test_a_slow_point_is_no_fixed_point():
    """tanh(2 h - 0.6) has lost two of its fixed points; q keeps a minimum near them."""
    points = find(units([[2.0]], [-0.6]), np.array([[2.0], [-2.0]]))
    assert points.converged.tolist() == [False, True]
    assert 0.3 < points.h[0, 0] < 1
    assert 1e-5 < points.speed[0] < 1e-2


@pytest.mark.usefixtures("x64")
def test_a_descent_step_is_taken_where_the_newton_step_fails():
    """A = diag(0, 1) is singular at every h: the fixed points are a line."""
    params = units(np.diag([1.0, 0.0]), [0.0, 1.0])
    starts = np.array([[0.3, 5.0], [-2.0, 0.0]])
    points = find(params, starts, activation=jaxrnn.identity)
    assert points.converged.all()
    np.testing.assert_allclose(points.h, [[0.3, 1], [-2, 1]], atol=1e-12)
    kinds = stability(points.jacobian)
    assert kinds.marginal.all()
    assert not kinds.stable.any()


@pytest.mark.usefixtures("x64")
def test_a_small_step_is_taken_where_A_is_almost_singular():
    """h = softplus(h - 1): f' is almost 1 for large h, so that both steps are far too long."""
    starts = np.array([[-9.0], [3.0], [10.0], [14.0]])
    points = find(units([[1.0]], [-1.0]), starts, activation=jaxrnn.softplus)
    assert points.converged.all()
    np.testing.assert_allclose(points.h, np.log1p(np.exp(points.h - 1)), atol=1e-12)


def test_a_start_that_is_not_finite_is_marked_and_leaves_the_others_alone():
    starts = jnp.array([[jnp.nan], [0.5], [jnp.inf]])
    points = find(units([[2.0]]), starts)
    assert points.converged.tolist() == [False, True, False]


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("leak", [0.2, np.linspace(0.1, 1, 6)], ids=["one", "for each unit"])
def test_a_leak_keeps_the_points_and_changes_their_jacobians(leak):
    params = network(0, 2, 6)._replace(W_h=jnp.asarray(3 * draw(2, 6, 6)))
    without = find(params, draw(1, 30, 6))
    points = find(params, draw(1, 30, 6), leak=leak)
    converged = np.asarray(without.converged)
    assert converged.sum() > 10
    np.testing.assert_array_equal(points.converged, converged)
    np.testing.assert_allclose(points.h[converged], without.h[converged], atol=1e-12)
    alpha = np.broadcast_to(leak, 6)
    expected = np.diag(1 - alpha) + alpha[:, None] * np.asarray(without.jacobian)
    np.testing.assert_allclose(points.jacobian[converged], expected[converged], atol=1e-11)
    starts = jnp.asarray(draw(1, 30, 6))
    traced = jax.jit(lambda leak: fixed_points(params, starts, jnp.zeros(2), leak=leak))(leak)
    np.testing.assert_allclose(traced.jacobian, points.jacobian, atol=1e-14)


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
def test_networks_can_be_searched_at_once():
    networks = [network(n, 2, 5)._replace(W_h=jnp.asarray(3 * draw(n, 5, 5))) for n in range(3)]
    starts, x = draw(9, 3, 20, 5), draw(8, 2)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *networks)
    at_once = jax.jit(jax.vmap(fixed_points, in_axes=(0, 0, None)))(stacked, starts, x)
    for n, params in enumerate(networks):
        alone = find(params, starts[n], x)
        np.testing.assert_array_equal(at_once.converged[n], alone.converged)
        np.testing.assert_allclose(at_once.h[n][alone.converged], alone.h[alone.converged], 1e-9)


def test_distinct_keeps_the_point_with_the_lowest_speed():
    points = FixedPoints(
        h=np.array([[0.0, 0], [1, 0], [0, 0.01], [1, 0.02], [9, 9]]),
        speed=np.array([3e-13, 1e-14, 2e-13, 4e-13, 5e-1]),
        jacobian=np.arange(5)[:, None, None] * np.ones((5, 2, 2)),
        converged=np.array([True, True, True, True, False]),
    )
    found = distinct(points, 0.1)
    np.testing.assert_array_equal(found.h, [[1, 0], [0, 0.01]])
    np.testing.assert_array_equal(found.jacobian[:, 0, 0], [1, 2])
    assert found.converged.all()
    assert len(distinct(points, 0.015).h) == 3
    assert len(distinct(points, 10.0).h) == 1


def test_stability_counts_the_directions_that_grow():
    angle = np.array([[0, -1], [1, 0]])
    Js = np.stack([0.5 * angle, 2.0 * angle, angle, np.diag([-3.0, 0.5]), np.diag([1.001, 0.0])])
    kinds = stability(Js)
    assert kinds.unstable_dim.tolist() == [0, 2, 0, 1, 1]
    assert kinds.stable.tolist() == [True, False, False, False, False]
    assert kinds.marginal.tolist() == [False, False, True, False, False]
    assert stability(Js, margin=0.01).marginal.tolist() == [False, False, True, False, True]
    np.testing.assert_allclose(np.abs(kinds.eigenvalues[3]), [3, 0.5])
    assert stability(Js.reshape(5, 1, 2, 2)).stable.shape == (5, 1)


H, X = np.zeros((3, 4), np.float32), np.zeros(2, np.float32)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"h": H[0]}, r"h: expected shape \(N, 4\), H of W_h, got \(4,\)"),
        ({"h": H[:, :3]}, r"h: expected shape \(N, 4\), H of W_h, got \(3, 3\)"),
        ({"x": np.zeros(3)}, r"x: expected shape \(N, 2\).*, got \(3,\)"),
        ({"x": np.zeros((2, 2))}, r"x: expected one input, or N = 3 .*, got shape \(2, 2\)"),
        ({"x": np.zeros((4,), int)}, r"x: expected one input, or N = 3 tokens .* \(4,\)"),
        ({"x": np.zeros((3, 2), int)}, r"x: expected a floating-point dtype .* \.astype.*"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"tolerance": 0.0}, "tolerance: expected above 0 and finite, got 0.0"),
        ({"tolerance": float("nan")}, "tolerance: expected above 0 and finite, got nan"),
        ({"tolerance": float("inf")}, "tolerance: expected above 0 and finite, got inf"),
        ({"leak": 0.0}, r"leak: expected values in \(0, 1\], got 0.0"),
        ({"leak": 1.5}, r"leak: expected values in \(0, 1\], got 1.5"),
        ({"leak": float("nan")}, r"leak: expected values in \(0, 1\], got nan"),
        ({"leak": np.ones(3)}, r"leak: expected a scalar or shape \(4,\) .*, got \(3,\)"),
    ],
)
def test_a_wrong_value_is_named(changed, message):
    params = jaxrnn.init(jax.random.key(0), 2, 4, 1)
    with pytest.raises(ValueError, match=f"^{message}$"):
        fixed_points(**{"params": params, "h": H, "x": X} | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"h": [[0.0] * 4]}, "h: expected an array, got list"),
        ({"h": H.astype(int)}, "h: expected a floating-point dtype, got int64"),
        ({"steps": 2.0}, "steps: expected an integer, got 2.0"),
        ({"tolerance": "small"}, "tolerance: expected a number, got 'small'"),
        ({"tolerance": True}, "tolerance: expected a number, got True"),
        ({"activation": jnp.tanh}, r"activation: expected an Activation\(f, df\), .*"),
        ({"params": jaxrnn.init(jax.random.key(0), 2, 4, 1, dtype=jnp.bfloat16)},
         "params: expected float32 or float64, got bfloat16"),
    ],
)  # fmt: skip
def test_a_wrong_type_is_named(changed, message):
    params = jaxrnn.init(jax.random.key(0), 2, 4, 1)
    with pytest.raises(TypeError, match=f"^{message}$"):
        fixed_points(**{"params": params, "h": H, "x": X} | changed)


POINTS = FixedPoints(np.zeros((3, 2, 4)), np.zeros((3, 2)), np.zeros((3, 2, 4, 4)), np.ones((3, 2)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: distinct(POINTS, 0.1), r"points.h: expected shape \(N, H\), .*, got \(3, 2, 4\)"),
        (lambda: distinct(jax.tree.map(lambda a: a[0], POINTS), 0.0), "tolerance: expected above"),
        (lambda: stability(np.zeros((2, 3))), r"jacobian: expected shape \(\*batch, H, H\), got"),
        (lambda: stability(np.full((2, 2), np.nan)), "jacobian: expected finite numbers, got nan"),
        (lambda: stability(np.eye(2), margin=-1.0), "margin: expected at least 0 and finite, got"),
    ],
)
def test_a_wrong_value_on_the_host_is_named(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def test_a_wrong_type_on_the_host_is_named():
    with pytest.raises(TypeError, match=r"^points: expected FixedPoints, got tuple$"):
        distinct(tuple(POINTS), 0.1)
    with pytest.raises(TypeError, match=r"^jacobian: expected an array, got list$"):
        stability([[1.0]])
    with pytest.raises(TypeError, match=r"^margin: expected a number, got None$"):
        stability(np.eye(2), margin=None)
    assert stability(np.eye(2), margin=np.float32(0.1)).marginal
