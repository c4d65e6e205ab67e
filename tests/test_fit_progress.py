"""Runs of `fit` that continue others, and what counts as an improvement."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrnn
from jaxrnn import Batch
from tests.test_fit_arguments import GOOD, LABELS


@pytest.fixture
def params():
    return jaxrnn.init(jax.random.key(0), 2, 4, 2)


def test_an_improvement_is_below_the_loss_of_an_epoch_without_an_applied_update():
    """Losses 0 (skipped), 5, 4.9, 4.8: each after the first is lower than the one before."""
    start = {"w": jnp.zeros(())}
    held_out = Batch(jnp.ones((1, 1, 1)), jnp.zeros((1, 1, 1)))
    epochs = iter(range(1, 10))

    class Train:
        def __iter__(self):
            yield held_out._replace(xs=jnp.full((1, 1, 1), next(epochs), float))

    def gradient(params, batch, h=None):
        gradients = jnp.array([0, jnp.nan, -5] + 7 * [0.1])
        return (params["w"], h), {"w": gradients[batch.xs[0, 0, 0].astype(int)]}

    with pytest.warns(UserWarning, match="1 of the 1 updates"):
        result = jaxrnn.fit(
            jax.random.key(0), start, Train(), held_out, gradient_fn=gradient,
            optimizer=partial(jaxrnn.sgd, learning_rate=1.0), patience=3, max_epochs=9,
        )  # fmt: skip
    assert result.converged
    np.testing.assert_allclose([row.valid_loss for row in result.history], [0, 5, 4.9, 4.8])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (optax.adam(0.1), optax.adamw(0.1)),
        (partial(jaxrnn.sgd, learning_rate=0.1), optax.sgd(0.1)),
        (optax.sgd(0.1), optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))),
    ],
    ids=["adam to adamw", "rule to sgd", "sgd to clipped sgd"],
)
def test_the_state_of_another_optimizer_is_refused_also_without_arrays(before, after, params):
    fit = partial(jaxrnn.fit, jax.random.key(0), params, GOOD, max_epochs=1)
    found = fit(optimizer=before)
    with pytest.raises(ValueError, match=r"^resume: expected the state of the optimizer given"):
        fit(optimizer=after, resume=found)


def test_a_fit_without_history_is_continued_on_other_data(params):
    """The losses of the earlier data decide neither `best` nor patience."""
    fit = partial(jaxrnn.fit, jax.random.key(0), params, optimizer=optax.sgd(1e-3))
    easy = fit([GOOD._replace(weights=jnp.ones((6, 8)))], max_epochs=3)
    other = GOOD._replace(targets=1 - LABELS)
    result = fit([other], max_epochs=2, patience=1, resume=easy._replace(history=()))
    assert [row.epoch for row in result.history] == [1, 2]
    np.testing.assert_array_equal(result.best.W_h, result.state.params.W_h)
    assert result.state.step == 5
