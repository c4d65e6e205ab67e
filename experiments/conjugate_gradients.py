"""Conjugate gradients with the stopping rule of Martens (2010), for Hessian-free optimisation."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax


class Iterates(NamedTuple):
    """Iterates of conjugate gradients, the last one included.

    Attributes:
      xs: (S, P), from `saved` on without meaning.
      values: (S,), phi(x) of each.
      saved: the number of iterates; the last one is `xs[saved - 1]`.
      steps: the number of steps, one product each.
    """

    xs: Array
    values: Array
    saved: Array
    steps: Array


def saved_steps(most: int) -> np.ndarray:
    """1, 2, 3, 4, 5, 7, 9 ...: the steps whose iterates are kept, a factor of 1.3 apart.

    >>> saved_steps(10).tolist()
    [1, 2, 3, 4, 5, 7, 9]
    """
    powers = np.ceil(1.3 ** np.arange(1 + np.log(most) / np.log(1.3))).astype(int)
    return np.unique(powers[powers <= most])


def conjugate_gradients(
    product: Callable[[Array], Array],
    b: Array,
    x_0: Array,
    most: int,
    tolerance: float = 5e-4,
) -> Iterates:
    """Lowers phi(x) = x^T A x / 2 - b^T x step by step, towards the solution of A x = b.

        x <- x + alpha p        r <- r - alpha A p        alpha = r^T r / p^T A p
        p <- r + beta p         beta = r^T r after / before

    Stops at step i if phi < 0 and the last k = max(10, i / 10) steps lowered phi by less than
    k * tolerance * |phi| (Martens 2010), or if r is down to rounding.

    Args:
      product: v (P,) -> A v; A is symmetric and positive definite.
      b: (P,).
      x_0: the start, (P,), unless phi(x_0) > phi(0) = 0; then zeros.
      most: the most steps.
      tolerance: the relative progress per step below which the steps stop.

    Returns:
      Iterates; the start alone if it is a solution.

    >>> A = jnp.array([[2.0, 1.0], [1.0, 3.0]])
    >>> xs, values, saved, steps = conjugate_gradients(A.dot, jnp.ones(2), jnp.zeros(2), most=10)
    >>> bool(jnp.allclose(A @ xs[saved - 1], jnp.ones(2)))
    True
    """
    keep = jnp.zeros(most + 1, bool).at[saved_steps(most)].set(True)
    room = len(saved_steps(most)) + 1
    rounding = jnp.finfo(b.dtype).eps ** 2 * jnp.vdot(b, b)

    def value(x, r):
        return -jnp.vdot(r + b, x) / 2  # A x = b - r

    def go_on(carry):
        _, r, _, i, phis, _ = carry
        k = jnp.maximum(10, i // 10)
        lowered = phis[jnp.maximum(i - k, 0)] - phis[i]
        stalled = (i > k) & (phis[i] < 0) & (lowered < k * tolerance * -phis[i])
        return (i < most) & ~stalled & (jnp.vdot(r, r) > rounding)

    def step(carry):
        x, r, p, i, phis, (xs, values, saved) = carry
        Ap, rr = product(p), jnp.vdot(r, r)
        alpha = rr / jnp.vdot(p, Ap)
        x, r = x + alpha * p, r - alpha * Ap
        p = r + jnp.vdot(r, r) / rr * p
        i = i + 1
        phis = phis.at[i].set(value(x, r))
        xs, values = xs.at[saved].set(x), values.at[saved].set(phis[i])
        return x, r, p, i, phis, (xs, values, saved + keep[i])  # the next overwrites unless kept

    r = b - product(x_0)
    better = value(x_0, r) < 0
    x_0, r = jnp.where(better, x_0, 0), jnp.where(better, r, b)
    phis = jnp.zeros(most + 1, b.dtype).at[0].set(value(x_0, r))
    xs = jnp.zeros((room, b.size), b.dtype).at[0].set(x_0)
    iterates = xs, jnp.zeros(room, b.dtype).at[0].set(phis[0]), jnp.zeros((), int)
    carry = x_0, r, r, jnp.zeros((), int), phis, iterates
    *_, i, _, (xs, values, saved) = lax.while_loop(go_on, step, carry)
    return Iterates(xs, values, saved + ~keep[i], i)
