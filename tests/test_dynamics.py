"""The gradient through time against derivatives by perturbation, which autodiff takes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from tests.conftest import default_and_thorough
from tests.reference import random_case, relative_errors, with_defaults


def perturbed_loss(perturbations, case):
    """The loss where dh is added to the state after each step, and dz before f: a plain loop."""
    params, activation = case.params, case.keywords["activation"]
    batch, h = with_defaults(*case.arguments)
    weights = batch.weights * batch.mask
    total = 0.0
    for t in range(batch.xs.shape[0]):
        exists, cut = batch.mask[t][..., None], batch.reset[t][..., None]
        z = batch.xs[t] @ params.W_x.T + jnp.where(cut, 0, h) @ params.W_h.T + params.b_h
        h_new = activation.f(z + perturbations.dzs[t])
        h = jnp.where(exists, h_new, h) + perturbations.dhs[t]
        losses = case.keywords["loss"].value(h @ params.W_y.T + params.b_y, batch.targets[t])
        total += (weights[t] * losses).sum()
    return total / weights.sum()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "activation", default_and_thorough(["tanh", "relu"], ["tanh", "relu", "sigmoid", "identity"])
)
@pytest.mark.parametrize("batch_shape", [(), (2, 2)], ids=str)
def test_flow_is_the_derivative_by_states_and_pre_activations(activation, batch_shape):
    given = dict.fromkeys(["mask", "reset", "weights", "h_0"], bool(batch_shape))
    case = random_case(
        7, T=6, batch_shape=batch_shape, activation=activation, loss="squared_error",
        tokens=False, **given,
    )  # fmt: skip
    if batch_shape:
        flags = np.random.default_rng(0).uniform(size=(2, 6, *batch_shape))
        batch = case.batch._replace(mask=flags[0] < 0.7, reset=flags[1] < 0.4)
        case = case._replace(batch=batch)
    zeros = jnp.zeros((6, *batch_shape, len(case.params.W_h)))
    nothing = jaxrnn.Flow(zeros, zeros)
    expected = jax.jit(jax.grad(partial(perturbed_loss, case=case)))(nothing)
    flow = jax.jit(partial(jaxrnn.gradient_flow, **case.keywords))(*case.arguments)
    assert max(relative_errors(flow, expected)) <= 1e-13


@pytest.mark.usefixtures("x64")
def test_the_sum_of_the_flow_is_the_gradient_of_bptt():
    case = random_case(3, T=40, batch_shape=(3,), tokens=False, mask=True, reset=True, h_0=True)
    flow = jax.jit(partial(jaxrnn.gradient_flow, **case.keywords))(*case.arguments)
    (_, grads) = jax.jit(partial(jaxrnn.bptt, **case.keywords))(*case.arguments)
    xs = jnp.where(case.batch.mask[..., None], case.batch.xs, 0)
    sums = flow.dzs.sum((0, 1)), jnp.einsum("tbi,tbj->ij", flow.dzs, xs)
    assert max(relative_errors(sums, (grads.b_h, grads.W_x))) <= 1e-13


def test_masked_steps_are_not_read_and_dtypes_are_kept():
    params = jaxrnn.init(jax.random.key(0), 2, 3, 2, dtype=jnp.bfloat16)
    mask = jnp.array([True, False, True, False])
    xs = jnp.where(mask[:, None], 1, jnp.nan) * jnp.ones((4, 2))
    flow = jaxrnn.gradient_flow(params, jaxrnn.Batch(xs, jnp.zeros(4, int), mask))
    assert flow.dhs.dtype == flow.dzs.dtype == jnp.bfloat16
    assert not np.isnan(np.asarray(flow.dhs, np.float32)).any()
    np.testing.assert_array_equal(flow.dzs[1], 0)
    np.testing.assert_array_equal(flow.dhs[3], 0)


def test_a_wrong_argument_of_gradient_flow_is_named():
    params = jaxrnn.init(jax.random.key(0), 2, 3, 2)
    with pytest.raises(ValueError, match=r"xs: expected shape \(T, \*batch, 2\)"):
        jaxrnn.gradient_flow(params, jaxrnn.Batch(jnp.ones((4, 5)), jnp.zeros(4, int)))


def test_the_mean_over_many_steps_is_taken_in_float32():
    """1 / 70,000 of a step in float16 would be 1 / inf."""
    params = jaxrnn.init(jax.random.key(0), 2, 3, 2, dtype=jnp.float16)
    ones = jnp.ones((70_000, 1))
    xs, labels = jnp.ones((70_000, 1, 2)), jnp.zeros((70_000, 1), int)
    batch = jaxrnn.Batch(xs, labels, weights=ones)
    assert jaxrnn.gradient_flow(params, batch).dhs[-1].any()
