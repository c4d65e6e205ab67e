"""Integers are tokens: integer features are an error of `xs`, and the message says what to do."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from jaxrnn import Batch
from tests.reference import relative_errors
from tests.test_checks import KEY, LABELS, B, H, T, zeros

PIANO_ROLL = np.ones((T, B, 8), np.uint8)
NO_FLOATS = ": expected a floating-point dtype for .* feature axis, got uint8 of shape "
FEATURES = "xs" + NO_FLOATS + re.escape("(7, 4, 8)")


@pytest.mark.parametrize("call", [jaxrnn.bptt, jaxrnn.sequence_loss, jaxrnn.check_values])
@pytest.mark.parametrize(
    ("fields", "h_0"),
    [
        ({"targets": PIANO_ROLL}, None),
        ({"targets": LABELS}, None),
        ({"targets": zeros(T, B, 8)}, None),
        ({"targets": PIANO_ROLL, "mask": np.ones((T, B), bool)}, None),
        ({"targets": PIANO_ROLL, "weights": zeros(T, B)}, None),
        ({"targets": PIANO_ROLL}, zeros(B, H)),
    ],
    ids=["targets", "labels", "distributions", "mask", "weights", "h_0"],
)
def test_integer_features_are_an_error_of_xs(call, fields, h_0):
    params = jaxrnn.init(KEY, 8, H, 8)
    with pytest.raises(ValueError, match="^" + FEATURES):
        call(params, Batch(PIANO_ROLL, **fields), h_0)
    xs = PIANO_ROLL.astype(np.float32)
    targets = fields["targets"] if fields["targets"].ndim == 2 else xs
    call(params, Batch(xs, **fields | {"targets": targets}), h_0)


def test_integer_features_of_another_loss_are_an_error_of_xs():
    loss, params = jaxrnn.binary_cross_entropy, jaxrnn.init(KEY, 8, H, 8)
    with pytest.raises(ValueError, match="^" + FEATURES):
        jaxrnn.bptt(params, Batch(PIANO_ROLL, PIANO_ROLL), loss=loss)


def test_integers_are_tokens_where_a_mask_or_a_state_says_so():
    """Tokens of two batch axes, the second of which has I sequences."""
    params, tokens = jaxrnn.init(KEY, 8, H, 8), PIANO_ROLL.astype(int)
    expected = jaxrnn.bptt(params, Batch(tokens[:, :, 0], tokens[:, :, 0]))[0][0]
    for h_0, mask in ((zeros(B, 8, H), None), (None, np.ones((T, B, 8), bool))):
        (value, _), _ = jaxrnn.bptt(params, Batch(tokens, tokens, mask), h_0)
        np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_integers_of_rank_2_are_tokens():
    params, tokens = jaxrnn.init(KEY, 8, H, 8), np.arange(T * 8).reshape(T, 8) % 8
    (_, h_T), _ = jaxrnn.bptt(params, Batch(tokens, tokens))
    assert h_T.shape == (8, H)
    jaxrnn.check_values(params, Batch(tokens, tokens))


@pytest.mark.parametrize(
    "call",
    [jaxrnn.hidden_states, jaxrnn.unroll, jaxrnn.lyapunov_exponents],
    ids=lambda f: f.__name__,
)
def test_integer_features_without_targets_are_an_error_of_xs(call):
    params = jaxrnn.init(KEY, 8, H, 8)
    for h_0 in (None, zeros(B, H)):
        with pytest.raises(ValueError, match="^" + FEATURES):
            call(params, PIANO_ROLL, h_0)
    call(params, PIANO_ROLL, zeros(B, 8, H))


@pytest.mark.parametrize("call", [jaxrnn.step, jaxrnn.jacobian], ids=lambda f: f.__name__)
def test_integer_features_of_one_step_are_an_error_of_x(call):
    params, x = jaxrnn.init(KEY, 8, H, 8), PIANO_ROLL[0]
    with pytest.raises(ValueError, match="^x" + NO_FLOATS):
        call(params, zeros(B, H), x)
    call(params, zeros(B, H), x.astype(np.float32))
    call(params, zeros(B, 8, H), x)


def test_targets_or_weights_say_that_xs_are_tokens():
    """In sequence_loss as in bptt, also where hidden_states alone could not tell."""
    params, tokens = jaxrnn.init(KEY, 8, H, 5), PIANO_ROLL.astype(int)
    labels, weights = np.zeros((T, B, 8), int), zeros(T, B, 8) + 1
    for batch in (Batch(tokens, labels), Batch(tokens, labels, weights=weights)):
        np.testing.assert_allclose(
            jaxrnn.sequence_loss(params, batch)[0], jaxrnn.bptt(params, batch)[0][0], rtol=1e-5
        )


def test_parameters_of_numpy_take_traced_tokens():
    params = jax.tree.map(np.asarray, jaxrnn.init(KEY, 5, H, 2))
    batch = Batch(np.arange(4 * T * B).reshape(4 * T, B) % 5, np.zeros((4 * T, B), int))
    expected = jaxrnn.bptt(jax.tree.map(jnp.asarray, params), batch)[1]
    for gradient in (partial(jaxrnn.bptt, checkpoint_every=7), jaxrnn.rtrl):
        assert max(relative_errors(gradient(params, batch)[1], expected)) <= 1e-5
    jax.jit(lambda xs: jaxrnn.unroll(params, xs))(batch.xs)


@pytest.mark.parametrize("field", ["reset", "drive"])
def test_a_reset_or_a_drive_says_that_xs_are_tokens(field):
    value = {"reset": np.zeros((T, B, 8), bool), "drive": zeros(T, B, 8, H)}[field]
    h_T, _ = jaxrnn.unroll(jaxrnn.init(KEY, 8, H, 8), PIANO_ROLL, **{field: value})
    assert h_T.shape == (B, 8, H)


@pytest.mark.parametrize("name", ["bptt", "rtrl", "snap1", "uoro"])
def test_tokens_of_8_bits_count_beyond_127(name):
    params = jaxrnn.init(KEY, 300, 4, 2)
    tokens = np.array([[0, 255], [44, 100], [127, 200]])
    options = {"key": jax.random.key(1)} if name == "uoro" else {}
    gradient = partial(getattr(jaxrnn, name), **options)
    got, expected = (
        gradient(params, Batch(xs, tokens % 2)) for xs in (tokens.astype(np.uint8), tokens)
    )
    assert max(relative_errors(got, expected)) == 0


def test_targets_of_bool_are_numbers():
    params, xs = jaxrnn.init(KEY, 3, H, 2), zeros(T, B, 3) + 1
    got, expected = (
        jaxrnn.bptt(params, Batch(xs, targets), loss=jaxrnn.binary_cross_entropy)
        for targets in (np.ones((T, B, 2), bool), zeros(T, B, 2) + 1)
    )
    assert max(relative_errors(got, expected)) == 0
