"""The arguments of `fit`: what it refuses before the first update, and what it takes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrnn
from jaxrnn import Batch, training
from tests.recipe_cases import labelled_batch


@pytest.fixture
def params():
    return jaxrnn.init(jax.random.key(0), 2, 4, 2)


XS, LABELS = labelled_batch(6, 8)[:2]
GOOD = Batch(XS.astype(np.float32), LABELS, mask=np.ones((6, 8), bool))
NO_STEP = GOOD._replace(mask=~GOOD.mask)
TOO_WIDE = GOOD._replace(xs=np.ones((6, 8, 3), np.float32))


def never_traced(params, grads):
    pytest.fail("an update was compiled")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": NO_STEP}, "train: expected at least one step that counts"),
        ({"train": [NO_STEP, NO_STEP]}, "train: expected at least one step that counts"),
        ({"train": NO_STEP, "valid": GOOD}, "train: expected at least one step that counts"),
        ({"train": GOOD, "valid": NO_STEP}, "valid: expected at least one step that counts"),
        ({"train": GOOD, "valid": (NO_STEP,)}, "valid: expected at least one step that counts"),
        ({"train": GOOD, "valid": []}, "valid: expected at least one batch"),
        ({"train": [GOOD, TOO_WIDE]}, "xs: .*The batch is train\\[1\\]"),
        ({"train": GOOD, "valid": (GOOD, TOO_WIDE)}, "xs: .*The batch is valid\\[1\\]"),
    ],
    ids=[
        "train",
        "train list",
        "train, valid",
        "valid",
        "valid tuple",
        "valid empty",
        "train[1]",
        "valid[1]",
    ],
)
def test_data_at_hand_are_refused_before_the_first_update(data, message, params):
    with pytest.raises(ValueError, match=f"(?s)^{message}"):  # which reads the notes, too
        jaxrnn.fit(jax.random.key(0), params, **data, optimizer=never_traced)


@pytest.mark.parametrize("shape", [(6,), (6, 0), (6, 1, 0)], ids=repr)
def test_examples_are_needed_on_every_batch_axis(shape, params):
    train = Batch(np.zeros((*shape, 2), np.float32), np.zeros(shape, int))
    with pytest.raises(ValueError, match=r"^train: expected xs \(T, examples, \.\.\.\)"):
        jaxrnn.fit(jax.random.key(0), params, train, optimizer=never_traced)


def test_one_example_is_enough(params):
    train = jax.tree.map(lambda leaf: leaf[:, :1], GOOD)
    result = jaxrnn.fit(jax.random.key(0), params, train, optimizer=optax.sgd(0.1), max_epochs=2)
    assert result.history[1].train_loss < result.history[0].train_loss


def test_some_batches_may_have_no_step_that_counts(params):
    result = jaxrnn.fit(
        jax.random.key(0), params, [NO_STEP, GOOD], optimizer=optax.sgd(0.1), max_epochs=1
    )
    expected = jaxrnn.sequence_loss(params, GOOD)[0]
    np.testing.assert_allclose(result.history[0].train_loss, expected, rtol=1e-6)


def test_a_key_for_a_function_that_takes_none_is_named(params):
    with pytest.raises(TypeError, match=r"^gradient_fn: expected one that takes a key"):
        jaxrnn.fit(
            jax.random.key(0), params, GOOD,
            optimizer=optax.sgd(0.1), gradient_key=jax.random.key(1),
        )  # fmt: skip


@pytest.mark.parametrize("where", ["init", "update"])
def test_an_error_of_the_optimiser_names_it(where, params):
    wrong = optax.adam("0.1") if where == "update" else optax.masked(optax.adam(0.1), {"w": True})
    with pytest.raises((TypeError, ValueError)) as raised:
        jaxrnn.fit(jax.random.key(0), params, GOOD, optimizer=wrong)
    assert "The error is in the optimizer." in raised.value.__notes__


def test_a_state_may_hold_a_key(params):
    def noisy(params, batch, carried=None):
        key, noise_key = jax.random.split(carried["key"])
        drive = 0.1 * jax.random.normal(noise_key, (6, 8, 4))
        (value, h_T), grads = jaxrnn.bptt(params, batch._replace(drive=drive), carried["h"])
        return (value, {"h": h_T, "key": key}), grads

    h_0 = {"h": jnp.zeros((8, 4)), "key": jax.random.key(1)}
    result = jaxrnn.fit(
        jax.random.key(0), params, [GOOD, GOOD],
        optimizer=optax.sgd(0.1), gradient_fn=noisy, h_0=h_0, max_epochs=2,
    )  # fmt: skip
    assert not jnp.array_equal(*(jax.random.key_data(h["key"]) for h in (h_0, result.state.h)))


class Trainer:
    """An object whose setting changes between two trainings."""

    penalty = 0.0

    def loss(self, params, batch, h=None):
        value, h_T = jaxrnn.sequence_loss(params, batch, h)
        return value + self.penalty * (params.W_h**2).sum(), h_T

    def gradient(self, params, batch, h=None):
        return jax.value_and_grad(self.loss, has_aux=True)(params, batch, h)

    def rule(self, params, grads):
        return jaxrnn.sgd(params, grads, self.penalty)


def test_a_bound_method_is_compiled_with_what_its_object_holds_now(params):
    """Two bound methods of one object are equal."""
    trainer, found = Trainer(), []
    for trainer.penalty in (0.0, 0.5):
        result = jaxrnn.fit(
            jax.random.key(0), params, GOOD,
            optimizer=trainer.rule, gradient_fn=trainer.gradient, max_epochs=1,
        )  # fmt: skip
        expected = trainer.loss(params, GOOD)[0].item()
        np.testing.assert_allclose(result.history[0].train_loss, expected, rtol=1e-6)
        np.testing.assert_allclose(
            jaxrnn.evaluate(params, GOOD, loss_fn=trainer.loss), expected, rtol=1e-6
        )
        found.append(jnp.array_equal(result.state.params.W_h, params.W_h))
    assert found == [True, False]  # the rate of the rule was 0, then 0.5


def aligned(x):
    """x from its first multiple of 64 bytes on: JAX on a CPU reads such memory without a copy."""
    return x[-x.ctypes.data % 64 // x.itemsize :]


def test_an_iterable_may_use_its_memory_again(params):
    """JAX on a CPU reads NumPy's memory when it runs, which may be after the next batch is made."""
    rng = np.random.default_rng(0)
    xs, labels = rng.normal(size=(8, 50, 32, 2)).astype(np.float32), np.zeros((50, 32), np.int32)

    class Loader:
        memory = aligned(np.empty(50 * 32 * 2 + 16, np.float32))[: 50 * 32 * 2].reshape(50, 32, 2)

        def __iter__(self):
            for x in xs:
                self.memory[:] = x
                yield Batch(self.memory, labels)
            self.memory[:] = np.nan

    results = [
        jaxrnn.fit(jax.random.key(0), params, data, optimizer=optax.sgd(0.1), max_epochs=1)
        for data in (Loader(), Stream(*(Batch(x, labels) for x in xs)))
    ]
    assert results[0].history == results[1].history


