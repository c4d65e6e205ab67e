"""Leak and drive: the rate network, in every function, against the plain scan and the oracle."""

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
    oracle_value_and_grad,
    plain_loss,
    plain_unroll,
    random_case,
    relative_errors,
    with_defaults,
)

AGREEMENT = 1e-12

by_autodiff = jax.value_and_grad(jaxrnn.sequence_loss, has_aux=True)
by_plain_autodiff = jax.value_and_grad(plain_loss, has_aux=True)


def draw(structure, values=0, **fixed):
    """A random case with a leak; three of four have a drive."""
    activation = list(ACTIVATIONS)[structure % len(ACTIVATIONS)]
    fixed = {"leak": True, "drive": structure % 4 < 3, "activation": activation} | fixed
    return random_case(2000 + structure, values=values, **{"largest_T": 60} | fixed)


def gradient_by(gradient_fn, case, **keywords):
    """A function of the leak and the other arguments, so that all draws share its compilation."""
    keywords = {**case.keywords, **keywords}

    @jax.jit
    def gradient(leak, *arguments):
        return gradient_fn(*arguments, **{**keywords, "leak": leak})

    return gradient


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("structure", default_and_thorough(range(2), range(20)))
def test_three_gradients_agree(structure, monkeypatch):
    """Six draws of all values for each structure: sizes, options, batch axes, blocks."""
    if structure % 2:
        monkeypatch.setattr(
            backward, "block_steps", lambda _, batch, *rest: blocks.near_divisor(len(batch.xs), 7)
        )
    cases = [draw(structure, values) for values in range(6)]
    by_hand = gradient_by(jaxrnn.bptt, cases[0], checkpoint_every=cases[0].checkpoint_every)
    fast, plain = gradient_by(by_autodiff, cases[0]), gradient_by(by_plain_autodiff, cases[0])
    for case in cases:
        expected = plain(case.leak, *case.arguments)
        assert max(relative_errors(by_hand(case.leak, *case.arguments), expected)) <= AGREEMENT
        assert max(relative_errors(fast(case.leak, *case.arguments), expected)) <= AGREEMENT


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("structure", default_and_thorough(range(3), range(12)))
def test_agrees_with_the_oracle_that_uses_no_autodiff(structure):
    case = draw(100 + structure, largest_T=6, largest_size=3)
    gradient = jax.jit(partial(jaxrnn.bptt, **case.keywords))
    (value, _), grads = gradient(*case.arguments)
    assert max(relative_errors((value, grads), oracle_value_and_grad(case))) <= AGREEMENT


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("structure", [1, 2])
def test_gradients_by_leak_drive_and_state(structure):
    """One leak for each unit and one for all; the second derivative by the leak as well."""
    case = draw(structure, drive=True, h_0=True, mask=True, reset=True, batch_shape=(3,), T=17)

    def by_leak(loss_fn):
        def of_leak(leak, drive, h_0):
            batch = case.batch._replace(drive=drive)
            return loss_fn(case.params, batch, h_0, **case.keywords | {"leak": leak})[0]

        first = jax.grad(of_leak, (0, 1, 2))
        second = jax.grad(lambda leak, *rest: jnp.sin(first(leak, *rest)[0]).sum())
        return jax.jit(lambda *args: (first(*args), second(*args)))

    arguments = case.leak, case.batch.drive, case.h_0
    got, expected = (by_leak(fn)(*arguments) for fn in (jaxrnn.sequence_loss, plain_loss))
    assert max(relative_errors(got, expected)) <= AGREEMENT


@pytest.mark.usefixtures("x64")
def test_forward_mode_and_vmap_over_leaks():
    case = draw(3, T=12, batch_shape=(2,))
    leaks = jnp.linspace(0.1, 1, 4)

    def along(loss_fn):
        def value(leak):
            return loss_fn(*case.arguments, **case.keywords | {"leak": leak})[0]

        return jax.jit(jax.vmap(lambda leak: jax.jvp(value, (leak,), (jnp.ones(()),))))(leaks)

    assert max(relative_errors(along(jaxrnn.sequence_loss), along(plain_loss))) <= AGREEMENT


