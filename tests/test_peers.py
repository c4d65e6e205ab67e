"""Cases in which the recurrent layers of other libraries fail, and in which jaxrnn must not.

The behaviour of a library is tested if it is installed. If such a test fails, the library has
changed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn

T, B, I, H = 5, 2, 3, 4
LENGTHS = jnp.array([2, 0])
MASK = jaxrnn.mask_from_lengths(LENGTHS, T)
XS = jax.random.normal(jax.random.key(0), (T, B, I))
NAN_PADDED = jnp.where(MASK[..., None], XS, jnp.nan)


def params_in(dtype):
    return jaxrnn.init(jax.random.key(1), I, H, 2, dtype=dtype)


def linen_rnn(**cell):
    linen = pytest.importorskip("flax.linen")
    return linen.RNN(linen.SimpleCell(H, **cell), time_major=True, return_carry=True)


def nnx_rnn(**cell):
    nnx = pytest.importorskip("flax.nnx")
    cell = nnx.SimpleCell(I, H, rngs=nnx.Rngs(0), **cell)
    return nnx.RNN(cell, time_major=True, return_carry=True)


def flax_run(rnn, xs, **keywords):
    """The last carry and the outputs of either kind of Flax layer."""
    if hasattr(rnn, "init_with_output"):
        return rnn.init_with_output(jax.random.key(0), xs, **keywords)[0]
    return rnn(xs, **keywords)


both_kinds = pytest.mark.parametrize("flax_rnn", [linen_rnn, nnx_rnn])


def test_bfloat16_computes_in_bfloat16():
    params = params_in(jnp.bfloat16)
    h_T, hs = jaxrnn.hidden_states(params, XS)
    assert h_T.dtype == hs.dtype == jnp.bfloat16
    exact, _ = jaxrnn.hidden_states(jax.tree.map(lambda p: p.astype(jnp.float32), params), XS)
    np.testing.assert_allclose(h_T.astype(jnp.float32), exact, atol=2**-5)


@both_kinds
def test_flax_rejects_bfloat16(flax_rnn):
    with pytest.raises(TypeError, match="carry"):
        flax_run(flax_rnn(dtype=jnp.bfloat16), XS.astype(jnp.bfloat16))


def test_the_last_state_of_an_empty_sequence_is_h_0():
    h_0 = jnp.ones((B, H))
    h_T, _ = jaxrnn.hidden_states(params_in(jnp.float32), XS, h_0, mask=MASK)
    assert (h_T[1] == h_0[1]).all()
    assert (h_T[0] != h_0[0]).all()


@both_kinds
def test_flax_returns_a_state_from_the_padding_of_an_empty_sequence(flax_rnn):
    carry, outputs = flax_run(flax_rnn(), XS, seq_lengths=LENGTHS)
    assert (carry[1] == outputs[-1, 1]).all()
    assert (carry[1] != 0).all()


def test_nan_in_the_padding_changes_neither_value_nor_gradient():
    params = params_in(jnp.float32)
    targets = jnp.zeros((T, B), int)
    for fn in (jaxrnn.bptt, jax.value_and_grad(jaxrnn.sequence_loss, has_aux=True)):
        gradient_fn = jax.jit(fn)
        clean = gradient_fn(params, jaxrnn.Batch(XS, targets, MASK))
        padded = gradient_fn(params, jaxrnn.Batch(NAN_PADDED, targets, MASK))
        assert jax.tree.all(jax.tree.map(np.array_equal, padded, clean))


def test_nan_in_the_padding_makes_the_gradient_of_flax_nan():
    rnn = linen_rnn()
    variables = rnn.init(jax.random.key(0), XS)

    def value(variables):
        outputs = rnn.apply(variables, NAN_PADDED, seq_lengths=LENGTHS)[1]
        return jnp.where(MASK[..., None], outputs, 0).sum()

    value, grads = jax.value_and_grad(value)(variables)
    assert jnp.isfinite(value)
    assert jnp.isnan(grads["params"]["cell"]["h"]["kernel"]).all()


TWO_AXES = jnp.stack([XS, -XS, 2 * XS], axis=1)
TWO_AXES_LENGTHS = jnp.array([[2, 0], [5, 3], [1, 4]])


def test_two_batch_axes_with_a_mask():
    params = params_in(jnp.float32)
    mask = jaxrnn.mask_from_lengths(TWO_AXES_LENGTHS, T)
    hidden_states = jax.jit(jaxrnn.hidden_states)
    h_T, _ = hidden_states(params, TWO_AXES, mask=mask)
    for b in np.ndindex(3, B):
        expected, _ = hidden_states(params, np.asarray(TWO_AXES)[: TWO_AXES_LENGTHS[b], *b])
        np.testing.assert_allclose(h_T[b], expected, atol=1e-6)


@both_kinds
def test_flax_rejects_two_batch_axes_with_lengths(flax_rnn):
    with pytest.raises(ValueError, match="Incompatible shapes"):
        flax_run(flax_rnn(), TWO_AXES, seq_lengths=TWO_AXES_LENGTHS)


def test_padded_outputs_are_zeros():
    _, hs = jaxrnn.hidden_states(params_in(jnp.float32), XS, mask=MASK)
    assert not hs[~MASK].any()
    _, ys = jaxrnn.unroll(params_in(jnp.float32)._replace(b_y=jnp.ones(2)), XS, mask=MASK)
    assert not ys[~MASK].any()


@both_kinds
def test_padded_outputs_of_flax_are_not_zeros(flax_rnn):
    _, outputs = flax_run(flax_rnn(), XS, seq_lengths=LENGTHS)
    assert outputs[~MASK].all()


def test_the_dtype_is_that_of_the_parameters():
    for dtype in (jnp.float32, jnp.bfloat16):
        for input_dtype in (jnp.float32, jnp.bfloat16):
            h, y = jaxrnn.step(params_in(dtype), jnp.zeros((B, H)), XS[0].astype(input_dtype))
            assert h.dtype == y.dtype == dtype


def test_haiku_makes_parameters_of_two_dtypes_from_bfloat16_input():
    hk = pytest.importorskip("haiku")

    @hk.transform
    def step(x):
        core = hk.VanillaRNN(H)
        return core(x, core.initial_state(B))

    x = XS[0].astype(jnp.bfloat16)
    params = step.init(jax.random.key(0), x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16", "float32"}
    assert step.apply(params, None, x)[0].dtype == jnp.float32
