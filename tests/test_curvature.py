"""The Gauss-Newton product against the dense J^T H_L J of autodiff."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.flatten_util import ravel_pytree

import jaxrnn
from jaxrnn import Batch, curvature
from tests.conftest import default_and_thorough
from tests.reference import plain_unroll, random_case, relative_errors, with_defaults

AGREEMENT = 1e-10


def draw(structure, **fixed):
    """Half of the structures have a leak, half a drive."""
    fixed = {"leak": structure % 2 == 0, "drive": structure % 4 < 2, "largest_T": 12} | fixed
    return random_case(4000 + structure, **{"largest_size": 3} | fixed)


def random_direction(params, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), params)


def states_and_outputs(case):
    """theta -> the states and the outputs of the plain scan, and theta as a vector."""
    theta, unravel = ravel_pytree(case.params)
    batch, h_0 = with_defaults(case.params, case.batch, case.h_0)
    activation, leak = case.keywords["activation"], case.leak

    def states(theta):  # an identity readout gives the states; those of masked steps are zero
        params = unravel(theta)
        H = len(params.b_h)
        params = params._replace(W_y=jnp.eye(H), b_y=jnp.zeros(H))
        steps = params, batch.xs, h_0, batch.mask, batch.reset, activation, leak, batch.drive
        return plain_unroll(*steps)[1]

    def outputs(theta):
        params = unravel(theta)
        steps = params, batch.xs, h_0, batch.mask, batch.reset, activation, leak, batch.drive
        return plain_unroll(*steps)[1]

    return states, outputs, theta, unravel


def dense(case, structural=0.0):
    """G, and structural times the matrix of the states, from Jacobians of the plain scan and the
    Hessian of the value of the loss."""
    batch, _ = with_defaults(case.params, case.batch, case.h_0)
    states, outputs, theta, _ = states_and_outputs(case)
    exists = batch.mask.reshape((*batch.mask.shape, *[1] * (batch.targets.ndim - batch.mask.ndim)))
    targets = jnp.where(exists, batch.targets, jnp.zeros_like(batch.targets))
    weights = batch.weights * batch.mask
    count = jnp.where(weights.sum() == 0, 1, weights.sum())

    @jax.jit
    def matrix(theta):
        ys, J = outputs(theta), jax.jacobian(outputs)(theta)
        steps = weights.size
        O = ys.shape[-1]
        hessian = jax.vmap(jax.hessian(case.keywords["loss"].value))
        H_L = hessian(ys.reshape(steps, O), targets.reshape(steps, *targets.shape[weights.ndim :]))
        J = J.reshape(steps, O, -1)
        S = jax.jacobian(states)(theta).reshape(-1, len(theta))
        G = jnp.einsum("s,sop,soq,sqr->pr", weights.reshape(steps), J, H_L, J)
        return (G + structural * S.T @ S) / count

    return matrix(theta)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("structure", default_and_thorough([1], range(44)))
def test_product_equals_the_dense_one(structure, monkeypatch):
    """With blocks of one, three or all steps, with structural damping, and with recomputed states.

    The products with all unit vectors are G itself, which must be symmetric and not negative.
    """
    K = [None, 1, 3][structure % 3]
    if K:
        monkeypatch.setattr(curvature, "block_steps", lambda _, batch: min(K, len(batch.xs)))
    case = draw(structure)
    keywords = case.keywords | {"checkpoint_every": case.checkpoint_every}
    theta, unravel = ravel_pytree(case.params)

    @jax.jit
    def products(params, batch, h_0):
        every = jax.vmap(unravel)(jnp.eye(len(theta)))
        plain = partial(jaxrnn.gauss_newton_product, params, batch, h_0=h_0, **case.keywords)
        product = curvature.gauss_newton(params, batch, h_0, **keywords)
        both = jax.vmap(plain)(every), jax.vmap(partial(product, structural=0.3))(every)
        return [jax.vmap(lambda tree: ravel_pytree(tree)[0])(tree) for tree in both]

    G, G_structural = products(*case.arguments)
    for got, structural in ((G, 0.0), (G_structural, 0.3)):
        want = dense(case, structural)
        assert max(relative_errors(got, want)) <= AGREEMENT
        scale = float(jnp.abs(want).max())
        assert np.abs(got - got.T).max() <= 1e-13 * scale
        assert np.linalg.eigvalsh(got).min() >= -1e-12 * scale


@pytest.mark.usefixtures("x64")
def test_damping_adds_multiples_of_the_direction_and_of_the_states():
    case = draw(0)
    v = random_direction(case.params)
    theta_dot = ravel_pytree(v)[0]

    @jax.jit
    def products(params, batch, h_0):
        product = curvature.gauss_newton(params, batch, h_0, **case.keywords)
        return curvature.damped(product, 0.5)(v), curvature.damped(product, 0.5, 0.2)(v)

    for damped, structural in zip(products(*case.arguments), (0.0, 0.1), strict=True):
        expected = dense(case, structural) @ theta_dot + 0.5 * theta_dot
        assert max(relative_errors(ravel_pytree(damped)[0], expected)) <= AGREEMENT


@pytest.mark.usefixtures("x64")
def test_an_activation_without_df():
    case = draw(1, activation="tanh")
    v = random_direction(case.params)
    keywords = case.keywords, case.keywords | {"activation": jaxrnn.Activation(jnp.tanh)}
    with_df, without = (
        jax.jit(partial(jaxrnn.gauss_newton_product, **options))(
            case.params, case.batch, v, case.h_0
        )
        for options in keywords
    )
    assert max(relative_errors(without, with_df)) <= AGREEMENT


@pytest.mark.parametrize("nothing", ["mask", "weights", "T"])
def test_product_is_zero_if_no_step_counts(nothing):
    params = jaxrnn.init(jax.random.key(0), 2, 3, 2)
    batch = Batch(jnp.ones((5, 4, 2)), jnp.zeros((5, 4), int))
    if nothing == "mask":
        batch = batch._replace(mask=jnp.zeros((5, 4), bool))
    if nothing == "weights":
        batch = batch._replace(weights=jnp.zeros((5, 4)))
    if nothing == "T":
        batch = jax.tree.map(lambda leaf: leaf[:0], batch)
    product = jax.jit(jaxrnn.gauss_newton_product)(params, batch, params)
    assert all((leaf == 0).all() for leaf in product)


def test_nan_in_padding_changes_no_bit():
    case = random_case(
        11, dtype=np.float32, T=9, batch_shape=(4,), tokens=False, mask=True, reset=True,
        weights=True, h_0=True, loss="squared_error", leak=True, drive=True,
    )  # fmt: skip
    mask = case.batch.mask[..., None]
    dirty = case.batch._replace(
        **{
            name: jnp.where(mask, getattr(case.batch, name), jnp.nan)
            for name in ("xs", "targets", "drive")
        },
        weights=jnp.where(case.batch.mask, case.batch.weights, jnp.nan),
    )
    product = jax.jit(partial(jaxrnn.gauss_newton_product, **case.keywords))
    clean = product(case.params, case.batch, case.params, case.h_0)
    for a, b in zip(clean, product(case.params, dirty, case.params, case.h_0), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_bfloat16_products_keep_the_dtype_and_sum_in_float32():
    params = jaxrnn.init(jax.random.key(0), 4, 8, 3, dtype=jnp.bfloat16)
    batch = Batch(jax.random.normal(jax.random.key(1), (128, 32, 4)), jnp.ones((128, 32, 3)))
    product = jax.jit(partial(jaxrnn.gauss_newton_product, loss=jaxrnn.squared_error))
    got = product(params, batch, params)
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    for leaf, expected in zip(got, product(single, batch, single), strict=True):
        assert leaf.dtype == jnp.bfloat16
        error = jnp.abs(leaf.astype(jnp.float32) - expected).max()
        assert error <= 0.03 * jnp.abs(expected).max()


@pytest.mark.parametrize("structural", [None, 0.5])
def test_the_scale_of_the_weights_changes_no_bit_in_float16(structural):
    params = jaxrnn.init(jax.random.key(0), 4, 8, 3, dtype=jnp.float16)
    xs = jax.random.normal(jax.random.key(1), (128, 8, 4))
    batch = Batch(xs, jnp.ones((128, 8), int))

    @jax.jit
    def product(scale):
        weights = jnp.full((128, 8), scale)
        times_v = curvature.gauss_newton(params, batch._replace(weights=weights))
        return times_v(params, structural=None if structural is None else structural * scale)

    with jax.numpy_dtype_promotion("strict"):
        leaves = zip(product(2.0**-40), product(1.0), strict=True)
    for leaf, expected in leaves:
        assert jnp.abs(expected).max() > 1e-3
        assert leaf.tobytes() == expected.tobytes()


def test_errors_name_the_direction():
    params = jaxrnn.init(jax.random.key(0), 2, 3, 2)
    batch = Batch(jnp.ones((5, 2)), jnp.zeros(5, int))
    for v, error, message in [
        (tuple(params), TypeError, "v: expected Params, got tuple"),
        (params._replace(W_h=jnp.ones((2, 3))), ValueError, r"v.W_h: expected shape \(3, 3\)"),
        (params._replace(b_y=jnp.ones(2, int)), TypeError, "v.b_y: expected float32"),
        (params._replace(b_y=[1.0, 2.0]), TypeError, "v.b_y: expected an array, got list"),
    ]:
        for steps in (batch, jax.tree.map(lambda leaf: leaf[:0], batch)):
            with pytest.raises(error, match=message):
                jaxrnn.gauss_newton_product(params, steps, v)
    with pytest.raises(ValueError, match="checkpoint_every: expected at least 1, got 0"):
        curvature.gauss_newton(params, batch, checkpoint_every=0)
    assert not any(leaf.any() for leaf in jaxrnn.gauss_newton_product(params, steps, params))


def loops(jaxpr) -> list:
    """The scans in a jaxpr, with the number of products in the body of each."""
    found = []
    for equation in jaxpr.eqns:
        for inner in jaxprs_in_params(equation.params):
            if equation.primitive.name == "scan":
                found.append(str(inner).count("dot_general"))
            found.extend(loops(inner))
    return found


def test_many_products_take_one_forward_pass_and_one_product_in_each_loop():
    params = jaxrnn.init(jax.random.key(0), 2, 3, 2)
    batch = Batch(jnp.ones((5, 64, 2)), jnp.zeros((5, 64), int))

    def products(params, batch, vs):
        product = curvature.gauss_newton(params, batch)
        return [product(v) for v in vs]

    counts = loops(jax.make_jaxpr(products)(params, batch, [params] * 3).jaxpr)
    assert counts == [1] * (1 + 2 * 3)


def test_checkpointing_bounds_the_memory_of_a_product():
    """Sixteen times T takes four times the memory."""
    params = jax.eval_shape(lambda: jaxrnn.init(jax.random.key(0), 8, 64, 8))

    def temporary(T):
        steps = partial(jax.ShapeDtypeStruct, (T, 16))
        batch = Batch(jax.ShapeDtypeStruct((T, 16, 8), jnp.float32), steps(jnp.int32))

        def product(params, batch, v):
            return curvature.gauss_newton(params, batch, checkpoint_every=round(T**0.5))(v)

        compiled = jax.jit(product).lower(params, batch, params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(1024), temporary(16 * 1024)
    assert long <= 4.5 * short
    assert long <= 16 * 1024 * 16 * 64 * 4 / 5  # a fifth of the states of all steps


@pytest.mark.parametrize("wrong", [jnp.ones((1, 1)), "0.1", None], ids=str)
def test_a_damping_that_is_not_a_number_is_named(wrong):
    params = jaxrnn.init(jax.random.key(0), 3, 4, 2)
    batch = Batch(jnp.ones((5, 3)), jnp.zeros(5, int))
    product = curvature.gauss_newton(params, batch)
    no_steps = jax.tree.map(lambda leaf: leaf[:0], batch)
    of_no_steps = curvature.gauss_newton(params, no_steps, checkpoint_every=3)
    assert not any(leaf.any() for leaf in of_no_steps(params))
    with pytest.raises(TypeError, match="damping: expected a number"):
        curvature.damped(product, wrong)
    if wrong is not None:
        for call in (
            partial(curvature.damped, product, 0.1, wrong),
            partial(product, params, wrong),
            partial(of_no_steps, params, wrong),
        ):
            with pytest.raises(TypeError, match="structural: expected a number"):
                call()


def test_a_damping_of_another_dtype_keeps_that_of_the_parameters():
    params = jaxrnn.init(jax.random.key(0), 3, 4, 2, dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        got = curvature.damped(lambda v: v, jnp.float32(0.5))(params)
    for leaf, before in zip(got, params, strict=True):
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, jnp.bfloat16(1.5) * before)


def test_numpy_parameters_in_float64_take_the_direction_of_bptt():
    """Without x64 both are float32."""
    rng = np.random.default_rng(0)
    params = jaxrnn.init(jax.random.key(0), 3, 4, 2)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    batch = Batch(rng.normal(size=(5, 2, 3)).astype(np.float32), rng.integers(0, 2, (5, 2)))
    grads = jaxrnn.bptt(params, batch)[1]
    with pytest.warns(UserWarning, match="float64"):
        found = jaxrnn.gauss_newton_product(wide, batch, grads)
    expected = jaxrnn.gauss_newton_product(params, batch, grads)
    assert max(jax.tree.leaves(relative_errors(found, expected))) < 1e-5
