"""The arguments of the products with the Gauss-Newton matrix: each that is wrong is named."""

import jax.numpy as jnp
import pytest

import jaxrnn
from tests.test_checks import BATCH, PARAMS, B, zeros


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"leak": 2.0}, r"^leak: expected values in \(0, 1\]"),
        ({"activation": jnp.tanh}, r"^activation: expected an Activation"),
        ({"loss": "mse"}, r"^loss: expected a Loss"),
        ({"h_0": zeros(B, 9)}, r"^h_0: expected shape"),
        ({"checkpoint_every": 0}, r"^checkpoint_every: expected at least 1, got 0"),
    ],
)
def test_a_wrong_argument_of_the_gauss_newton_product_is_named(wrong, message):
    with pytest.raises((TypeError, ValueError), match=message):
        jaxrnn.gauss_newton_product(PARAMS, BATCH, PARAMS, **wrong)


def test_what_is_no_product_is_named():
    with pytest.raises(TypeError, match=r"^product: expected a function, got"):
        jaxrnn.curvature.damped(PARAMS, 0.1)
