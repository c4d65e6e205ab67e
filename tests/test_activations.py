"""The activations against NumPy and autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.reference import ACTIVATIONS, NUMPY_ACTIVATIONS

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
