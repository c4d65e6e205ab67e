"""The forward pass against the plain scan, under each transformation, and its jaxpr."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from jaxrnn import Batch
from tests.conftest import default_and_thorough
from tests.reference import ACTIVATIONS, plain_loss, plain_unroll, random_case, with_defaults
from tests.reference import relative_errors as errors

AGREEMENT = 1e-12
by_autodiff = jax.value_and_grad(jaxrnn.sequence_loss, has_aux=True)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("structure", default_and_thorough(range(3), range(16)))
def test_unroll_equals_the_plain_scan(structure):
    case = random_case(2000 + structure, largest_T=20)
    activation = ACTIVATIONS[case.activation]

    def unroll(params, batch, h_0):
        options = {"mask": batch.mask, "reset": batch.reset, "activation": activation}
        return jaxrnn.unroll(params, batch.xs, h_0, **options)

    def plain(params, batch, h_0):
        batch, h_0 = with_defaults(params, batch, h_0)
        return plain_unroll(params, batch.xs, h_0, batch.mask, batch.reset, activation)

    got, expected = (jax.jit(fn)(*case.arguments) for fn in (unroll, plain))
    assert max(errors(got, expected)) <= AGREEMENT


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", default_and_thorough(["tanh", "relu"], ACTIVATIONS))
def test_unroll_equals_a_scan_over_step(name):
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2, dtype=jnp.float64)
    xs, h_0 = jax.random.normal(jax.random.key(1), (7, 4, 3)), jnp.ones((4, 5))
    activation = ACTIVATIONS[name]

    @jax.jit
    def both(params, xs, h_0):
        step = partial(jaxrnn.step, params, activation=activation)
        got = jaxrnn.unroll(params, xs, h_0, activation=activation)
        return got, jax.lax.scan(step, h_0, xs)

    got, expected = both(params, xs, h_0)
    assert max(errors(got, expected)) <= AGREEMENT


@pytest.mark.usefixtures("x64")
def test_tokens_equal_one_hot_inputs():
    params = jaxrnn.init(jax.random.key(0), 6, 5, 2, dtype=jnp.float64)
    tokens = jax.random.randint(jax.random.key(1), (7, 4), 0, 6)
    unroll = jax.jit(jaxrnn.unroll)
    expected = unroll(params, jax.nn.one_hot(tokens, 6))
    for dtype in (jnp.int32, jnp.uint8, jnp.int64):
        assert max(errors(unroll(params, tokens.astype(dtype)), expected)) <= AGREEMENT


@pytest.mark.usefixtures("x64")
def test_masked_sequences_equal_the_sequences_without_padding():
    T = 6
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2, dtype=jnp.float64)
    xs = jax.random.normal(jax.random.key(1), (T, T + 1, 3))
    h_0 = jax.random.normal(jax.random.key(2), (T + 1, 5))
    mask = jaxrnn.mask_from_lengths(jnp.arange(T + 1), T)
    hidden_states = jax.jit(jaxrnn.hidden_states)
    h_T, hs = hidden_states(params, xs, h_0, mask=mask)
    h_T, hs, xs, h_0 = map(np.asarray, (h_T, hs, xs, h_0))
    assert (h_T[0] == h_0[0]).all()
    for length in range(T + 1):
        expected_T, expected = hidden_states(params, xs[:length, length], h_0[length])
        np.testing.assert_allclose(h_T[length], expected_T, atol=1e-14)
        np.testing.assert_allclose(hs[:length, length], expected, atol=1e-14)
        assert not hs[length:, length].any()
        assert expected.shape == (length, 5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("resets", default_and_thorough([(2, 5)], [(0,), (6,), (2, 5), range(7)]))
def test_pieces_between_resets_equal_separate_sequences(resets):
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2, dtype=jnp.float64)
    xs = jax.random.normal(jax.random.key(1), (7, 3))
    targets = jax.random.randint(jax.random.key(2), (7,), 0, 2)
    h_0 = jnp.ones(5)
    reset = jnp.zeros(7, bool).at[jnp.array(resets)].set(True)

    def separate_pieces(params):
        total, h = 0.0, h_0
        for start, stop in zip([0, *resets], [*resets, 7], strict=True):
            h = h if start == 0 and 0 not in resets else jnp.zeros(5)
            if start == stop:
                continue
            piece = Batch(xs[start:stop], targets[start:stop])
            value, h = jaxrnn.sequence_loss(params, piece, h)
            total += value * (stop - start) / 7
        return total, h

    expected = jax.jit(jax.value_and_grad(separate_pieces, has_aux=True))(params)
    batch = Batch(xs, targets, reset=reset)
    for fn in (jaxrnn.bptt, by_autodiff):
        assert max(errors(jax.jit(fn)(params, batch, h_0), expected)) <= AGREEMENT


def test_a_masked_step_keeps_the_state_and_ignores_its_reset():
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    xs, h_0 = jnp.ones((3, 3)), jnp.ones(5)
    mask, reset = jnp.array([True, False, True]), jnp.array([False, True, False])
    hidden_states = jax.jit(jaxrnn.hidden_states)
    h_T, hs = hidden_states(params, xs, h_0, mask=mask, reset=reset)
    expected, _ = hidden_states(params, xs[:2], h_0)
    np.testing.assert_allclose(h_T, expected, rtol=1e-6)
    assert not hs[1].any()


@pytest.mark.usefixtures("x64")
def test_outputs_depend_only_on_current_and_earlier_inputs():
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2, dtype=jnp.float64)
    xs = jax.random.normal(jax.random.key(1), (6, 3))
    dys = jax.jit(jax.jacobian(lambda xs: jaxrnn.unroll(params, xs)[1]))(xs)  # (6, O, 6, I)
    depends = jnp.abs(dys).sum(axis=(1, 3)) > 0
    np.testing.assert_array_equal(depends, np.tril(np.ones((6, 6), bool)))


@pytest.fixture(scope="module")
def small():
    with jax.enable_x64(True):
        return random_case(
            31, T=6, batch_shape=(3,), sizes=(2, 3, 2), activation="tanh", loss="cross_entropy",
            tokens=False, mask=True, reset=True, weights=True, h_0=True, labels=True,
        )  # fmt: skip


def directions(tree, seed):
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return structure.unflatten([jnp.asarray(rng.normal(size=leaf.shape)) for leaf in leaves])


TRANSFORMS = {
    "grad by parameters": lambda f, p, x, h: jax.grad(f)(p, x, h),
    "grad by inputs": lambda f, p, x, h: jax.grad(f, 1)(p, x, h),
    "grad by h_0": lambda f, p, x, h: jax.grad(f, 2)(p, x, h),
    "jvp": lambda f, p, x, h: jax.jvp(f, (p, x, h), directions((p, x, h), 1)),
    "checkpoint": lambda f, p, x, h: jax.grad(jax.checkpoint(f))(p, x, h),
    "hessian": lambda f, p, x, h: jax.hessian(f)(p, x, h),
    "reverse over reverse": lambda f, p, x, h: jax.jacrev(jax.grad(f))(p, x, h),
    "forward over reverse": lambda f, p, x, h: jax.jvp(
        jax.grad(f), (p, x, h), directions((p, x, h), 2)
    ),
    "third derivative": lambda f, p, x, h: jax.jvp(
        lambda h: jax.jvp(jax.grad(f, 2), (p, x, h), directions((p, x, h), 3))[1],
        (h,),
        (directions(h, 4),),
    ),
    "vmap over parameters": lambda f, p, x, h: jax.vmap(jax.grad(f), (0, None, None))(
        jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), p), x, h
    ),
    "vmap over inputs": lambda f, p, x, h: jax.vmap(jax.grad(f), (None, 0, None))(
        p, jnp.stack([x, 2 * x]), h
    ),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name", default_and_thorough(["grad by parameters", "jvp", "vmap over parameters"], TRANSFORMS)
)
def test_transformations_equal_those_of_the_plain_scan(name, small):
    def run(loss_fn, params, xs, h_0):
        def f(params, xs, h_0):
            return loss_fn(params, small.batch._replace(xs=xs), h_0)[0]

        return TRANSFORMS[name](f, params, xs, h_0)

    arguments = small.params, small.batch.xs, small.h_0
    got = jax.jit(partial(run, jaxrnn.sequence_loss))(*arguments)
    expected = jax.jit(partial(run, plain_loss))(*arguments)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13 * scale)


@pytest.mark.usefixtures("x64")
def test_vmap_over_sequences_equals_the_batch_axis():
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2, dtype=jnp.float64)
    xs = jax.random.normal(jax.random.key(1), (7, 4, 3))
    mapped = jax.vmap(partial(jaxrnn.unroll, params), in_axes=1, out_axes=(0, 1))
    assert max(errors(jax.jit(mapped)(xs), jax.jit(jaxrnn.unroll)(params, xs))) <= AGREEMENT


def arrays_and_innermost_scans(jaxpr, arrays, scans):
    """Collects the shapes in a jaxpr, and the shapes that the body of each innermost scan returns.

    Returns whether the jaxpr contains a scan.
    """
    found = False
    for equation in jaxpr.eqns:
        arrays.update(out.aval.shape for out in equation.outvars if hasattr(out.aval, "shape"))
        inner = [leaf for leaf in jax.tree.leaves(equation.params) if hasattr(leaf, "jaxpr")]
        nested = [arrays_and_innermost_scans(leaf.jaxpr, arrays, scans) for leaf in inner]
        if equation.primitive.name == "scan" and not any(nested):
            scans.append({out.aval.shape for out in inner[0].jaxpr.outvars})
        found |= equation.primitive.name == "scan" or any(nested)
    return found


T, I, H, O = 96, 4, 7, 6


def structure_of(fn, B):
    params = jaxrnn.init(jax.random.key(0), I, H, O)
    batch = Batch(jnp.ones((T, B, I)), jnp.zeros((T, B), int))
    arrays, scans = set(), []
    arrays_and_innermost_scans(jax.make_jaxpr(fn)(params, batch).jaxpr, arrays, scans)
    return arrays, scans


def per_example_loss(params, batch):
    one = jax.vmap(lambda xs, targets: jaxrnn.sequence_loss(params, Batch(xs, targets))[0], 1)
    return one(batch.xs, batch.targets).mean(), None


@pytest.mark.parametrize(
    "gradient_fn",
    [
        jaxrnn.bptt,
        partial(jaxrnn.bptt, checkpoint_every=10),
        by_autodiff,
        jax.value_and_grad(per_example_loss, has_aux=True),
    ],
    ids=["bptt", "bptt, recomputed", "autodiff", "autodiff of vmap"],
)
@pytest.mark.parametrize("B", [3, 33])
def test_no_weight_gradient_inside_the_loop_over_time(gradient_fn, B):
    arrays, scans = structure_of(gradient_fn, B)
    assert (H, H) in arrays  # the gradient itself, so the search works
    if B == 33:  # the products of fewer sequences are elementwise, (B, H, H)
        assert not {(B, H, H), (H, B, H), (H, H, B)} & arrays
    assert len(scans) >= 2
    assert not any({(H, H), (H, I), (O, H)} & returned for returned in scans)


def test_the_plain_scan_has_the_weight_gradient_inside_its_loop():
    """Shows that `test_no_weight_gradient_inside_the_loop_over_time` can fail."""
    _, scans = structure_of(jax.value_and_grad(plain_loss, has_aux=True), 3)
    assert any((H, H) in returned for returned in scans)


def test_zero_steps():
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    h_0 = jnp.ones((4, 5))
    h_T, ys = jaxrnn.unroll(params, jnp.ones((0, 4, 3)), h_0)
    assert (h_T == h_0).all()
    assert ys.shape == (0, 4, 2)
    np.testing.assert_array_equal(
        jaxrnn.unroll(params, jnp.ones((0, 4, 3)))[0], np.zeros((4, 5), np.float32), strict=True
    )


def test_two_batch_axes_equal_one():
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    lengths = jnp.array([[0, 1, 2], [3, 4, 5]])
    xs = jax.random.normal(jax.random.key(1), (5, 2, 3, 3))
    mask = jaxrnn.mask_from_lengths(lengths, 5)
    unroll = jax.jit(jaxrnn.unroll)
    h_T, ys = unroll(params, xs, mask=mask)
    flat_T, flat_ys = unroll(params, xs.reshape(5, 6, 3), mask=mask.reshape(5, 6))
    np.testing.assert_allclose(h_T.reshape(6, 5), flat_T, atol=1e-6)
    np.testing.assert_allclose(ys.reshape(5, 6, 2), flat_ys, atol=1e-6)


def test_bfloat16_under_strict_dtype_promotion():
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2, dtype=jnp.bfloat16)
    batch = Batch(
        jnp.ones((6, 4, 3)), jnp.zeros((6, 4), int), mask=jnp.ones((6, 4), bool),
        weights=jnp.ones((6, 4)),
    )  # fmt: skip
    with jax.numpy_dtype_promotion("strict"):
        for fn in (jaxrnn.bptt, by_autodiff):
            (value, h_T), grads = jax.jit(fn)(params, batch, jnp.zeros((4, 5)))
            assert value.dtype == jnp.float32
            assert h_T.dtype == grads.W_h.dtype == jnp.bfloat16
