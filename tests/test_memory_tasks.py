"""The tasks of hessian_free: what is shown, what is asked, and where."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import hessian_free, memory_tasks
from experiments.long_lag_tasks import wrong_sequences
from jaxrnn import Params
from tests.conftest import default_and_thorough

T, B = 100, 64
TASKS = {task.name: task for task in memory_tasks.TASKS}


def batch_of(name, seed=0, T=T):
    batch = TASKS[name].batch(jax.random.key(seed), T, B)
    return tuple(map(np.asarray, (batch.xs, batch.targets, batch.weights)))


def test_every_task_has_its_name_in_the_settings():
    assert set(get_args(hessian_free.TaskName)) == set(hessian_free.TASKS)


@pytest.mark.parametrize("name", default_and_thorough(["20-bit memorisation"], TASKS))
def test_new_keys_draw_new_sequences_and_only_the_last_steps_count(name):
    xs, targets, weights = batch_of(name)
    assert (xs != batch_of(name, seed=1)[0]).any()
    counting = {"5-bit memorisation": 5, "20-bit memorisation": 10}.get(name, 1)
    assert weights.shape == xs.shape[:2]
    assert (weights[-counting:] == 1).all()
    assert not weights[:-counting].any()
    task = TASKS[name]
    if xs.ndim == 2:
        assert xs.min() >= 0
        assert xs.max() < task.input_size
        assert set(np.unique(targets[-counting:])) == set(range(task.output_size))


def test_the_product_is_that_of_the_marked_numbers():
    xs, targets, _ = batch_of("multiplication")
    for b in range(B):
        first, second = xs[xs[:, b, 1] > 0, b, 0]
        np.testing.assert_allclose(targets[-1, b, 0], first * second, rtol=1e-6)


def test_the_class_is_that_of_three_symbols_in_order():
    xs, targets, _ = batch_of("3-bit temporal order")
    for b in range(B):
        (places,) = np.nonzero(xs[:, b] < 2)
        assert len(places) == 3
        for place, first in zip(places, (10, 33, 66), strict=True):
            assert first <= place < first + 10
        assert targets[-1, b] == (xs[places, b] * [1, 2, 4]).sum()


@pytest.mark.parametrize("T", [50, 99, 250])
def test_between_the_symbol_and_its_recall_each_round_is_a_permutation(T):
    xs, targets, _ = batch_of("random permutation", T=T)
    assert xs.shape == (T, B)
    np.testing.assert_array_equal(targets[-1], xs[0])
    assert set(np.unique(xs[0])) == {0, 1}
    rounds = [xs[start : start + 98] for start in range(1, T, 98)]
    for each in rounds:
        assert all(len(set(column)) == len(column) for column in each.T)
        assert each.min() >= 2
    assert (xs[1:5, 0] != xs[1:5, 1]).any()


@pytest.mark.parametrize(("name", "length", "symbols"), [("5-bit", 5, 2), ("20-bit", 10, 4)])
def test_the_symbols_are_repeated_after_the_blanks_and_the_cue(name, length, symbols):
    xs, targets, _ = batch_of(f"{name} memorisation")
    assert len(xs) == T + 2 * length
    assert (xs[:length] < symbols).all()
    np.testing.assert_array_equal(targets[-length:], xs[:length])
    rest = xs[length:]
    assert (rest[T - 1] == symbols + 1).all()
    assert (np.delete(rest, T - 1, axis=0) == symbols).all()


def test_one_wrong_symbol_of_several_makes_a_sequence_wrong():
    """A readout by W_y of the one-hot inputs, in a network whose state is its input."""
    task = memory_tasks.memorisation("copy", length=2, symbols=2)
    batch = task.batch(jax.random.key(0), 3, B)
    xs = batch.xs.at[-2:].set(batch.targets[-2:]).at[-1, 0].set(1 - batch.targets[-1, 0])
    network = Params(
        W_x=5 * jnp.eye(4),
        W_h=jnp.zeros((4, 4)),
        W_y=jnp.eye(2, 4),
        b_h=jnp.zeros(4),
        b_y=jnp.zeros(2),
    )
    wrong = wrong_sequences(task, network, batch._replace(xs=xs))
    assert wrong.tolist() == [True] + [False] * (B - 1)
