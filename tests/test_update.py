import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrnn
from jaxrnn import Batch, Params
from tests.reference import relative_errors


@pytest.fixture
def params():
    return jaxrnn.init(jax.random.key(0), 3, 5, 2)


@pytest.fixture
def batch():
    xs = jax.random.normal(jax.random.key(1), (7, 4, 3))
    return Batch(xs, jax.random.randint(jax.random.key(2), (7, 4), 0, 2))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("compile", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_sgd_is_optax_sgd_bit_for_bit(dtype, compile):
    params, grads = (jaxrnn.init(jax.random.key(k), 30, 40, 20, dtype=dtype) for k in (0, 1))
    optimizer = optax.sgd(0.1)

    def by_optax(params, grads):
        updates, _ = optimizer.update(grads, optimizer.init(params))
        return optax.apply_updates(params, updates)

    ours = compile(partial(jaxrnn.sgd, learning_rate=0.1))(params, grads)
    theirs = compile(by_optax)(params, grads)
    for a, b in zip(ours, theirs, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_sgd_takes_one_rate_and_gradients_of_the_shapes_of_the_parameters(params):
    with pytest.raises(TypeError, match=r"^learning_rate: expected a number, got Params"):
        jaxrnn.sgd(params, params, Params(*range(5)))
    with pytest.raises(ValueError, match=r"^grads: expected shape \(5, 5\) .*, got \(9, 5, 5\)"):
        jaxrnn.sgd(params, params._replace(W_h=jnp.ones((9, 5, 5))), 0.1)


@pytest.mark.usefixtures("x64")
def test_one_update_worked_out_by_hand():
    """Two steps, 2 x 2 weights, f = g = identity, l = (y - target)^2 / 2, eta = 1; by hand:

    W_x = W_y = 1, W_h = [[0, 1], [1, 0]], b = 0; x_1 = (1, 0), x_2 = (0, 1).
    h_1 = (1, 0), h_2 = W_h h_1 + x_2 = (0, 2); the mean over two steps halves every error.
    targets (0, 0), (0, 0): dy_1 = (1/2, 0), dy_2 = (0, 1).
    dz_2 = dh_2 = dy_2 = (0, 1); dz_1 = dh_1 = dy_1 + W_h^T dz_2 = (3/2, 0).
    dW_x = dz_1 x_1^T + dz_2 x_2^T = [[3/2, 0], [0, 1]]; dW_h = dz_2 h_1^T = [[0, 0], [1, 0]];
    dW_y = dy_1 h_1^T + dy_2 h_2^T = [[1/2, 0], [0, 2]]; db_h = (3/2, 1); db_y = (1/2, 1).
    """
    one = jnp.eye(2)
    params = Params(one, one[::-1], one, jnp.zeros(2), jnp.zeros(2))
    gradient_fn = partial(jaxrnn.bptt, activation=jaxrnn.identity, loss=jaxrnn.squared_error)
    rule = partial(jaxrnn.sgd, learning_rate=1.0)
    update = jaxrnn.make_update(gradient_fn, rule)
    batch = Batch(xs=one, targets=jnp.zeros((2, 2)))
    state, metrics = update(jaxrnn.init_state(params, rule), batch)
    expected = Params(
        W_x=[[1 - 1.5, 0], [0, 1 - 1]],
        W_h=[[0, 1], [1 - 1, 0]],
        W_y=[[1 - 0.5, 0], [0, 1 - 2]],
        b_h=[-1.5, -1],
        b_y=[-0.5, -1],
    )
    for got, want in zip(state.params, expected, strict=True):
        np.testing.assert_array_equal(got, want)
    assert metrics.loss == (1 / 2 + 4 / 2) / 2
    norm = 1.5**2 + 1 + 1 + 0.5**2 + 2**2 + 1.5**2 + 1 + 0.5**2 + 1
    np.testing.assert_allclose(metrics.gradient_norm**2, norm)
    assert metrics.counted == 2


def test_bptt_and_autodiff_train_alike(params, batch):
    after = []
    for gradient_fn in (jaxrnn.bptt, jax.value_and_grad(jaxrnn.sequence_loss, has_aux=True)):
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
        update = jaxrnn.make_update(gradient_fn, optimizer)
        state = jaxrnn.init_state(params, optimizer)
        for _ in range(5):
            state, _ = update(state, batch)
        after.append(state.params)
    for a, b in zip(*after, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_hundred_updates_are_traced_once_and_lower_the_loss(params, batch):
    traces = []

    def gradient_fn(*arguments):
        traces.append(arguments)
        return jaxrnn.bptt(*arguments)

    optimizer = optax.adam(1e-2)
    update = jaxrnn.make_update(gradient_fn, optimizer)
    state = jaxrnn.init_state(params, optimizer, h=jnp.zeros((4, 5)))
    losses = []
    for _ in range(100):
        state, metrics = update(state, batch)
        losses.append(metrics.loss.item())
    assert len(traces) == 1
    assert update.__name__ == "update"  # the name of the compiled program in a profile
    assert state.step == 100
    assert losses[-1] < 0.5 * losses[0]


def test_the_state_is_donated_and_the_callers_parameters_are_not(params, batch):
    rule = partial(jaxrnn.sgd, learning_rate=0.1)
    update = jaxrnn.make_update(jaxrnn.bptt, rule)
    state = jaxrnn.init_state(params, rule)
    new, _ = update(state, batch)
    assert state.params.W_h.is_deleted()
    assert not new.params.W_h.is_deleted()
    assert not params.W_h.is_deleted()


@pytest.mark.thorough
def test_a_state_that_vmap_does_not_map_is_not_donated(params, batch):
    """XLA warns of a donated state that it cannot reuse, and warnings are errors here."""
    rule = partial(jaxrnn.sgd, learning_rate=0.1)
    update = jaxrnn.make_update(jaxrnn.bptt, rule)
    state = jaxrnn.init_state(params, rule)
    batches = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), batch)
    new, metrics = jax.jit(jax.vmap(update, in_axes=(None, 0)))(state, batches)
    again, _ = jax.vmap(update, in_axes=(None, 0))(state, batches)
    assert not state.params.W_h.is_deleted()
    alone, alone_metrics = update(state, jax.tree.map(lambda leaf: leaf[1], batches))
    for together in (new, again):
        np.testing.assert_allclose(together.params.W_h[1], alone.params.W_h, rtol=1e-5)
    np.testing.assert_allclose(metrics.loss[1], alone_metrics.loss, rtol=1e-5)


@pytest.mark.parametrize("transform", [jax.grad, jax.jacfwd, jax.vmap], ids=lambda f: f.__name__)
def test_a_state_beside_a_traced_rate_is_not_donated(transform, params, batch):
    state = jaxrnn.init_state(params, jaxrnn.sgd)

    def loss_after(rate):
        update = jaxrnn.make_update(jaxrnn.bptt, partial(jaxrnn.sgd, learning_rate=rate))
        return jaxrnn.sequence_loss(update(state, batch)[0].params, batch)[0]

    rate = jnp.array([0.1, 0.2]) if transform is jax.vmap else 0.1
    first, second = (transform(loss_after)(rate) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.usefixtures("x64")
def test_the_carried_state_continues_the_stream_and_cuts_the_gradient(batch):
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2, dtype=jnp.float64)
    rule = partial(jaxrnn.sgd, learning_rate=0.0)
    update = jaxrnn.make_update(jaxrnn.bptt, rule)
    state = jaxrnn.init_state(params, rule, h=jnp.zeros((4, 5)))
    for window in jaxrnn.windows(batch, 3):
        state, metrics = update(state, window)
    hidden_states = jax.jit(jaxrnn.hidden_states)
    h_T, _ = hidden_states(params, batch.xs)
    assert max(relative_errors(state.h, h_T)) <= 1e-12
    h_6, _ = hidden_states(params, batch.xs[:6])
    last = jax.tree.map(lambda leaf: leaf[6:], batch)
    cut = jax.jit(jax.grad(lambda p: jaxrnn.sequence_loss(p, last, h_6)[0]))(params)
    np.testing.assert_allclose(metrics.gradient_norm, optax.tree.norm(cut), rtol=1e-12)


def test_without_a_state_to_carry_every_batch_starts_from_zeros(params, batch):
    rule = partial(jaxrnn.sgd, learning_rate=0.0)
    update = jaxrnn.make_update(jaxrnn.bptt, rule)
    state, first = update(jaxrnn.init_state(params, rule), batch)
    state, second = update(state, batch)
    assert state.h is None
    assert first.loss == second.loss


def test_counted_is_the_weight_of_the_steps_that_exist(params, batch):
    rule = partial(jaxrnn.sgd, learning_rate=0.0)
    update = jaxrnn.make_update(jaxrnn.bptt, rule)
    mask = jnp.arange(28).reshape(7, 4) < 10
    weighted = batch._replace(mask=mask, weights=jnp.full((7, 4), 0.5))
    _, metrics = update(jaxrnn.init_state(params, rule), weighted)
    assert metrics.counted == 5.0


# Numbers that go wrong: each of these is planted in one batch of a stream.

BAD = {"nan": jnp.nan, "inf": jnp.inf, "-inf": -jnp.inf, "huge": 1e30}
SPOILT = ["loss", *Params._fields, "h_T"]
PLANTED = [f"{place} {bad}" for place in ["xs", "targets", *SPOILT] for bad in list(BAD)[:3]]
PLANTED += ["weights nan", "h nan", "h inf", "params nan", "square overflows"]
PLANTED += ["W_h huge"]  # Adam would take its square, which is infinite, and go on


def spoiling(params, batch, h):
    """The gradient with a bad value in the place that the weight of the first step encodes."""

    def spoil(place, x):
        for number, bad in enumerate(BAD.values()):
            code = 100 + len(BAD) * SPOILT.index(place) + number
            spoilt = x.at[(0,) * x.ndim].set(bad)
            x = jnp.where(batch.weights[0, 0] == code, spoilt, x)
        return x

    gradient_fn = partial(jaxrnn.bptt, loss=jaxrnn.squared_error)
    (value, h_T), grads = gradient_fn(params, batch, h)
    grads = Params(*(spoil(name, leaf) for name, leaf in grads._asdict().items()))
    return (spoil("loss", value), spoil("h_T", h_T)), grads


def plant(name, batch, state):
    place, _, bad = name.rpartition(" ")
    if place in SPOILT:
        code = 100 + len(BAD) * SPOILT.index(place) + list(BAD).index(bad)
        return batch._replace(weights=batch.weights.at[0, 0].set(code)), state
    if place in ("xs", "targets", "weights"):
        leaf = getattr(batch, place)
        return batch._replace(**{place: leaf.at[(0,) * leaf.ndim].set(BAD[bad])}), state
    if place == "h":
        return batch, state._replace(h=state.h.at[0, 0].set(BAD[bad]))
    if place == "params":
        W_y = state.params.W_y.at[0, 0].set(BAD[bad])
        return batch, state._replace(params=state.params._replace(W_y=W_y))
    return batch._replace(targets=batch.targets.at[0, 0].set(3e19)), state  # its square is infinite


@pytest.fixture(scope="module")
def spoiling_update():
    optimizer = optax.adam(1e-2)
    return jaxrnn.make_update(spoiling, optimizer), optimizer


def bits(state):
    kept = state.params, state.opt_state, state.h
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(kept)]


