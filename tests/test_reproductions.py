"""The experiments that reproduce published results: small runs and tasks."""

import importlib
import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from experiments import (
    adding,
    copy_memory,
    long_lag_tasks,
    multi_seed,
    run_state,
    temporal_order,
)
from experiments.regularizer import regularizer
from experiments.reports import Report, mean_and_spread
from jaxrnn import Batch
from tests.conftest import default_and_thorough

NAMES = [
    "gradient_flow",
    "temporal_order",
    "adding",
    "hessian_free",
    "curvature_cost",
    "copy_memory",
    "mnist_1d",
    "japanese_vowels",
    "polyphonic_music",
    "char_sweep",
    "flip_flop",
    "reservoir",
    "cognitive_tasks",
    "online_learning",
    "parallel_in_time",
    "small_loops",
]


@pytest.fixture
def few_curves(monkeypatch):
    """MNIST-1D with 500 of its 5,000 curves, since it is slow to generate."""
    data = pytest.importorskip("mnist1d.data")
    settings = data.get_dataset_args()
    settings.num_samples = 500
    monkeypatch.setattr(data, "get_dataset_args", lambda: settings)


@pytest.mark.parametrize("name", default_and_thorough(["char_sweep"], NAMES))
def test_every_experiment_runs_and_writes_its_files(name, tmp_path, music, capsys, request):
    if name == "mnist_1d":
        request.getfixturevalue("few_curves")
    if name == "japanese_vowels":
        pytest.importorskip("aeon")
    if name == "cognitive_tasks":
        pytest.importorskip("neurogym")
    module = importlib.import_module(f"experiments.{name}")
    out = tmp_path / "out"
    flags = ["--data", str(music)] if name == "polyphonic_music" else []
    assert module.run(["--smoke", "--out", str(out), *flags]) == 0
    assert {path.name for path in out.iterdir()} == {"metrics.jsonl", "figure.png", "summary.json"}
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["ours"] in capsys.readouterr().out
    assert summary["settings"]["smoke"] is True
    assert summary["settings"].get("seeds", 1) <= 2
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", summary["date"])
    assert summary["versions"]["jax"] == jax.__version__


