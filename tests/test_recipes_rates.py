"""The recipes of rate networks equal what their equations say."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrnn
from experiments.recipes import (
    dales_law,
    low_rank,
    noise,
    penalties,
    shared_blocks,
    time_constants,
    voltage,
)
from tests.recipe_cases import draw, labelled_batch, network
from tests.reference import plain_loss, plain_unroll, relative_errors

AGREEMENT = 1e-12


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("activation", [jaxrnn.tanh, jaxrnn.softplus])
def test_voltages_equal_the_scan_and_so_do_their_gradients(activation):
    params, us = network(0, 3, 5), jnp.asarray(draw(1, 17, 2, 3))

    def value(voltages, params):
        vs = voltages(params, us, 0.3, activation)
        return jnp.sin(vs).sum(), vs

    results = (
        jax.jit(jax.value_and_grad(partial(value, fn), has_aux=True))(params)
        for fn in (voltage.voltages, voltage.plain_voltages)
    )
    (got, got_grads), (expected, expected_grads) = results
    assert max(relative_errors(got, expected)) <= AGREEMENT
    grads, expected_grads = (g._replace(W_y=None, b_y=None) for g in (got_grads, expected_grads))
    assert max(relative_errors(grads, expected_grads)) <= AGREEMENT


@pytest.mark.usefixtures("x64")
def test_the_gradient_of_the_time_constants_is_that_of_the_plain_scan():
    batch = jax.tree.map(jnp.asarray, labelled_batch())
    theta = {"params": network(0, 2, 5), "logit": jnp.linspace(-2, 2, 5)}

    def plain(theta):
        return plain_loss(theta["params"], batch, leak=1 / (1 + jnp.exp(-theta["logit"])))

    expected = jax.jit(jax.value_and_grad(plain, has_aux=True))(theta)
    got = jax.jit(time_constants.gradient_fn)(theta, batch)
    assert max(relative_errors(got, expected)) <= AGREEMENT


@pytest.mark.usefixtures("x64")
def test_penalties_are_those_of_the_states_of_the_plain_scan():
    params, batch = network(0, 2, 5), jax.tree.map(jnp.asarray, labelled_batch())
    mask = jnp.ones((6, 4), bool).at[0, 0].set(False).at[4:, 1].set(False)
    reset, weights = jnp.zeros((6, 4), bool).at[3].set(True), abs(jnp.asarray(draw(1, 6, 4)))
    batch = batch._replace(mask=mask, reset=reset, weights=weights.at[:, 3].set(0))

    def plain(params):
        states = params._replace(W_y=jnp.eye(5), b_y=jnp.zeros(5))
        h_0 = jnp.zeros((4, 5))
        _, hs = plain_unroll(states, batch.xs, h_0, mask, reset, jaxrnn.softplus, 0.2)
        counted = batch.weights * mask
        rates = (counted * (hs**2).sum(axis=-1)).sum() / counted.sum() / 5
        value, h_T = plain_loss(params, batch, **penalties.OPTIONS)
        return value + 0.3 * rates + 0.1 * abs(params.W_h).sum(), h_T

    expected = jax.jit(jax.value_and_grad(plain, has_aux=True))(params)
    got = jax.jit(penalties.penalised(0.3, 0.1))(params, batch)
    assert max(relative_errors(got, expected)) <= AGREEMENT


@pytest.mark.usefixtures("x64")
def test_a_low_rank_network_is_the_network_with_its_weights():
    batch = jax.tree.map(jnp.asarray, labelled_batch())
    mask = jnp.ones((6, 4), bool).at[0, 0].set(False).at[4:, 1].set(False)
    reset = jnp.zeros((6, 4), bool).at[3].set(True)
    xs = batch.xs.at[4:, 1].set(jnp.nan)
    theta = low_rank.init(jax.random.key(0), 2, 6, 2, rank=2)
    theta = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), theta)
    by_theta = jaxrnn.reparametrized(jaxrnn.bptt, low_rank.to_params)
    for case in (batch, batch._replace(xs=xs, mask=mask, reset=reset)):
        (value, _), grads = jax.jit(low_rank.gradient_fn)(theta, case)
        (expected, _), expected_grads = jax.jit(by_theta)(theta, case)
        assert max(relative_errors((value, grads), (expected, expected_grads))) <= AGREEMENT


@pytest.mark.usefixtures("x64")
def test_a_low_rank_network_carries_its_state_over_windows():
    batch = jax.tree.map(jnp.asarray, labelled_batch())
    theta = low_rank.init(jax.random.key(0), 2, 6, 2, rank=2)
    kappa, whole = None, low_rank.unroll(theta, batch)
    for window in jaxrnn.windows(batch, 4):
        kappa, ys = low_rank.unroll(theta, window, kappa)
    assert max(relative_errors((kappa, ys), (whole[0], whole[1][4:]))) <= 1e-6


@pytest.mark.thorough
def test_noise_is_new_for_each_key_and_absent_without_one():
    params = jaxrnn.init(jax.random.key(0), 1, 6, 2)
    batch = jax.tree.map(jnp.asarray, labelled_batch(I=1))
    one, other, none = (
        jax.jit(noise.gradient_fn)(params, batch, key=key)[0][0].item()
        for key in (jax.random.key(1), jax.random.key(2), None)
    )
    assert len({one, other, none}) == 3
    assert none == pytest.approx(plain_loss(params, batch, **noise.OPTIONS)[0].item(), rel=1e-5)
    drive = noise.with_noise(params, batch._replace(xs=jnp.zeros((900, 50, 1))), jax.random.key(3))
    assert drive.drive.std() == pytest.approx(0.1 * 10**0.5, rel=0.02)


def test_no_update_gives_a_weight_the_wrong_sign_or_a_new_connection():
    """Every one of 30 updates with a rate so large that unconstrained weights would change sign."""
    optimizer = optax.adam(0.1)
    update = jaxrnn.make_update(dales_law.gradient_fn, optimizer)
    theta = dales_law.init(jax.random.key(0))
    state = jaxrnn.init_state(theta, optimizer)
    batch = jax.tree.map(jnp.asarray, labelled_batch(I=1))
    changed_sign = False
    for _ in range(30):
        state, metrics = update(state, batch)
        W_h = np.asarray(dales_law.to_params(state.params).W_h)
        assert (W_h * dales_law.SIGNS >= 0).all()
        assert (W_h[~dales_law.CONNECTED] == 0).all()
        changed_sign |= bool((np.asarray(state.params.W_h) < 0).any())
    assert metrics.skipped == 0
    assert changed_sign


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
def test_shared_blocks_are_written_entry_by_entry():
    theta = shared_blocks.init_theta(jax.random.key(0), 2, 3, 2, 2)
    theta = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), theta)
    W_h = np.zeros((6, 6))
    for i in range(6):
        for j in range(6):
            W_h[i, j] = theta.between[i // 2, j // 2] / 2 + (i == j) * theta.within[i // 2]
    to_params, batch = partial(shared_blocks.to_params, copies=2), labelled_batch()
    np.testing.assert_allclose(to_params(theta).W_h, W_h, atol=1e-15)
    got = jax.jit(jaxrnn.reparametrized(jaxrnn.bptt, to_params))(theta, batch)
    plain = jax.value_and_grad(lambda theta: plain_loss(to_params(theta), batch), has_aux=True)
    assert max(relative_errors(got, jax.jit(plain)(theta))) <= AGREEMENT
