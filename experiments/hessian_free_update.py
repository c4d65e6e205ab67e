"""One update of Hessian-free optimisation (Martens 2010; Martens and Sutskever 2011).

Near theta the loss is approximated by a quadratic, with the Gauss-Newton matrix G:

    f(theta + d) ~ f(theta) + q(d)        q(d) = g^T d + d^T (G + lambda I + lambda mu S) d / 2

    1. d_1, d_2, ... by conjugate gradients on q, from a share of the last update's solution
    2. d is the last of them, or an earlier one as long as that has a lower loss
    3. theta <- theta + alpha d, with alpha = 1, 0.8, 0.64, ... until the loss falls enough
    4. lambda grows if the loss fell by less than q predicts, and shrinks if q predicts it well

lambda I penalises the change of the parameters, lambda mu S that of the hidden states (structural
damping). f and g may be means over more sequences than G: the noise of g, divided by small
curvatures, limits how small lambda can be.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from experiments.conjugate_gradients import conjugate_gradients
from jaxrnn.curvature import damped


class Objective(NamedTuple):
    """What an update needs of the loss, for parameters in one vector.

    Attributes:
      value: theta (P,) -> f(theta).
      gradient: theta -> g (P,).
      gauss_newton: theta -> product, and product(v, structural=None) is G v, plus structural S v.
    """

    value: Callable[[Array], Array]
    gradient: Callable[[Array], Array]
    gauss_newton: Callable[[Array], Callable]


class Rules(NamedTuple):
    """What an update goes by.

    Attributes:
      structural: mu.
      cg_steps: the most steps of conjugate gradients.
      tolerance: of their stopping rule.
      warm_start: the share of the last solution that they start from.
    """

    structural: float = 0.1
    cg_steps: int = 150
    tolerance: float = 5e-4
    warm_start: float = 0.95


class State(NamedTuple):
    """theta (P,), the last solution of conjugate gradients (P,), and lambda."""

    theta: Array
    solution: Array
    damping: Array


class Metrics(NamedTuple):
    """Of one update.

    Attributes:
      loss: f(theta) before it.
      new_loss: f after it, on the same batch.
      ratio: the reduction of f over the one that q predicts, for alpha = 1.
      alpha: the step length; 0 if none lowers f, and theta stays.
      cg_steps: steps of conjugate gradients.
      damping: lambda that q was damped by.
    """

    loss: Array
    new_loss: Array
    ratio: Array
    alpha: Array
    cg_steps: Array
    damping: Array


SUFFICIENT = 0.01
"""The share of the linear decrease alpha g^T d that a step must reach (Armijo)."""

SHORTEST = 0.01
"""Shorter steps alpha are not tried."""


def init_state(theta: Array, damping: float) -> State:
    return State(theta, jnp.zeros_like(theta), jnp.asarray(damping, theta.dtype))


def new_damping(damping: Array, ratio: Array) -> Array:
    """Levenberg-Marquardt: lambda times 2/3 where q predicts well, 3/2 or 3 where it does not.

    >>> [round(float(new_damping(1.0, ratio)), 2) for ratio in (0.9, 0.5, 0.1, -1.0, jnp.nan)]
    [0.67, 1.0, 1.5, 3.0, 3.0]
    """
    factors = jnp.select([ratio > 0.75, ratio >= 0.25, ratio >= 0], [2 / 3, 1.0, 1.5], 3.0)
    return damping * factors


def backtrack(value, theta: Array, ds: Array, saved: Array) -> tuple[Array, Array]:
    """The index of the last iterate d, or of an earlier one while f(theta + d) falls; f there."""

    def falls(carry):
        n, f, f_before = carry
        return (n > 0) & ((f_before <= f) | jnp.isnan(f))

    def go_back(carry):
        n, _, f_before = carry
        return n - 1, f_before, value(theta + ds[jnp.maximum(n - 2, 0)])

    last = saved - 1
    before = value(theta + ds[jnp.maximum(last - 1, 0)])
    n, f, _ = lax.while_loop(falls, go_back, (last, value(theta + ds[last]), before))
    return n, f


def line_search(value, theta: Array, d: Array, f: Array, f_d: Array, slope: Array):
    """The first alpha of 1, 0.8, 0.64, ... with f(theta + alpha d) <= f + 0.01 alpha g^T d.

    Returns:
      alpha and the value there, or 0 and f if there is none.
    """

    def too_high(carry):
        alpha, f_alpha = carry
        return ~(f_alpha <= f + SUFFICIENT * alpha * slope) & (alpha > SHORTEST)

    def shorten(carry):
        alpha = 0.8 * carry[0]
        return alpha, value(theta + alpha * d)

    alpha, f_alpha = lax.while_loop(too_high, shorten, (jnp.ones_like(f), f_d))
    falls = f_alpha < f
    return jnp.where(falls, alpha, 0), jnp.where(falls, f_alpha, f)


def hessian_free_update(state: State, objective: Objective, rules: Rules) -> tuple[State, Metrics]:
    """The new state after one update on the objective, and the metrics."""
    theta, solution, damping = state
    f, g = objective.value(theta), objective.gradient(theta)
    matrix: Callable = damped(objective.gauss_newton(theta), damping, rules.structural)
    start = rules.warm_start * solution
    ds, qs, saved, steps = conjugate_gradients(matrix, -g, start, rules.cg_steps, rules.tolerance)
    n, f_d = backtrack(objective.value, theta, ds, saved)
    d, ratio = ds[n], (f_d - f) / qs[n]
    alpha, new_f = line_search(objective.value, theta, d, f, f_d, jnp.vdot(g, d))
    theta = jnp.where(alpha > 0, theta + alpha * d, theta)  # d may be NaN
    solution = jnp.where(alpha > 0, ds[saved - 1], 0)
    new = State(theta, solution, new_damping(damping, ratio))
    return new, Metrics(f, new_f, ratio, alpha, steps, damping)