@pytest.mark.usefixtures("x64")
def test_unroll_and_flow_agree_with_the_plain_scan():
    case = draw(5, mask=True, reset=True, h_0=True, drive=True, batch_shape=(2, 2), T=23)
    batch, h_0 = with_defaults(*case.arguments)
    activation = case.keywords["activation"]
    unroll = partial(jaxrnn.unroll, activation=activation, leak=case.leak)
    got = jax.jit(unroll)(
        case.params, batch.xs, h_0, drive=batch.drive, mask=batch.mask, reset=batch.reset
    )
    plain = jax.jit(plain_unroll, static_argnums=5)
    expected = plain(
        case.params, batch.xs, h_0, batch.mask, batch.reset, activation, case.leak, batch.drive
    )
    assert max(relative_errors(got, expected)) <= AGREEMENT
    flow = jax.jit(partial(jaxrnn.gradient_flow, **case.keywords))(*case.arguments)

    @jax.jit
    @jax.grad
    def by_drive(drive):
        return plain_loss(case.params, batch._replace(drive=drive), h_0, **case.keywords)[0]

    assert max(relative_errors(flow.dzs, by_drive(batch.drive))) <= AGREEMENT


def test_relu_units_at_zero_have_no_gradient():
    """f' is taken at z: recovered from h, a unit at 0 gets a rounding error and its sign."""
    params = jaxrnn.init(jax.random.key(0), 3, 40, 2)
    params = params._replace(b_h=jnp.full(40, -50.0))
    batch = Batch(jnp.ones((20, 4, 3)), jnp.zeros((20, 4), int))
    h_0 = jnp.abs(jax.random.normal(jax.random.key(1), (4, 40)))
    by_hand = jax.jit(partial(jaxrnn.bptt, activation=jaxrnn.relu, leak=0.3))
    _, grads = by_hand(params, batch, h_0)
    assert not grads.b_h.any()
    assert grads.W_y.any()


@pytest.mark.parametrize("structure", default_and_thorough([0], range(3)))
def test_a_leak_of_1_is_no_leak(structure):
    case = random_case(structure, dtype=np.float32, T=9)
    without = jax.jit(partial(jaxrnn.bptt, **case.keywords))(*case.arguments)
    with_leak = jax.jit(partial(jaxrnn.bptt, **case.keywords, leak=1.0))(*case.arguments)
    assert max(relative_errors(with_leak, without)) <= 1e-6


def test_drive_is_not_read_where_the_mask_is_false():
    case = draw(1, dtype=np.float32, mask=True, drive=True, batch_shape=(3,), T=11)
    masked = ~case.batch.mask[..., None]
    spoilt = case.batch._replace(drive=jnp.where(masked, jnp.nan, case.batch.drive))
    for function in (jaxrnn.bptt, jaxrnn.gradient_flow, by_autodiff):
        function = jax.jit(partial(function, **case.keywords))
        results = (
            jax.tree.leaves(function(case.params, batch, case.h_0))
            for batch in (case.batch, spoilt)
        )
        assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))


def test_bfloat16_and_a_custom_activation():
    params = jaxrnn.init(jax.random.key(0), 3, 8, 2, dtype=jnp.bfloat16)
    batch = Batch(
        jnp.ones((9, 4, 3)), jnp.zeros((9, 4), int), drive=jnp.full((9, 4, 8), 0.1, jnp.float32)
    )
    options = {"activation": Activation(jax.nn.gelu), "leak": 0.5}
    (value, h_T), grads = jax.jit(partial(jaxrnn.bptt, **options))(params, batch)
    assert (value.dtype, h_T.dtype, grads.W_h.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    auto = jax.jit(partial(by_plain_autodiff, **options))(
        jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), batch
    )[1]
    assert max(relative_errors(grads, auto)) <= 0.05


