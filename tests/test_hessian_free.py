"""Hessian-free optimisation: its conjugate gradients, its update on quadratics, its experiment."""

import itertools
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P

import jaxrnn
from experiments import (
    hessian_free,
    hessian_free_objective,
    hessian_free_report,
    long_lag_tasks,
    multi_seed,
    temporal_order,
)
from experiments.conjugate_gradients import conjugate_gradients, saved_steps
from experiments.hessian_free_update import (
    Objective,
    Rules,
    hessian_free_update,
    init_state,
    new_damping,
)
from experiments.run_state import Run

SIZE = 40


def random_matrix(seed, smallest=1e-3):
    """Symmetric, with eigenvalues between `smallest` and 1."""
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.standard_normal((SIZE, SIZE)))
    return jnp.asarray(Q * np.geomspace(smallest, 1, SIZE) @ Q.T), jnp.asarray(rng.random(SIZE))


def plain_conjugate_gradients(A, b, x, most, tolerance):
    """The iterates, with directions made conjugate one by one and phi by its definition."""
    xs, directions = [x], []
    phis = [x @ A @ x / 2 - b @ x]
    while len(xs) <= most:
        r = b - A @ x
        p = r - sum((d @ A @ r) / (d @ A @ d) * d for d in directions)
        directions.append(p)
        x = x + (p @ r) / (p @ A @ p) * p
        xs.append(x)
        phis.append(x @ A @ x / 2 - b @ x)
        i = len(xs) - 1
        k = max(10, i // 10)
        if i > k and phis[i] < 0 and (phis[i] - phis[i - k]) / phis[i] < k * tolerance:
            break
    return xs, phis


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("tolerance", [5e-4, 1e-2])
def test_conjugate_gradients_equal_the_plain_ones_and_stop_with_them(tolerance):
    A, b = random_matrix(0, smallest=0.02)  # a larger condition number needs reorthogonalisation
    x_0 = b / 2  # better than zeros
    xs, phis = plain_conjugate_gradients(*map(np.asarray, (A, b, x_0)), 35, tolerance)
    got = jax.jit(lambda A: conjugate_gradients(A.dot, b, x_0, 35, tolerance))(A)
    last = len(xs) - 1
    assert 10 < got.steps == last < 35
    kept = sorted({*saved_steps(35)[saved_steps(35) <= last].tolist(), last})
    assert got.saved == len(kept)
    np.testing.assert_allclose(got.xs[: got.saved], [xs[i] for i in kept], rtol=0, atol=1e-7)
    np.testing.assert_allclose(got.values[: got.saved], [phis[i] for i in kept], rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_conjugate_gradients_solve_the_system_and_stop_at_a_solution():
    A, b = random_matrix(2, smallest=0.1)
    got = conjugate_gradients(A.dot, b, jnp.zeros(SIZE), 100, tolerance=0)
    x = got.xs[got.saved - 1]
    np.testing.assert_allclose(x, np.linalg.solve(A, b), rtol=1e-9)
    assert got.steps < 100
    assert (conjugate_gradients(A.dot, b, -x, 100).xs[0] == got.xs[0]).all()  # as from zeros
    again = conjugate_gradients(A.dot, A @ x, x, 100)
    assert again.steps == 0
    assert again.saved == 1
    assert (again.xs[0] == x).all()


def quadratic(A, center, curvature=1.0, value=None):
    """f = (theta - c)^T A (theta - c) / 2, with `curvature` times its Hessian; S is 2 I."""

    def f(theta):
        return (theta - center) @ A @ (theta - center) / 2

    def gauss_newton(_):
        return lambda v, structural=0.0: curvature * A @ v + structural * 2 * v

    return Objective(value or f, jax.grad(f), gauss_newton)


@pytest.mark.usefixtures("x64")
def test_an_update_on_a_quadratic_ends_in_its_minimum():
    A, center = random_matrix(3, smallest=0.1)
    state = init_state(jnp.zeros(SIZE), 1e-14)
    rules = Rules(cg_steps=100, tolerance=0)
    new, metrics = hessian_free_update(state, quadratic(A, center), rules)
    np.testing.assert_allclose(new.theta, center, rtol=1e-8)
    assert metrics.alpha == 1
    assert metrics.ratio == pytest.approx(1, abs=1e-10)
    assert metrics.new_loss == pytest.approx(0, abs=1e-20)
    assert new.damping == pytest.approx(1e-14 * 2 / 3)


@pytest.mark.usefixtures("x64")
def test_conjugate_gradients_start_from_a_share_of_the_last_solution():
    A, center = random_matrix(8)
    solution = A @ center
    state = init_state(jnp.zeros(SIZE), 0.5)._replace(solution=solution)
    new, metrics = hessian_free_update(state, quadratic(A, center), Rules(0.0, 1, warm_start=0.6))
    matrix = A + 0.5 * jnp.eye(SIZE)
    r = A @ center - matrix @ (0.6 * solution)
    expected = 0.6 * solution + (r @ r) / (r @ matrix @ r) * r
    assert metrics.cg_steps == 1
    np.testing.assert_allclose(new.solution, expected, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_both_dampings_shorten_the_step():
    A, center = random_matrix(4, smallest=0.1)
    state = init_state(jnp.zeros(SIZE), 0.5)
    new, _ = hessian_free_update(state, quadratic(A, center), Rules(0.3, 100, tolerance=0))
    shifted = A + (0.5 + 0.5 * 0.3 * 2) * jnp.eye(SIZE)
    np.testing.assert_allclose(new.solution, np.linalg.solve(shifted, A @ center), rtol=1e-11)
    np.testing.assert_allclose(new.theta, new.solution, rtol=1e-3)  # an iterate near it


def test_a_step_that_does_not_lower_the_loss_is_rejected():
    A, center = random_matrix(5)
    state = init_state(jnp.zeros(SIZE), 0.1)
    for change in (1.0, jnp.nan):
        objective = quadratic(A, center, value=lambda new, c=change: 1 + c * (new @ new > 0))
        new, metrics = hessian_free_update(state, objective, Rules())
        assert metrics.alpha == 0
        assert metrics.new_loss == metrics.loss == 1
        assert new.theta.tobytes() == state.theta.tobytes()
        assert new.damping == pytest.approx(0.3)
        assert (new.solution == 0).all()


def test_a_solution_of_nan_is_forgotten():
    A, center = random_matrix(6)
    state = init_state(jnp.zeros(SIZE), 0.1)
    broken, metrics = hessian_free_update(state, quadratic(A, center, jnp.nan), Rules())
    assert metrics.alpha == 0
    assert (broken.theta == 0).all()
    assert (broken.solution == 0).all()


def test_the_line_search_takes_the_first_length_that_lowers_the_loss_enough():
    """G is a tenth of the Hessian, so the step is ten times too long: 0.8^8 is short enough."""
    state = init_state(jnp.ones(1), 1e-6)
    objective = quadratic(jnp.eye(1), jnp.zeros(1), curvature=0.1)
    new, metrics = hessian_free_update(state, objective, Rules())
    assert metrics.alpha == pytest.approx(0.8**8)
    assert new.theta[0] == pytest.approx(1 - 10 * 0.8**8, rel=1e-3)
    assert metrics.ratio < 0
    assert new.damping == pytest.approx(3e-6)
    objective = quadratic(jnp.eye(1), jnp.zeros(1), curvature=1 / 1.99)
    _, metrics = hessian_free_update(state, objective, Rules())
    assert metrics.alpha == pytest.approx(0.8)  # the whole step lowers the loss by 2 %, too little


def test_an_earlier_iterate_is_taken_while_the_loss_falls():
    """The loss is the distance from the fifth iterate, and NaN near the last one and beyond."""
    A, center = random_matrix(7)
    start = jnp.zeros(SIZE)
    xs, _, saved, _ = conjugate_gradients(lambda v: A @ v + 0.01 * v, A @ center, start, 150)

    def distance(theta):
        far = jnp.linalg.norm(theta) > jnp.linalg.norm(xs[saved - 2])
        return jnp.where(far, jnp.nan, jnp.linalg.norm(theta - xs[4]) - 100)

    objective = quadratic(A, center, value=distance)
    new, _ = hessian_free_update(init_state(start, 0.01), objective, Rules(structural=0.0))
    np.testing.assert_allclose(new.theta, xs[4], rtol=1e-4)


def test_damping_follows_the_reduction_ratio():
    for ratio, factor in ((0.8, 2 / 3), (0.75, 1), (0.25, 1), (0.2, 1.5), (0, 1.5), (-0.1, 3)):
        assert new_damping(2.0, ratio) == pytest.approx(2 * factor)
    assert new_damping(2.0, jnp.nan) == new_damping(2.0, jnp.inf * -1) == 6


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
def test_the_objective_over_devices_is_that_of_the_whole_batch():
    task, T = temporal_order.TASK, 12
    keys = jax.random.split(jax.random.key(0), 3)
    batches = jax.vmap(lambda key: task.batch(key, T, 16))(keys)
    params = jaxrnn.init(jax.random.key(1), 6, 5, 4, dtype=jnp.float64)
    theta, unravel = ravel_pytree(params)
    v = jnp.asarray(np.random.default_rng(0).standard_normal(theta.shape))
    mesh = multi_seed.devices_for(16, "batch")
    assert mesh.shape["batch"] == 8

    def everything(theta, v, batches):
        f = hessian_free_objective.objective(task, batches, unravel)
        product = f.gauss_newton(theta)
        return f.value(theta), f.gradient(theta), product(v), product(v, 0.3)

    specs = P(), P(), P(None, None, "batch")
    sharded = jax.shard_map(everything, mesh=mesh, in_specs=specs, out_specs=P())
    value, g, Gv, Gv_structural = jax.jit(sharded)(theta, v, batches)
    each = [jax.tree.map(lambda leaf, n=n: leaf[n], batches) for n in range(3)]
    results = [jaxrnn.bptt(params, batch) for batch in each]
    mean = sum(value for (value, _), _ in results) / 3
    assert value == pytest.approx(mean.item(), rel=1e-13)
    vectors = [ravel_pytree(grads)[0] for _, grads in results]
    np.testing.assert_allclose(g, sum(vectors) / 3, rtol=1e-9, atol=1e-14)
    product = jaxrnn.curvature.gauss_newton(params, each[0])
    for got, structural in ((Gv, None), (Gv_structural, 0.3)):
        wanted = ravel_pytree(product(unravel(v), structural))[0]
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-12)


def test_a_sequence_is_wrong_if_one_of_its_steps_that_count_is():
    """The network outputs the class that its input names, two steps count."""
    params = jaxrnn.init(jax.random.key(0), 4, 4, 4)
    params = params._replace(W_x=jnp.eye(4), W_h=jnp.zeros((4, 4)), W_y=jnp.eye(4))
    xs = jnp.array([[0, 1, 2], [3, 3, 3], [1, 1, 1]])
    targets = xs.at[0, 0].set(1).at[1, 1].set(0).at[2, 2].set(0)
    weights = jnp.ones((3, 3)).at[1].set(0)
    batch = jaxrnn.Batch(xs, targets, weights=weights)
    wrong = long_lag_tasks.wrong_sequences(temporal_order.TASK, params, batch)
    assert wrong.tolist() == [True, False, True]


@pytest.mark.thorough
def test_a_short_temporal_order_is_solved_in_a_few_updates():
    settings = {"hidden_size": 16, "batch_size": 256, "gradient_batches": 2, "seeds": 1}
    config = hessian_free.Config(lengths=(10,), updates=15, test_size=1_000, **settings)
    rows = [row for row, _ in hessian_free.train(config, temporal_order.TASK, 10, [])]
    assert rows[-1]["error"] <= 0.01
    assert len(rows) < 15
    assert all(row["new_loss"] <= row["loss"] for row in rows)


def lines(folder):
    """The lines of the metrics, without durations."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.thorough
@pytest.mark.parametrize("stops", [(3,), (1, 4), (8,)])
def test_a_stopped_run_resumes_bit_identically(stops, tmp_path, monkeypatch, capsys, usual_signals):
    """Stopped within a network, between two tasks, and at the end of the last network."""
    flags = ["--smoke", "--tasks", "temporal order", "adding"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert hessian_free.run([*flags, "--out", str(whole)]) == 0
    names = {"metrics.jsonl", "figure.png", "summary.json"}
    assert {path.name for path in whole.iterdir()} == names
    networks = [(row["task"], row["seed"], row["updates"]) for row in lines(whole)]
    assert networks == list(itertools.product(("temporal order", "adding"), (0, 1), (1, 2)))
    log = Run.log

    def log_and_stop(run, row):
        log(run, row)
        if run.step in stops:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Run, "log", log_and_stop)
    flags = [*flags, "--out", str(stopped)]
    assert hessian_free.run(flags) == 143
    assert f"stopped after step {stops[0]}" in capsys.readouterr().err
    for status in (*[143] * (len(stops) - 1), 0):
        assert hessian_free.run([*flags, "--resume"]) == status
    assert lines(stopped) == lines(whole)
    assert {path.name for path in stopped.iterdir()} == names


def test_summaries_count_the_seeds_that_solved_the_task():
    rows = [
        {"task": "a", "T": 5, "method": "m", "seed": seed, "updates": n, "seconds": n / 2}
        | {"error": error}
        for seed, n, error in [
            (0, 1, 0.5), (0, 2, 0.01), (1, 1, 0.4), (1, 2, 0.02), (2, 4, 0.0), (2, 5, 0.3),
        ]
    ]  # fmt: skip
    rows.append(rows[0] | {"T": 6})
    ours, figures = hessian_free_report.summarize(rows)
    assert ours == "a, T 5, m: 2 of 3, median 1.5 s and 3.0 updates; a, T 6, m: 0 of 1"
    assert figures["a, T 5, m"] == {"solved": 2, "of": 3, "seconds": 1.5, "updates": 3}
    assert figures["a, T 6, m"]["seconds"] is None
