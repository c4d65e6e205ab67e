"""All states at once by Newton's method equal those one by one; what the experiment reports."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from experiments import deer as deer_module
from experiments import parallel_in_time
from experiments.deer import deer
from experiments.parallel_in_time import Config
from experiments.reports import Report
from jaxrnn.jacobians import lyapunov_exponents
from tests.conftest import default_and_thorough
from tests.faults import with_fault
from tests.recipe_cases import draw, network

METHODS = ["full", "diagonal"]
T = 40
OPTIONS = {
    "tanh": {},
    "rate, sigmoid": {"activation": jaxrnn.sigmoid, "leak": jnp.array([0.2, 0.5, 1.0, 0.7, 0.4])},
    "ReLU": {"activation": jaxrnn.relu, "leak": 0.5},
}


def solve(module, method, params, xs, h_0, **options):
    linear = getattr(module, method)
    return jax.jit(partial(module.deer, linear=linear, **options))(params, xs, h_0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", default_and_thorough([(2, 3)], [(), (3,), (2, 3)]), ids=str)
@pytest.mark.parametrize("name", default_and_thorough(["tanh"], OPTIONS))
def test_the_states_are_those_of_the_loop_over_time(method, batch, name):
    params, options = network(0, 3, 5), OPTIONS[name]
    xs, h_0 = jnp.asarray(draw(1, T, *batch, 3)), jnp.asarray(draw(2, *batch, 5))
    found = solve(deer_module, method, params, xs, h_0, tolerance=1e-14, **options)
    assert found.found.all()
    assert found.iterations <= T
    _, hs = jax.jit(partial(jaxrnn.hidden_states, **options))(params, xs, h_0)
    np.testing.assert_allclose(found.hs, hs, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", METHODS)
def test_a_linear_network_takes_one_iteration(method):
    """With a diagonal W_h, the diagonal of the Jacobian is all of it."""
    params, xs, h_0 = network(0, 3, 5), jnp.asarray(draw(1, T, 2, 3)), jnp.asarray(draw(2, 2, 5))
    if method == "diagonal":
        params = params._replace(W_h=jnp.diag(jnp.diagonal(params.W_h)))
    options = {"activation": jaxrnn.identity, "leak": 0.5}
    found = solve(deer_module, method, params, xs, h_0, max_iterations=1, **options)
    assert found.found.all()
    hs = jaxrnn.hidden_states(params, xs, h_0, **options)[1]
    np.testing.assert_allclose(found.hs, hs, rtol=1e-12, atol=1e-12)


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", METHODS)
def test_T_iterations_find_all_states_even_if_products_overflow(method):
    """With a tolerance of rounding; then every state is F of the one before."""
    long = 400
    params, xs, h_0 = network(0, 1, 4), jnp.asarray(draw(1, long, 1)), jnp.asarray(draw(2, 4))
    params = params._replace(W_h=40 * params.W_h)
    found = solve(deer_module, method, params, xs, h_0, tolerance=1e-14, max_iterations=long)
    assert found.found.all()
    np.testing.assert_allclose(found.hs, found.images, rtol=0, atol=1e-14)
    first = jaxrnn.hidden_states(params, xs[:8], h_0)[1]  # soon rounding separates the two
    np.testing.assert_allclose(found.hs[:8], first, rtol=0, atol=1e-9)


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", METHODS)
def test_at_the_cap_what_is_found_is_right_and_the_rest_is_not(method):
    params, xs, h_0 = network(0, 1, 8), jnp.asarray(draw(1, 100, 3, 1)), jnp.asarray(draw(2, 3, 8))
    params = params._replace(W_h=4 * params.W_h)
    found = solve(deer_module, method, params, xs, h_0, tolerance=1e-9, max_iterations=7)
    assert found.iterations == 7
    assert (found.found.sum(axis=0) >= 7).all()
    assert not found.found.all()
    assert (jnp.diff(found.found.astype(int), axis=0) <= 0).all()
    error = jnp.abs(found.hs - jaxrnn.hidden_states(params, xs, h_0)[1]).max(axis=-1)
    assert error[:7].max() < 1e-6
    assert error[~found.found].max() > 1e-2


def gaussian_network(gain):
    """16 tanh units without biases: chaotic with a gain of 4."""
    W_h = gain * jax.random.normal(jax.random.key(3), (16, 16)) / 4
    return network(0, 1, 16)._replace(W_h=W_h, b_h=jnp.zeros(16))


@pytest.mark.usefixtures("x64")
def test_few_iterations_where_trajectories_meet_and_many_where_they_separate():
    xs, iterations = jnp.asarray(draw(1, 200, 1)), {}
    for gain in (0.5, 4.0):
        params = gaussian_network(gain)
        exponent = jax.jit(lyapunov_exponents)(params, xs)[0]
        found = solve(deer_module, "full", params, xs, jnp.zeros(16), max_iterations=200)
        iterations[float(exponent)] = int(found.iterations)
    (below, few), (above, many) = sorted(iterations.items())
    assert below < 0 < above
    assert few <= 6
    assert many >= 60


FAULTS = {
    "A transposed": ("Linear(lambda J: J,", "Linear(jnp.matrix_transpose,"),
    "products in the wrong order": ("linear.times(A_2, A_1)", "linear.times(A_1, A_2)"),
    "b_1 not carried on": ("linear.apply(A_2, b_1) + b_2", "b_2"),
    "b_1 carried on by A_1": ("linear.apply(A_2, b_1)", "linear.apply(A_1, b_1)"),
    "b without A h": ("last.images - linear.apply(A, hs_before)", "last.images"),
    "h_0 left out": ("jnp.concatenate([h_0[None], hs[:-1]])",
                     "jnp.concatenate([0 * h_0[None], hs[:-1]])"),
    "linearised at h_t": ("jacobian(params, hs_before, xs", "jacobian(params, last.hs, xs"),
    "a state after a wrong one is found": ("jnp.cumprod(solved, axis=0) > 0", "solved"),
    "one unit is enough": (".all(axis=-1)", ".any(axis=-1)"),
    "leak forgotten": ("jacobian(params, hs_before, xs, **options)",
                       "jacobian(params, hs_before, xs)"),
    "what is found is linearised": ("last.found[:-1]])", "0 * last.found[:-1] > 0])"),
    "states that are not finite are kept": ("jnp.where(jnp.isfinite(hs), hs, 0)", "hs"),
}  # fmt: skip


def agrees(module) -> bool:
    """Equal states, in as few iterations as Newton's method takes, and all of them found."""
    params, xs, h_0 = network(0, 3, 5), jnp.asarray(draw(1, T, 2, 3)), jnp.asarray(draw(2, 2, 5))
    keywords = {"leak": 0.5, "tolerance": 1e-13}
    for method, limit in (("full", 8), ("diagonal", 36)):
        found = solve(module, method, params, xs, h_0, max_iterations=limit, **keywords)
        hs = jaxrnn.hidden_states(params, xs, h_0, leak=0.5)[1]
        if not (found.found.all() and jnp.abs(found.hs - hs).max() <= 1e-12):
            return False
    # In chaos, T iterations find all; before, what is found is the beginning.
    arguments = gaussian_network(4.0), jnp.asarray(draw(1, 150, 1)), jnp.zeros(16)
    capped, found = (
        solve(module, "full", *arguments, tolerance=1e-14, max_iterations=cap) for cap in (3, 150)
    )
    starts = (jnp.diff(capped.found.astype(int), axis=0) <= 0).all()
    if not (starts and found.found.all() and jnp.abs(found.hs - found.images).max() <= 1e-14):
        return False
    # h = tanh(3 h) has a stable solution; at h = 0, where Newton's method starts, 3^700 overflows.
    zeros = jax.tree.map(jnp.zeros_like, network(0, 1, 1))
    arguments = zeros._replace(W_h=jnp.array([[3.0]])), jnp.zeros((700, 1)), jnp.array([0.5])
    return bool(solve(module, "full", *arguments, max_iterations=20).found.all())


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_is_caught(fault):
    assert not agrees(with_fault([deer_module], *FAULTS[fault])), "this fault would have passed"


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
def test_without_a_fault_the_same_comparisons_pass():
    assert agrees(deer_module)


