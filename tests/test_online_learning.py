"""Online learning on addition: its streams, its levels, its updates, and what it reports."""

import json
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrnn
from experiments import online_learning, online_report
from experiments.cli import InputError
from experiments.long_lag_tasks import last_step
from experiments.online_learning import Config
from jaxrnn import Batch
from tests.recipe_cases import draw, network
from tests.reference import relative_errors

LAGS = 2, 5
STORED = Path(online_learning.__file__).parent / "results" / "online_learning.json"


def config(**changed):
    return Config(**{**online_learning.SMOKE, **changed})


def by_name(config, name):
    return next(method for method in online_learning.methods(config) if method.name == name)


def test_the_levels_are_the_mean_entropies_of_the_target_given_what_is_known():
    """All 2^6 streams of six bits; only the bits of the two lags before the last step count."""
    bits = np.array(list(np.ndindex((2,) * 6)), np.float32).T
    targets = np.asarray(online_learning.addition(jnp.asarray(bits), LAGS, 1))[0]
    assert set(targets.tolist()) == {0.25, 0.5, 0.75, 1.0}
    known = {"neither bit": (), "the first bit": LAGS[:1], "both bits": LAGS}
    assert known.keys() == online_learning.LEVELS.keys()
    for name, lags in known.items():
        groups = bits[[-1 - lag for lag in lags]].T
        entropies = []
        for group in groups:
            p = targets[(groups == group).all(axis=1)].mean()
            entropies.append(-sum(q * math.log(q) for q in (p, 1 - p) if q))
        assert np.mean(entropies) == pytest.approx(online_learning.LEVELS[name], abs=1e-5)


def test_a_target_follows_from_the_bits_of_the_two_lags_alone():
    T, past = 12, 6
    bits = np.asarray(online_learning.coin_flips(jax.random.key(0), 0, past + T, 3))
    targets = online_learning.addition(jnp.asarray(bits), LAGS, T)
    for step in range(past + T):
        flipped = bits.copy()
        flipped[step, 1] = 1 - flipped[step, 1]
        change = np.asarray(online_learning.addition(jnp.asarray(flipped), LAGS, T) - targets)
        expected = np.zeros((T, 3))
        for lag, weight in zip(LAGS, (0.5, -0.25), strict=True):
            if past <= step + lag < past + T:
                expected[step + lag - past, 1] = weight * (flipped[step, 1] - bits[step, 1])
        np.testing.assert_array_equal(change, expected)


