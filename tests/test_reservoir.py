"""The reservoir experiment: its series, its network and readout, and runs without reservoirpy."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from experiments import echo_state, reservoir
from experiments.echo_state import CONNECTIVITY, TASKS, Steps

STEPS = Steps(washout=20, training=150, test=120, starts=2, loop=90)
MACKEY_GLASS, NARMA = TASKS


class Middle:
    """A generator whose random numbers are all the middle of their range."""

    def random(self) -> float:
        return 0.5


def test_mackey_glass_takes_runge_kutta_steps_from_a_constant_history():
    """x' = 0.2 d / (1 + d^10) - 0.1 x. In the first 17 time units the delayed value d is 1.2."""
    xs, targets = echo_state.mackey_glass(Middle(), 5)
    assert xs.shape == targets.shape == (5, 1)
    np.testing.assert_array_equal(xs[1:], targets[:-1])
    equilibrium = 10 * 0.2 * 1.2 / (1 + 1.2**10)
    exact = equilibrium + (1.2 - equilibrium) * np.exp(-0.1 * np.arange(6))
    np.testing.assert_allclose(xs[:, 0] + 1, exact[:5], rtol=1e-8)
    np.testing.assert_allclose(targets[:, 0] + 1, exact[1:], rtol=1e-8)


def test_mackey_glass_approaches_small_euler_steps():
    """Past the delay of 17 as well."""
    dt, steps = 0.002, 40
    delay, per_step = round(17 / dt), round(1 / dt)
    series = [1.2] * (delay + 1)
    for n in range(delay, delay + steps * per_step):
        d = series[n - delay]
        series.append(series[n] + dt * (0.2 * d / (1 + d**10) - 0.1 * series[n]))
    _, targets = echo_state.mackey_glass(Middle(), steps)
    np.testing.assert_allclose(targets[:, 0] + 1, series[delay + per_step :: per_step], atol=2e-3)