SMALL = {**parallel_in_time.SMOKE, "lengths": (8,), "length": 8, "gains": (0.5,), "seeds": 1}


@pytest.mark.thorough
def test_a_run_counts_only_if_every_state_equals_unroll(tmp_path, monkeypatch):
    """A solver that is sure of a wrong state has not succeeded; nor has one at the cap."""

    def wrong(params, xs, h_0, *, linear, **options):
        solution = deer(params, xs, h_0, linear=linear, **options)
        if linear is parallel_in_time.METHODS["full"]:
            return solution._replace(hs=solution.hs.at[3, 1].add(1e-3))
        return solution._replace(found=solution.found.at[-1].set(False))

    rows = {}
    for name, solver in (("right", deer), ("wrong", wrong)):
        monkeypatch.setattr(parallel_in_time, "deer", solver)
        config = Config(**SMALL, out=tmp_path / name)
        report = Report(config)
        parallel_in_time.measure(config, report, 4, 8)
        rows[name] = [row["succeeded"] for row in report.rows if row["method"] != "unroll"]
    assert rows == {"right": [True, True], "wrong": [False, False]}


def test_the_speed_is_that_of_the_best_run_that_succeeded():
    def row(method, milliseconds, succeeded=True):
        return {"method": method, "milliseconds": milliseconds, "succeeded": succeeded}

    rows = [
        row("unroll", 1.0), row("full", 4.0), row("diagonal", 0.1, succeeded=False),
        row("unroll", 3.0), row("full", 4.0), row("diagonal", 30.0, succeeded=False),
    ]  # fmt: skip
    assert parallel_in_time.speeds(rows) == {"full": 0.75, "diagonal": None}


def test_networks_of_one_seed_differ_in_gain_and_length_alone():
    config = Config(gains=(0.5, 2.0), lengths=(8, 16), length=16)
    (params, xs), (scaled, longer) = (
        parallel_in_time.draw_network(config, 4, T, gain, 1) for T, gain in ((8, 0.5), (16, 2.0))
    )
    np.testing.assert_allclose(4 * params.W_h, scaled.W_h, rtol=1e-6)
    np.testing.assert_array_equal(xs, longer[:8])
    np.testing.assert_array_equal(params.W_x, scaled.W_x)
    other, _ = parallel_in_time.draw_network(config, 4, 8, 0.5, 2)
    assert not np.allclose(other.W_h, params.W_h)
