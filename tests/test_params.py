"""The initialisation of the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from tests.reference import relative_errors


def test_weights_have_the_documented_scales_and_biases_are_zero():
    params = jaxrnn.init(jax.random.key(0), 300, 400, 200)
    assert np.std(params.W_x) == pytest.approx(300**-0.5, rel=0.02)
    assert np.std(params.W_y) == pytest.approx(400**-0.5, rel=0.02)
    assert np.abs(params.W_x).max() > 4 * 300**-0.5  # normal numbers, which are not truncated
    assert not params.b_h.any()
    assert not params.b_y.any()


def test_W_h_is_orthogonal_by_default_and_scaled_by_W_h_init():
    params = jaxrnn.init(jax.random.key(0), 3, 64, 2)
    np.testing.assert_allclose(params.W_h @ params.W_h.T, np.eye(64), atol=1e-5)
    W_h_init = jax.nn.initializers.orthogonal(scale=0.5)
    params = jaxrnn.init(jax.random.key(0), 3, 64, 2, W_h_init=W_h_init)
    radius = np.abs(np.linalg.eigvals(np.asarray(params.W_h))).max()
    assert radius == pytest.approx(0.5, rel=1e-5)


def test_scaled_identity():
    params = jaxrnn.init(jax.random.key(0), 3, 4, 2, W_h_init=jaxrnn.scaled_identity(0.9))
    np.testing.assert_array_equal(params.W_h, 0.9 * np.eye(4, dtype=np.float32))


def test_weights_are_independent_and_determined_by_the_key():
    a, b = (jaxrnn.init(jax.random.key(7), 8, 8, 8) for _ in range(2))
    other = jaxrnn.init(jax.random.key(8), 8, 8, 8)
    for name in ("W_x", "W_h", "W_y"):
        assert (getattr(a, name) == getattr(b, name)).all()
        assert not (getattr(a, name) == getattr(other, name)).any()
    W_h_init = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=0)
    W_x, W_h, W_y, *_ = jaxrnn.init(jax.random.key(7), 8, 8, 8, W_h_init=W_h_init)
    assert not ((W_x == W_y) | (W_x == W_h) | (W_h == W_y)).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_parameters_and_outputs_have_the_given_dtype(dtype):
    params = jaxrnn.init(jax.random.key(0), 3, 4, 2, dtype=dtype)
    assert {leaf.dtype for leaf in params} == {jnp.dtype(dtype)}
    h_T, ys = jaxrnn.unroll(params, jnp.ones((5, 3)))
    assert h_T.dtype == ys.dtype == dtype


def test_vmap_of_init_gives_an_ensemble():
    keys = jax.random.split(jax.random.key(0), 3)
    ensemble = jax.vmap(lambda key: jaxrnn.init(key, 2, 4, 2))(keys)
    np.testing.assert_allclose(ensemble.W_h[1], jaxrnn.init(keys[1], 2, 4, 2).W_h, atol=1e-6)


def test_numpy_float64_without_x64_is_float32_with_a_warning():
    params = jaxrnn.init(jax.random.key(0), 3, 4, 2)
    of_numpy = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    batch = jaxrnn.Batch(jnp.ones((5, 3)), jnp.zeros(5, int))
    for function in (jaxrnn.bptt, jaxrnn.sequence_loss, jaxrnn.gradient_flow):
        with pytest.warns(UserWarning, match="float64 .* truncated to dtype float32"):
            got = function(of_numpy, batch)
        assert max(relative_errors(got, function(params, batch))) <= 1e-6


def test_scaled_identity_is_the_identity_by_default():
    np.testing.assert_array_equal(jaxrnn.scaled_identity()(None, (3, 3)), np.eye(3))


def test_numbers_of_numpy_are_sizes_leaks_and_tokens():
    params = jaxrnn.init(jax.random.key(0), *np.array([3, 5, 2]))
    assert params.W_y.shape == (2, 5)
    batch = jaxrnn.Batch(jnp.ones((7, 4, 3)), jnp.zeros((7, 4), int))
    got, expected = (jaxrnn.bptt(params, batch, leak=leak) for leak in (np.float32(0.25), 0.25))
    assert max(relative_errors(got, expected)) == 0
    jaxrnn.step(params, jnp.zeros(5), np.int64(1))
    product = jaxrnn.curvature.gauss_newton(params, batch)
    jaxrnn.curvature.damped(product, np.array(0.5, np.float32))(params)


def test_a_bias_of_another_size_or_16_bit_dtype_is_named():
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    with pytest.raises(ValueError, match=r"^params.b_y: expected shape \(2,\)"):
        jaxrnn.readout(params._replace(b_y=jnp.zeros(1)), jnp.zeros((7, 5)))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params)
    with pytest.raises(TypeError, match=r"^params.b_h: expected float16 as W_h has, got bfloat16"):
        jaxrnn.unroll(half._replace(b_h=half.b_h.astype(jnp.bfloat16)), jnp.ones((7, 4, 3)))