def test_narma_follows_its_recursion():
    us, ys = (series[:, 0] for series in echo_state.narma(np.random.default_rng(0), 60))
    assert us.min() >= 0
    assert us.max() <= 0.5
    for t in range(10, 59):
        last = sum(ys[t - 1 - i] for i in range(10))
        y = 0.3 * ys[t - 1] + 0.05 * ys[t - 1] * last + 1.5 * us[t - 9] * us[t] + 0.1
        assert ys[t] == pytest.approx(y, rel=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_W_h_is_sparse_and_has_the_spectral_radius(task):
    params = echo_state.init_network(jax.random.key(0), 80, task)
    assert np.abs(np.linalg.eigvals(params.W_h)).max() == pytest.approx(task.radius, rel=1e-10)
    assert np.mean(np.asarray(params.W_h) != 0) == pytest.approx(CONNECTIVITY, abs=0.02)
    assert params.W_h.dtype == jnp.float64


@pytest.mark.usefixtures("x64")
def test_a_small_W_h_is_drawn_again_until_it_has_a_cycle():
    radii = []
    for key in jax.random.split(jax.random.key(0), 60):
        W_h = echo_state.sparse(key, (10, 10), jnp.float64, radius=0.9)
        radii.append(np.abs(np.linalg.eigvals(W_h)).max())
    np.testing.assert_allclose(radii, 0.9, rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_the_readout_is_least_squares_on_an_augmented_system():
    """Rows sqrt(ridge) I below the states penalise W_y, and a column of ones gives b_y."""
    rng = np.random.default_rng(0)
    hs, targets, ridge = rng.standard_normal((50, 6)) + 3, rng.standard_normal((50, 2)), 0.7
    rows = np.block([[hs, np.ones((50, 1))], [ridge**0.5 * np.eye(6), np.zeros((6, 1))]])
    expected = np.linalg.lstsq(rows, np.vstack([targets, np.zeros((6, 2))]), rcond=None)[0]
    params = jaxrnn.init(jax.random.key(0), 1, 6, 2, dtype=jnp.float64)
    fitted = echo_state.fit_readout(params, jnp.asarray(hs), jnp.asarray(targets), ridge)
    np.testing.assert_allclose(fitted.W_y, expected[:6].T, atol=1e-12)
    np.testing.assert_allclose(fitted.b_y, expected[6], atol=1e-12)


def series(task):
    return task.series(np.random.default_rng(1), STEPS.training + STEPS.test)


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
def test_the_closed_loop_reads_its_own_predictions():
    xs, targets = series(MACKEY_GLASS)
    params = echo_state.init_network(jax.random.key(0), 30, MACKEY_GLASS)
    predicted = echo_state.predict(STEPS, MACKEY_GLASS, params, xs, targets)
    train = slice(STEPS.washout, STEPS.training)
    params = echo_state.fit_readout(params, predicted.hs[train], targets[train], MACKEY_GLASS.ridge)
    for loop, start in enumerate(STEPS.loop_starts()):
        h, y = predicted.hs[start], xs[start + 1]
        for n in range(3):
            h, y = jaxrnn.step(params, h, y, leak=MACKEY_GLASS.leak)
            np.testing.assert_allclose(predicted.loops[n, loop], y, atol=1e-9)
    measured = echo_state.errors(STEPS, MACKEY_GLASS, targets, predicted)
    perfect = predicted._replace(
        ys=targets[STEPS.training :],
        loops=np.stack([targets[start + 1 :][:90] for start in STEPS.loop_starts()], axis=1),
    )
    assert set(echo_state.errors(STEPS, MACKEY_GLASS, targets, perfect).values()) == {0}
    assert min(measured.values()) > 0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_reservoirpy_has_the_same_states_and_predictions(task):
    pytest.importorskip("reservoirpy")
    xs, targets = series(task)
    params = echo_state.init_network(jax.random.key(0), 30, task)
    arguments = STEPS, task._replace(ridge=1e-3), params, xs, targets
    ours, theirs = echo_state.predict(*arguments), echo_state.predict_reservoirpy(*arguments)
    np.testing.assert_allclose(ours.hs, theirs.hs, atol=1e-12)
    np.testing.assert_allclose(ours.ys, theirs.ys, atol=1e-9)
    if task.closed_loop:
        np.testing.assert_allclose(ours.loops[:5], theirs.loops[:5], atol=1e-8)


def test_other_states_are_refused():
    echo_state.check_agreement("right", np.ones(3), np.ones(3))
    for wrong in (np.full(3, 1.1), np.full(3, np.nan)):
        with pytest.raises(AssertionError, match=r"^wrong: expected the states of jaxrnn, got "):
            echo_state.check_agreement("wrong", wrong, np.ones(3))


@pytest.mark.thorough
@pytest.mark.parametrize("installed", [True, False])
def test_the_experiment_runs_with_and_without_reservoirpy(installed, tmp_path, capsys, monkeypatch):
    if installed:
        pytest.importorskip("reservoirpy")
    monkeypatch.setattr(reservoir, "has_reservoirpy", lambda: installed)
    assert reservoir.run(["--smoke", "--out", str(tmp_path / "out")]) == 0
    left_out = "reservoirpy is not installed and left out\n"
    assert (left_out in capsys.readouterr().err) is not installed
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert ("reservoirpy" in summary["ours"]) is installed
    assert (tmp_path / "out" / "figure.png").exists()


def test_both_libraries_have_the_same_stored_errors():
    """The states are equal to rounding, so the errors are."""
    path = Path(reservoir.__file__).parent / "results" / "reservoir.json"
    ours = json.loads(path.read_text())["ours"]
    (part,) = [part for part in ours.split("; ") if part.startswith("NARMA-10, NRMSE")]
    jaxrnn_error, reservoirpy_error = part.split(": ")[1].split(", ")
    assert jaxrnn_error.split(" ", 1)[1] == reservoirpy_error.split(" ", 1)[1]
