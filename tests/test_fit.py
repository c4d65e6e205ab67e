"""What `fit` hands out: the best parameters, results that stay, early ends, no recompilation."""

import linecache
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrnn
from jaxrnn import Batch, checkpoints
from tests.conftest import default_and_thorough


@pytest.fixture
def params():
    return jaxrnn.init(jax.random.key(0), 3, 5, 2)


@pytest.fixture
def batch():
    xs = jax.random.normal(jax.random.key(1), (7, 6, 3))
    return Batch(xs, jax.random.normal(jax.random.key(2), (7, 6, 2)))


REGRESSION = partial(jaxrnn.bptt, loss=jaxrnn.squared_error)


@jax.jit
def loss(params, batch):
    return jaxrnn.sequence_loss(params, batch, loss=jaxrnn.squared_error)[0]


def fit(params, train, *arguments, optimizer=None, **keywords):
    keywords = {"gradient_fn": REGRESSION, "max_epochs": 4} | keywords
    optimizer = optimizer or optax.sgd(0.1)
    return jaxrnn.fit(jax.random.key(3), params, train, *arguments, optimizer=optimizer, **keywords)


def as_bytes(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("as_batches", default_and_thorough([True], [False, True]))
def test_without_held_out_data_best_has_the_lowest_loss_that_was_measured(
    as_batches, params, batch
):
    """The learning rate is so high that the loss rises: the loss before an epoch's updates is not
    that of the parameters after them."""
    train = [batch] if as_batches else batch
    result = fit(params, train, optimizer=optax.sgd(1.5), patience=20, max_epochs=8)
    losses = [row.valid_loss for row in result.history]
    assert losses != sorted(losses, reverse=True)
    np.testing.assert_allclose(loss(result.best, batch), min(losses), rtol=1e-5)
    np.testing.assert_allclose(result.history[0].train_loss, loss(params, batch), rtol=1e-5)
    np.testing.assert_allclose(result.history[1].train_loss, losses[0], rtol=1e-5)


def test_an_iterable_that_changes_is_iterated_once_per_epoch(params, batch):
    reads = []

    class Stream:
        def __iter__(self):
            reads.append(1)
            return iter([batch._replace(xs=batch.xs + len(reads))])

    result = fit(params, Stream())
    assert len(reads) == len(result.history) == 4
    assert [row.valid_loss for row in result.history] == [row.train_loss for row in result.history]


@pytest.mark.parametrize("name", ["train", "valid"])
def test_a_one_pass_iterator_is_refused_where_it_would_be_empty_in_the_second_epoch(
    name, params, batch
):
    data = {"train": [batch], "valid": [batch]} | {name: jaxrnn.windows(batch, 3)}
    with pytest.raises(ValueError, match=f"^{name}: expected batches that can be iterated once"):
        fit(params, data["train"], data["valid"], max_epochs=2)
    data[name] = jaxrnn.windows(batch, 3)
    assert len(fit(params, data["train"], data["valid"], max_epochs=1).history) == 1


@pytest.mark.parametrize("kind", ["none", "a Batch", "batches", "one pass"])
@pytest.mark.parametrize("name", ["train", "valid"])
def test_data_in_which_no_step_counts_are_refused(name, kind, params, batch):
    empty = batch._replace(mask=jnp.zeros((7, 6), bool))
    data = {"none": [], "a Batch": empty, "batches": [empty], "one pass": iter([empty])}[kind]
    with pytest.raises(
        ValueError, match=f"^{name}: expected at least one (step that counts|batch),"
    ):
        fit(params, **({"train": batch} | {name: data}), max_epochs=1)


@pytest.mark.parametrize("as_batches", [False, True])
def test_a_fit_that_was_handed_out_never_changes(as_batches, params, batch):
    kept, copies = [], []

    def keep(result):
        kept.append(result)
        copies.append((as_bytes(result), result.history))

    result = fit(params, [batch] if as_batches else batch, callback=keep)
    for fit_then, copy in zip(kept, copies, strict=True):
        assert (as_bytes(fit_then), fit_then.history) == copy
    again = fit(params, [batch] if as_batches else batch, resume=kept[1])
    assert as_bytes(again) == as_bytes(result)
    assert as_bytes(kept[1]) == copies[1][0]


def test_a_callback_ends_training_by_returning_true(params, batch):
    result = fit(params, batch, callback=lambda result: len(result.history) == 2)
    assert len(result.history) == 2
    assert not result.converged
    assert as_bytes(fit(params, batch, resume=result)) == as_bytes(fit(params, batch))


@pytest.mark.parametrize("as_batches", [False, True])
def test_an_interrupt_returns_the_result_of_the_last_whole_epoch(as_batches, params, batch):
    class Interrupted(list):
        epochs = 0

        def __iter__(self):
            yield batch
            self.epochs += 1
            if self.epochs == 3:
                raise KeyboardInterrupt
            yield batch

    train, valid = (Interrupted(), batch) if as_batches else (batch, Interrupted())
    with pytest.warns(
        UserWarning, match="interrupted: fit returns the result of epoch 2"
    ) as warned:
        result = fit(params, train, valid)
    caller = linecache.getline(warned[0].filename, warned[0].lineno)
    assert "return jaxrnn.fit(" in caller
    assert len(result.history) == 2
    assert np.isfinite(loss(result.state.params, batch))


def test_the_same_call_again_does_not_trace_again(params, batch):
    traces = []

    def gradient_fn(params, batch, h):
        traces.append(1)
        return REGRESSION(params, batch, h)

    run = partial(fit, params, batch, batch, gradient_fn=gradient_fn, optimizer=optax.adam(1e-2))
    first = run()
    count = len(traces)
    assert as_bytes(run()) == as_bytes(first)
    assert len(traces) == count


@pytest.mark.parametrize("tolerance", [float("nan"), float("inf"), -1e-3])
def test_a_tolerance_that_is_negative_or_not_finite_is_refused(tolerance, params, batch):
    with pytest.raises(ValueError, match=f"^tolerance: expected at least 0 .*, got {tolerance}"):
        fit(params, batch, tolerance=tolerance)


def test_a_folder_with_another_run_is_not_overwritten(params, batch, tmp_path):
    save = partial(jaxrnn.save_fit, tmp_path)
    whole = fit(params, batch, callback=save)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(checkpoints.CheckpointError, match="expected no checkpoint of epoch 1 or"):
        fit(params, batch, callback=save)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    found = jaxrnn.load_fit(tmp_path, params, optax.sgd(0.1))
    longer = fit(params, batch, callback=save, resume=found, max_epochs=6)
    assert checkpoints.saved_steps(tmp_path) == [5, 6]
    assert longer.history[:4] == whole.history


def test_a_damaged_newer_checkpoint_is_written_again(params, batch, tmp_path):
    save = partial(jaxrnn.save_fit, tmp_path)
    whole = fit(params, batch, callback=save)
    path = checkpoints.checkpoint_path(tmp_path, 4)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="checkpoint-4"):
        found = jaxrnn.load_fit(tmp_path, params, optax.sgd(0.1))
    assert as_bytes(fit(params, batch, callback=save, resume=found)) == as_bytes(whole)
    assert checkpoints.saved_steps(tmp_path) == [3, 4]


