"""The losses against their formulas, autodiff and optax."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrnn
from jaxrnn import Batch, Loss
from tests.reference import LOSSES, oracle_step_loss


def example(name, seed=0):
    rng = np.random.default_rng(seed)
    y = jnp.asarray(rng.normal(size=(5, 4)))
    target = rng.uniform(size=(5, 4)) if name == "binary_cross_entropy" else rng.normal(size=(5, 4))
    if name == "cross_entropy":
        target = rng.dirichlet(np.ones(4), 5)
    return y, jnp.asarray(target)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", LOSSES)
def test_error_is_the_derivative_of_value_and_y_hat_minus_target(name):
    loss = LOSSES[name]
    y, target = example(name)
    derivative = jax.grad(lambda y: loss.value(y, target).sum())(y)
    np.testing.assert_allclose(loss.error(y, target), derivative, atol=1e-15)
    np.testing.assert_allclose(loss.error(y, target), loss.g(y) - target, atol=1e-15)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", LOSSES)
def test_value_equals_the_formula(name):
    y, target = example(name)
    expected = [oracle_step_loss(name, *pair) for pair in zip(y, target, strict=True)]
    np.testing.assert_allclose(LOSSES[name].value(y, target), expected, rtol=1e-13)


@pytest.mark.usefixtures("x64")
def test_values_equal_optax():
    y, target = example("cross_entropy")
    labels = jnp.arange(5) % 4
    got = [jaxrnn.cross_entropy.value(y, t) for t in (target, labels)]
    np.testing.assert_allclose(got[0], optax.softmax_cross_entropy(y, target), rtol=1e-13)
    expected = optax.softmax_cross_entropy_with_integer_labels(y, labels)
    np.testing.assert_allclose(got[1], expected, rtol=1e-13)
    y, target = example("binary_cross_entropy")
    expected = optax.sigmoid_binary_cross_entropy(y, target).sum(axis=-1)
    np.testing.assert_allclose(jaxrnn.binary_cross_entropy.value(y, target), expected, rtol=1e-13)


@pytest.mark.usefixtures("x64")
def test_the_cross_entropy_of_rows_whose_sum_is_not_1():
    """The formula as it stands; a row of zeros is a step without a target."""
    loss = jaxrnn.cross_entropy
    y, target = example("cross_entropy")
    target = jnp.array([[0.5], [3.0], [0.0], [1.0], [-2.0]]) * target
    expected = optax.softmax_cross_entropy(y, target)
    np.testing.assert_allclose(loss.value(y, target), expected, atol=1e-14)
    derivative = jax.grad(lambda y: optax.softmax_cross_entropy(y, target).sum())(y)
    np.testing.assert_allclose(loss.error(y, target), derivative, atol=1e-15)
    assert (loss.value(y, target)[2], *loss.error(y, target)[2]) == (0, 0, 0, 0, 0)


def test_integer_labels_equal_one_hot_distributions():
    y, labels = jnp.arange(12.0).reshape(3, 4), jnp.array([3, 0, 1])
    for part in ("value", "error"):
        fn = getattr(jaxrnn.cross_entropy, part)
        np.testing.assert_allclose(fn(y, labels), fn(y, jax.nn.one_hot(labels, 4)), rtol=1e-6)


@pytest.mark.parametrize("name", ["cross_entropy", "binary_cross_entropy"])
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
def test_large_outputs_stay_finite_and_exact(name, scale):
    """A confident correct output has loss 0, a confident wrong one the margin as its loss."""
    loss, target = LOSSES[name], jnp.array([1.0, 0.0])
    y = jnp.array([scale, -scale])
    assert loss.value(y, target) == 0
    assert loss.value(y, 1 - target) == pytest.approx(2 * scale)
    assert jnp.isfinite(loss.error(y, 1 - target)).all()


def test_a_small_binary_cross_entropy_is_accurate():
    value = jaxrnn.binary_cross_entropy.value(jnp.array([20.0]), jnp.array([1.0]))
    assert value == pytest.approx(np.log1p(np.exp(-20.0)), rel=1e-6)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8])
def test_labels_of_8_bits_equal_labels_of_32(dtype):
    """With more classes than the dtype of the labels can count."""
    y, labels = jax.random.normal(jax.random.key(0), (3, 300)), jnp.array([5, 44, 127])
    for function in (jaxrnn.cross_entropy.value, jaxrnn.cross_entropy.error):
        assert jnp.array_equal(function(y, labels.astype(dtype)), function(y, labels))


def _deviance(y, target):
    """Poisson; NaN for the target 0 of a step that does not exist."""
    return (jnp.exp(y) - target * y + target * jnp.log(target) - target).sum(-1)


def _deviance_error(y, target):
    return jnp.exp(y) - target + 0 * jnp.log(target)


@pytest.mark.parametrize(
    "gradient",
    [
        jaxrnn.bptt,
        jaxrnn.rtrl,
        jax.value_and_grad(jaxrnn.sequence_loss, has_aux=True),
        lambda params, batch, **options: (
            jaxrnn.sequence_loss(params, batch, **options),
            jaxrnn.gauss_newton_product(params, batch, params, **options),
        ),
    ],
    ids=["bptt", "rtrl", "sequence_loss", "gauss_newton"],
)
def test_a_loss_may_be_infinite_where_no_step_exists(gradient):
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    whole = Batch(jnp.ones((7, 4, 3)), jnp.ones((7, 4, 2)))
    padded = whole._replace(mask=jnp.ones((7, 4), bool).at[5:].set(False))
    short = jax.tree.map(lambda leaf: leaf[:5], whole)
    loss = Loss(jnp.exp, _deviance, _deviance_error)
    got, expected = (gradient(params, batch, loss=loss) for batch in (padded, short))
    for leaf, like in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, like, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("gradient_fn", [jaxrnn.bptt, jaxrnn.rtrl])
def test_a_loss_may_be_of_a_wider_dtype_than_the_parameters(gradient_fn):
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2, dtype=jnp.float32)
    batch = Batch(jnp.ones((1000, 4, 3), jnp.float32), jnp.ones((1000, 4, 2), jnp.float32))
    wide = Loss(*(partial(_widened, function) for function in jaxrnn.squared_error))
    (value, _), grads = gradient_fn(params, batch, loss=wide)
    (expected, _), _ = gradient_fn(params, batch, loss=jaxrnn.squared_error)
    assert (value.dtype, grads.W_h.dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def _widened(function, *arguments):
    return function(*arguments).astype(jnp.float64)


@pytest.mark.parametrize("part", ["value", "error"])
def test_an_error_of_a_loss_names_it(part):
    def fails(y, target):
        return y - target  # a label for each y

    loss = jaxrnn.cross_entropy._replace(**{part: fails})
    params = jaxrnn.init(jax.random.key(0), 3, 4, 2)
    with pytest.raises((TypeError, ValueError)) as raised:
        jaxrnn.bptt(params, Batch(jnp.ones((5, 4, 3)), jnp.zeros((5, 4), int)), loss=loss)
    assert f"The error is in loss.{part}." in raised.value.__notes__


def test_mean_loss_checks_its_loss():
    batch = Batch(jnp.ones((7, 4, 3)), jnp.zeros((7, 4), int))
    with pytest.raises(TypeError, match=r"^loss: expected a Loss\(g, value, error\), got 'mse'"):
        jaxrnn.mean_loss(jnp.ones((7, 4, 2)), batch, "mse")
    summed = jaxrnn.cross_entropy._replace(value=lambda y, target: jnp.abs(y).sum())
    with pytest.raises(ValueError, match=r"^loss.value: expected shape \(7, 4\)"):
        jaxrnn.mean_loss(jnp.ones((7, 4, 2)), batch, summed)


@pytest.mark.usefixtures("x64")
def test_evaluate_sums_in_float64_and_traces_a_loss_once():
    traced = []

    def loss_fn(params, batch, h=None):
        traced.append(1)
        return jaxrnn.sequence_loss(params, batch, h)

    params = jaxrnn.init(jax.random.key(0), 3, 5, 2, dtype=jnp.float64)
    xs, weights = (jax.random.uniform(jax.random.key(n), (7, 4, 3)) for n in (1, 2))
    batch = Batch(xs, jnp.zeros((7, 4), int), weights=weights[..., 0])
    halves = [jax.tree.map(lambda leaf, n=n: leaf[:, n : n + 2], batch) for n in (0, 2)]
    for _ in range(2):
        got = jaxrnn.evaluate(params, halves, loss_fn=loss_fn)
    np.testing.assert_allclose(got, jaxrnn.sequence_loss(params, batch)[0], rtol=1e-14)
    assert len(traced) == 1


def test_the_loss_of_outputs_of_16_bits_is_computed_in_float32():
    batch = Batch(jnp.ones((7, 4, 3)), jnp.zeros((7, 4), int))
    ys = jax.random.normal(jax.random.key(0), (7, 4, 2)).astype(jnp.bfloat16)
    assert jaxrnn.mean_loss(ys, batch) == jaxrnn.mean_loss(ys.astype(jnp.float32), batch)


def test_the_loss_of_a_batch_in_which_nothing_counts_is_not_read():
    def loss_fn(params, batch, h=None):
        value, h_T = jaxrnn.sequence_loss(params, batch, h)
        return value / batch.mask.any(), h_T

    params, mask = jaxrnn.init(jax.random.key(0), 3, 5, 2), jnp.ones((7, 4), bool)
    batch = Batch(jnp.ones((7, 4, 3)), jnp.zeros((7, 4), int), mask)
    got = jaxrnn.evaluate(params, [batch, batch._replace(mask=~mask)], loss_fn=loss_fn)
    np.testing.assert_allclose(got, jaxrnn.sequence_loss(params, batch)[0], rtol=1e-6)
