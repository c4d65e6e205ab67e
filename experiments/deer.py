"""All T states of a network at once, by Newton's method: DEER (Lim et al. 2024).

The states solve T equations, h_t = F(h_{t-1}, x_t). Linearised at a guess of all states, they are

    h_t = A_t h_{t-1} + b_t        A_t = dF/dh_{t-1}        b_t = F(h_{t-1}, x_t) - A_t h_{t-1}

An associative scan solves these in O(log T) steps, given enough processors, and its solution is the
next guess. Quasi-DEER (Gonzalez et al. 2024) takes the diagonal of dF/dh for A_t: its scan is
O(T H) elementwise work instead of O(T H^3), and there are more iterations.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

import jaxrnn
from jaxrnn import Params, jacobian


class Linear(NamedTuple):
    """A of a Jacobian (*batch, H, H), the product of two A, and that of A and a state."""

    of: Callable[[Array], Array]
    times: Callable[[Array, Array], Array]
    apply: Callable[[Array, Array], Array]


full = Linear(lambda J: J, jnp.matmul, jnp.matvec)
"""The whole Jacobian: DEER."""
diagonal = Linear(lambda J: jnp.diagonal(J, axis1=-2, axis2=-1), jnp.multiply, jnp.multiply)
"""Its diagonal: quasi-DEER."""


class Guess(NamedTuple):
    """A guess of all states.

    Attributes:
      hs: the states, (T, *batch, H).
      images: F(h_{t-1}, x_t), the same shape.
      found: (T, *batch), whether h_t and all states before it solve their equations.
      iterations: how many linear systems were solved to get it, a scalar.
    """

    hs: Array
    images: Array
    found: Array
    iterations: Array | int


def deer(
    params: Params,
    xs: Array,
    h_0: Array,
    *,
    linear: Linear = full,
    tolerance: float = 1e-5,
    max_iterations: int = 100,
    **options: Any,
) -> Guess:
    """The states of `jaxrnn.hidden_states(params, xs, h_0, **options)`, in parallel over time.

    The step after a state that is found is not linearised: A_t = 0 and b_t = F(h_{t-1}, x_t). So
    each iteration finds at least one more state, whatever the linear systems do, and T iterations
    find all. Where nearby trajectories separate, products of many A_t overflow: states that are not
    finite start again from 0. There, states that solve their equations to the tolerance may be far
    from those of `hidden_states`, because rounding grows too.

    Args:
      params: Params.
      xs: (T, *batch, I).
      h_0: (*batch, H).
      linear: `full` or `diagonal`.
      tolerance: the largest |h_t - F(h_{t-1}, x_t)| of a unit of a state that is found; above the
        rounding error of F.
      max_iterations: the cap. There, the states that are not `found` are wrong.
      options: `activation` and `leak`.

    >>> import jax
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> xs = jax.random.normal(jax.random.key(1), (200, 3))
    >>> solution = deer(params, xs, jnp.zeros(5))
    >>> bool(jnp.allclose(solution.hs, jaxrnn.hidden_states(params, xs)[1], atol=1e-4))
    True
    >>> bool(solution.found.all()), bool(solution.iterations < 20)
    (True, True)
    """

    def before(hs):
        return jnp.concatenate([h_0[None], hs[:-1]])

    def guess(hs, iterations):
        images, _ = jaxrnn.step(params, before(hs), xs, **options)
        solved = (jnp.abs(hs - images) <= tolerance).all(axis=-1)
        return Guess(hs, images, jnp.cumprod(solved, axis=0) > 0, iterations)

    def compose(first, second):  # A_2 (A_1 h + b_1) + b_2
        (A_1, b_1), (A_2, b_2) = first, second
        return linear.times(A_2, A_1), linear.apply(A_2, b_1) + b_2

    def iterate(last: Guess) -> Guess:
        hs_before = before(last.hs)
        A = linear.of(jacobian(params, hs_before, xs, **options))
        known = jnp.concatenate([jnp.ones_like(last.found[:1]), last.found[:-1]])  # h_0 is
        A = jnp.where(jnp.expand_dims(known, tuple(range(known.ndim, A.ndim))), 0, A)
        b = last.images - linear.apply(A, hs_before)
        _, hs = lax.associative_scan(compose, (A, b))
        return guess(jnp.where(jnp.isfinite(hs), hs, 0), last.iterations + 1)

    start = guess(jnp.zeros((len(xs), *h_0.shape), h_0.dtype), jnp.zeros((), jnp.int32))
    return lax.while_loop(
        lambda last: ~last.found.all() & (last.iterations < max_iterations), iterate, start
    )
