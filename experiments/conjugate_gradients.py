"""Conjugate gradients with the stopping rule of Martens (2010), for Hessian-free optimisation."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


class Iterates(NamedTuple):
    """Iterates of conjugate gradients, the last one included.

    Attributes:
      xs: (S, P); those after `saved` are zeros.
      values: (S,), phi(x) of each.
      saved: the number of iterates in `xs`; the last one is `xs[saved - 1]`.
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
    """Minimises phi(x) = x^T A x / 2 - b^T x, that is, solves A x = b.

    Stops after step i if phi < 0 and the last k = max(10, i / 10) steps lowered phi by less than
    the share k * tolerance of it (Martens 2010), or after `most` steps.
    """
    keep = jnp.zeros(most + 1, bool).at[saved_steps(most)].set(True)
    room = len(saved_steps(most)) + 1
    steps = jnp.arange(most + 1)

    def value(x, r):
        return -jnp.vdot(r + b, x) / 2  # A x = b - r

    def go_on(carry):
        _, r, _, i, phis, _ = carry
        k = jnp.maximum(10, i // 10)
        before = phis[jnp.maximum(i - k, 0)]
        stalled = (i > k) & (phis[i] < 0) & (phis[i] - before > k * tolerance * phis[i])
        return (i < most) & ~stalled & (jnp.vdot(r, r) > 0)

    def step(carry):
        x, r, p, i, phis, kept = carry
        Ap = product(p)
        rr = jnp.vdot(r, r)
        alpha = rr / jnp.vdot(p, Ap)
        x, r = x + alpha * p, r - alpha * Ap
        p = r + jnp.vdot(r, r) / rr * p
        i = i + 1
        phi = value(x, r)
        phis = phis.at[i].set(phi)
        xs, values, saved = kept
        xs, values = xs.at[saved].set(x), values.at[saved].set(phi)  # overwritten unless kept
        return x, r, p, i, phis, (xs, values, saved + keep[i])

    r = b - product(x_0)
    phis = jnp.where(steps == 0, value(x_0, r), 0)
    nothing = jnp.zeros((room, b.size), b.dtype), jnp.zeros(room, b.dtype), jnp.zeros((), int)
    carry = x_0, r, r, jnp.zeros((), int), phis, nothing
    *_, i, phis, (xs, values, saved) = lax.while_loop(go_on, step, carry)
    return Iterates(xs, values, saved + ~keep[i], i)