def unchanging(params, batch, h=None):
    """A loss of 1 everywhere, and a gradient that is not zero."""
    return (jnp.ones(()), None), jax.tree.map(jnp.ones_like, params)


def test_an_equal_loss_is_no_improvement(params, batch):
    """`best` are the parameters that reached the lowest loss first."""
    result = fit(params, batch, gradient_fn=unchanging, patience=2, max_epochs=9)
    assert result.converged
    assert len(result.history) == 3
    first = fit(params, batch, gradient_fn=unchanging, max_epochs=1)
    assert as_bytes(result.best) == as_bytes(first.best) != as_bytes(result.state.params)


def test_a_resumed_fit_that_has_waited_longer_than_its_patience_has_converged(params, batch):
    result = fit(params, batch, gradient_fn=unchanging, patience=9, max_epochs=6)
    assert not result.converged
    again = fit(params, batch, gradient_fn=unchanging, patience=2, max_epochs=9, resume=result)
    assert again.converged
    assert len(again.history) == 6


def not_finite(params, batch, h=None):
    """A gradient that is not finite, at a weight above 1."""
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, batch.weights.max()), params)
    return (jnp.where(batch.weights.max() > 1, jnp.nan, 1.0), None), grads


def test_diverged_has_the_gradient_norms_of_earlier_epochs(params, batch):
    """Epochs of one update each; three that are skipped follow five that are not."""
    epochs = iter([1.0] * 5 + [2.0] * 3)

    class Changing:
        def __iter__(self):
            yield batch._replace(weights=jnp.full((7, 6), next(epochs)))

    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(jaxrnn.Diverged, match=r"^step 8: .* got 3 consecutive") as stopped,
    ):
        fit(params, Changing(), gradient_fn=not_finite, max_skipped=3, max_epochs=9, patience=9)
    norm = stopped.value.gradient_norms[0]
    np.testing.assert_allclose(stopped.value.gradient_norms, [norm] * 3 + [2 * norm] * 3)


