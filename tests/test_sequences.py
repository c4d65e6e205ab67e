import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxrnn
from jaxrnn import Batch


@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_mask_from_lengths(lengths):
    mask = jaxrnn.mask_from_lengths(jnp.array(lengths), 6)
    expected = [[t < length for length in lengths] for t in range(6)]
    np.testing.assert_array_equal(mask, expected)


def test_mask_from_lengths_takes_any_batch_axes():
    lengths = jnp.array([[0, 1], [2, 3]])
    mask = jaxrnn.mask_from_lengths(lengths, 3)
    assert mask.shape == (3, 2, 2)
    np.testing.assert_array_equal(mask.sum(axis=0), lengths)
    assert jaxrnn.mask_from_lengths(jnp.array(2), 3).tolist() == [True, True, False]


@given(T=st.integers(0, 20), length=st.integers(1, 25))
def test_windows_are_the_stream_again(T, length):
    stream = Batch(np.arange(T), np.arange(T) + 1, mask=np.arange(T) % 3 > 0)
    parts = list(jaxrnn.windows(stream, length))
    assert all(part.xs.shape[0] == length for part in parts[:-1])
    assert all(part.reset is None for part in parts)
    if T:
        whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        assert jax.tree.all(jax.tree.map(np.array_equal, whole, stream))
    else:
        assert parts == []


@pytest.mark.usefixtures("x64")
def test_windows_with_the_state_carried_have_the_loss_of_the_whole():
    params = jaxrnn.init(jax.random.key(0), 2, 4, 3, dtype=jnp.float64)
    xs = jax.random.normal(jax.random.key(1), (20, 2))
    stream = Batch(xs, jax.random.randint(jax.random.key(2), (20,), 0, 3))
    h, total = jnp.zeros(4), 0.0
    for part in jaxrnn.windows(stream, 6):
        value, h = jaxrnn.sequence_loss(params, part, h)
        total += value * part.xs.shape[0] / 20
    expected, h_T = jaxrnn.sequence_loss(params, stream)
    np.testing.assert_allclose(total, expected, rtol=1e-13)
    np.testing.assert_allclose(h, h_T, rtol=1e-13)
