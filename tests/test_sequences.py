"""Masks, windows, padding and buckets of sequences."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxrnn
from jaxrnn import Batch
from tests.conftest import default_and_thorough
from tests.reference import relative_errors, separate_pieces_loss


@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_mask_from_lengths(lengths):
    mask = jaxrnn.mask_from_lengths(jnp.array(lengths), 6)
    expected = [[t < length for length in lengths] for t in range(6)]
    np.testing.assert_array_equal(mask, expected)


def test_mask_from_lengths_with_zero_or_more_batch_axes():
    lengths = jnp.array([[0, 1], [2, 3]])
    mask = jaxrnn.mask_from_lengths(lengths, 3)
    assert mask.shape == (3, 2, 2)
    np.testing.assert_array_equal(mask.sum(axis=0), lengths)
    assert jaxrnn.mask_from_lengths(jnp.array(2), 3).tolist() == [True, True, False]


@given(T=st.integers(0, 20), length=st.integers(1, 25))
def test_windows_concatenate_to_the_stream(T, length):
    stream = Batch(np.arange(T), np.arange(T) + 1, mask=np.arange(T) % 3 > 0)
    parts = list(jaxrnn.windows(stream, length))
    assert all(part.xs.shape[0] == length for part in parts[:-1])
    assert all(part.reset is None for part in parts)
    if T:
        whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        assert jax.tree.all(jax.tree.map(np.array_equal, whole, stream))
    else:
        assert parts == []


def test_windows_checks_its_arguments_when_called():
    with pytest.raises(TypeError, match="batch: expected Batch"):
        jaxrnn.windows((np.ones(3), np.ones(3)), 2)
    with pytest.raises(ValueError, match="length: expected at least 1, got 0"):
        jaxrnn.windows(Batch(np.ones(3, int), np.ones(3, int)), 0)


@pytest.mark.usefixtures("x64")
def test_windows_with_carried_state_have_the_loss_of_the_stream():
    params = jaxrnn.init(jax.random.key(0), 2, 4, 3, dtype=jnp.float64)
    xs = jax.random.normal(jax.random.key(1), (20, 2))
    stream = Batch(xs, jax.random.randint(jax.random.key(2), (20,), 0, 3))
    h, total, loss = jnp.zeros(4), 0.0, jax.jit(jaxrnn.sequence_loss)
    for part in jaxrnn.windows(stream, 6):
        value, h = loss(params, part, h)
        total += value * part.xs.shape[0] / 20
    expected, h_T = loss(params, stream)
    np.testing.assert_allclose(total, expected, rtol=1e-13)
    np.testing.assert_allclose(h, h_T, rtol=1e-13)


RESETS = {
    "none": [],
    "at step 0": [0],
    "at step T-1": [4],
    "at every step": range(5),
    "at random": None,
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("batch_shape", [(), (2, 4)], ids=str)
@pytest.mark.parametrize("resets", default_and_thorough(["at random"], RESETS))
def test_a_batch_has_the_loss_and_gradient_of_its_separate_pieces(batch_shape, resets):
    """One sequence, or eight in two batch axes: lengths 0 to T, and two masks with gaps."""
    T, rng = 5, np.random.default_rng(0)
    params = jaxrnn.init(jax.random.key(0), 2, 3, 2, dtype=jnp.float64)
    shape = (T, *batch_shape)
    reset = rng.uniform(size=shape) < 0.4
    if RESETS[resets] is not None:
        reset = np.zeros(shape, bool)
        reset[list(RESETS[resets])] = True
    mask = np.ones(shape, bool)
    if batch_shape:
        lengths = np.array([0, 1, 2, 3, 4, 5, 5, 5]).reshape(batch_shape)
        mask = np.array(jaxrnn.mask_from_lengths(lengths, T))
        mask[[0, 1, 3, 4], 1, [2, 2, 3, 3]] = False
    h_0 = rng.normal(size=(*batch_shape, 3))
    batch = Batch(rng.normal(size=(*shape, 2)), rng.integers(0, 2, shape), mask, reset)

    @jax.jit
    def three_gradients(params, xs, h_0):
        inputs = batch._replace(xs=xs)
        separate = partial(separate_pieces_loss, batch=inputs)
        expected = jax.value_and_grad(lambda p, h: separate(p, h_0=h), (0, 1), has_aux=True)
        value_and_grad = jax.value_and_grad(
            lambda p, h: jaxrnn.sequence_loss(p, inputs, h), (0, 1), has_aux=True
        )
        return expected(params, h_0), value_and_grad(params, h_0), jaxrnn.bptt(params, inputs, h_0)

    expected, by_autodiff, by_hand = three_gradients(
        params, jnp.asarray(batch.xs), jnp.asarray(h_0)
    )
    assert max(relative_errors(by_autodiff, expected)) <= 1e-13
    assert max(relative_errors(by_hand, (expected[0], expected[1][0]))) <= 1e-13


sequence_lengths = st.lists(st.integers(0, 7), min_size=1, max_size=6)


@given(lengths=sequence_lengths, optional=st.booleans())
def test_unpad_inverts_pad(lengths, optional):
    rng = np.random.default_rng(len(lengths))
    sequences = [
        Batch(
            rng.normal(size=(T, 2)),
            rng.integers(0, 5, T),
            mask=rng.uniform(size=T) < 0.5 if optional and n % 2 else None,
            reset=rng.uniform(size=T) < 0.5 if optional else None,
            weights=rng.uniform(size=T) if optional else None,
        )
        for n, T in enumerate(lengths)
    ]
    batch = jaxrnn.pad(sequences)
    assert batch.xs.shape == (max(lengths), len(lengths), 2)
    valid = np.asarray(jaxrnn.mask_from_lengths(np.array(lengths), max(lengths)))
    assert not batch.mask[~valid].any()
    assert not batch.xs[~valid].any()
    for sequence, again in zip(sequences, jaxrnn.unpad(batch, lengths), strict=True):
        mask = np.ones(len(sequence.xs), bool) if sequence.mask is None else sequence.mask
        for name, leaf in sequence._replace(mask=mask)._asdict().items():
            if leaf is None:
                assert getattr(again, name) is None
            else:
                np.testing.assert_array_equal(getattr(again, name), leaf)
                assert getattr(again, name).dtype == leaf.dtype


@pytest.mark.parametrize("padded", [slice(2), slice(4, None)], ids=["in front", "behind"])
def test_nan_in_the_padding_meets_no_operation(padded):
    """`jax_debug_nans` checks what each operation returns, outside `jit` one by one."""
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    mask = jnp.ones(6, bool).at[padded].set(False)
    batch = Batch(jnp.ones((6, 3)).at[padded].set(jnp.nan), jnp.zeros(6, int), mask)
    with jax.debug_nans(True):
        for gradient_fn in (jaxrnn.bptt, jaxrnn.rtrl, jaxrnn.sequence_loss, jaxrnn.gradient_flow):
            gradient_fn(params, batch)
        jax.grad(lambda params: jaxrnn.sequence_loss(params, batch)[0])(params)
        jaxrnn.gauss_newton_product(params, batch, params)
        jaxrnn.hidden_states(params, batch.xs, mask=mask)


@pytest.mark.usefixtures("x64")
def test_a_padded_batch_has_the_outputs_of_its_sequences():
    params = jaxrnn.init(jax.random.key(0), 2, 3, 2, dtype=jnp.float64)
    lengths, rng = [4, 0, 7], np.random.default_rng(0)
    sequences = [Batch(rng.normal(size=(T, 2)), rng.integers(0, 2, T)) for T in lengths]
    batch = jaxrnn.pad(sequences)
    unroll = jax.jit(jaxrnn.unroll)
    _, ys = unroll(params, batch.xs, mask=batch.mask)
    for sequence, got in zip(sequences, jaxrnn.unpad(ys, lengths), strict=True):
        np.testing.assert_allclose(got, unroll(params, sequence.xs)[1], rtol=1e-13)


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "sequences: expected at least one, got none"),
        ([np.ones((2, 3))], r"sequences\[0\]: expected Batch.*, got ndarray"),
        ([Batch([1], [2])], r"sequences\[0\].xs: expected an array, got list"),
        (
            [Batch(np.ones((2, 3)), np.ones(2, int)), Batch(np.ones((2, 4)), np.ones(2, int))],
            r"sequences\[1\].xs: expected \(3, 'float64'\) .* got \(4, 'float64'\)",
        ),
        (
            [Batch(np.ones(2, int), np.ones(2)), Batch(np.ones(2, int), np.ones(2, np.float32))],
            r"sequences\[1\].targets: expected \('float64',\) .* got \('float32',\)",
        ),
        (
            [Batch(np.ones(2, int), np.ones(2)), Batch(*[np.ones(2, int)] * 2, weights=np.ones(2))],
            r"sequences\[1\].targets: expected",
        ),
        (
            [Batch(*[np.ones(2)] * 2), Batch(*[np.ones(2)] * 2, weights=np.ones(2))],
            r"sequences\[1\].weights: expected None",
        ),
        (
            [Batch(np.ones((2, 3)), np.ones(3, int))],
            r"sequences\[0\].targets: expected as many steps as xs \(2, 3\) has, got shape \(3,\)",
        ),
        (
            [Batch(*[np.ones((4, 4), int)] * 2, mask=np.ones(4, bool))],
            r"sequences\[0\].mask: expected shape \(4, 4\) .*, got \(4,\)",
        ),
        (
            [Batch(*[np.ones(4, int)] * 2, mask=np.ones(4))],
            r"sequences\[0\].mask: expected bool, got float64",
        ),
    ],
)
def test_errors_of_pad_name_the_invalid_sequence(sequences, message):
    with pytest.raises((TypeError, ValueError), match=message):
        jaxrnn.pad(sequences)


@pytest.mark.parametrize("lengths", [[1], [1, 4], [-1, 2], [1.0, 2.0], [[1], [2]]])
def test_unpad_rejects_invalid_lengths(lengths):
    with pytest.raises(ValueError, match=r"lengths: expected 2 integers in 0..3, got"):
        jaxrnn.unpad(np.zeros((3, 2)), lengths)


def test_unpad_takes_arrays_that_jax_does_not_have():
    words = np.array([["a", "b"], ["c", ""]])
    assert [leaf.tolist() for leaf in jaxrnn.unpad(words, [2, 1])] == [["a", "c"], ["b"]]


@pytest.mark.parametrize("padded", [np.ones(5), None, (np.ones((3, 2)), np.ones((2, 4)))])
def test_unpad_rejects_arrays_without_time_and_sequences(padded):
    with pytest.raises(ValueError, match=r"^padded: expected arrays \(T, N, \.\.\.\), got"):
        jaxrnn.unpad(padded, [1, 2])


@given(
    lengths=st.lists(st.integers(0, 50), max_size=40),
    padding=st.sampled_from([0.0, 0.1, 0.3, 0.9]),
)
def test_buckets_hold_each_sequence_once_and_limit_the_padding(lengths, padding):
    found = jaxrnn.buckets(lengths, padding=padding)
    assert sorted(int(n) for bucket in found for n in bucket) == list(range(len(lengths)))

    def share(bucket):
        steps = max(lengths[n] for n in bucket) * len(bucket)
        return (steps - sum(lengths[n] for n in bucket)) / max(steps, 1)

    assert all(share(bucket) <= padding + 1e-12 for bucket in found)
    for bucket, after in pairwise(found):
        assert share([*bucket, after[0]]) > padding - 1e-12, "the next sequence would have fitted"


def test_buckets_of_lengths_in_eight_bits():
    lengths = [100, 100, 100, 60, 50]
    narrow = jaxrnn.buckets(np.array(lengths, np.int8))
    assert [b.tolist() for b in narrow] == [b.tolist() for b in jaxrnn.buckets(lengths)]


def test_mask_from_lengths_inside_jit():
    mask = jax.jit(partial(jaxrnn.mask_from_lengths, T=3))(jnp.array([2, 5]))
    np.testing.assert_array_equal(mask.sum(axis=0), [2, 3])


def test_buckets_pad_by_a_tenth_by_default_and_no_sequence_is_no_bucket():
    assert [b.tolist() for b in jaxrnn.buckets([10, 8, 7])] == [[0, 1], [2]]
    assert jaxrnn.mask_from_lengths([], 3).shape == (3, 0)
    assert jaxrnn.unpad(np.ones((3, 0)), []) == []


def test_buckets_reject_an_invalid_share():
    for padding in (1, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"padding: expected a share in \[0, 1\), got"):
            jaxrnn.buckets([1, 2], padding=padding)
    with pytest.raises(TypeError, match=r"^padding: expected a number, got None$"):
        jaxrnn.buckets([1, 2], padding=None)


@pytest.mark.parametrize("lengths", [[2.5, 1.0], [3, -1], [[1, 2]], 3, [True, False], ["2"]])
def test_buckets_reject_what_is_no_list_of_lengths(lengths):
    with pytest.raises(ValueError, match=r"^lengths: expected integers of at least 0, got"):
        jaxrnn.buckets(lengths)