@pytest.mark.parametrize(("spoilt_from", "diverged", "read"), [(0, 3, 3), (4, 7, 9)])
def test_a_stream_is_polled_once_in_max_skipped_updates(spoilt_from, diverged, read, params, batch):
    taken = []

    class Stream:
        def __iter__(self):
            for n in range(100):
                taken.append(n)
                weight = 2.0 if n >= spoilt_from else 1.0
                yield batch._replace(weights=jnp.full((7, 6), weight))

    with pytest.raises(jaxrnn.Diverged, match=rf"^step {diverged}: .* got 3 consecutive"):
        fit(params, Stream(), gradient_fn=not_finite, max_skipped=3)
    assert len(taken) == read


def test_a_warning_shows_the_line_that_calls_fit(params, batch):
    spoilt = batch._replace(weights=jnp.full((7, 6), 2.0))
    with pytest.warns(UserWarning, match="skipped") as warned:
        jaxrnn.fit(
            jax.random.key(3), params, spoilt,
            optimizer=optax.sgd(0.1), gradient_fn=not_finite, max_epochs=1,
        )  # fmt: skip
    assert warned[0].filename == __file__


def test_functions_that_cannot_be_hashed_train(params, batch):
    class Gradient:
        __hash__ = None

        def __call__(self, params, batch, h=None):
            return REGRESSION(params, batch, h)

    assert as_bytes(fit(params, batch, gradient_fn=Gradient())) == as_bytes(fit(params, batch))


@pytest.mark.parametrize("patience", [1, 5])
def test_an_epoch_without_an_applied_update_does_not_wait(patience, params, batch):
    spoilt = batch._replace(weights=jnp.full((7, 6), 2.0))
    with pytest.warns(UserWarning, match="1 of the 1 updates up to step 1 were skipped"):
        result = fit(params, spoilt, gradient_fn=not_finite, max_epochs=1, patience=patience)
    assert not result.converged


@pytest.mark.thorough
def test_examples_may_have_several_batch_axes(params, batch):
    def paired(leaf):
        return leaf.reshape(7, 3, 2, *leaf.shape[2:])

    both = jax.tree.map(paired, batch)
    alone = fit(params, batch, max_epochs=1)
    result = fit(params, both, max_epochs=1)
    np.testing.assert_allclose(result.state.params.W_h, alone.state.params.W_h, rtol=1e-5)
    parts = fit(params, both, max_epochs=1, batch_size=2, optimizer=optax.sgd(0.0))
    np.testing.assert_allclose(parts.history[0].train_loss, loss(params, batch), rtol=1e-5)


def test_the_defaults_of_fit(params, batch):
    """100 epochs, a patience of 5, a tolerance of 0, and 10 consecutive skips."""
    assert jaxrnn.Evaluation(1, 0.5, 0.5).skipped == 0
    run = partial(jaxrnn.fit, jax.random.key(0), {"w": jnp.ones(())}, optimizer=optax.sgd(0.01))

    def falling(params, batch, h=None):
        return (params["w"], None), {"w": jnp.ones(())}

    assert len(run(train=batch, gradient_fn=falling).history) == 100
    assert len(run(train=batch, gradient_fn=unchanging).history) == 6
    spoilt = [batch._replace(weights=jnp.full((7, 6), 2.0))] * 20
    with pytest.raises(jaxrnn.Diverged, match=r"^step 10: .* got 10 consecutive"):
        run(train=spoilt, gradient_fn=not_finite)
