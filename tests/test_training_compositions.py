"""Training of compositions: parameters that hold more than one Params, and random gradients."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import jaxrnn
from experiments.recipes import dropout, embedding, learned_h0, stack
from jaxrnn import Batch
from jaxrnn.serialization import to_arrays
from tests.conftest import default_and_thorough
from tests.recipe_cases import AGREEMENT, labelled_batch
from tests.reference import relative_errors

T, N = 6, 8
ADAM = optax.adam(3e-2)


class Composition(NamedTuple):
    """Parameters, data, and the loss of the recipe, which runs on a single device."""

    params: Any
    loss: Callable
    gradient_fn: Callable
    batch: Batch
    h_0: Any = None
    key: Any = None


def numbers():
    batch = labelled_batch(T, N)
    mask = np.arange(T)[:, None] < np.array([0, 2, 1, 0, 6, 5, 6, 6])
    return batch._replace(xs=batch.xs.astype(np.float32), mask=mask)


def tokens():
    rng = np.random.default_rng(0)
    return numbers()._replace(xs=rng.integers(0, 5, (T, N)))


def two_layers():
    return stack.init_stack(jax.random.key(0), 2, [5, 4], 2)


def stack_case():
    h_0 = [jnp.zeros((N, 5)), jnp.zeros((N, 4))]
    return Composition(two_layers(), stack.loss, stack.gradient_fn, numbers(), h_0)


def embedding_case():
    params = embedding.init(jax.random.key(0), 5, 3, 4, 3, 2)
    return Composition(params, embedding.loss, embedding.gradient_fn, tokens())


def learned_h0_case():
    theta = jaxrnn.init(jax.random.key(0), 2, 4, 2), jnp.zeros(4)
    return Composition(theta, learned_h0.loss, learned_h0.gradient_fn, numbers())


def dropout_case():
    return Composition(
        two_layers(), dropout.loss, dropout.gradient_fn, numbers(), key=jax.random.key(7)
    )


def parallel_case(make_case):
    """The same on two devices, of which one counts 3 steps and the other 23."""
    case = make_case()
    mesh = Mesh(jax.devices()[:2], ("batch",))
    return case._replace(gradient_fn=jaxrnn.data_parallel(case.gradient_fn, mesh))


CASES = {
    "stack": stack_case,
    "embedding and head": embedding_case,
    "learned h_0": learned_h0_case,
    "dropout": dropout_case,
    "parallel stack": partial(parallel_case, stack_case),
}


def to_float64(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


def key_of(case, number):
    """The keyword argument of update `number`."""
    return {} if case.key is None else {"key": jax.random.fold_in(case.key, number)}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", default_and_thorough(["dropout"], CASES))
def test_updates_follow_the_gradient_and_change_every_part(name):
    case = CASES[name]()
    params, h = to_float64((case.params, case.h_0))
    update = jaxrnn.make_update(case.gradient_fn, ADAM)
    state = jaxrnn.init_state(params, ADAM, h, key=case.key)
    by_autodiff = jax.jit(jax.value_and_grad(case.loss, has_aux=True))
    losses = []
    for number in range(20):
        key = key_of(case, number)
        (value, h_T), grads = by_autodiff(state.params, case.batch, state.h, **key)
        state, metrics = update(state, case.batch)
        expected = value, optax.tree.norm(grads), None if h is None else h_T
        got = metrics.loss, metrics.gradient_norm, state.h
        assert max(relative_errors(got, expected)) <= AGREEMENT
        losses.append(metrics.loss.item())
    assert metrics.counted == 26
    assert losses[-1] < 0.8 * losses[0]
    unchanged = jax.tree.map(lambda a, b: a.size and (a == b).all().item(), state.params, params)
    assert not any(jax.tree.leaves(unchanged))


def as_bytes(tree):
    return {name: array.tobytes() for name, array in to_arrays(tree).items()}


@pytest.mark.parametrize("name", default_and_thorough(["dropout"], CASES))
def test_fit_lowers_the_loss_and_resumes_bit_identically(name, tmp_path):
    """Windows with the state carried, or examples that are shuffled into batches of 6 and 2."""
    case = CASES[name]()
    train, settings = case.batch, {"batch_size": 6}
    if case.h_0 is not None:
        train, settings = list(jaxrnn.windows(case.batch, 2)), {"h_0": case.h_0}
    fit = partial(
        jaxrnn.fit, jax.random.key(1), case.params, train, optimizer=ADAM,
        gradient_fn=case.gradient_fn, gradient_key=case.key, **settings,
    )  # fmt: skip
    uninterrupted = fit(max_epochs=4)
    losses = [epoch.valid_loss for epoch in uninterrupted.history]
    assert losses[-1] < losses[0]

    fit(max_epochs=2, callback=partial(jaxrnn.save_fit, tmp_path))
    found = jaxrnn.load_fit(tmp_path, case.params, ADAM, case.h_0, gradient_key=case.key)
    assert len(found.history) == 2
    resumed = fit(max_epochs=4, resume=found)
    assert resumed.history == uninterrupted.history
    for part in ("state", "best"):
        assert as_bytes(getattr(resumed, part)) == as_bytes(getattr(uninterrupted, part))


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name",
    default_and_thorough(
        ["embedding and head"], ["stack", "embedding and head", "learned h_0", "dropout"]
    ),
)
def test_data_parallel_equals_a_single_device(name):
    case = CASES[name]()
    params, h = to_float64((case.params, case.h_0))
    parallel = parallel_case(lambda: case).gradient_fn
    got = jax.jit(parallel)(params, case.batch, h)
    expected = jax.jit(jax.value_and_grad(case.loss, has_aux=True))(params, case.batch, h)
    assert max(relative_errors(got, expected)) <= AGREEMENT


@pytest.mark.thorough
def test_dropout_draws_a_mask_for_each_update_and_none_to_evaluate():
    """With the parameters held still, only the masks change the loss."""
    case = dropout_case()
    rule = partial(jaxrnn.sgd, learning_rate=0.0)
    result = jaxrnn.fit(
        jax.random.key(1), case.params, [case.batch], optimizer=rule,
        gradient_fn=case.gradient_fn, gradient_key=case.key, max_epochs=4,
    )  # fmt: skip
    loss = jax.jit(case.loss)
    expected = [loss(case.params, case.batch, **key_of(case, n))[0].item() for n in range(4)]
    np.testing.assert_allclose([row.train_loss for row in result.history], expected, rtol=1e-5)
    assert len({f"{value:.4f}" for value in expected}) == 4
    without = loss(case.params, case.batch)[0]
    np.testing.assert_allclose([row.valid_loss for row in result.history], without, rtol=1e-5)


@pytest.mark.thorough
def test_dropout_on_two_devices_draws_other_masks_on_each():
    """Both devices get the same sequences, so only their masks can differ."""
    case = dropout_case()
    half = jax.tree.map(lambda leaf: leaf[:, :4], case.batch)
    batch = jax.tree.map(lambda *halves: jnp.concatenate(halves, axis=1), half, half)
    mesh = Mesh(jax.devices()[:2], ("batch",))

    def gradient_fn(params, batch, h, *, key=None):
        """The state that it returns is the loss of each sequence's device."""
        (value, _), grads = dropout.gradient_fn(params, batch, h, key=key)
        return (value, jnp.broadcast_to(value, batch.xs.shape[1:2])), grads

    parallel = jax.jit(jaxrnn.data_parallel(gradient_fn, mesh))
    (_, losses), _ = parallel(case.params, batch, None, key=case.key)
    assert len(set(losses.tolist())) == 2
    (_, losses), _ = parallel(case.params, batch)
    assert len(set(losses.tolist())) == 1
