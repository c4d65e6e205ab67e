from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrnn
from jaxrnn import Batch


def parity(key, T=8, N=50):
    """Is the number of ones so far odd?"""
    xs = jax.random.bernoulli(key, 0.5, (T, N, 1)).astype(jnp.float32)
    return Batch(xs, xs[..., 0].cumsum(axis=0).astype(int) % 2)


@pytest.fixture
def params():
    return jaxrnn.init(jax.random.key(0), 1, 12, 2)


def halves(batch):
    """The same examples as two batches."""
    return [
        jax.tree.map(lambda leaf: leaf[:, :25], batch),
        jax.tree.map(lambda leaf: leaf[:, 25:], batch),
    ]


def test_training_converges_on_held_out_data(params):
    result = jaxrnn.fit(
        jax.random.key(1), params, parity(jax.random.key(2), N=200), parity(jax.random.key(3)),
        optimizer=optax.adam(2e-2), batch_size=20, max_epochs=200, patience=8, tolerance=1e-3,
    )  # fmt: skip
    assert result.converged
    assert len(result.history) < 200
    best = min(row.valid_loss for row in result.history)
    assert best < 0.05
    held_out = parity(jax.random.key(3))
    np.testing.assert_allclose(jaxrnn.evaluate(result.best, held_out), best, rtol=1e-5)


def test_patience_and_tolerance_count_evaluations(params):
    rule = partial(jaxrnn.sgd, learning_rate=0.0)
    result = jaxrnn.fit(
        jax.random.key(0), params, parity(jax.random.key(1)), optimizer=rule, patience=3,
        tolerance=1e-6,
    )  # fmt: skip
    assert result.converged
    assert [row.epoch for row in result.history] == [1, 2, 3, 4]  # the first is an improvement
    result = jaxrnn.fit(
        jax.random.key(0), params, parity(jax.random.key(1)), optimizer=rule, patience=3,
        max_epochs=2,
    )  # fmt: skip
    assert not result.converged
    assert len(result.history) == 2


@pytest.mark.parametrize("batch_size", [None, 16, 50, 1000])
def test_every_example_counts_once_an_epoch(params, batch_size):
    """With the parameters held still, the epoch's mean loss is the loss of the whole data, even
    where the last minibatch is not full."""
    data = parity(jax.random.key(1))
    rule = partial(jaxrnn.sgd, learning_rate=0.0)
    result = jaxrnn.fit(
        jax.random.key(0), params, data, optimizer=rule, batch_size=batch_size, max_epochs=1
    )
    expected = jaxrnn.sequence_loss(params, data)[0]
    np.testing.assert_allclose(result.history[0].train_loss, expected, rtol=1e-6)


def test_the_key_decides_everything(params):
    fit = partial(
        jaxrnn.fit, params=params, train=parity(jax.random.key(1)), optimizer=optax.adam(1e-2),
        batch_size=16, max_epochs=3,
    )  # fmt: skip
    a, b, other = (fit(jax.random.key(k)) for k in (5, 5, 6))
    assert a.history == b.history
    assert a.history != other.history
    for x, y in zip(a.state.params, b.state.params, strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_batches_are_taken_in_order_each_epoch(params):
    """One epoch over two batches is two updates by hand."""
    batches = halves(parity(jax.random.key(1)))
    optimizer = optax.sgd(0.1)
    result = jaxrnn.fit(jax.random.key(0), params, batches, optimizer=optimizer, max_epochs=2)
    update = jaxrnn.make_update(jaxrnn.bptt, optimizer)
    state = jaxrnn.init_state(params, optimizer)
    for batch in 2 * batches:
        state, _ = update(state, batch)
    for x, y in zip(result.state.params, state.params, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    assert result.state.step == 4


def test_a_carried_state_starts_anew_each_epoch(params):
    stream = list(jaxrnn.windows(parity(jax.random.key(1), T=12, N=4), 4))
    rule = partial(jaxrnn.sgd, learning_rate=0.0)
    result = jaxrnn.fit(
        jax.random.key(0), params, stream, stream, optimizer=rule, h_0=jnp.zeros((4, 12)),
        max_epochs=3,
    )  # fmt: skip
    expected = jaxrnn.sequence_loss(params, parity(jax.random.key(1), T=12, N=4))[0]
    losses = [loss for row in result.history for loss in row[1:3]]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


def test_the_callers_parameters_stay(params):
    jaxrnn.fit(
        jax.random.key(0), params, parity(jax.random.key(1)), optimizer=optax.sgd(0.1), max_epochs=1
    )
    assert not any(leaf.is_deleted() for leaf in params)


def test_the_best_parameters_are_kept_when_training_gets_worse(params):
    """Gradient ascent: the first epoch is the best one."""
    seen = []
    result = jaxrnn.fit(
        jax.random.key(0), params, parity(jax.random.key(1)), parity(jax.random.key(2)),
        optimizer=optax.sgd(-0.5), max_epochs=4, callback=lambda fit: seen.append(len(fit.history)),
    )  # fmt: skip
    losses = [row.valid_loss for row in result.history]
    assert losses == sorted(losses)
    best = jaxrnn.evaluate(result.best, parity(jax.random.key(2)))
    np.testing.assert_allclose(best, losses[0], rtol=1e-6)
    assert seen == [1, 2, 3, 4]


def test_evaluate_weighs_batches_by_their_counted_steps(params):
    data = parity(jax.random.key(1))
    data = data._replace(mask=jax.random.bernoulli(jax.random.key(2), 0.5, (8, 50)))
    expected = jaxrnn.sequence_loss(params, data)[0]
    np.testing.assert_allclose(jaxrnn.evaluate(params, halves(data)), expected, rtol=1e-6)
    assert jaxrnn.evaluate(params, []) == 0.0