@pytest.mark.parametrize("finished", [True, False])
def test_only_overwrite_discards_a_run(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(copy_memory, "train", lambda *_: [(2, [0.5, 0.5]), (4, [0.4, 0.3])])
    name = "summary.json" if finished else "metrics.jsonl"
    (tmp_path / name).write_text("{}")
    flags = ["--smoke", "--out", str(tmp_path), "--methods", "orthogonal tanh"]
    assert copy_memory.run(flags) == 2
    state = "a finished" if finished else "an unfinished"
    assert capsys.readouterr().err == (
        f"{tmp_path}: expected a folder without a run, got {state} one: --overwrite discards it, "
        "another --out leaves it as it is\n"
    )
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "{}"}
    monkeypatch.setattr(Report, "finish", lambda *_: {})  # as of a run that is killed
    (tmp_path / "figure.png").touch()
    assert copy_memory.run([*flags, "--overwrite"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    monkeypatch.undo()
    monkeypatch.setattr(copy_memory, "train", lambda *_: [(2, [0.5, 0.5]), (4, [0.4, 0.3])])
    assert copy_memory.run([*flags, "--overwrite"]) == 0
    assert "overwrite" not in json.loads((tmp_path / "summary.json").read_text())["settings"]


def test_a_run_removes_no_file_of_a_folder_without_one(tmp_path):
    (tmp_path / "sample.txt").write_text("of the user")
    run_state.discard_run(tmp_path)
    assert (tmp_path / "sample.txt").read_text() == "of the user"


def test_metrics_without_a_line_are_not_a_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert not run_state.holds_run(tmp_path)
    assert not run_state.holds_run(tmp_path / "missing")


def test_mean_and_spread():
    assert mean_and_spread([2.0]) == "2.000"
    assert mean_and_spread([1.0, 3.0], digits=1) == "2.0 ± 1.4"


def test_the_target_of_temporal_order_follows_from_two_symbols():
    T, B = 50, 200
    batch = temporal_order.order_batch(jax.random.key(0), T, B)
    xs, targets = np.asarray(batch.xs), np.asarray(batch.targets[-1])
    for b in range(B):
        first, second = np.flatnonzero(xs[:, b] < 2)
        assert T // 10 <= first < T // 5 < T // 2 <= second < T // 2 + T // 10
        assert targets[b] == xs[first, b] + 2 * xs[second, b]
    assert set(targets.tolist()) == {0, 1, 2, 3}
    assert batch.weights.sum() == batch.weights[-1].sum() == B


def test_the_target_of_adding_is_the_sum_of_the_marked_numbers():
    T, B = 20, 100
    batch = adding.adding_batch(jax.random.key(0), T, B)
    numbers, marks = np.moveaxis(np.asarray(batch.xs), -1, 0)
    assert (marks[: T // 2].sum(axis=0) == 1).all()
    assert (marks[T // 2 :].sum(axis=0) == 1).all()
    np.testing.assert_allclose(batch.targets[-1, :, 0], (numbers * marks).sum(axis=0), rtol=1e-6)


@pytest.mark.parametrize("task", [temporal_order.TASK, adding.TASK], ids=lambda task: task.name)
def test_nan_outputs_are_wrong(task):
    target = jnp.zeros(3, int) if task is temporal_order.TASK else jnp.ones((3, 1))
    assert task.wrong(jnp.full((3, task.output_size), jnp.nan), target).all()


@pytest.mark.thorough
def test_a_skipped_update_counts_as_divergence():
    """NaN in every training batch; the initial parameters, which the updates keep, are finite."""
    config = adding.Config(**{**long_lag_tasks.SMOKE, "methods": ("tanh",)})

    def batch(key, T, B):
        batch = adding.adding_batch(key, T, B)
        return batch._replace(xs=jnp.nan * batch.xs) if config.batch_size == B else batch

    task = adding.TASK._replace(batch=batch, wrong=lambda y, target: jnp.isnan(y[:, 0]))
    (method,) = long_lag_tasks.methods(config)
    for _, errors in long_lag_tasks.train(config, task, 10, method):
        assert errors == [1, 1]
    finite = task._replace(batch=adding.adding_batch)
    for _, errors in long_lag_tasks.train(config, finite, 10, method):
        assert errors == [0, 0]


def test_updates_until_solved_end_at_the_first_check_with_few_errors():
    rows = [
        {"T": T, "method": method, "updates": n, "errors": errors}
        for T, method, n, errors in [
            (6, "m", 5, [0.0, 0.0]),
            (5, "n", 5, [0.0, 0.0]),
            (5, "m", 10, [0.5, 0.0]),
            (5, "m", 20, [0.01, 0.9]),
            (5, "m", 30, [0.3, 0.9]),
        ]
    ]
    assert long_lag_tasks.updates_until_solved(rows, 5, "m") == [20, 10]


def test_the_targets_of_copying_are_blanks_and_then_the_symbols():
    T, B = 7, 30
    batch = copy_memory.copy_batch(jax.random.key(0), T, B)
    xs, targets = np.asarray(batch.xs), np.asarray(batch.targets)
    assert xs.shape == targets.shape == (T + 20, B)
    assert (targets[-10:] == xs[:10]).all()
    assert (xs[:10] < 8).all()
    assert (targets[:-10] == copy_memory.BLANK).all()
    assert (xs[10:].argmax(axis=0) == T - 1).all()  # the marker, right before the answer
    assert copy_memory.memoryless_loss(1000) == pytest.approx(0.0204, abs=2e-4)


def test_the_regularizer_is_zero_if_every_step_keeps_the_norm(x64):
    """An orthogonal W_h, f = identity, and an error at the last step alone."""
    params = jaxrnn.init(jax.random.key(0), 3, 8, 2, dtype=jnp.float64)
    xs = jax.random.normal(jax.random.key(1), (9, 4, 3), jnp.float64)
    last = jnp.zeros((9, 4)).at[-1].set(1)
    batch = Batch(xs, jnp.zeros((9, 4), int), weights=last)
    omega = jax.jit(partial(regularizer, activation=jaxrnn.identity))
    assert omega(params, batch) == pytest.approx(0, abs=1e-20)
    shrunk = params._replace(W_h=0.5 * params.W_h)
    assert omega(shrunk, batch) == pytest.approx((0.25 - 1) ** 2)


def test_the_regularizer_equals_its_definition_step_by_step(x64):
    """With a mask, a reset and h_0; dh is `jax.grad` of the loss by a term added to h."""
    keys = jax.random.split(jax.random.key(0), 4)
    T, B, H = 6, 3, 5
    params = jaxrnn.init(keys[0], 2, H, 4, dtype=jnp.float64)
    xs = jax.random.normal(keys[1], (T, B, 2), jnp.float64)
    targets = jax.random.randint(keys[2], (T, B), 0, 4)
    mask = jaxrnn.mask_from_lengths(jnp.array([6, 4, 1]), T)
    reset = jnp.zeros((T, B), bool).at[3, 0].set(True)
    h_0 = jax.random.normal(keys[3], (B, H), jnp.float64)
    batch = Batch(xs, targets, mask, reset)

    def loss(nudges):
        h, total = h_0, 0.0
        for t in range(T):
            before = jnp.where(reset[t][:, None], 0, h)
            now = jnp.tanh(xs[t] @ params.W_x.T + before @ params.W_h.T + params.b_h)
            h = jnp.where(mask[t][:, None], now, h) + nudges[t]
            y = h @ params.W_y.T + params.b_y
            total += (mask[t] * jaxrnn.cross_entropy.value(y, targets[t])).sum()
        return total / mask.sum()

    dhs = np.asarray(jax.jit(jax.grad(loss))(jnp.zeros((T, B, H))))
    hs = jax.jit(jaxrnn.hidden_states)(params, xs, h_0, mask=mask, reset=reset)[1]
    hs, W_h, mask, reset = map(np.asarray, (hs, params.W_h, mask, reset))
    terms = []
    for t in range(1, T):
        for b in range(B):
            if mask[t, b] and not reset[t, b]:
                before = ((1 - hs[t, b] ** 2) * dhs[t, b]) @ W_h
                terms.append(((before**2).sum() / (dhs[t, b] ** 2).sum() - 1) ** 2)
    omega = jax.jit(regularizer)(params, batch, h_0)
    assert omega == pytest.approx(np.mean(terms), rel=1e-12)


@pytest.mark.parametrize("networks", [3, 8, 10])
def test_copies_that_fill_idle_devices_change_no_result(networks):
    """On eight devices: fewer networks than devices, as many, and more that they do not divide."""

    def updates_and_check(state, key, rate):
        state = state._replace(params=state.params + rate * jax.random.normal(key))
        return state, state.params

    zeros = jnp.zeros(networks)
    states = jaxrnn.TrainState(zeros, zeros, (), skipped=zeros)
    rates = jnp.arange(networks, dtype=float)
    trained = multi_seed.train_seeds(updates_and_check, states, jax.random.key(0), 4, 2, rates)
    expected = np.zeros(networks)
    for updates, results in trained:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), updates), networks)
        expected += rates * jax.vmap(jax.random.normal)(keys)
        np.testing.assert_allclose(results, expected, rtol=1e-6)
