"""Optax optimisers that need more than the gradient, other rules, and errors for a wrong one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrnn
from experiments.recipes import dropout
from jaxrnn import Batch
from tests.recipe_cases import draw, labelled_batch, network
from tests.reference import plain_loss, relative_errors


@pytest.mark.usefixtures("x64")
def test_lbfgs_finds_the_least_squares_readout_in_few_updates():
    params, xs, targets = network(0, 2, 4), draw(1, 9, 5, 2), draw(2, 9, 5, 2)
    batch = Batch(jnp.asarray(xs), jnp.asarray(targets))

    def readout_gradient(readout, batch, h):
        trained = params._replace(**readout)
        result, grads = jaxrnn.bptt(trained, batch, h, loss=jaxrnn.squared_error)
        return result, {"W_y": grads.W_y, "b_y": grads.b_y}

    optimizer = optax.lbfgs()
    update = jaxrnn.make_update(readout_gradient, optimizer)
    state = jaxrnn.init_state({"W_y": params.W_y, "b_y": params.b_y}, optimizer)
    for _ in range(60):
        state, metrics = update(state, batch)
    _, hs = jaxrnn.hidden_states(params, batch.xs)
    design = np.concatenate([hs.reshape(45, 4), np.ones((45, 1))], axis=1)
    expected, *_ = np.linalg.lstsq(design, targets.reshape(45, 2))
    np.testing.assert_allclose(state.params["W_y"], expected[:4].T, atol=1e-6)
    np.testing.assert_allclose(state.params["b_y"], expected[4], atol=1e-6)
    assert metrics.gradient_norm < 1e-6


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("key", [None, 3])
def test_value_fn_has_the_value_and_the_gradient_of_the_gradient_function(key):
    """Elsewhere than at the parameters of the update, and with the key of the update."""
    layers, batch = [network(0, 2, 4), network(1, 4, 4)], labelled_batch()
    key = None if key is None else jax.random.key(key)
    halved = jax.tree.map(lambda leaf: leaf / 2, layers)

    def init(params):
        return jnp.zeros(()), jnp.zeros(()), params

    def update(updates, state, params, *, value_fn, **extra):
        assert extra.keys() == {"value", "grad"}
        return updates, (value_fn(halved), *jax.value_and_grad(value_fn)(halved))

    optimizer = optax.GradientTransformationExtraArgs(init, update)
    state = jaxrnn.init_state(layers, optimizer, key=key)
    state, _ = jaxrnn.make_update(dropout.gradient_fn, optimizer)(state, batch)
    first_key = None if key is None else jax.random.fold_in(key, 0)
    by_autodiff = jax.jit(jax.value_and_grad(dropout.loss, has_aux=True))
    (value, _), grads = by_autodiff(halved, batch, key=first_key)
    assert max(relative_errors(state.opt_state, (value, value, grads))) <= 1e-12


@pytest.mark.usefixtures("x64")
def test_multi_steps_update_by_the_mean_gradient():
    params, optimizer = network(0, 2, 4), optax.MultiSteps(optax.sgd(0.1), every_k_schedule=3)
    batches = [labelled_batch(seed=n) for n in range(3)]
    update = jaxrnn.make_update(jaxrnn.bptt, optimizer)
    state = jaxrnn.init_state(params, optimizer)
    for batch in batches:
        for leaf, initial in zip(state.params, params, strict=True):
            np.testing.assert_array_equal(leaf, initial)
        state, _ = update(state, batch)

    def mean(params):
        return sum(plain_loss(params, batch)[0] for batch in batches) / 3

    expected = jaxrnn.sgd(params, jax.jit(jax.grad(mean))(params), 0.1)
    assert max(relative_errors(state.params, expected)) <= 1e-8  # optax accumulates in float32


def constant_gradient(params, batch, h):
    """A loss of 3 that never falls, and a gradient of 2 for each parameter."""
    return (jnp.array(3.0), h), jax.tree.map(lambda leaf: jnp.full_like(leaf, 2.0), params)


def steps(optimizer, updates):
    """What each update subtracts from one of four parameters."""
    update = jaxrnn.make_update(constant_gradient, optimizer)
    state = jaxrnn.init_state({"w": jnp.zeros(4)}, optimizer)
    path = [0.0]
    for _ in range(updates):
        state, _ = update(state, labelled_batch())
        path.append(state.params["w"][0].item())
    return -np.diff(path)


def test_a_loss_on_a_plateau_reduces_the_step():
    """The first loss is an improvement; after each two without one, the step is a tenth."""
    plateau = optax.contrib.reduce_on_plateau(factor=0.1, patience=2)
    got = steps(optax.chain(optax.sgd(1.0), plateau), 7)
    np.testing.assert_allclose(got, 2 * np.array([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001]), rtol=1e-4)


def test_multi_steps_pass_on_the_loss():
    polyak = optax.polyak_sgd(max_learning_rate=1.0)
    got = steps(optax.MultiSteps(polyak, every_k_schedule=2), 4)
    np.testing.assert_allclose(got, [0, 3 / 16 * 2, 0, 3 / 16 * 2], rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_a_line_search_that_keeps_the_gradient_of_its_last_step():
    """It differentiates `value_fn` itself, with a number of Python as the tangent."""
    params, batch = network(0, 2, 4), labelled_batch()
    search = optax.scale_by_backtracking_linesearch(10, store_grad=True)
    optimizer = optax.chain(optax.sgd(1.0), search)
    state, _ = jaxrnn.make_update(jaxrnn.bptt, optimizer)(
        jaxrnn.init_state(params, optimizer), batch
    )
    stored, expected = state.opt_state[1].grad, jaxrnn.bptt(state.params, batch)[1]
    assert max(relative_errors(stored, expected)) <= 1e-12


def test_the_polyak_step_is_the_loss_over_the_squared_norm():
    """3 / (4 * 2^2) times the gradient of 2, and at most max_learning_rate times it."""
    got = steps(optax.polyak_sgd(max_learning_rate=1.0), 1)
    np.testing.assert_allclose(got, 3 / 16 * 2, rtol=1e-6)
    got = steps(optax.polyak_sgd(max_learning_rate=0.1), 1)
    np.testing.assert_allclose(got, 0.1 * 2, rtol=1e-6)


@pytest.mark.parametrize("factory", [optax.adam, optax.lbfgs, optax.contrib.schedule_free_sgd])
@pytest.mark.parametrize("as_dict", [False, True])
def test_an_optimiser_that_was_not_called_is_named(factory, as_dict):
    params = jaxrnn.init(jax.random.key(0), 2, 4, 2)
    params = {"rnn": params} if as_dict else params
    message = (
        rf"^optimizer: expected .* got <function {factory.__name__} .*Call the optax function first"
    )
    with pytest.raises(TypeError, match=message):
        jaxrnn.make_update(jaxrnn.bptt, factory)
    with pytest.raises(TypeError, match=message):
        jaxrnn.init_state(params, factory)
    with pytest.raises(TypeError, match=message):
        jaxrnn.fit(jax.random.key(0), params, labelled_batch(), optimizer=factory)


@pytest.mark.parametrize(
    ("rule", "advice"),
    [
        (lambda params, grads: None, False),
        (lambda params, grads: grads.W_h, False),
        (partial(optax.adam, eps=1e-6), True),
    ],
    ids=["nothing", "one leaf", "an optimiser"],
)
def test_a_rule_that_returns_something_else_is_named(rule, advice):
    update = jaxrnn.make_update(jaxrnn.bptt, rule)
    state = jaxrnn.init_state(jaxrnn.init(jax.random.key(0), 2, 4, 2), rule)
    message = r"^optimizer: expected a rule that returns new parameters"
    with pytest.raises(TypeError, match=message) as error:
        update(state, labelled_batch())
    assert ("Call the optax function first" in str(error.value)) == advice


def test_an_optimiser_gets_only_what_its_update_takes():
    """SAM takes no value; the second of its updates is that of its inner optimisers by hand."""
    batch = labelled_batch()
    params = jaxrnn.init(jax.random.key(0), 2, 4, 2)
    sam = optax.contrib.sam(optax.sgd(1e-2), optax.sgd(5e-2), sync_period=2)
    update, state = jaxrnn.make_update(jaxrnn.bptt, sam), jaxrnn.init_state(params, sam)
    by_hand, opt_state = params, sam.init(params)
    for _ in range(4):
        state, _ = update(state, batch)
        updates, opt_state = sam.update(jaxrnn.bptt(by_hand, batch)[1], opt_state, by_hand)
        by_hand = optax.apply_updates(by_hand, updates)
    assert max(relative_errors(state.params, by_hand)) <= 1e-5
    assert not jnp.array_equal(state.params.W_h, params.W_h)


def test_a_rule_may_return_any_pytree_class():
    """Also one whose instances compare by identity."""

    class Weights:
        def __init__(self, params):
            self.params = params

    jax.tree_util.register_pytree_node(
        Weights, lambda weights: ((weights.params,), None), lambda _, leaves: Weights(*leaves)
    )

    def gradient_fn(weights, batch, h):
        (value, h_T), grads = jaxrnn.bptt(weights.params, batch, h)
        return (value, h_T), Weights(grads)

    rule, batch = partial(jaxrnn.sgd, learning_rate=0.1), Batch(jnp.ones((5, 3)), jnp.ones(5, int))
    state = jaxrnn.init_state(Weights(jaxrnn.init(jax.random.key(0), 3, 4, 2)), rule)
    state, _ = jaxrnn.make_update(gradient_fn, rule)(state, batch)
    assert isinstance(state.params, Weights)


@pytest.mark.parametrize(
    ("dtype", "new"), [(jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32)]
)
def test_a_rule_that_changes_the_dtype_is_an_error(dtype, new):
    params = jaxrnn.init(jax.random.key(0), 2, 4, 4, dtype=dtype)
    batch = Batch(jnp.ones((5, 2)), jnp.ones(5, int))

    def rule(params, grads):
        return jax.tree.map(lambda p, d: (p - d).astype(new), params, grads)

    with pytest.raises(TypeError, match=r"optimizer: expected a rule .* same shapes and dtypes"):
        jaxrnn.make_update(jaxrnn.bptt, rule)(jaxrnn.init_state(params, rule), batch)


@pytest.mark.thorough
def test_diverged_names_the_eps_of_adam_in_float16():
    xs = jax.random.normal(jax.random.key(1), (7, 4, 3))
    batch = Batch(xs, jax.random.randint(jax.random.key(2), (7, 4), 0, 2))
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2, dtype=jnp.float16)
    fit = partial(jaxrnn.fit, jax.random.key(0), params, batch, max_epochs=2, max_skipped=2)
    with (
        pytest.warns(UserWarning, match="1 of the 1 updates up to step 1 were skipped"),
        pytest.raises(jaxrnn.Diverged, match=r"The gradients are finite, but .* try .*eps=1e-4\)"),
    ):
        fit(optimizer=optax.adam(1e-2))
    result = fit(optimizer=optax.adam(1e-2, eps=1e-4))
    assert [row.skipped for row in result.history] == [0, 0]


def test_the_state_and_the_batch_are_named():
    params = network(0, 2, 4)
    rule = optax.sgd(0.1)
    update = jaxrnn.make_update(jaxrnn.bptt, rule)
    with pytest.raises(TypeError, match=r"^state: expected a TrainState, got Params$"):
        update(params, labelled_batch(7, 4))
    with pytest.raises(TypeError, match=r"^batch: expected Batch.*, got int$"):
        update(jaxrnn.init_state(params, rule), 3)


def test_an_optimiser_may_hold_a_key():
    """Of a dtype that no number is converted to."""
    params, xs, targets = network(0, 2, 4), draw(1, 9, 5, 2), draw(2, 9, 5, 2)
    noise = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1))
    update = jaxrnn.make_update(partial(jaxrnn.bptt, loss=jaxrnn.squared_error), noise)
    state = jaxrnn.init_state(params, noise)
    first = np.asarray(jax.random.key_data(state.opt_state[0].rng_key))
    state, metrics = update(state, Batch(jnp.asarray(xs), jnp.asarray(targets)))
    assert metrics.skipped == 0
    assert not jnp.array_equal(first, jax.random.key_data(state.opt_state[0].rng_key))