@pytest.mark.parametrize("name", PLANTED, ids=lambda name: name.replace(" ", "-"))
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(name, spoiling_update, params):
    update, optimizer = spoiling_update
    xs = jax.random.normal(jax.random.key(1), (7, 4, 3))
    good = Batch(xs, jnp.ones((7, 4, 2)), weights=jnp.ones((7, 4)))
    state, metrics = update(jaxrnn.init_state(params, optimizer, h=jnp.zeros((4, 5))), good)
    assert metrics.skipped == state.skipped == 0
    bad, planted = plant(name, good, state)
    before = bits(planted)
    for count in (1, 2, 3):
        planted, metrics = update(planted, bad)
        assert bits(planted) == before
        assert metrics.skipped == planted.skipped == count
        assert planted.step == 1 + count
    if name.startswith(("h ", "params ")):
        return  # what is spoilt stays: the loop stops, and no checkpoint is made of it
    planted, metrics = update(planted, good)
    assert metrics.skipped == planted.skipped == 0
    assert bits(planted) != before
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(planted.params))


def test_a_train_state_made_by_hand_has_no_skipped_updates(params, batch):
    rule = partial(jaxrnn.sgd, learning_rate=0.1)
    state = jaxrnn.TrainState(jnp.zeros((), int), params, ())
    bad = batch._replace(xs=batch.xs * jnp.nan)
    _, metrics = jaxrnn.make_update(jaxrnn.bptt, rule)(state, bad)
    assert metrics.skipped == 1


