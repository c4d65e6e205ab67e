"""The hand-written gradient against autodiff, and against an oracle without autodiff."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from jaxrnn import Activation, Batch, backward, blocks
from tests.conftest import default_and_thorough
from tests.reference import (
    ACTIVATIONS,
    Case,
    oracle_value_and_grad,
    plain_loss,
    random_case,
    relative_errors,
)

AGREEMENT = 1e-12


def compiled(gradient_fn, case: Case, **keywords):
    return jax.jit(partial(gradient_fn, **case.keywords, **keywords))


by_autodiff = jax.value_and_grad(jaxrnn.sequence_loss, has_aux=True)
by_plain_autodiff = jax.value_and_grad(plain_loss, has_aux=True)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("structure", default_and_thorough([0, 5, 7, 14, 28], range(43)))
def test_three_gradients_agree(structure, monkeypatch):
    """Structures (sizes, T, activation, loss, options) with 6 draws of all values each. Those that
    run by default have every activation, loss, option, batch shape and checkpoint_every.

    Half of them have many blocks; by default a network so small has one.
    """
    if structure % 2:
        monkeypatch.setattr(
            backward, "block_steps", lambda _, batch, *rest: blocks.near_divisor(len(batch.xs), 7)
        )
    cases = [random_case(structure, values=draw) for draw in range(6)]
    by_hand = compiled(jaxrnn.bptt, cases[0], checkpoint_every=cases[0].checkpoint_every)
    fast = compiled(by_autodiff, cases[0])
    plain = compiled(by_plain_autodiff, cases[0])
    for case in cases:
        expected = plain(*case.arguments)
        assert max(relative_errors(by_hand(*case.arguments), expected)) <= AGREEMENT
        assert max(relative_errors(fast(*case.arguments), expected)) <= AGREEMENT


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", [False, True], ids=["plain", "options"])
@pytest.mark.parametrize("by_blocks", [None, "forward", "recomputed"])
def test_blocks_that_do_not_divide_the_steps(options, by_blocks, monkeypatch):
    """17 steps by blocks of 6. The forward pass is one loop, or by blocks, or not stored. With
    options, only steps of the second block count."""
    monkeypatch.setattr(backward, "block_steps", lambda *_: 6)
    if by_blocks == "forward":
        monkeypatch.setattr(backward, "forward_steps", lambda T, K, h_0: K)
    given = dict.fromkeys(("mask", "reset", "weights", "h_0", "leak", "drive"), options)
    case = random_case(
        3, **given, T=17, sizes=(3, 4, 2), batch_shape=(3,), activation="tanh",
        loss="cross_entropy", labels=True, tokens=False,
    )  # fmt: skip
    if options:
        counts = (jnp.arange(17) // 3 == 2)[:, None]
        weights = jnp.where(counts, case.batch.weights, 0)
        case = case._replace(batch=case.batch._replace(weights=weights))
    K = 6 if by_blocks == "recomputed" else None
    got = compiled(jaxrnn.bptt, case, checkpoint_every=K)(*case.arguments)
    assert (
        max(relative_errors(got, compiled(by_plain_autodiff, case)(*case.arguments))) <= AGREEMENT
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("structure", default_and_thorough([0, 1, 2, 4, 8, 13, 14], range(24)))
def test_agrees_with_the_oracle_that_uses_no_autodiff(structure):
    case = random_case(1000 + structure, largest_T=6, largest_size=3)
    by_hand = compiled(jaxrnn.bptt, case, checkpoint_every=case.checkpoint_every)
    (value, _), grads = by_hand(*case.arguments)
    assert max(relative_errors((value, grads), oracle_value_and_grad(case))) <= AGREEMENT


@pytest.mark.parametrize("checkpoint_every", [None, 2])
def test_zero_steps_have_no_loss_and_no_gradient(checkpoint_every):
    params, h_0 = jaxrnn.init(jax.random.key(0), 3, 5, 2), jnp.ones((4, 5))
    batch = Batch(jnp.ones((0, 4, 3)), jnp.zeros((0, 4), int))
    (value, h_T), grads = jaxrnn.bptt(params, batch, h_0, checkpoint_every=checkpoint_every)
    assert value == 0
    np.testing.assert_array_equal(h_T, h_0)
    jax.tree.map(lambda d, leaf: np.testing.assert_array_equal(d, 0 * leaf), grads, params)


@pytest.mark.usefixtures("x64")
def test_a_softmax_over_one_class_has_no_gradient():
    case = random_case(1, sizes=(2, 3, 1), loss="cross_entropy")
    (value, _), grads = compiled(jaxrnn.bptt, case)(*case.arguments)
    assert max(float(jnp.abs(leaf).max()) for leaf in (value, *grads)) <= 1e-15


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("T", "checkpoint_every"),
    default_and_thorough([(200, 14)], [(40, None), (200, 14)], unpack=True),
)
def test_float32_error_is_at_most_twice_autodiffs(T, checkpoint_every):
    """The error of the whole gradient, against float64; the mean over 5 draws."""
    cases = [
        random_case(
            7, values=draw, T=T, batch_shape=(8,), sizes=(16, 32, 10), activation="tanh",
            loss="cross_entropy", labels=True, tokens=False, mask=False, reset=False,
            weights=False, h_0=True,
        )
        for draw in range(5)
    ]  # fmt: skip
    by_hand = compiled(jaxrnn.bptt, cases[0], checkpoint_every=checkpoint_every)
    plain = compiled(by_plain_autodiff, cases[0])
    errors, autodiffs = 0.0, 0.0
    for case in cases:
        exact = plain(*case.arguments)[1]
        single = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.float64 else leaf,
            case.arguments,
        )
        errors += distance(by_hand(*single)[1], exact)
        autodiffs += distance(plain(*single)[1], exact)
    assert 0 < errors <= 2 * autodiffs


def distance(tree, reference) -> float:
    differences = jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), tree, reference)
    return float(np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(differences))))


def test_bfloat16_sums_over_time_accumulate_in_float32():
    """Against float64 autodiff of the same parameters; a bias gradient summed in bfloat16 over
    these 4,096 terms is wrong by half."""
    params = jaxrnn.init(jax.random.key(0), 4, 8, 3, dtype=jnp.bfloat16)
    batch = Batch(jax.random.normal(jax.random.key(1), (128, 32, 4)), jnp.ones((128, 32, 3)))
    with jax.enable_x64(True):
        exact = jax.jit(partial(by_plain_autodiff, loss=jaxrnn.squared_error))(
            jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params), batch
        )
    for gradient_fn in (jaxrnn.bptt, jax.value_and_grad(jaxrnn.sequence_loss, has_aux=True)):
        gradient_fn = jax.jit(partial(gradient_fn, loss=jaxrnn.squared_error))
        (value, h_T), grads = gradient_fn(params, batch)
        assert value.dtype == jnp.float32
        assert h_T.dtype == grads.b_y.dtype == jnp.bfloat16
        for leaf, expected in zip((value, *grads), (exact[0][0], *exact[1]), strict=True):
            expected = np.asarray(expected)
            error = np.abs(np.asarray(leaf).astype(np.float64) - expected).max()
            assert error <= 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])
@pytest.mark.parametrize("method", [jaxrnn.bptt, jaxrnn.rtrl])
def test_the_scale_of_the_weights_changes_no_bit_in_float16(method, scale):
    """A weighted error of float16, whose range ends at 65504, would be infinite or 0."""
    params = jaxrnn.init(jax.random.key(0), 4, 8, 3, dtype=jnp.float16)
    xs = jax.random.normal(jax.random.key(1), (128, 8, 4))
    weights = jax.random.uniform(jax.random.key(2), (128, 8))
    batch = Batch(xs, jnp.ones((128, 8), int), mask=weights < 0.7, weights=weights)
    gradient = jax.jit(method)
    got = gradient(params, batch._replace(weights=scale * weights))
    assert jnp.abs(got[1].W_h).max() > 1e-3
    for leaf, expected in zip(*map(jax.tree.leaves, (got, gradient(params, batch))), strict=True):
        assert leaf.tobytes() == expected.tobytes()


@pytest.mark.parametrize("checkpoint_every", [None, 3])
def test_nan_in_padding_changes_no_bit(checkpoint_every):
    case = random_case(
        11, dtype=np.float32, T=37, batch_shape=(4,), tokens=False, mask=True, reset=True,
        weights=True, h_0=True, loss="squared_error",
    )  # fmt: skip
    mask = case.batch.mask[..., None]
    dirty = case.batch._replace(
        xs=jnp.where(mask, case.batch.xs, jnp.nan),
        targets=jnp.where(mask, case.batch.targets, jnp.nan),
        weights=jnp.where(case.batch.mask, case.batch.weights, jnp.nan),
    )
    fns = [
        partial(jaxrnn.bptt, checkpoint_every=checkpoint_every, **case.keywords),
        jax.value_and_grad(partial(jaxrnn.sequence_loss, **case.keywords), has_aux=True),
    ]
    for fn in fns:
        fn = jax.jit(fn)
        clean_out = fn(case.params, case.batch, case.h_0)
        dirty_out = fn(case.params, dirty, case.h_0)
        for a, b in zip(jax.tree.leaves(clean_out), jax.tree.leaves(dirty_out), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


GELU = Activation(jax.nn.gelu)


@pytest.mark.parametrize(
    "activation",
    default_and_thorough([GELU], [*ACTIVATIONS.values(), GELU]),
)
def test_nan_in_a_state_that_no_step_reads_changes_no_bit(activation):
    """Sequence 1 does not exist; sequence 2 begins with padding and then a reset."""
    case = random_case(
        11, dtype=np.float32, T=9, batch_shape=(4,), tokens=False, mask=True, h_0=True,
        loss="squared_error", reset=False, weights=False,
    )  # fmt: skip
    reset = jnp.zeros((9, 4), bool).at[3, 2].set(True)
    mask = case.batch.mask.at[:, 1].set(False).at[:3, 2].set(False).at[3, 2].set(True)
    batch = case.batch._replace(mask=mask, reset=reset)
    dirty = case.h_0.at[1:3].set(jnp.nan)
    keywords = {"activation": activation, "loss": jaxrnn.squared_error}
    fns = [partial(jaxrnn.bptt, checkpoint_every=K, **keywords) for K in (None, 3)]
    fns += [jax.value_and_grad(partial(jaxrnn.sequence_loss, **keywords), has_aux=True)]
    for fn in fns:
        outs = [jax.jit(fn)(case.params, batch, h_0) for h_0 in (case.h_0, dirty)]
        (((value, _), grads), ((dirty_value, h_T), dirty_grads)) = outs
        np.testing.assert_array_equal(h_T[1], dirty[1])
        for a, b in zip((value, *grads), (dirty_value, *dirty_grads), strict=True):
            assert np.isfinite(a).all()
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    flow = jaxrnn.gradient_flow(case.params, batch, dirty, **keywords)
    assert all(np.isfinite(leaf).all() for leaf in flow)


@pytest.mark.parametrize("nothing", default_and_thorough(["mask"], ["mask", "weights", "T"]))
def test_value_and_gradient_are_zero_if_no_step_counts(nothing):
    params = jaxrnn.init(jax.random.key(0), 2, 3, 2)
    h_0 = jnp.ones((4, 3))
    batch = Batch(jnp.ones((5, 4, 2)), jnp.zeros((5, 4), int))
    if nothing == "mask":
        batch = batch._replace(mask=jnp.zeros((5, 4), bool))
    if nothing == "weights":
        batch = batch._replace(weights=jnp.zeros((5, 4)))
    if nothing == "T":
        batch = jax.tree.map(lambda leaf: leaf[:0], batch)
    for fn in (jaxrnn.bptt, by_autodiff):
        (value, h_T), grads = jax.jit(fn)(params, batch, h_0)
        assert value == 0
        assert all((leaf == 0).all() for leaf in grads)
        assert (h_T == h_0).all() or nothing == "weights"


@pytest.mark.usefixtures("x64")
def test_bptt_can_be_jitted_vmapped_and_differentiated_itself():
    case = random_case(
        5, T=11, batch_shape=(), sizes=(2, 3, 2), activation="tanh", loss="cross_entropy",
        tokens=False, mask=True, reset=True, weights=True, h_0=True, checkpoint_every=None,
    )  # fmt: skip
    params, *data = case.arguments
    some = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)

    def gradient_size(params, gradient_fn):
        return sum((leaf**2).sum() for leaf in gradient_fn(params, *data)[1])

    def all_of_it(gradient_fn):
        one = partial(gradient_fn, batch=data[0], h_0=data[1])
        second = jax.grad(partial(gradient_size, gradient_fn=gradient_fn))(params)
        return one(params), jax.vmap(one)(some), second

    by_hand = jax.jit(partial(all_of_it, jaxrnn.bptt))()
    expected = jax.jit(partial(all_of_it, by_plain_autodiff))()
    assert max(relative_errors(by_hand, expected)) <= 10 * AGREEMENT


def test_bptt_calls_no_autodiff(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("autodiff was called")

    reverse = "grad", "vjp", "value_and_grad", "jacrev", "hessian", "linear_transpose"
    for name in (*reverse, "jvp", "linearize", "jacfwd"):
        monkeypatch.setattr(jax, name, refuse)
    case = random_case(0, mask=True, reset=True, weights=True, leak=True, drive=True)
    options = {"loss": case.keywords["loss"], "leak": 0.3}
    for more in ({}, options, options | {"checkpoint_every": 2}):
        jax.make_jaxpr(partial(jaxrnn.bptt, **more))(*case.arguments)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8])
def test_tokens_of_8_bits_equal_tokens_of_32(dtype):
    """With more tokens than their dtype can count."""
    params = jaxrnn.init(jax.random.key(0), 300, 4, 2)
    tokens = jnp.arange(100, 124).reshape(6, 4)
    batch = Batch(tokens, tokens % 2)
    short = batch._replace(xs=tokens.astype(dtype))
    for gradient_fn in map(jax.jit, (jaxrnn.bptt, by_autodiff)):
        results = gradient_fn(params, short), gradient_fn(params, batch)
        assert max(relative_errors(*results)) == 0
