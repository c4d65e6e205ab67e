"""Echo state networks: their tasks, and the same network in jaxrnn and in reservoirpy.

W_x, W_h and b_h are random and fixed; W_h is sparse, and the units leak. Only the readout is
learned, by ridge regression on the states (Jaeger 2001).
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax import lax

import jaxrnn
from jaxrnn import Params

HORIZON = 84
"""Steps ahead at which the closed loop is judged."""

CONNECTIVITY = 0.1
"""The share of weights in W_h that are not zero."""


class Steps(NamedTuple):
    """How the steps of a series are used.

    Attributes:
      washout: the first steps, which the readout is not fitted to.
      training: the steps before the test, the washout included.
      test: the steps of the test.
      starts: the number of closed loops, which start at different steps of the test.
      loop: the steps of each closed loop.
    """

    washout: int
    training: int
    test: int
    starts: int
    loop: int

    def loop_starts(self) -> np.ndarray:
        """The last teacher-forced step of each closed loop."""
        spacing = (self.test - self.loop - 1) // self.starts
        return self.training + spacing * np.arange(self.starts)


def mackey_glass(rng: np.random.Generator, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """x(t) - 1 and x(t + 1) - 1, (steps, 1) each, from a random constant history.

    x'(t) = 0.2 x(t - 17) / (1 + x(t - 17)^10) - 0.1 x(t), by fourth-order Runge-Kutta steps of 0.1.
    """
    dt, delay, sampled = 0.1, 170, 10
    xs = np.full(delay + 1 + sampled * steps, 1.2 + 0.2 * (rng.random() - 0.5)).tolist()

    def slope(x: float, delayed: float) -> float:
        return 0.2 * delayed / (1 + delayed**10) - 0.1 * x

    for n in range(delay, len(xs) - 1):
        x, before, after = xs[n], xs[n - delay], xs[n - delay + 1]
        middle = (before + after) / 2
        k_1 = slope(x, before)
        k_2 = slope(x + dt / 2 * k_1, middle)
        k_3 = slope(x + dt / 2 * k_2, middle)
        k_4 = slope(x + dt * k_3, after)
        xs[n + 1] = x + dt / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
    series = np.array(xs[delay::sampled])[:, None] - 1
    return series[:-1], series[1:]


def narma(rng: np.random.Generator, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """u(t) and y(t + 1), (steps, 1) each.

    y(t+1) = 0.3 y(t) + 0.05 y(t) sum_{i=0}^{9} y(t-i) + 1.5 u(t-9) u(t) + 0.1, u uniform in
    [0, 0.5].
    """
    u, y = rng.uniform(0, 0.5, steps + 10), np.zeros(steps + 11)
    for t in range(9, steps + 10):
        y[t + 1] = 0.3 * y[t] + 0.05 * y[t] * y[t - 9 : t + 1].sum() + 1.5 * u[t - 9] * u[t] + 0.1
    return u[10:, None], y[11:, None]


class Task(NamedTuple):
    """A series, and the network for it.

    Attributes:
      name: as in the figure.
      series: (rng, steps) -> xs, targets, (steps, 1) each.
      leak: alpha.
      radius: the spectral radius of W_h.
      input_scale: the standard deviation of W_x.
      bias_scale: the standard deviation of b_h.
      ridge: the penalty of the readout.
      closed_loop: whether the target is the next input.
    """

    name: str
    series: Callable
    leak: float
    radius: float
    input_scale: float
    bias_scale: float
    ridge: float
    closed_loop: bool


TASKS = [
    Task("Mackey-Glass", mackey_glass, 0.5, 0.9, 1.0, 0.5, 1e-9, closed_loop=True),
    Task("NARMA-10", narma, 1.0, 0.9, 0.2, 0.5, 1e-9, closed_loop=False),
]


def sparse(key, shape, dtype=jnp.float32, *, radius: float):
    """W_h with a share CONNECTIVITY of normal weights, scaled to a spectral radius."""
    key_weights, key_exists, key_again = jax.random.split(key, 3)
    exists = jax.random.bernoulli(key_exists, CONNECTIVITY, shape)
    W_h = np.asarray(jnp.where(exists, jax.random.normal(key_weights, shape, dtype), 0))
    drawn = np.abs(np.linalg.eigvals(W_h)).max()
    if drawn == 0:  # a small W_h without a cycle
        return sparse(key_again, shape, dtype, radius=radius)
    return jnp.asarray(radius / drawn * W_h)


def init_network(key, hidden_size: int, task: Task) -> Params:
    """Params of one input and one output, in float64."""
    key_init, key_bias = jax.random.split(key)
    W_h_init = partial(sparse, radius=task.radius)
    params = jaxrnn.init(key_init, 1, hidden_size, 1, W_h_init=W_h_init, dtype=jnp.float64)
    b_h = task.bias_scale * jax.random.normal(key_bias, (hidden_size,), jnp.float64)
    return params._replace(W_x=task.input_scale * params.W_x, b_h=b_h)


def fit_readout(params: Params, hs, targets, ridge: float) -> Params:
    """W_y and b_y by ridge regression of the targets (T, O) on the states hs (T, H).

    W_y^T = (sum_t h_t h_t^T + ridge I)^-1 sum_t h_t y_t^T of centred h and y. The bias is not
    penalised.
    """
    h_mean, y_mean = hs.mean(axis=0), targets.mean(axis=0)
    centred = hs - h_mean
    gram = centred.T @ centred + ridge * jnp.eye(len(h_mean), dtype=hs.dtype)
    W_y = jnp.linalg.solve(gram, centred.T @ (targets - y_mean)).T
    return params._replace(W_y=W_y, b_y=y_mean - W_y @ h_mean)


class Predicted(NamedTuple):
    """What a network predicts.

    Attributes:
      hs: the states of all steps, (T, H).
      ys: the predictions of the test, (test, 1).
      loops: the closed loops, (loop, starts, 1), or None.
    """

    hs: Any
    ys: Any
    loops: Any


def predict(steps: Steps, task: Task, params: Params, xs, targets) -> Predicted:
    """The states, and what a readout fitted to the training steps predicts."""
    _, hs = jaxrnn.hidden_states(params, xs, leak=task.leak)
    train = slice(steps.washout, steps.training)
    params = fit_readout(params, hs[train], targets[train], task.ridge)
    ys = jaxrnn.readout(params, hs[steps.training :])
    if not task.closed_loop:
        return Predicted(hs, ys, None)

    def body(carry, _):
        h, y = jaxrnn.step(params, *carry, leak=task.leak)
        return (h, y), y

    starts = steps.loop_starts()
    _, loops = lax.scan(body, (hs[starts], xs[starts + 1]), length=steps.loop)
    return Predicted(hs, ys, loops)


def has_reservoirpy() -> bool:
    return importlib.util.find_spec("reservoirpy") is not None


def reservoir_node(params: Params, leak: float):
    """The network as a node of reservoirpy, with a sparse W_h."""
    from reservoirpy.nodes import Reservoir

    W_x, W_h, _, b_h, _ = map(np.asarray, params)
    return Reservoir(W=scipy.sparse.csr_array(W_h), Win=W_x, bias=b_h, lr=leak)


def run_from_zero(node, xs: np.ndarray):
    """The states (B, T, H) of sequences xs (B, T, 1) by a node of reservoirpy.

    Without the reset, the sequences start from the last state of the last call.
    """
    if node.initialized:
        node.reset()
    return node.run(xs)


def predict_reservoirpy(steps: Steps, task: Task, params: Params, xs, targets) -> Predicted:
    """What `predict` returns, by reservoirpy."""
    from reservoirpy.nodes import Ridge

    reservoir, readout = reservoir_node(params, task.leak), Ridge(task.ridge)
    hs = reservoir.run(xs)
    train = slice(steps.washout, steps.training)
    readout.fit(hs[train], targets[train])
    ys = readout.run(hs[steps.training :])
    if not task.closed_loop:
        return Predicted(hs, ys, None)
    loops = []
    for start in steps.loop_starts():
        reservoir.state, y = {"out": hs[start]}, xs[start + 1]
        loops.append([y := readout.step(reservoir.step(y)) for _ in range(steps.loop)])
    return Predicted(hs, ys, np.array(loops).swapaxes(0, 1))


def errors(steps: Steps, task: Task, targets, predicted: Predicted) -> dict[str, float]:
    """The NRMSE of the test, and of the closed loops after HORIZON steps."""
    test = targets[steps.training :]

    def nrmse(ys, targets) -> float:
        return float(np.sqrt(np.mean((np.asarray(ys) - targets) ** 2)) / test.std())

    one_step = {"one_step": nrmse(predicted.ys, test)}
    if not task.closed_loop:
        return one_step
    ahead = targets[steps.loop_starts() + HORIZON]
    return one_step | {"closed_loop": nrmse(predicted.loops[HORIZON - 1], ahead)}


def check_agreement(method: str, got, expected) -> None:
    """Raises AssertionError unless the states are equal to rounding."""
    got, expected = np.asarray(got), np.asarray(expected)
    error = np.abs(got - expected).max()
    if not error <= 1e4 * np.finfo(got.dtype).eps:
        raise AssertionError(
            f"{method}: expected the states of jaxrnn, got a difference {error:.1e}"
        )