def test_an_update_that_overflows_the_parameters_is_skipped(params):
    """theta + 1e38 theta: from 1e-20 to 1e18, then beyond the range of float32."""
    rule = partial(jaxrnn.sgd, learning_rate=-1e38)
    update = jaxrnn.make_update(lambda params, batch, h: ((jnp.ones(()), None), params), rule)
    state = jaxrnn.init_state(jax.tree.map(lambda leaf: leaf * 1e-20, params), rule)
    for skipped in (0, 1, 2):
        state, metrics = update(state, Batch(jnp.ones((1, 3)), jnp.ones(1)))
        assert np.isfinite(metrics.gradient_norm)
        assert metrics.skipped == skipped


def test_diverged_names_the_step_and_what_to_try():
    error = jaxrnn.Diverged(12, 3, [0.5, 80.0, float("nan")])
    message = "step 12: .* got 3 consecutive skipped updates; .*: 0.5, 80, nan. Try .*data$"
    with pytest.raises(jaxrnn.Diverged, match=message):
        raise error
    assert (error.step, error.skipped, error.gradient_norms[:2]) == (12, 3, [0.5, 80.0])
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error)
    assert (copy.step, copy.skipped) == (12, 3)


def test_a_gradient_function_that_is_none_is_named():
    with pytest.raises(TypeError, match="gradient_fn: expected a function, got None"):
        jaxrnn.make_update(None, optax.sgd(0.1))
