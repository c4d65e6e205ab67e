"""Updates of parameters and states in 16 bits, and in more than one dtype."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrnn
from jaxrnn import Batch


@pytest.fixture
def batch():
    xs = jax.random.normal(jax.random.key(1), (7, 4, 3))
    return Batch(xs, jax.random.randint(jax.random.key(2), (7, 4), 0, 2))


def test_the_norm_of_short_floats_does_not_overflow(batch):
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2, dtype=jnp.float16)
    rule = partial(jaxrnn.sgd, learning_rate=0.0)
    update = jaxrnn.make_update(partial(jaxrnn.bptt, loss=jaxrnn.squared_error), rule)
    large = Batch(batch.xs, jnp.full((7, 4, 2), 500.0))
    _, metrics = update(jaxrnn.init_state(params, rule), large)
    assert metrics.gradient_norm.dtype == jnp.float32
    assert 256 < metrics.gradient_norm < jnp.inf  # its square is beyond the range of float16


def test_an_update_whose_state_float16_cannot_hold_is_skipped():
    """g^2 is above 65504: Adam's mean of squares would stay infinite, and the parameters fixed."""
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2, dtype=jnp.float16)
    adam = optax.adam(1e-2, eps=1e-4)
    update = jaxrnn.make_update(partial(jaxrnn.bptt, loss=jaxrnn.squared_error), adam)
    state = jaxrnn.init_state(params, adam)
    for target, skipped in ((2, 0), (500, 1), (2, 0)):
        before = jax.tree.map(np.asarray, state.params)
        batch = Batch(jnp.ones((7, 4, 3), jnp.float16), jnp.full((7, 4, 2), target, jnp.float16))
        state, metrics = update(state, batch)
        assert np.isfinite(metrics.gradient_norm)
        assert metrics.skipped == skipped
        changed = [not np.array_equal(a, b) for a, b in zip(before, state.params, strict=True)]
        assert all(changed) if skipped == 0 else not any(changed)


def test_sgd_keeps_the_dtype_of_the_parameters():
    new = jaxrnn.sgd({"w": jnp.ones(2, jnp.bfloat16)}, {"w": jnp.ones(2, jnp.float32)}, 0.5)
    assert (new["w"].dtype, new["w"].tolist()) == (jnp.bfloat16, [0.5, 0.5])


def test_a_state_of_float32_may_be_infinite(batch):
    """Only the numbers of float16 leave its range in an ordinary run."""

    def update(grads, state, params=None):
        return jax.tree.map(lambda d: -0.1 * d, grads), state + jnp.inf

    optimizer = optax.GradientTransformation(lambda params: jnp.zeros(()), update)
    state = jaxrnn.init_state(jaxrnn.init(jax.random.key(0), 3, 5, 2), optimizer)
    state, metrics = jaxrnn.make_update(jaxrnn.bptt, optimizer)(state, batch)
    assert metrics.skipped == 0
    assert state.opt_state == jnp.inf


def test_a_state_that_the_optimiser_widens_keeps_its_dtype(batch):
    """`inject_hyperparams` holds numbers in the dtype of the first leaf, here float32."""
    params = {"a": jaxrnn.init(jax.random.key(0), 3, 5, 2), "b": jnp.ones(3, jnp.bfloat16)}
    adam = optax.inject_hyperparams(optax.adam)(learning_rate=0.01)

    def loss(params, batch, h=None):
        value, h_T = jaxrnn.sequence_loss(params["a"], batch, h)
        return value + params["b"].sum().astype(value.dtype), h_T

    gradient_fn = jax.value_and_grad(loss, has_aux=True)
    result = jaxrnn.fit(
        jax.random.key(0), params, batch, optimizer=adam, gradient_fn=gradient_fn, max_epochs=2
    )
    start = jaxrnn.init_state(params, adam)
    assert jax.tree.map(jnp.result_type, result.state) == jax.tree.map(jnp.result_type, start)


def test_hyperparameters_in_float32_train_a_network_in_bfloat16():
    """In bfloat16 the mean of squares of Adam is divided by 1 - b2^n = 0; `Diverged` says so."""
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2, dtype=jnp.bfloat16)
    batch = Batch(jnp.ones((7, 4, 3), jnp.bfloat16), jnp.zeros((7, 4), int))

    def skipped(**keywords):
        adam = optax.inject_hyperparams(optax.adam, **keywords)(learning_rate=0.01)
        update = jaxrnn.make_update(jaxrnn.bptt, adam)
        return update(jaxrnn.init_state(params, adam), batch)[1].skipped

    assert skipped() == 1
    assert skipped(hyperparam_dtype=jnp.float32) == 0


def test_diverged_names_eps_if_the_gradients_of_the_skipped_updates_are_finite():
    assert "eps" in str(jaxrnn.Diverged(12, 2, [float("inf"), 0.5, 80.0]))
    assert "eps" not in str(jaxrnn.Diverged(12, 3, [float("inf"), 0.5, 80.0]))


def test_a_carried_state_keeps_its_dtype(batch):
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    rule = partial(jaxrnn.sgd, learning_rate=0.1)
    h = jnp.zeros((*batch.xs.shape[1:-1], params.W_h.shape[0]), jnp.bfloat16)
    state = jaxrnn.init_state(params, rule, h)
    state, _ = jaxrnn.make_update(jaxrnn.bptt, rule)(state, batch)
    assert state.h.dtype == jnp.bfloat16
