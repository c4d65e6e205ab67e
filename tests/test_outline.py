"""The gradient against the algorithm as one writes it on paper."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from jaxrnn import Batch, Params
from tests.conftest import default_and_thorough
from tests.reference import ACTIVATIONS, outline_bptt, relative_errors

AGREEMENT = 1e-12
F = {
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "identity": (lambda z: z, np.ones_like),
}
"""f and f', as functions of z."""
by_autodiff = jax.value_and_grad(jaxrnn.sequence_loss, has_aux=True)


def draw(T, I, H, O):
    """Parameters, inputs, labels and h_0 as NumPy arrays."""
    rng = np.random.default_rng([T, I, H, O])
    shapes = Params(W_x=(H, I), W_h=(H, H), W_y=(O, H), b_h=(H,), b_y=(O,))
    params = Params(*(rng.standard_normal(shape) / shape[-1] ** 0.5 for shape in shapes))
    params = params._replace(W_h=0.5 * params.W_h)  # bounded states for f = identity as well
    return params, rng.standard_normal((T, I)), rng.integers(0, O, T), rng.standard_normal(H)


def mean_by_outline(params, xs, labels, h_0, **keywords):
    loss, grads = outline_bptt(params, xs, labels, h_0, **keywords)
    return jax.tree.map(lambda total: total / len(xs), (loss, grads))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("activation", F)
@pytest.mark.parametrize(
    "sizes",
    default_and_thorough([(9, 3, 5, 2)], [(1, 1, 1, 2), (2, 3, 4, 5), (9, 3, 5, 2), (60, 2, 7, 3)]),
    ids=str,
)
def test_bptt_and_autodiff_equal_the_outline(sizes, activation):
    params, xs, labels, h_0 = draw(*sizes)
    f, f_prime = F[activation]
    expected = mean_by_outline(params, xs, labels, h_0, f=f, f_prime=f_prime)
    arguments = jax.tree.map(jnp.asarray, (params, Batch(xs, labels), h_0))
    for gradient_fn in (jaxrnn.bptt, partial(jaxrnn.bptt, checkpoint_every=4), by_autodiff):
        run = jax.jit(partial(gradient_fn, activation=ACTIVATIONS[activation]))
        (value, _), grads = run(*arguments)
        assert max(relative_errors((value, grads), expected)) <= AGREEMENT


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("activation", "is_right"), [("identity", True), ("tanh", False)])
def test_the_recursion_without_f_prime_is_right_only_for_the_identity(activation, is_right):
    """dh_t = W_y^T dy_t + W_h^T dh_{t+1}, as some texts print it, lacks the factor f'(z_{t+1})."""
    params, xs, labels, h_0 = draw(T=9, I=3, H=5, O=2)
    f, f_prime = F[activation]
    _, printed = mean_by_outline(
        params, xs, labels, h_0, f=f, f_prime=f_prime, passed_back=lambda dh, dz: dh
    )
    arguments = jax.tree.map(jnp.asarray, (params, Batch(xs, labels), h_0))
    gradient_fn = jax.jit(partial(by_autodiff, activation=ACTIVATIONS[activation]))
    _, grads = gradient_fn(*arguments)
    error = max(relative_errors(printed, grads))
    assert error <= AGREEMENT if is_right else error > 1e-2
