from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrnn
from jaxrnn import Batch, training
from tests.conftest import default_and_thorough

sequence_loss = jax.jit(jaxrnn.sequence_loss)


@partial(jax.jit, static_argnames=("T", "N"))
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


@pytest.mark.parametrize("batch_size", default_and_thorough([16], [None, 16, 50, 1000]))
def test_every_example_counts_once_an_epoch(params, batch_size):
    """With the parameters held still, the epoch's mean loss is the loss of the whole data, even
    where the last minibatch is not full."""
    data = parity(jax.random.key(1))
    rule = partial(jaxrnn.sgd, learning_rate=0.0)
    result = jaxrnn.fit(
        jax.random.key(0), params, data, optimizer=rule, batch_size=batch_size, max_epochs=1
    )
    expected = sequence_loss(params, data)[0]
    np.testing.assert_allclose(result.history[0].train_loss, expected, rtol=1e-6)


def test_the_same_key_gives_the_same_result(params):
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


def test_a_carried_state_starts_from_h_0_in_each_epoch(params):
    stream = list(jaxrnn.windows(parity(jax.random.key(1), T=12, N=4), 4))
    rule = partial(jaxrnn.sgd, learning_rate=0.0)
    result = jaxrnn.fit(
        jax.random.key(0), params, stream, stream, optimizer=rule, h_0=jnp.zeros((4, 12)),
        max_epochs=3,
    )  # fmt: skip
    expected = sequence_loss(params, parity(jax.random.key(1), T=12, N=4))[0]
    losses = [loss for row in result.history for loss in row[1:3]]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


def test_the_initial_parameters_are_not_donated(params):
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
    expected = sequence_loss(params, data)[0]
    np.testing.assert_allclose(jaxrnn.evaluate(params, halves(data)), expected, rtol=1e-6)
    nothing = data._replace(mask=jnp.zeros((8, 50), bool))
    for batches, missing in (([], "batch,"), (nothing, "step that"), ([nothing], "step that")):
        with pytest.raises(ValueError, match=f"^batches: expected at least one {missing}"):
            jaxrnn.evaluate(params, batches)


def test_a_wrong_argument_of_evaluate_is_named(params):
    data = parity(jax.random.key(1))
    with pytest.raises(TypeError, match=r"^batches: expected a Batch or an iterable of them"):
        jaxrnn.evaluate(params, None)
    for loss_fn in (jaxrnn.bptt, lambda *a: jaxrnn.sequence_loss(*a)[0]):
        with pytest.raises(TypeError, match=r"^loss_fn: expected \(value, h_T\) of shapes .*, got"):
            jaxrnn.evaluate(params, data, loss_fn=loss_fn)
    with pytest.raises(TypeError, match=r"^loss_fn: expected a function, got 3$"):
        jaxrnn.evaluate(params, data, loss_fn=3)


def test_a_setting_of_the_wrong_type_is_named_before_training(params):
    fit = partial(jaxrnn.fit, jax.random.key(0), params, parity(jax.random.key(1)))
    fit = partial(fit, optimizer=optax.sgd(0.1), max_epochs=1)
    with pytest.raises(TypeError, match=r"^tolerance: expected a number, got None$"):
        fit(tolerance=None)
    with pytest.raises(TypeError, match=r"^callback: expected a function, got 3$"):
        fit(callback=3)
    for wrong in (0.5, np.array([True])):
        with pytest.raises(TypeError, match=r"^callback: expected a function that returns None or"):
            fit(callback=lambda result, wrong=wrong: wrong)
    assert len(fit(callback=lambda result: np.bool_(False)).history) == 1
    assert len(fit(tolerance=np.float32(0.1)).history) == 1


def spoilt(count, where):
    """Batches; the loss of those in `where` is not finite."""
    batch = parity(jax.random.key(1), N=4)
    weights = jnp.ones((8, 4))
    return [batch._replace(weights=weights * (1e30 if i in where else 1)) for i in range(count)]


def spoiling(params, batch, h=None):
    (value, h_T), grads = jaxrnn.bptt(params, batch, h)
    return (jnp.where(batch.weights[0, 0] > 1e20, jnp.nan, value), h_T), grads


def test_the_loss_of_evaluate_is_given_by_name(params):
    batch = Batch(jnp.ones((7, 6, 3)), jnp.zeros((7, 6), int))
    with pytest.raises(TypeError, match="positional"):
        jaxrnn.evaluate(params, batch, None, jaxrnn.sequence_loss)


