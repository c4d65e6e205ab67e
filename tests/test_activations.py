"""The activations against NumPy and autodiff."""

import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxrnn
from jaxrnn import Activation, Batch
from tests.conftest import default_and_thorough
from tests.reference import ACTIVATIONS, NUMPY_ACTIVATIONS, plain_loss, random_case, relative_errors

numbers = st.floats(-30, 30, width=32)


@pytest.mark.parametrize("name", ACTIVATIONS)
@given(z=numbers)
def test_f_equals_numpy_and_df_its_derivative(name, z):
    f, df = ACTIVATIONS[name]
    np.testing.assert_allclose(
        f(jnp.float32(z)), NUMPY_ACTIVATIONS[name](np.array(z)).real, atol=1e-6, rtol=1e-6
    )
    np.testing.assert_allclose(df(f(jnp.float32(z))), jax.grad(f)(jnp.float32(z)), atol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtype_and_shape_are_preserved(name, dtype):
    f, df = ACTIVATIONS[name]
    h = f(jnp.zeros((2, 3), dtype))
    assert h.dtype == df(h).dtype == dtype
    assert h.shape == df(h).shape == (2, 3)


def test_the_derivative_of_relu_at_zero_is_zero():
    f, df = ACTIVATIONS["relu"]
    assert jax.grad(f)(0.0) == df(f(jnp.zeros(()))) == 0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("structure", default_and_thorough([1], range(6)))
def test_a_function_without_df_is_differentiated_by_autodiff(structure):
    """The derivative of gelu does not follow from its value."""
    case = random_case(structure, checkpoint_every=3)
    keywords = {"activation": Activation(jax.nn.gelu), "loss": case.keywords["loss"]}
    plain = jax.value_and_grad(partial(plain_loss, **keywords), has_aux=True)
    expected = jax.jit(plain)(*case.arguments)
    fast = jax.value_and_grad(partial(jaxrnn.sequence_loss, **keywords), has_aux=True)
    by_hand = partial(jaxrnn.bptt, checkpoint_every=3, **keywords)
    for gradient_fn in (fast, by_hand):
        assert max(relative_errors(jax.jit(gradient_fn)(*case.arguments), expected)) <= 1e-12
    if case.batch.mask is None:
        flow = jax.jit(partial(jaxrnn.gradient_flow, **keywords))(*case.arguments)
        steps = tuple(range(flow.dzs.ndim - 1))
        assert max(relative_errors(flow.dzs.sum(axis=steps), expected[1].b_h)) <= 1e-12


@jax.custom_vjp
def spike(z):
    """A step function with a surrogate gradient."""
    return (z > 0).astype(z.dtype)


spike.defvjp(lambda z: (spike(z), z), lambda z, d: (d / (1 + jnp.abs(z)) ** 2,))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("leak", [None, 0.3])
def test_a_surrogate_gradient_by_custom_vjp_is_that_of_the_plain_scan(leak):
    case = random_case(1, checkpoint_every=3)
    keywords = {"activation": Activation(spike), "loss": case.keywords["loss"], "leak": leak}
    plain = jax.value_and_grad(partial(plain_loss, **keywords), has_aux=True)
    expected = jax.jit(plain)(*case.arguments)
    assert jnp.abs(expected[1].W_h).max() > 0
    for gradient_fn in (
        jax.value_and_grad(partial(jaxrnn.sequence_loss, **keywords), has_aux=True),
        partial(jaxrnn.bptt, **keywords),
        partial(jaxrnn.bptt, checkpoint_every=3, **keywords),
        partial(jaxrnn.rtrl, **keywords),
    ):
        assert max(relative_errors(jax.jit(gradient_fn)(*case.arguments), expected)) <= 1e-12


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "compile",
    [jax.jit, pytest.param(lambda f: f, marks=pytest.mark.thorough)],
    ids=["jit", "eager"],
)
def test_the_gradient_by_a_learned_slope_is_that_of_the_plain_scan(compile):
    params = jaxrnn.init(jax.random.key(0), 3, 4, 2, dtype=jnp.float64)
    batch = Batch(jnp.ones((7, 2, 3)), jnp.zeros((7, 2), int))

    def loss(slope, loss_fn):
        activation = Activation(lambda z: jnp.tanh(slope * z))
        return loss_fn(params, batch, activation=activation)[0]

    got, expected = (
        compile(jax.grad(partial(loss, loss_fn=loss_fn)))(1.3)
        for loss_fn in (jaxrnn.sequence_loss, plain_loss)
    )
    assert relative_errors(got, expected)[0] <= 1e-12


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (jnp.tanh, r"activation: expected an Activation\(f, df\), got"),
        (Activation(jnp.tanh, 3), "activation.df: expected a function, got 3"),
        (
            Activation(np.tanh),
            "activation.f: expected a function of JAX arrays, got",
        ),
        (Activation(jnp.sum), r"activation.f: expected shape \(1, 2\) \(elementwise\), got \(\)"),
        (Activation(lambda z: z * jnp.ones(4)), "activation.f: expected an elementwise function"),
        (Activation(jax.nn.softmax), "activation.f: expected an elementwise function, got"),
        (Activation(jnp.tanh, jnp.sort), "activation.df: expected an elementwise function, got"),
        (Activation(jnp.tanh, lambda h: 1.0), "activation.df: expected shape"),
        (Activation(lambda z: z > 0), "activation.f: expected dtype float32, got bool"),
        (Activation(lambda z: (z, z)), "activation.f: expected an array, got tuple"),
    ],
)
def test_a_wrong_activation_is_named(activation, message):
    params = jaxrnn.init(jax.random.key(0), 3, 4, 2)
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        jaxrnn.unroll(params, jnp.ones((7, 3)), activation=activation)


