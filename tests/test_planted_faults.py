"""Each fault planted in the source must be caught by the comparisons that the other tests make."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from jaxrnn import Batch, backward, blocks, forward, products, recurrence, update
from tests.conftest import default_and_thorough
from tests.faults import (
    BACKWARD,
    FORWARD,
    LEAK,
    LEAK_TANGENT,
    LEAK_VARIATIONS,
    TANGENT,
    UPDATE,
    VARIATIONS,
    with_fault,
)
from tests.reference import plain_loss, random_case, relative_errors

AGREEMENT = 1e-12
CAUGHT = 1e-3


def names(faults, variations=()):
    """A fifth of the faults, and all with JAXRNN_THOROUGH=1."""
    default = [fault for fault in faults if fault not in variations][::5]
    chosen = default_and_thorough(default, faults)
    return pytest.mark.parametrize("fault", chosen, ids=lambda fault: fault.replace(" ", "-"))


@pytest.fixture(scope="module")
def cases():
    """Square weights, so that a transposition keeps its shape; each option; no block divides T."""
    fixed = {"sizes": (4, 4, 4), "batch_shape": (3,), "activation": "tanh", "T": 71}
    fixed |= {"mask": True, "reset": True, "weights": True, "h_0": True, "tokens": False}
    with jax.enable_x64(True):
        drawn = [
            random_case(1, **fixed, loss="cross_entropy", labels=True, checkpoint_every=None),
            random_case(2, **fixed, loss="squared_error", checkpoint_every=16),
        ]
        by_autodiff = jax.value_and_grad(plain_loss, argnums=(0, 2), has_aux=True)
        return [
            (case, jax.jit(partial(by_autodiff, **case.keywords))(*case.arguments))
            for case in drawn
        ]


@pytest.fixture(scope="module")
def leaky_cases():
    """The same with a leak for each unit, and a drive that is NaN where the mask is False."""
    fixed = {"sizes": (4, 4, 4), "batch_shape": (3,), "activation": "tanh", "T": 71}
    fixed |= {"mask": True, "reset": True, "weights": True, "h_0": True, "tokens": False}
    with jax.enable_x64(True):
        case = random_case(
            1, **fixed, loss="cross_entropy", labels=True, checkpoint_every=None, leak=True,
            drive=True,
        )  # fmt: skip
        drive = jnp.where(case.batch.mask[..., None], case.batch.drive, jnp.nan)
        case = case._replace(batch=case.batch._replace(drive=drive))
        by_autodiff = jax.value_and_grad(plain_loss, argnums=(0, 2), has_aux=True)
        return [(case, jax.jit(partial(by_autodiff, **case.keywords))(*case.arguments))]


def leak_gradients(loss_fn, case):
    """The gradients by the leak and the parameters."""

    def value(leak, params):
        return loss_fn(params, case.batch, case.h_0, **case.keywords | {"leak": leak})[0]

    return jax.jit(jax.grad(value, (0, 1)))(case.leak, case.params)


@pytest.fixture(scope="module")
def plain_leak_gradients(leaky_cases):
    with jax.enable_x64(True):
        return leak_gradients(plain_loss, leaky_cases[0][0])


def leak_gradient_agrees(module, cases, expected) -> bool:
    errors = relative_errors(leak_gradients(module.sequence_loss, cases[0][0]), expected)
    return max(errors) <= AGREEMENT


def bptt_agrees(module, cases, tolerance) -> bool:
    for case, (value, (grads, _)) in cases:
        keywords = case.keywords | {"checkpoint_every": case.checkpoint_every}
        by_hand = jax.jit(partial(module.bptt, **keywords))(*case.arguments)
        if not max(relative_errors(by_hand, (value, grads))) <= tolerance:
            return False
    return True


def sequence_loss_agrees(module, cases, tolerance) -> bool:
    """Value, last state, and gradients by the parameters and by h_0, of one case."""
    for case, expected in cases[:1]:
        fn = partial(module.sequence_loss, **case.keywords)
        fn = jax.jit(jax.value_and_grad(fn, argnums=(0, 2), has_aux=True))
        if not max(relative_errors(fn(*case.arguments), expected)) <= tolerance:
            return False
    return True


def noisy(params, batch, h, key):
    """Depends on each argument, and compiles fast; large weights make h_T or the value NaN."""
    value = batch.xs.mean() + (h**2).mean() + jax.random.normal(key)
    grads = jax.tree.map(lambda leaf: jnp.sin(leaf) + value, params)
    bad = batch.weights.max()
    h_T = jnp.where(bad == 7, jnp.nan, h - value)
    return (jnp.where(bad == 8, jnp.nan, value), h_T), grads


RATE, UPDATE_KEY = 0.5, jax.random.key(3)


@pytest.fixture(scope="module")
def updates():
    """Five batches and what follows each: the second and third update are skipped."""
    rng, gradient_fn = np.random.default_rng(0), jax.jit(noisy)
    params = random_case(0, sizes=(3, 4, 2), dtype=np.float32).params
    start = params, h = jax.tree.map(np.asarray, params), np.ones((2, 4), np.float32)
    mask, labels, skipped, expected = np.arange(12).reshape(6, 2) < 9, np.zeros((6, 2), int), 0, []
    for n, bad in enumerate([1, 7, 8, 1, 1]):
        xs = rng.standard_normal((6, 2, 3)).astype(np.float32)
        batch = Batch(xs, labels, mask, weights=np.full((6, 2), bad, np.float32))
        (_, h_T), grads = gradient_fn(params, batch, h, jax.random.fold_in(UPDATE_KEY, n))
        grads = jax.tree.map(np.asarray, grads)
        skipped = skipped + 1 if bad > 1 else 0
        if bad == 1:
            params = jax.tree.map(lambda p, d: p - RATE * d, params, grads)
            h = h_T
        norm = np.sqrt(sum((leaf**2).sum() for leaf in grads))
        expected.append((batch, (*params, h, n + 1, skipped, skipped, norm, 9.0 * bad)))
    return start, expected


def update_agrees(module, updates) -> bool:
    """The updates of `make_update` against the rule written out."""
    (params, h), expected_updates = updates
    rule = partial(module.sgd, learning_rate=RATE)
    step = module.make_update(noisy, rule)
    state = module.init_state(params, rule, h, key=UPDATE_KEY)
    for batch, expected in expected_updates:
        state, metrics = step(state, batch)
        got = (*state.params, state.h, state.step, state.skipped)
        got = (*got, metrics.skipped, metrics.gradient_norm, metrics.counted)
        if not all(
            np.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(got, expected, strict=True)
        ):
            return False
    return True


@pytest.mark.usefixtures("x64")
@names(BACKWARD, VARIATIONS)
def test_a_fault_in_the_backward_pass_is_caught(fault, cases):
    faulty = with_fault([products, recurrence, blocks, backward], *BACKWARD[fault])
    faulty.block_steps = lambda *_: 30  # by default a sequence so small is one block
    faulty.forward_steps = lambda T, K, h_0: K
    assert not bptt_agrees(faulty, cases, CAUGHT), "this fault would have passed"


@pytest.mark.usefixtures("x64")
@names(FORWARD)
def test_a_fault_in_the_forward_pass_is_caught(fault, cases):
    faulty = with_fault([products, recurrence, forward], *FORWARD[fault])
    assert not sequence_loss_agrees(faulty, cases, CAUGHT), "this fault would have passed"


@pytest.mark.usefixtures("x64")
@names(TANGENT)
def test_a_fault_in_the_derivative_rule_is_caught(fault, cases):
    faulty = with_fault([products, recurrence, forward], *TANGENT[fault])
    assert not sequence_loss_agrees(faulty, cases, CAUGHT), "this fault would have passed"


@pytest.mark.usefixtures("x64")
@names(LEAK, LEAK_VARIATIONS)
def test_a_fault_in_the_leak_is_caught(fault, leaky_cases):
    faulty = with_fault([products, recurrence, blocks, backward], *LEAK[fault])
    faulty.block_steps = lambda *_: 30
    assert not bptt_agrees(faulty, leaky_cases, CAUGHT), "this fault would have passed"


@pytest.mark.usefixtures("x64")
@names(LEAK_TANGENT, LEAK_VARIATIONS)
def test_a_fault_in_the_derivative_rule_of_the_leak_is_caught(
    fault, leaky_cases, plain_leak_gradients
):
    faulty = with_fault([products, recurrence, forward], *LEAK_TANGENT[fault])
    agrees = leak_gradient_agrees(faulty, leaky_cases, plain_leak_gradients)
    assert not agrees, "this fault would have passed"


@names(UPDATE)
def test_a_fault_in_the_update_is_caught(fault, updates):
    faulty = with_fault([update], *UPDATE[fault])
    assert not update_agrees(faulty, updates), "this fault would have passed"


@pytest.mark.usefixtures("x64")
def test_without_a_fault_the_same_comparisons_pass(
    cases, leaky_cases, plain_leak_gradients, updates, monkeypatch
):
    monkeypatch.setattr(backward, "block_steps", lambda _, batch, *rest: min(30, len(batch.xs)))
    monkeypatch.setattr(backward, "forward_steps", lambda T, K, h_0: K)
    assert bptt_agrees(jaxrnn, cases, AGREEMENT)
    assert sequence_loss_agrees(jaxrnn, cases, AGREEMENT)
    assert bptt_agrees(jaxrnn, leaky_cases, AGREEMENT)
    assert leak_gradient_agrees(jaxrnn, leaky_cases, plain_leak_gradients)
    with jax.enable_x64(False):
        assert update_agrees(jaxrnn, updates)
