"""Streams in training and where steps do not exist, derivatives of their gradients, and errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from jaxrnn import Batch, streams
from jaxrnn.influence import RankOne
from tests.reference import relative_errors


@pytest.fixture
def params():
    return jaxrnn.init(jax.random.key(0), 3, 4, 2)


@pytest.fixture
def batch():
    xs = jax.random.normal(jax.random.key(1), (6, 2, 3))
    return Batch(xs, jax.random.randint(jax.random.key(2), (6, 2), 0, 2))


def forward(name):
    """rtrl, snap1 or uoro, the last with a key."""
    options = {"key": jax.random.key(3)} if name == "uoro" else {}
    return partial(getattr(jaxrnn, name), **options)


@pytest.mark.parametrize("name", ["rtrl", "snap1", "uoro"])
@pytest.mark.parametrize("first_step", [6, 2], ids=["no step", "after a reset"])
def test_a_state_that_no_step_reads_may_be_nan(name, first_step, params, batch):
    """The second sequence has no step, or its first one comes after a reset."""
    exists = jnp.ones((6, 2), bool).at[:first_step, 1].set(False)
    batch = batch._replace(mask=exists, reset=jnp.zeros((6, 2), bool).at[2, 1].set(True))
    h_0 = jnp.zeros((2, 4))
    expected = forward(name)(params, batch, h_0)
    got = forward(name)(params, batch, h_0.at[1].set(jnp.nan))
    assert max(relative_errors((got[0][0], got[1]), (expected[0][0], expected[1]))) == 0


def test_fit_takes_a_stream_as_state(params, batch):
    steps = [jax.tree.map(lambda leaf, t=t: leaf[t : t + 1], batch) for t in range(6)]
    gradient_fn = partial(streams.stream_gradient, influence=streams.full)
    start = streams.start_stream(params, jnp.zeros((2, 4)), streams.full)
    rule = partial(jaxrnn.sgd, learning_rate=0.1)
    fit = partial(jaxrnn.fit, jax.random.key(0), params, steps, optimizer=rule)
    result = fit(gradient_fn=gradient_fn, h_0=start, max_epochs=2)
    expected = params
    for _ in range(2):
        stream = start
        for step in steps:
            (_, stream), grads = gradient_fn(expected, step, stream)
            expected = rule(expected, grads)
    assert max(relative_errors(result.state.params, expected)) <= 1e-5
    with pytest.raises(ValueError, match=r"^h_0\.influence: expected finite numbers, got nan"):
        fit(
            gradient_fn=gradient_fn,
            h_0=start._replace(influence=start.influence.at[0].set(jnp.nan)),
        )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["rtrl", "snap1", "uoro"])
def test_gradients_have_derivatives(name, batch):
    params = jaxrnn.init(jax.random.key(0), 3, 4, 2, dtype=jnp.float64)

    def penalty(params):
        return sum((d**2).sum() for d in forward(name)(params, batch)[1])

    grads = jax.jit(jax.grad(penalty))(params)
    tangent = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(4), leaf.shape), params)
    along = sum(jnp.vdot(d, v) for d, v in zip(grads, tangent, strict=True))
    _, expected = jax.jvp(penalty, (params,), (tangent,))
    np.testing.assert_allclose(along, expected, rtol=1e-10)


@pytest.mark.parametrize("influence", ["full", None, streams.full.start])
def test_what_is_no_influence_is_named(influence, params, batch):
    stream = streams.start_stream(params, jnp.zeros((2, 4)), streams.full)
    with pytest.raises(TypeError, match=r"^influence: expected an Influence such as streams\.full"):
        streams.start_stream(params, jnp.zeros((2, 4)), influence)
    with pytest.raises(TypeError, match=r"^influence: expected an Influence such as streams\.full"):
        streams.stream_gradient(params, batch, stream, influence=influence)
    with pytest.raises(TypeError, match=r"^params: expected Params, got int$"):
        streams.stream_gradient(3, batch, stream, influence=streams.full)


@pytest.mark.usefixtures("x64")
def test_a_step_of_rank_one_has_the_mean_of_a_step_of_the_whole_influence():
    """Over all signs: the keys draw each of the 2^H vectors, and each is counted once."""
    rng = np.random.default_rng(0)
    H, N, leak = 3, 7, jnp.array(0.3)
    W_h, f_prime, a, u, b = (
        jnp.asarray(rng.standard_normal(shape)) for shape in ((H, H), (H,), (H,), (N,), (H, N))
    )
    keys = jax.random.split(jax.random.key(0), 100)
    J = RankOne(a, b)
    draws = jax.vmap(lambda key: streams.rank_one.advance(J, W_h, f_prime, leak, u, key))(keys)
    outer = np.unique(np.einsum("ki,kjn->kjni", *draws).round(12), axis=0)
    assert len(outer) == 2**H
    whole = streams.full.advance(jnp.einsum("i,jn->jni", a, b), W_h, f_prime, leak, u, None)
    np.testing.assert_allclose(outer.mean(axis=0), whole, atol=1e-10)


def test_uoro_of_units_that_do_not_respond_is_finite(params, batch):
    silent = params._replace(b_h=jnp.full(4, -99.0))
    _, grads = jaxrnn.uoro(silent, batch, key=jax.random.key(0), activation=jaxrnn.relu)
    assert all(jnp.isfinite(leaf).all() for leaf in grads)
    assert not grads.W_h.any()


@pytest.mark.parametrize("name", ["rtrl", "snap1"])
def test_a_sum_beyond_the_range_of_float16_has_a_mean(name):
    params = jaxrnn.init(jax.random.key(0), 3, 4, 2, dtype=jnp.float16)
    batch = Batch(jnp.ones((3, 4096, 3)), jnp.full((3, 4096, 2), 100.0))
    gradient_fn = partial(forward(name), loss=jaxrnn.squared_error)
    _, got = gradient_fn(params, batch)
    _, expected = gradient_fn(params, jax.tree.map(lambda leaf: leaf[:, :1], batch))
    assert max(relative_errors(got, expected)) <= 1e-2