def test_a_leak_splits_over_devices():
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("batch",))
    case = draw(1, dtype=np.float32, batch_shape=(4,), drive=True, T=8)
    gradient_fn = partial(jaxrnn.bptt, **case.keywords)
    split = jax.jit(jaxrnn.data_parallel(gradient_fn, mesh))(*case.arguments)
    assert max(relative_errors(split, jax.jit(gradient_fn)(*case.arguments))) <= 1e-5


@pytest.mark.parametrize(
    ("leak", "error", "message"),
    [
        (0.0, ValueError, r"leak: expected values in \(0, 1\], got 0.0"),
        (1.5, ValueError, r"leak: expected values in \(0, 1\], got 1.5"),
        (float("nan"), ValueError, r"leak: expected values in \(0, 1\], got nan"),
        (True, TypeError, "leak: expected a number or an array, got bool"),
        (np.ones(3), ValueError, r"leak: expected a scalar or shape \(5,\) .*, got \(3,\)"),
        (jnp.array([0.5, 0.5, -0.1, 1, 1]), ValueError, r"leak: expected values in \(0, 1\]"),
        (jnp.array(1), TypeError, "leak: expected a floating-point dtype, got int32"),
        ("0.5", TypeError, "leak: expected a number or an array, got str"),
    ],
)  # fmt: skip
def test_a_wrong_leak_is_an_error(leak, error, message):
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    batch = Batch(jnp.ones((4, 3)), jnp.zeros(4, int))
    calls = [
        lambda: jaxrnn.step(params, jnp.zeros(5), jnp.ones(3), leak=leak),
        lambda: jaxrnn.hidden_states(params, batch.xs, leak=leak),
        lambda: jaxrnn.unroll(params, batch.xs, leak=leak),
        lambda: jaxrnn.sequence_loss(params, batch, leak=leak),
        lambda: jaxrnn.bptt(params, batch, leak=leak),
        lambda: jaxrnn.gradient_flow(params, batch, leak=leak),
    ]
    for call in calls:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    ("drive", "error", "message"),
    [
        (jnp.ones((4, 3)), ValueError, r"drive: expected shape \(4, 5\) .*got \(4, 3\)"),
        (jnp.ones(5), ValueError, r"drive: expected shape \(4, 5\) .*got \(5,\)"),
        (jnp.ones((4, 5), int), TypeError, "drive: expected a floating-point dtype, got int32"),
        ([[0.0] * 5] * 4, TypeError, "drive: expected an array, got list"),
    ],
)
def test_a_wrong_drive_is_an_error(drive, error, message):
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    batch = Batch(jnp.ones((4, 3)), jnp.zeros(4, int), drive=drive)
    calls = [
        lambda: jaxrnn.hidden_states(params, batch.xs, drive=drive),
        lambda: jaxrnn.unroll(params, batch.xs, drive=drive),
        lambda: jaxrnn.sequence_loss(params, batch),
        lambda: jaxrnn.bptt(params, batch),
        lambda: jaxrnn.gradient_flow(params, batch),
        lambda: jaxrnn.check_values(params, batch),
    ]
    for call in calls:
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(ValueError, match=r"drive: expected shape \(5,\)"):
        jaxrnn.step(params, jnp.zeros(5), jnp.ones(3), drive=jnp.ones(3))


@pytest.mark.parametrize("leak", [1e-8, 9e-4, 1.0001])
def test_a_leak_that_float16_does_not_hold_is_an_error(leak):
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2, dtype=jnp.float16)
    with pytest.raises(ValueError, match=rf"^leak: expected .*, got {leak}"):
        jaxrnn.hidden_states(params, jnp.ones((4, 3)), leak=leak)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_smallest_leak_lets_the_state_decay(dtype):
    params = jaxrnn.init(jax.random.key(0), 1, 4, 1, dtype=dtype)
    params = jax.tree.map(jnp.zeros_like, params)
    eps = float(jnp.finfo(dtype).eps)
    h, _ = jaxrnn.hidden_states(params, jnp.zeros((8, 1)), jnp.ones(4), leak=eps)
    np.testing.assert_allclose(1 - h.astype(jnp.float32), 8 * eps, rtol=0.3)
