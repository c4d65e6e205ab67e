"""The cognitive tasks: how responses are judged, Dale's law, and a small run with neurogym."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from experiments import cognitive_data, cognitive_report, cognitive_tasks
from experiments.cognitive_data import Trials
from experiments.cognitive_tasks import KINDS, Config
from jaxrnn import Batch, Params

SMALL = Config(hidden_size=6, noise=0.0, dt=50, tau=50)


def network_that_copies():
    """Outputs are the inputs, through softplus units that are far above 0: alpha is 1."""
    zeros, eye = jnp.zeros((3, 3)), jnp.eye(3)
    return Params(W_x=eye, W_h=zeros, W_y=eye, b_h=jnp.full(3, 20.0), b_y=jnp.zeros(3))


@pytest.mark.parametrize(
    ("actions", "response"),
    [
        ([0, 0, 2, 2], 2),
        ([0, 0, 0, 1], 1),
        ([0, 0, 1, 2], 1),  # the first action counts
        ([0, 0, 0, 0], 0),  # no action
        ([0, 1, 1, 1], -1),  # an action before the decision
        ([0, 0, 2, 1], 2),
    ],
)
def test_the_first_action_of_the_decision_is_the_response(actions, response):
    xs = jax.nn.one_hot(jnp.array(actions), 3)[:, None]
    batch = Batch(xs, jnp.zeros((4, 1), int), mask=jnp.ones((4, 1), bool))
    trials = Trials(batch, onset=np.array([2]), truth=np.array([response]))
    config = Config(hidden_size=3, noise=0.0, dt=50, tau=50)
    got = cognitive_tasks.responses(config, network_that_copies(), trials, jax.random.key(0))
    assert got.tolist() == [response]


def test_steps_that_do_not_exist_are_no_actions():
    xs = jax.nn.one_hot(jnp.array([0, 0, 0, 1]), 3)[:, None]
    mask = jnp.array([True, True, True, False])[:, None]
    trials = Trials(Batch(xs, jnp.zeros((4, 1), int), mask=mask), np.array([2]), np.array([0]))
    config = Config(hidden_size=3, noise=0.0, dt=50, tau=50)
    params, key = network_that_copies(), jax.random.key(0)
    assert cognitive_tasks.responses(config, params, trials, key).tolist() == [0]
    broken = params._replace(b_y=jnp.full(3, jnp.nan))
    assert cognitive_tasks.responses(config, broken, trials, key).tolist() == [-1]


def test_no_update_gives_a_weight_the_wrong_sign():
    """Every one of 20 updates, with a rate at which unconstrained weights change sign."""
    kind, config = KINDS[1], Config(hidden_size=10, learning_rate=0.1)
    optimizer = cognitive_tasks.make_optimizer(config, updates=40)
    update = jaxrnn.make_update(cognitive_tasks.make_gradient_fn(config, kind), optimizer)
    theta = kind.init(jax.random.key(0), 3, 10, 2)
    state = jaxrnn.init_state(theta, optimizer, key=jax.random.key(1))
    xs = jax.random.normal(jax.random.key(2), (8, 5, 3))
    signs, changed = np.asarray(cognitive_tasks.signs(10)), False
    assert (signs > 0).sum() == 8
    for _ in range(20):
        state, metrics = update(state, Batch(xs, jnp.ones((8, 5), int)))
        assert (np.asarray(kind.to_params(state.params).W_h) * signs >= 0).all()
        changed |= bool((np.sign(state.params.W_h) != np.sign(theta.W_h)).any())
    assert metrics.skipped == 0
    assert changed


def test_excitation_and_inhibition_of_a_new_network_cancel():
    """The sum of a row is small beside that of its magnitudes, and the radius is near 1."""
    kind = KINDS[1]
    W_h = np.asarray(kind.to_params(kind.init(jax.random.key(0), 3, 200, 2)).W_h)
    assert abs(W_h.sum(axis=1).mean()) < 0.05 * np.abs(W_h).sum(axis=1).mean()
    assert 0.7 < np.abs(np.linalg.eigvals(W_h)).max() < 2


def test_choices_are_sorted_by_the_evidence_for_right():
    """A network that is right from 12.8 % on and else chooses left."""
    truth = np.repeat(np.tile([1, 2], len(cognitive_data.COHERENCES)), 3)
    strong = np.repeat(np.array(cognitive_data.COHERENCES) > 10, 6)
    row = cognitive_report.perceptual_row(truth, np.where(strong, truth, 1)[None])
    assert row["coherences"] == [-51.2, -25.6, -12.8, -6.4, 0, 6.4, 12.8, 25.6, 51.2]
    assert row["chose_right"] == [[0, 0, 0, 0, 0, 0, 1, 1, 1]]
    assert row["accuracies"] == [0.8]
    assert row["with_evidence"] == [0.875]


@pytest.mark.filterwarnings("ignore")
def test_a_small_run(tmp_path):
    pytest.importorskip("neurogym")
    assert cognitive_tasks.run(["--smoke", "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {(row["set"], row["kind"]) for row in rows} == {
        (name, kind.name) for name in ("perceptual", "yang19") for kind in KINDS
    }
    assert all(0 <= np.min(row["accuracies"]) <= np.max(row["accuracies"]) <= 1 for row in rows)


@pytest.mark.filterwarnings("ignore")
def test_trials_are_those_of_neurogym():
    pytest.importorskip("neurogym")
    trials, more = cognitive_data.perceptual_trials(100, (2, 1), seed=0)
    batch = trials.batch
    T, N = batch.targets.shape
    assert (N, more.truth.size) == (20, 10)
    assert set(trials.truth.tolist()) == {1, 2}
    decision = np.arange(T)[:, None] >= trials.onset
    assert (batch.targets[~decision] == 0).all()
    assert (batch.targets[np.asarray(decision & batch.mask)] > 0).all()
