"""The flip-flop experiment: its task, its searches, and the results that it reports."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from experiments import flip_flop
from experiments.cli import InputError
from experiments.flip_flop import Config
from jaxrnn.equilibria import FixedPoints, distinct, fixed_points
from tests.recipe_cases import draw, network

STORED = Path(flip_flop.__file__).parent / "results" / "flip_flop.json"


def test_each_target_is_the_sign_of_the_last_pulse():
    xs, targets, *_ = map(np.asarray, flip_flop.flip_flop_batch(jax.random.key(0), 60, 40)[:2])
    assert set(np.unique(xs)) == {-1, 0, 1}
    assert (xs[0] != 0).all()
    assert abs((xs[1:] != 0).mean() - flip_flop.PULSES) < 0.01
    bits = xs[0]
    for x, target in zip(xs, targets, strict=True):
        bits = np.where(x == 0, bits, x)
        np.testing.assert_array_equal(target, bits)


def test_starts_are_near_means_of_two_states(monkeypatch):
    monkeypatch.setattr(flip_flop, "START_NOISE", 0.0)
    hs = np.arange(24.0).reshape(3, 2, 4) ** 2
    states = hs.reshape(6, 4)
    means = (states[:, None] + states) / 2
    for start in flip_flop.starts(Config(starts=30), hs, 0):
        assert np.isclose(means, start).all(axis=-1).any()


@pytest.mark.usefixtures("x64")
def test_both_finders_find_the_same_points():
    """Two units that hold a bit each: h = tanh(2 h) in each, nine points."""
    params = network(0, 3, 2)._replace(W_h=2 * jnp.eye(2), b_h=jnp.zeros(2))
    config = Config(leak=0.5, adam_steps=2000)
    starts = 2 * draw(0, 200, 2)
    by_adam = jax.jit(partial(flip_flop.adam, config, 0.1))(params, starts)
    by_newton = jax.jit(partial(fixed_points, leak=0.5))(params, starts, jnp.zeros(3))
    found = [distinct(points, 1e-4) for points in (by_adam, by_newton)]
    first, second = (points.h[np.lexsort(np.round(points.h, 3).T)] for points in found)
    assert len(first) == 9
    np.testing.assert_allclose(first, second, atol=1e-5)
    for points in found:
        measured = flip_flop.measure(points)
        assert (measured["stable"], measured["saddles"]) == (4, [4, 1, 0])
        assert measured["sum_of_signs"] == 1
    missing = jax.tree.map(lambda leaf: leaf[1:], found[1])
    assert flip_flop.measure(missing)["sum_of_signs"] != 1


def test_nothing_found_is_measured_and_drawn():
    nothing = FixedPoints(np.zeros((0, 4)), np.zeros(0), np.zeros((0, 4, 4)), np.zeros(0, bool))
    measured = flip_flop.measure(nothing)
    assert (measured["points"], measured["stable"], measured["saddles"]) == (0, 0, [0, 0, 0])
    row = {"network": 0, "finder": "Newton", "seconds": 1.0, "percent": 0.0, **measured}
    flip_flop.plt.close(flip_flop.draw([row]))
    assert "0.0 % converge" in flip_flop.summarize([row])


@pytest.mark.usefixtures("x64")
def test_directions_are_the_unstable_eigenvectors():
    hs = draw(0, 30, 25, 5) * np.array([5, 4, 3, 0.1, 0.1])
    basis = np.linalg.qr(draw(1, 5, 5))[0]
    J = basis @ np.diag([0.1, 0.2, 1.5, 0.3, 0.4]) @ basis.T
    point = FixedPoints(hs[:1, 0], np.zeros(1), J[None], np.ones(1, bool))
    row = flip_flop.project(point, hs)
    assert np.shape(row["trajectories"]) == (24, 30, 3)
    assert row["unstable_dims"] == [1]
    centered = (hs - hs.mean(axis=(0, 1))).reshape(-1, 5)
    axes = np.linalg.eigh(centered.T @ centered)[1][:, :-4:-1]
    np.testing.assert_allclose(np.abs(row["directions"][0]), np.abs(basis[:, 2] @ axes))
    np.testing.assert_allclose(np.abs(row["at"][0]), np.abs(centered[0] @ axes))


def test_a_leak_above_1_is_refused():
    with pytest.raises(InputError, match=r"^--leak: expected at most 1, got 1.5$"):
        Config(leak=1.5)


def test_each_stored_network_has_eight_stable_points_and_all_saddles():
    """The signs of det(I - J) add up to 1, so no single point is missing."""
    summary = json.loads(STORED.read_text())
    networks = summary["figures"]["networks"]
    assert len(networks) == summary["settings"]["seeds"] >= 5
    for row in networks:
        assert row["stable"] == 2**flip_flop.BITS
        assert row["largest_speed"] < 1e-12
        assert row["largest_radius"] < 1
        assert row["stable"] + sum(row["saddles"]) == row["points"]
        assert row["marginal"] == 0
        assert row["sum_of_signs"] == 1
    assert max(summary["figures"]["wrong_bits"]) < 1e-3


def test_the_state_of_a_step_without_input_stays_in_the_cube():
    """On which the count of the signs rests."""
    params, h = network(0, 3, 6), jnp.asarray(np.sign(draw(0, 50, 6)))
    after, _ = jaxrnn.step(params, h, jnp.zeros((50, 3)), leak=0.5)
    assert (jnp.abs(after) <= 1).all()
