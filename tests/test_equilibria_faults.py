"""Each fault planted in the search for fixed points, or in the Jacobian, must be caught."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from jaxrnn import equilibria, jacobians
from tests.faults import with_fault
from tests.recipe_cases import draw, network
from tests.test_equilibria import units

FAULTS = {
    "1 - alpha forgotten in J": ("return (1 - alpha) * per_unit(", "return 0 * per_unit("),
    "alpha forgotten in J": ("J) + alpha * J", "J) + J"),
    "1 - alpha of another unit": ("return (1 - alpha) *", "return (1 - alpha[..., ::-1, :]) *"),
    "f' forgotten": ("= f_prime * per_unit(W_h", "= f_prime**0 * per_unit(W_h"),
    "f' of the column": ("= f_prime * per_unit(W_h", "= f_prime.swapaxes(-1, -2) * per_unit(W_h"),
    "W_h transposed in z": ("z = z_x + h @ W_h.T", "z = z_x + h @ W_h"),
    "leak forgotten in the speed": ("moved = r if leak is None else per_unit(leak, r) * r",
                                    "moved = r"),
    "leak in the search": ("state_jacobian(activation, W_h, z_x, h, None)",
                           "state_jacobian(activation, W_h, z_x, h, jnp.asarray(0.1))"),
    "half of q forgotten": ("(r * r).sum(axis=-1) / 2", "(r * r).sum(axis=-1)"),
    "I forgotten in A": ("A = jnp.eye(h.shape[-1], dtype=h.dtype) - state_jacobian(",
                         "A = -state_jacobian("),
    "uphill": ("newton = -jnp", "newton = jnp"),
    "A transposed in the gradient": ("gradient = A.T @ r", "gradient = A @ r"),
    "no descent step": ("for d in (newton, descent)", "for d in (newton, newton)"),
    "no smaller steps": ("0.5 ** np.arange(10)", "0.5 ** np.arange(1)"),
    "the smallest step first": ("0.5 ** np.arange(10)", "0.5 ** np.arange(10)[::-1]"),
    "no small steps": ("np.arange(12, 30, 3)", "np.arange(1)"),
    "every step is taken": ("< q + SUFFICIENT * predicted", "< jnp.inf"),
    "no step after the tolerance": ("h, q, falls.any()", "h, q * 1e-9, falls.any()"),
    "every point has converged": ("J, _speed(r) <= tolerance)", "J, _speed(r) <= jnp.inf)"),
    "one start for all": ("jax.vmap(search)(h, z_x)", "jax.vmap(search)(h[:1] + 0 * h, z_x)"),
    "the input of the first start for all": ("(input_zs(params, x), h.shape)",
                                             "(input_zs(params, x)[:1], h.shape)"),
}  # fmt: skip


def finds_what_is_known(module) -> bool:
    """Compares speeds and Jacobians with NumPy in a network with a leak for each unit.

    Its starts are far from its fixed points, so steps are shortened. Another network has a line of
    fixed points, where A is singular; one is known; one has a slow point; in one A is almost 0.
    """

    def find(params, h, x, **options):
        return jax.jit(partial(module.fixed_points, **options))(params, h, x)

    alpha, far, x = np.linspace(0.1, 1, 6), 4 * draw(1, 40, 6), draw(3, 40, 2)
    params = network(0, 2, 6)._replace(W_h=jnp.asarray(2 * draw([2, 2], 6, 6)))
    W_x, W_h, _, b_h, _ = (np.asarray(leaf) for leaf in params)
    points = find(params, far, x, leak=alpha)
    f = np.tanh(x @ W_x.T + points.h @ W_h.T + b_h)
    speed = ((alpha * (points.h - f)) ** 2).sum(axis=-1) / 2
    Js = np.diag(1 - alpha) + (alpha * (1 - f**2))[..., None] * W_h
    if not (
        bool(points.converged.all())
        and np.allclose(points.speed, speed, rtol=1e-6, atol=1e-25)
        and np.allclose(points.jacobian, Js, atol=1e-12)
    ):
        return False
    first = find(params, far, x, leak=alpha, steps=1)
    before, after = (h - np.tanh(x @ W_x.T + h @ W_h.T + b_h) for h in (far, first.h))
    if not (
        ((after**2).sum(axis=-1) < (before**2).sum(axis=-1)).all()
        and np.allclose(first.speed, ((alpha * after) ** 2).sum(axis=-1) / 2, rtol=1e-6)
    ):
        return False

    zero = jnp.zeros(1)
    line = find(
        units([[1.0, -2.0], [0.0, 0.0]], [2.0, 1.0]), np.array([[0.3, 5.0]]), zero,
        activation=jaxrnn.identity,
    )  # fmt: skip
    three = find(units([[2.0]]), np.array([[-0.9], [0.1], [0.8]]), zero, tolerance=1e-4)
    slow = find(units([[2.0]], [-0.6]), np.array([[2.0]]), zero)
    # At 10, f' is almost 1: both steps are ten thousand times too long.
    far = find(units([[1.0]], [-1.0]), np.array([[10.0]]), zero, activation=jaxrnn.softplus)
    return (
        np.allclose(line.h, [[0.3, 1]])
        and bool((three.speed < 1e-8).all())
        and np.allclose(abs(three.h[:, 0]), [0.957504, 0, 0.957504], atol=1e-3)
        and not slow.converged.any()
        and np.allclose(far.h, 0.458675, atol=1e-6)
    )


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "fault",
    FAULTS,
    ids=lambda fault: fault.replace(" ", "-"),
)
def test_a_planted_fault_is_caught(fault):
    assert not finds_what_is_known(with_fault([jacobians, equilibria], *FAULTS[fault]))


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
def test_without_a_fault_nothing_is_caught():
    assert finds_what_is_known(with_fault([jacobians, equilibria], "n < steps", "n < steps"))
