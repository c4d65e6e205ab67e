"""SOFO: the loss along random directions, and the step within the subspace that they span."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jaxrnn
from experiments import hessian_free_compare, long_lag_tasks, subspace, temporal_order
from jaxrnn import Batch
from tests.conftest import default_and_thorough

B, H = 4, 5


def small_network(I=3, O=2):
    return jaxrnn.init(jax.random.key(0), I, H, O, dtype=jnp.float64)


def numbers_with_options(T):
    rng = np.random.default_rng(0)
    mask, reset = rng.random((2, T, B)) < [[[0.7]], [[0.2]]]
    return Batch(rng.standard_normal((T, B, 3)), np.zeros((T, B), int), mask, reset)


def tokens_and_weights(T):
    rng = np.random.default_rng(1)
    tokens, targets = rng.integers(0, 3, (T, B)), rng.standard_normal((T, B, 2))
    return Batch(tokens, targets, weights=rng.random((T, B)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("T", default_and_thorough([17], [1, 8, 17]))
@pytest.mark.parametrize(
    ("make_batch", "loss", "f"),
    [
        (numbers_with_options, jaxrnn.cross_entropy, jaxrnn.tanh),
        (tokens_and_weights, jaxrnn.squared_error, jaxrnn.sigmoid),
    ],
)
def test_the_projection_is_that_of_the_gradient_and_of_the_curvature(make_batch, loss, f, T):
    params, batch = small_network(), make_batch(T)
    h_0 = jnp.asarray(np.random.default_rng(2).standard_normal((B, H)))
    theta, unravel = ravel_pytree(params)
    V = jnp.asarray(np.random.default_rng(3).standard_normal((4, theta.size)))
    options = {"activation": f, "loss": loss}
    got, h_T = jax.jit(partial(subspace.project, **options))(
        params, jax.vmap(unravel)(V), batch, h_0
    )
    (value, expected_h_T), grads = jaxrnn.bptt(params, batch, h_0, **options)
    product = jaxrnn.curvature.gauss_newton(params, batch, h_0, **options)
    GV = jnp.stack([ravel_pytree(product(unravel(v)))[0] for v in V])
    np.testing.assert_allclose(got.loss, value, rtol=1e-12)
    np.testing.assert_allclose(h_T, expected_h_T, rtol=1e-12)
    np.testing.assert_allclose(got.c, V @ ravel_pytree(grads)[0], rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(got.M, V @ GV.T, rtol=1e-10, atol=1e-13)


@pytest.mark.usefixtures("x64")
def test_with_as_many_directions_as_parameters_the_step_is_that_of_newton():
    """G d + damping = g, for a batch in which G has full rank."""
    params = small_network()
    rng = np.random.default_rng(4)
    batch = Batch(rng.standard_normal((40, B, 3)), rng.standard_normal((40, B, 2)))
    loss = jaxrnn.squared_error
    P = ravel_pytree(params)[0].size
    key = jax.random.key(1)
    _, d = jax.jit(partial(subspace.sofo, directions=P, damping=0.0, loss=loss))(
        params, batch, key=key
    )
    _, grads = jaxrnn.bptt(params, batch, loss=loss)
    Gd = jaxrnn.gauss_newton_product(params, batch, d, loss=loss)
    np.testing.assert_allclose(*(ravel_pytree(tree)[0] for tree in (Gd, grads)), atol=1e-8)


def test_damping_is_relative_to_the_largest_curvature_and_no_curvature_is_no_step():
    M, c = jnp.diag(jnp.array([4.0, 2.0])), jnp.array([4.4, 1.2])
    for scale in (1.0, 1e-3):
        got = subspace.solve(scale * M, c, 0.1)
        np.testing.assert_allclose(scale * got, [1.0, 0.5], rtol=1e-5)
    assert subspace.solve(0 * M, c, 0.1).tolist() == [0, 0]


def test_memory_does_not_grow_with_the_number_of_steps():
    params = jaxrnn.init(jax.random.key(0), 3, 32, 2)

    def temporary(T):
        batch = Batch(jnp.zeros((T, 8), int), jnp.zeros((T, 8), int))
        call = jax.jit(partial(subspace.sofo, directions=16))
        compiled = call.lower(params, batch, key=jax.random.key(1)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(1600) <= 1.1 * temporary(160)


@pytest.mark.thorough
def test_it_learns_as_a_gradient_function_of_the_training():
    bits = jax.random.bernoulli(jax.random.key(0), 0.5, (12, 200, 1)).astype(float)
    batch = Batch(bits, bits[..., 0].cumsum(axis=0).astype(int) % 2)
    params = jaxrnn.init(jax.random.key(1), 1, 8, 2)
    result = jaxrnn.fit(
        jax.random.key(2), params, batch, gradient_fn=subspace.sofo,
        gradient_key=jax.random.key(3), max_epochs=200,
        optimizer=partial(jaxrnn.sgd, learning_rate=0.3),
    )  # fmt: skip
    assert jaxrnn.evaluate(result.best, batch) < 0.1


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["subspace", "+ clipping"])
def test_a_method_trains_all_networks_until_the_time_is_up(method, monkeypatch, tmp_path):
    monkeypatch.setattr(hessian_free_compare, "check_every", lambda method: 1)
    monkeypatch.setattr(subspace, "BATCH_SIZE", 8)
    settings = long_lag_tasks.Config(
        lengths=(10,), updates=1, check_every=1, hidden_size=8, out=tmp_path, test_size=20, seeds=2
    )
    checks = list(hessian_free_compare.train_for(0.0, settings, temporal_order.TASK, 10, method))
    assert [[row["seed"] for row in rows] for rows in checks] == [[0, 1]]
    assert {row["method"] for row in checks[0]} == {method}
    assert all(row["updates"] == 1 for row in checks[0])