def test_a_stream_has_the_same_bits_wherever_it_is_read_from():
    key = jax.random.key(3)
    bits = np.asarray(online_learning.coin_flips(key, 0, 500, 4))
    np.testing.assert_array_equal(online_learning.coin_flips(key, 123, 40, 4), bits[123:163])
    assert set(np.unique(bits)) == {0, 1}
    assert abs(bits.mean() - 0.5) < 0.05
    assert (np.abs(np.corrcoef(bits.T)[np.triu_indices(4, 1)]) < 0.2).all()


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
def test_a_window_over_the_whole_stream_has_the_gradient_of_rtrl():
    """That of the last loss, at fixed parameters. A shorter window leaves something out."""
    T, B, params = 9, 2, network(0, 1, 4, 1)
    xs, targets = jnp.asarray(draw(1, T, B, 1)), jnp.full((T, B, 1), 0.3)
    rtrl = jax.jit(partial(jaxrnn.rtrl, loss=online_learning.LOSS))
    (value, _), exact = rtrl(params, Batch(xs, targets, weights=last_step(T, B)))
    truncated, errors = jax.jit(online_learning.truncated), {}
    for k in (3, T):
        h = jnp.zeros((B, 4))
        for n in range(T - k + 1):
            window = Batch(xs[n : n + k], targets[n : n + k], weights=last_step(k, B))
            (last, h), grads = truncated(params, window, h)
        assert last == pytest.approx(float(value), rel=1e-12)
        h_T, _ = jaxrnn.hidden_states(params, xs[: T - k + 1])
        np.testing.assert_allclose(h, h_T, rtol=1e-12)
        errors[k] = max(relative_errors(grads, exact))
    assert errors[T] < 1e-12
    assert errors[3] > 1e-3


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["window 2", "UORO"])
def test_the_stream_goes_on_from_check_to_check(name):
    """Two checks of four updates are one of eight."""
    states = []
    for every, checks in ((4, 2), (8, 1)):
        small = config(check_every=every)
        start, updates_and_check = online_learning.make_training(small, by_name(small, name))
        state, run = start(jax.random.key(1)), jax.jit(updates_and_check)
        for _ in range(checks):
            state, _ = run(state, jax.random.key(0), jnp.array([2, 4]), jax.random.key(2))
        states.append(state)
    assert states[0].step == 8
    for one, other in zip(*(jax.tree.leaves(state.params) for state in states), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.thorough
def test_an_update_reads_its_window_and_its_target_off_the_stream():
    """Eight updates by autodiff and optax, in a loop over the steps 5, ..., 12 of the stream."""
    small, key = config(check_every=8), jax.random.key(5)
    start, updates_and_check = online_learning.make_training(small, by_name(small, "window 2"))
    state, lags = start(key), (3, 5)
    bits = online_learning.coin_flips(key, 0, 13, small.streams)
    optimizer = optax.adam(small.learning_rate)
    params, opt_state, h, losses = state.params, state.opt_state, state.h, []

    @jax.jit
    def value_and_grad(params, h, xs, target):
        def loss(params):
            h_1, _ = jaxrnn.step(params, h, xs[0])
            _, y = jaxrnn.step(params, h_1, xs[1])
            return jnp.logaddexp(0, y).mean() - (target * y).mean(), h_1

        return jax.value_and_grad(loss, has_aux=True)(params)

    for t in range(5, 13):
        target = 0.5 + 0.5 * bits[t - 3] - 0.25 * bits[t - 5]
        (value, h), grads = value_and_grad(params, h, bits[t - 1 : t + 1, :, None], target[:, None])
        changes, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(params, changes)
        losses.append(value)
    state, loss = jax.jit(updates_and_check)(state, key, jnp.array(lags), key)
    assert loss == pytest.approx(float(np.mean(losses)), rel=1e-5)
    assert max(relative_errors((state.params, state.h), (params, h))) < 1e-4


def losses_of_training(name, updates):
    small = config(
        lags=(2,), timed_lag=2, between=1, windows=(2, 4), updates=updates, check_every=500,
        hidden_size=8, streams=8, learning_rate=1e-2,
    )  # fmt: skip
    *_, (_, losses) = online_learning.train(small, by_name(small, name), (2,), updates)
    return losses


@pytest.mark.thorough
def test_a_window_learns_only_lags_that_it_spans():
    assert losses_of_training("window 2", 1500).min() > 0.53
    for name in ("window 4", "RTRL"):
        assert losses_of_training(name, 1500).max() < 0.48, name


def test_a_network_has_diverged_from_its_first_skipped_update_on():
    """A gradient that is not finite in one stream, with a loss that is."""

    def gradient_fn(params, batch, h):
        (value, h), grads = online_learning.truncated(params, batch, h)
        return (value, h), jax.tree.map(lambda d: d / batch.xs[-1, 0, 0], grads)

    small = config()
    method = by_name(small, "window 2")._replace(gradient_fn=gradient_fn)
    start, updates_and_check = online_learning.make_training(small, method)
    key = jax.random.key(0)
    state, loss = jax.jit(updates_and_check)(start(key), key, jnp.array([3, 5]), key)
    assert np.isnan(loss)
    assert all(np.isnan(leaf).all() for leaf in state.params)


ROWS = [
    {"method": "window 2", "cost": "k H N", "microseconds": 50.0},
    {"method": "RTRL", "cost": "H^3 N", "microseconds": 100.0},
    {"method": "window 2", "lag": 3, "updates": 10, "losses": [0.6, 0.7]},
    {"method": "window 2", "lag": 3, "updates": 20, "losses": [0.5, None]},
    {"method": "RTRL", "lag": 3, "updates": 10, "losses": [0.4, 0.4]},
]


def test_the_summary_compares_equal_updates_and_equal_times():
    assert online_report.losses_after(ROWS, "window 2", 3, 19) == [0.6, 0.7]
    assert online_report.losses_after(ROWS, "window 2", 3, 1) == [0.6, 0.7]
    summary = online_report.summarize(ROWS[:3] + ROWS[4:], 10, 3, seconds=0.001)
    assert summary == (
        "cross-entropy after 10 updates: window 2, O(B k H N): 50 µs per update, 0.650 ± 0.071 at "
        "t1 = 3, and in the time of RTRL 0.650 ± 0.071 at t1 = 3; RTRL, O(B H^3 N): 100 µs per "
        "update, 0.400 ± 0.000 at t1 = 3, and in the time of RTRL 0.400 ± 0.000 at t1 = 3"
    )
    longer = [*ROWS[:3], {**ROWS[3], "losses": [0.5, 0.5]}, ROWS[4]]
    assert "in the time of RTRL 0.500 ± 0.000" in online_report.summarize(longer, 10, 3, 0.001)
    assert "0.650 ± 0.071 at t1 = 3, and" in online_report.summarize(longer, 10, 3, 0.001)


def test_in_the_stored_results_RTRL_learns_where_windows_do_not_reach():
    summary = json.loads(STORED.read_text())
    settings, losses = summary["settings"], summary["figures"]["losses"]
    assert settings["seeds"] >= 3
    for lag in settings["lags"]:
        assert np.mean(losses["RTRL"][str(lag)]) < 0.47
        for k in settings["windows"]:
            if k <= lag:  # the window does not hold x_{t - t1}
                assert np.mean(losses[f"window {k}"][str(lag)]) > 0.5


def test_a_loss_that_is_missing_is_drawn_as_a_gap():
    figure = online_report.draw(ROWS, online_learning.LEVELS, 10, 3)
    online_report.plt.close(figure)
    (line,) = (line for line in figure.axes[2].lines if line.get_label() == "window 2")
    assert line.get_xdata() == pytest.approx([5e-4, 1e-3])
    assert np.isnan(line.get_ydata()[1])


def test_the_timed_lag_is_one_of_the_lags():
    with pytest.raises(InputError, match="--timed-lag: expected one of --lags, got 7"):
        Config(timed_lag=7)