PUBLIC = ("tanh", "relu", "sigmoid", "softplus", "identity")
PUBLIC += ("cross_entropy", "squared_error", "binary_cross_entropy")


@pytest.mark.parametrize("name", PUBLIC)
def test_activations_and_losses_can_be_pickled(name):
    value = getattr(jaxrnn, name)
    assert pickle.loads(pickle.dumps(value)) == value
    bound = partial(jaxrnn.bptt, **{"activation" if len(value) == 2 else "loss": value})
    assert pickle.loads(pickle.dumps(bound)).keywords == bound.keywords


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("changed", ["activation", "loss"])
def test_a_value_that_changes_in_an_object_gets_its_gradient_after_an_eager_call(changed):
    class Scale:
        scale = 1.0

        def f(self, z):
            return jnp.tanh(self.scale * z)

        def value(self, y, target):
            return self.scale * jaxrnn.cross_entropy.value(y, target)

        def error(self, y, target):
            return self.scale * jaxrnn.cross_entropy.error(y, target)

    kept, params = Scale(), jaxrnn.init(jax.random.key(0), 3, 4, 2, dtype=jnp.float64)
    batch = Batch(jnp.ones((8, 2, 3)), jnp.zeros((8, 2), int), weights=jnp.ones((8, 2)))
    options = {"activation": Activation(kept.f)}
    if changed == "loss":
        options = {"loss": jaxrnn.cross_entropy._replace(value=kept.value, error=kept.error)}

    def value(function, scale, **more):
        kept.scale = scale
        return function(params, batch, **options, **more)[0]

    functions = [plain_loss, jaxrnn.sequence_loss]
    functions.append(lambda *a, **k: jaxrnn.bptt(*a, **k, checkpoint_every=2)[0])
    found = []
    for function in functions:
        value(function, 1.0)
        found.append(jax.grad(partial(value, function))(1.3).item())
    assert found[1:] == pytest.approx([found[0]] * 2, rel=1e-12)


class Leaky:
    """A function that cannot be hashed."""

    __hash__ = None

    def __call__(self, z):
        return jnp.where(z > 0, z, 0.1 * z)


def test_an_activation_that_cannot_be_hashed_works():
    params = jaxrnn.init(jax.random.key(0), 3, 4, 2)
    batch = Batch(jnp.ones((7, 2, 3)), jnp.zeros((7, 2), int))
    leaky = Activation(Leaky())
    by_autodiff = jax.grad(jaxrnn.sequence_loss, has_aux=True)(params, batch, activation=leaky)[0]
    by_hand = jaxrnn.bptt(params, batch, activation=leaky)[1]
    np.testing.assert_allclose(by_hand.W_h, by_autodiff.W_h, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_far_from_zero_the_derivative_is_finite_and_NaN_stays_NaN(name):
    f, df = ACTIVATIONS[name]
    for z in map(jnp.float32, (-1e4, -100, 100, 1e4)):
        np.testing.assert_allclose(df(f(z)), jax.grad(f)(z), atol=1e-6)
    assert jnp.isnan(f(jnp.float32(jnp.nan)))


def test_the_derivative_of_softplus_keeps_its_digits_where_it_is_small():
    f, df = ACTIVATIONS["softplus"]
    np.testing.assert_allclose(df(f(jnp.float32(-30))), np.exp(-30.0), rtol=1e-5)
