"""Recipes about training, each against a Python loop over optax and autodiff of the plain scan."""

import io
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tqdm import tqdm

import jaxrnn
from experiments.recipes import (
    ensemble,
    mixed_precision,
    optimizers,
    progress,
    state_space,
    sweep,
)
from tests.recipe_cases import labelled_batch, network, plain_training
from tests.reference import relative_errors


@pytest.mark.thorough
def test_an_ensemble_on_two_devices_is_each_seed_alone():
    batch, keys = labelled_batch(), jax.random.split(jax.random.key(0), 4)
    train_all = jax.jit(partial(ensemble.train_all, batch, 4, devices=jax.devices()[:2]))
    params, losses = train_all(keys)
    assert len(losses.sharding.device_set) == 2
    for n, key in enumerate(keys):
        initial = jaxrnn.init(key, 2, ensemble.H, 2)
        expected, losses_alone = plain_training(initial, batch, ensemble.optimizer, 4)
        np.testing.assert_allclose(losses[n], losses_alone, rtol=1e-5)
        for got, leaf in zip(params, expected, strict=True):
            np.testing.assert_allclose(got[n], leaf, atol=1e-4)


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("way", ["map", "vmap"])
def test_a_sweep_is_each_learning_rate_alone(way):
    params, batch = network(0, 2, 4), labelled_batch()
    rates = jnp.array([0.1, 1.0])
    train = partial(sweep.train, params=params, batch=batch, updates=5)
    train_all = partial(jax.lax.map, train) if way == "map" else jax.vmap(train)
    got = jax.tree.map(np.asarray, jax.jit(train_all)(rates))
    for n, rate in enumerate(rates.tolist()):
        alone = plain_training(params, batch, optax.sgd(rate), 5)
        assert max(relative_errors(jax.tree.map(lambda leaf, n=n: leaf[n], got), alone)) < 1e-12


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
def test_an_optimiser_trains_as_a_loop_over_optax():
    params, batch = network(0, 2, 4), labelled_batch()
    state = optimizers.train(params, batch, optimizers.clipped_adam, 5)
    expected, _ = plain_training(params, batch, optimizers.clipped_adam, 5)
    assert max(relative_errors(state.params, expected)) < 1e-9
    assert state.step == 5


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
def test_four_batches_make_one_update_by_their_mean_gradient():
    params = network(0, 2, 4)
    grads = [jax.tree.map(lambda leaf, n=n: jnp.sin(n + leaf), params) for n in range(4)]
    state = optimizers.four_batches.init(params)
    update = jax.jit(optimizers.four_batches.update)
    for n, grad in enumerate(grads):
        changes, state = update(grad, state, params)
        assert all(bool(leaf.any()) == (n == 3) for leaf in changes)
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 4, *grads)
    once = optimizers.clipped_adam
    expected, _ = jax.jit(once.update)(mean, once.init(params), params)
    assert max(relative_errors(changes, expected)) <= 1e-9


def test_a_mask_selects_parameters():
    params = jaxrnn.init(jax.random.key(0), 2, 4, 2)._replace(b_h=jnp.ones(4), b_y=jnp.ones(2))
    zeros = jax.tree.map(jnp.zeros_like, params)
    optimizer = optimizers.clipped_adam
    changes, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(changes.W_h, -1e-2 * 1e-4 * params.W_h, rtol=1e-6)
    assert not changes.b_h.any()
    grads = jax.tree.map(jnp.ones_like, params)
    optimizer = optimizers.readout_only
    changes, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    moved = [name for name, leaf in changes._asdict().items() if leaf.any()]
    assert moved == ["W_y", "b_y"]


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("way", ["bptt_in", "autodiff"])
def test_mixed_precision_gradients_come_back_in_the_dtype_of_the_parameters(way):
    params = jaxrnn.init(jax.random.key(0), 8, 32, 2)
    batch = labelled_batch(T=40, B=16, I=8)
    gradient_fn = mixed_precision.bptt_in
    if way == "autodiff":
        gradient_fn = jax.value_and_grad(mixed_precision.loss_in, 1, has_aux=True)
    gradient_fn = jax.jit(gradient_fn, static_argnums=0)
    (value, h_T), grads = gradient_fn(jnp.bfloat16, params, batch)
    assert value.dtype == jnp.float32
    assert h_T.dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in grads} == {"float32"}
    (exact, _), exact_grads = jax.jit(jaxrnn.bptt)(mixed_precision.cast(params, jnp.float64), batch)
    assert abs(value - exact) < 2e-3
    for leaf, exact_leaf in zip(grads, exact_grads, strict=True):
        error = jnp.linalg.norm(leaf - exact_leaf) / jnp.linalg.norm(exact_leaf)
        assert 1e-4 < error < 0.03


def test_updates_in_mixed_precision_are_float32_and_carry_the_state():
    params, optimizer = jaxrnn.init(jax.random.key(0), 2, 4, 2), optax.adam(1e-2)
    gradient_fn = partial(mixed_precision.bptt_in, jnp.bfloat16)
    update = jaxrnn.make_update(gradient_fn, optimizer)
    state = jaxrnn.init_state(params, optimizer, jnp.zeros((4, 4)))
    kinds = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    losses = []
    for _ in range(30):
        state, metrics = update(state, labelled_batch())
        losses.append(metrics.loss.item())
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == kinds
    assert losses[-1] < losses[0]


@pytest.mark.thorough
def test_a_progress_bar_counts_epochs_and_ends_training_below_the_target():
    train, valid = (progress.parity(jax.random.key(n), 5, 32) for n in (0, 1))
    params, written = jaxrnn.init(jax.random.key(2), 1, 8, 2), io.StringIO()
    with tqdm(total=50, file=written) as bar:
        result = jaxrnn.fit(
            jax.random.key(3), params, train, valid, optimizer=optax.adam(3e-2), batch_size=8,
            max_epochs=50, callback=partial(progress.report, bar, 0.5),
        )  # fmt: skip
    losses = [epoch.valid_loss for epoch in result.history]
    assert [loss < 0.5 for loss in losses] == [False] * (len(losses) - 1) + [True]
    assert bar.n == len(losses) < 50
    assert f"valid={losses[-1]:.3f}" in written.getvalue()


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
def test_a_state_space_model_finds_the_poles_of_the_impulse_response():
    """The oracle is NumPy: poles of order 2 satisfy g_t = a g_{t-1} + b g_{t-2} of the response."""
    us, ys = state_space.record(jax.random.key(3), 120)
    result = state_space.identify(jax.random.key(4), us, ys, order=2, updates=150)
    impulse = jnp.zeros_like(us).at[0].set(1)
    _, responses = jaxrnn.unroll(result.best, impulse, activation=jaxrnn.identity)
    g = np.diff(np.asarray(responses)[:, 0])  # without the constant that the biases add
    trend = np.stack([g[1:-1], g[:-2]], axis=1)
    a, b = np.linalg.lstsq(trend[1:50], g[3:52])[0]
    expected = 0.95 * np.exp([-0.3j, 0.3j])
    assert result.history[-1].valid_loss < 1e-12
    np.testing.assert_allclose(state_space.poles(result.best), expected, atol=1e-6)
    np.testing.assert_allclose(np.sort_complex(np.roots([1, -a, -b])), expected, atol=1e-4)