def test_the_number_of_batches_of_an_epoch_compiles_nothing(params):
    """It may differ from epoch to epoch, as with batches of so many tokens."""
    numbers = iter([2, 3, 4])

    class Changing:
        def __iter__(self):
            return iter([GOOD] * next(numbers))

    compiled, at_epoch = [], []

    def listener(name, *_, **__):
        compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        jaxrnn.fit(
            jax.random.key(0), params, Changing(), optimizer=optax.sgd(0.1), max_epochs=3,
            callback=lambda _: at_epoch.append(len(compiled)),
        )  # fmt: skip
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert 0 < at_epoch[0] == at_epoch[2], compiled[at_epoch[0] :]


def test_updates_that_continue_do_not_delete_the_best_parameters(params):
    sgd = optax.sgd(0.1)
    result = jaxrnn.fit(jax.random.key(0), params, GOOD, optimizer=sgd, max_epochs=2)
    best = jax.tree.map(np.array, result.best)  # a view would prevent the donation
    jaxrnn.make_update(jaxrnn.bptt, sgd)(result.state, GOOD)
    for leaf, kept in zip(result.best, best, strict=True):
        np.testing.assert_array_equal(leaf, kept)


def test_a_loss_that_cannot_be_hashed_is_evaluated(params):
    class Loss:
        __hash__ = None

        def __call__(self, params, batch, h=None):
            return jaxrnn.sequence_loss(params, batch, h)

    assert jaxrnn.evaluate(params, GOOD, loss_fn=Loss()) == jaxrnn.evaluate(params, GOOD)


class Stream:
    """Batches that are made anew for each pass."""

    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize("name", ["train", "valid"])
def test_batches_of_an_iterable_are_checked_during_the_first_pass(name, params, monkeypatch):
    checked = []
    monkeypatch.setattr(training, "check_values", lambda params, batch, **_: checked.append(batch))
    data = {"train": GOOD} | {name: Stream(GOOD, GOOD)}
    jaxrnn.fit(jax.random.key(0), params, **data, optimizer=optax.sgd(0.1), max_epochs=3)
    assert len(checked) == len(data) + 1

    monkeypatch.undo()
    data[name] = Stream(GOOD, GOOD._replace(targets=2 + 0 * LABELS))
    with pytest.raises(ValueError, match=rf"(?s)^targets: .*The batch is {name}\[1\]"):
        jaxrnn.fit(jax.random.key(0), params, **data, optimizer=optax.sgd(0.1))


def test_data_that_change_during_training_change_nothing(params):
    """NumPy arrays of a Batch are read once."""

    def run(callback):
        train, valid = (jax.tree.map(np.array, GOOD) for _ in range(2))
        return jaxrnn.fit(
            jax.random.key(0), params, train, valid, optimizer=optax.sgd(0.1), max_epochs=3,
            callback=lambda _: callback(train, valid),
        ).history  # fmt: skip

    def spoil(*batches):
        for batch in batches:
            batch.xs[:] = np.nan

    assert run(spoil) == run(lambda *_: None)


@pytest.mark.parametrize("weight", [1e36, 1e-3])
def test_the_training_loss_does_not_depend_on_the_scale_of_the_weights(weight, params):
    """Large ones times the loss have no finite sum in float32; the sum of small ones is below 1."""
    targets, weights = np.full((6, 8, 2), 30, np.float32), np.full((6, 8), weight, np.float32)
    weighted = GOOD._replace(targets=targets, weights=weights)
    expected = jaxrnn.sequence_loss(params, weighted, loss=jaxrnn.squared_error)[0].item()
    for train in (weighted, [weighted] * 3):
        result = jaxrnn.fit(
            jax.random.key(0), params, train, optimizer=optax.sgd(0.0), max_epochs=1,
            gradient_fn=partial(jaxrnn.bptt, loss=jaxrnn.squared_error),
        )  # fmt: skip
        assert result.history[0].train_loss == pytest.approx(expected, rel=1e-5)
