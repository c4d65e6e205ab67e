"""How the loops over time run on a backend: unrolled steps, and the layout of W_h."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from jaxrnn import Batch
from jaxrnn.products import Elementwise, Transposed, in_fast_layout
from jaxrnn.recurrence import scan, scan_unroll
from tests.reference import plain_loss, relative_errors
from tests.test_curvature import loops

AGREEMENT = 1e-12


def test_steps_are_unrolled_on_a_gpu_alone(monkeypatch):
    for backend, steps in (("cpu", 1), ("gpu", 8), ("tpu", 1)):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert scan_unroll() == steps


def test_the_direction_of_a_loop_is_given_by_name():
    with pytest.raises(TypeError, match="positional"):
        scan(lambda *_: None, (jnp.eye(2), (None, None)), jnp.ones(2), jnp.ones((3, 2)), True)


@pytest.mark.parametrize(
    ("H", "B", "reverse", "transposed"),
    [
        (25, 1, False, False),
        (25, 2, False, True),
        (25, 32, False, True),
        (25, 33, False, False),
        (25, 2, True, False),
        (999, 16, False, True),
        (1000, 16, False, False),
        (1000, 15, False, True),
        (999, 16, True, False),
        (1000, 16, True, True),
        (1000, 15, True, False),
    ],
)
def test_the_layout_of_the_recurrent_weights(H, B, reverse, transposed):
    """Products over rows for few sequences, over columns for more and large matrices."""
    W_h, h = jnp.arange(H * H, dtype=jnp.float32).reshape(H, H), jnp.ones((B, H))
    stored = in_fast_layout(W_h, h, reverse=reverse)
    assert isinstance(stored, Transposed) == transposed
    np.testing.assert_array_equal(stored.T, W_h.T)
    np.testing.assert_allclose(h @ stored, h @ W_h, rtol=1e-5)


@pytest.mark.parametrize(
    ("H", "batch", "elementwise"),
    [
        (20, (), False),
        (20, (1,), False),
        (20, (2,), True),
        (20, (3, 1), True),
        (20, (2, 2), False),
        (2, (7,), False),
        (2, (2, 4), True),
        (2, (32,), True),
        (2, (33,), False),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("reverse", [False, True])
def test_products_of_small_networks_are_elementwise(H, batch, elementwise, dtype, reverse):
    """Of 32 to 1,200 multiplications, for 2 to 32 sequences."""
    W_h = jax.random.normal(jax.random.key(0), (H, H), dtype)
    h = jax.random.normal(jax.random.key(1), (*batch, H), dtype)
    stored = in_fast_layout(W_h, h, reverse=reverse)
    in_loop = stored if reverse or not isinstance(stored, Transposed) else stored.T
    assert isinstance(in_loop, Elementwise) == elementwise
    with jax.numpy_rank_promotion("raise"):
        for got, W in ((h @ stored, W_h), (h @ stored.T, W_h.T)):
            assert (got.shape, got.dtype) == (h.shape, dtype)
            exact = np.asarray(h, float) @ np.asarray(W, float)
            np.testing.assert_allclose(np.asarray(got, float), exact, atol=8 * jnp.finfo(dtype).eps)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("H", "B"), [(4, 16), (16, 16), (708, 16)])
def test_states_and_gradient_in_each_layout(H, B):
    """Elementwise products; the loop forward, or the reverse loop, that reads W_h transposed."""
    params = jaxrnn.init(jax.random.key(0), 1, H, 1, dtype=jnp.float64)
    xs = jax.random.normal(jax.random.key(1), (3, B, 1), jnp.float64)
    batch, options = Batch(xs, xs), {"loss": jaxrnn.squared_error}
    got = jax.jit(partial(jaxrnn.bptt, **options))(params, batch)
    expected = jax.jit(jax.value_and_grad(partial(plain_loss, **options), has_aux=True))(
        params, batch
    )
    assert max(relative_errors(got, expected)) <= AGREEMENT


def test_products_of_float16_do_not_overflow():
    """Each is 80,000, above 65,504; their sum is 0."""
    W_h = jnp.array([[200.0, -200.0], [200.0, -200.0]], jnp.float16)
    h = jnp.full((8, 2), 400.0, jnp.float16)
    stored = in_fast_layout(W_h, h)
    assert isinstance(stored.T, Elementwise)
    assert not (h @ stored.T).any()


@pytest.mark.parametrize("gradient_fn", [jaxrnn.bptt, jax.grad(jaxrnn.sequence_loss, has_aux=True)])
@pytest.mark.parametrize(("B", "products"), [(4, 0), (64, 1)])
def test_the_loops_of_a_small_network_have_no_matrix_product(gradient_fn, B, products):
    params = jaxrnn.init(jax.random.key(0), 2, 5, 2)
    batch = Batch(jnp.ones((7, B, 2)), jnp.zeros((7, B), int))
    found = loops(jax.make_jaxpr(gradient_fn)(params, batch).jaxpr)
    assert found == [products] * len(found)
    assert len(found) >= 2