def test_skipped_updates_are_counted_and_left_out_of_the_mean_with_a_warning(params):
    rule = partial(jaxrnn.sgd, learning_rate=0.0)
    fit = partial(
        jaxrnn.fit, jax.random.key(0), params, optimizer=rule, gradient_fn=spoiling, max_epochs=1
    )
    with pytest.warns(UserWarning, match="train: 2 of the 6 updates up to step 6 were skipped"):
        result = fit(train=spoilt(6, {0, 4}), max_skipped=2)
    (row,) = result.history
    assert row.skipped == 2
    expected = sequence_loss(params, spoilt(1, {})[0])[0]
    np.testing.assert_allclose(row.train_loss, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("where", "step"), [({2, 3, 4}, 5), ({0, 1, 2, 3, 4, 5, 6, 7}, 3), ({5, 6, 7}, 8)]
)
def test_too_many_consecutive_skips_raise_diverged(where, step, params):
    seen = []
    with pytest.raises(
        jaxrnn.Diverged, match=f"^step {step}: .* got 3 consecutive skipped updates"
    ) as stopped:
        jaxrnn.fit(
            jax.random.key(0), params, spoilt(8, where), optimizer=optax.adam(1e-2),
            gradient_fn=spoiling, max_skipped=3, callback=seen.append,
        )  # fmt: skip
    assert len(stopped.value.gradient_norms) == min(step, 6)
    assert seen == []


def test_consecutive_skips_are_counted_across_epochs(params):
    """Three at the end of an epoch and two at the start of the next; also for a Batch."""
    with (
        pytest.warns(UserWarning, match="train: 3 of the 4 updates up to step 4 were skipped"),
        pytest.raises(
            jaxrnn.Diverged, match=r"^step 5: .* got 4 consecutive skipped updates"
        ) as stopped,
    ):
        jaxrnn.fit(
            jax.random.key(0), params, Cycle(spoilt(4, {1, 2, 3}), spoilt(4, {0, 1})),
            optimizer=optax.adam(1e-2), gradient_fn=spoiling, max_skipped=4,
        )  # fmt: skip
    assert len(stopped.value.gradient_norms) == 5
    whole = parity(jax.random.key(1))._replace(weights=jnp.full((8, 50), 1e30))
    with pytest.raises(jaxrnn.Diverged, match=r"^step 4: .* got 4 consecutive skipped updates"):
        jaxrnn.fit(
            jax.random.key(0), params, whole, optimizer=optax.adam(1e-2), gradient_fn=spoiling,
            batch_size=10, max_skipped=4,
        )  # fmt: skip


def test_an_epoch_without_an_applied_update_changes_neither_best_nor_patience(params):
    whole = parity(jax.random.key(1))._replace(weights=jnp.full((8, 50), 1e30))
    fit = partial(
        jaxrnn.fit, jax.random.key(0), params, whole, optimizer=optax.adam(1e-2),
        gradient_fn=spoiling, patience=2, max_skipped=4,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="1 of the 1 updates"):
        result = fit(max_epochs=3)
    assert [row.skipped for row in result.history] == [1, 1, 1]
    assert all(np.isnan(row[1:3]).all() for row in result.history)
    assert not result.converged
    with pytest.raises(jaxrnn.Diverged, match=r"^step 4: "):
        fit(max_epochs=9, resume=result)


@pytest.mark.parametrize("skipped", [1, 3])
def test_the_best_epoch_after_epochs_without_an_applied_update(skipped, params):
    epochs = [spoilt(4, {0, 1, 2, 3} if epoch < skipped else {}) for epoch in range(skipped + 2)]
    with pytest.warns(UserWarning, match="4 of the 4 updates"):
        result = jaxrnn.fit(
            jax.random.key(0), params, Cycle(*epochs), optimizer=optax.adam(1e-2),
            gradient_fn=spoiling, max_skipped=40, max_epochs=skipped + 2,
        )  # fmt: skip
    losses = [row.valid_loss for row in result.history]
    assert np.isnan(losses).tolist() == [True] * skipped + [False] * 2
    assert losses[-1] < losses[-2]
    np.testing.assert_array_equal(result.best.W_h, result.state.params.W_h)


class Cycle:
    """Different batches in each epoch."""

    def __init__(self, *epochs):
        self.epochs = iter(epochs)

    def __iter__(self):
        return iter(next(self.epochs))


def test_each_batch_is_checked_once(params, monkeypatch):
    checked = []
    check = jaxrnn.check_values
    monkeypatch.setattr(
        training, "check_values", lambda *a, **k: (checked.append(a), check(*a, **k))
    )
    train = halves(parity(jax.random.key(1)))
    fit = partial(jaxrnn.fit, jax.random.key(0), params, optimizer=optax.sgd(0.1))
    fit(train, train, max_epochs=3)
    assert len(checked) == 4
    wrong = train[1]._replace(targets=train[1].targets + 1)
    message = r"^targets: expected integers in \[0, 2\).*\nThe batch is "
    with pytest.raises(ValueError, match=message + r"train\[1\]\.$"):
        fit([train[0], wrong])
    with pytest.raises(ValueError, match=message + r"valid\[0\]\.$"):
        fit(train, [wrong])
    with pytest.raises(ValueError, match=message + r"valid\.$"):
        fit(train, wrong)
