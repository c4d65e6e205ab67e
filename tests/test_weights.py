"""The weights of steps: derivatives by them, also where a block of steps has none; their scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from jaxrnn import Batch, Loss
from tests.recipe_cases import draw, labelled_batch, network
from tests.reference import relative_errors

pytestmark = pytest.mark.usefixtures("x64")

T, B = 24, 3


def batch():
    xs, labels = jnp.asarray(draw(0, T, B, 2)), jnp.arange(T * B).reshape(T, B) % 2
    mask = jax.random.bernoulli(jax.random.key(1), 0.8, (T, B))
    return Batch(xs, labels, mask, weights=jnp.zeros((T, B)).at[-3:].set(1.0))


def by_hand(params, weights, loss=jaxrnn.cross_entropy):
    data = batch()._replace(weights=weights)
    (value, _), grads = jaxrnn.bptt(params, data, checkpoint_every=4, loss=loss)
    return value, grads


def by_autodiff(params, weights, loss=jaxrnn.cross_entropy):
    def value(params):
        return jaxrnn.sequence_loss(params, batch()._replace(weights=weights), loss=loss)[0]

    return jax.value_and_grad(value)(params)


DERIVATIVES = {
    "of the value": lambda f: jax.grad(lambda p, w: f(p, w)[0], 1),
    "of the gradient": lambda f: jax.jacobian(lambda p, w: f(p, w)[1], 1),
    "of the gradient by autodiff": lambda f: jax.jacrev(jax.grad(lambda p, w: f(p, w)[0], 0), 1),
    "forward": lambda f: lambda p, w: jax.jvp(lambda w: f(p, w), (w,), (w + 0.5,))[1],
}


@pytest.mark.parametrize("which", DERIVATIVES)
def test_derivatives_by_the_weights_equal_autodiff(which):
    derivative, params, weights = DERIVATIVES[which], network(0, 2, 4), batch().weights
    got, expected = (jax.jit(derivative(f))(params, weights) for f in (by_hand, by_autodiff))
    assert max(relative_errors(got, expected)) <= 1e-12


def test_a_loss_that_learns():
    """Its scale s is traced: the derivative of the value by s is the loss itself."""
    params, weights = network(0, 2, 4), batch().weights

    def value(f, s, weights):
        plain = jaxrnn.cross_entropy
        scaled = Loss(
            plain.g, lambda y, t: s * plain.value(y, t), lambda y, t: s * plain.error(y, t)
        )
        return f(params, weights, scaled)[0]

    got, expected = (
        jax.jit(jax.grad(lambda s, w, f=f: value(f, s, w), (0, 1)))(2.0, weights)
        for f in (by_hand, by_autodiff)
    )
    assert max(relative_errors(got, expected)) <= 1e-12


@pytest.mark.parametrize("weight", [1e-37, 1e37])
def test_the_scale_of_the_weights_does_not_matter(weight):
    """In float32, errors weighted by the smallest numbers would be 0, by the largest infinite."""
    params = jax.tree.map(jnp.float32, network(0, 2, 4))
    batch = Batch(*jax.tree.map(jnp.asarray, labelled_batch(6, 4)[:2]))
    weights = jnp.linspace(0.5, 1.0, 24, dtype=jnp.float32).reshape(6, 4)

    def at_scale(scale):
        scaled = batch._replace(weights=weights * scale)
        (value, _), grads = jaxrnn.bptt(params, scaled)
        (_, _), forward = jaxrnn.rtrl(params, scaled)
        return value, grads, forward, jaxrnn.gauss_newton_product(params, scaled, params)

    for got, expected in zip(
        jax.tree.leaves(at_scale(weight)), jax.tree.leaves(at_scale(1.0)), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


def test_the_sum_of_narrow_weights_and_weights_of_no_step():
    """The first is beyond the range of float16; the second may be NaN, or there is no step."""
    params = jax.tree.map(jnp.float32, network(0, 2, 4))
    data = Batch(*jax.tree.map(jnp.asarray, labelled_batch(6, 4)[:2]))
    expected = jaxrnn.sequence_loss(params, data)[0]
    narrow = data._replace(weights=np.full((6, 4), 6e4, np.float16))
    np.testing.assert_allclose(jaxrnn.sequence_loss(params, narrow)[0], expected, rtol=1e-6)
    mask = jnp.ones((6, 4), bool).at[4:].set(False)
    masked = data._replace(mask=mask, weights=jnp.where(mask, 1, jnp.nan))
    np.testing.assert_allclose(
        jaxrnn.evaluate(params, masked),
        jaxrnn.sequence_loss(params, data._replace(mask=mask))[0], rtol=1e-6,
    )  # fmt: skip
    none = jax.tree.map(lambda leaf: leaf[:0], narrow)
    assert jaxrnn.bptt(params, none)[0][0] == jaxrnn.sequence_loss(params, none)[0] == 0
