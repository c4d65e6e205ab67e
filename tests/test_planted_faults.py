"""Each fault planted in the source must be caught by the comparisons that the other tests make."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrnn
from jaxrnn import Batch, backward, blocks, forward, recurrence, update
from tests.faults import with_fault
from tests.reference import plain_loss, random_case, relative_errors

AGREEMENT = 1e-12
CAUGHT = 1e-3

BACKWARD = {
    "f' forgotten": ("f_prime * dh)", "dh)"),
    "f' forgotten in what flows back, as textbooks print it": ("dz @ W_h", "dh @ W_h"),
    "f' of another quantity": ("derivatives(activation, leak, hs, fs, partial",
                                "derivatives(activation, leak, dhs_y, fs, partial"),
    "W_h transposed": ("dz @ W_h", "dz @ W_h.T"),
    "W_y transposed": ("dhs_y = dys @ params.W_y", "dhs_y = dys @ params.W_y.T"),
    "dW_h transposed": ("outer_sum(dzs, hs_before, dtype)",
                        "outer_sum(dzs, hs_before, dtype).T"),
    "forward in time": ("inputs, reverse=True, unroll", "inputs, unroll"),
    "blocks forward in time": ("K, saved, reverse=True)", "K, saved)"),
    "no recurrence": ("dh = dh_y + dh_next", "dh = dh_y"),
    "no output error": ("dh = dh_y + dh_next", "dh = dh_next"),
    "mask ignored in dz": ("where_exists(valid, f_prime * dh)", "f_prime * dh"),
    "gradient not held over a masked step": (
        "hold(valid, unless_reset(reset_t, dh_before), dh_next)", "unless_reset(reset_t, dh_before)"
    ),
    "mask a step late": ("f_primes, leak, block.mask,",
                         "f_primes, leak, jnp.roll(block.mask, 1, 0),"),
    "reset ignored": ("unless_reset(reset_t, dh_before)", "dh_before"),
    "reset a step late": ("dh_y + dh_next", "dh_y + unless_reset(reset_t, dh_next)"),
    "reset ignored in h_{t-1}": ("hs_before = previous(hs, h_0, block.mask, block.reset)",
                                 "hs_before = previous(hs, h_0, block.mask, None)"),
    "h_t for h_{t-1}": ("outer_sum(dzs, hs_before, dtype)",
                        "outer_sum(dzs, hs, dtype)"),
    "h_0 left out of dW_h": ("hs_before = previous(hs, h_0, block.mask, block.reset)",
                             "hs_before = previous(hs, 0 * h_0, block.mask, block.reset)"),
    "dW_h skips the first step": ("outer_sum(dzs, hs_before, dtype)",
                                  "outer_sum(dzs[1:], hs_before[1:], dtype)"),
    "db_h skips the last step": ("bias_sum(dzs, dtype)", "bias_sum(dzs[:-1], dtype)"),
    "db_y skips the first step": ("bias_sum(dys, dtype)", "bias_sum(dys[1:], dtype)"),
    "db_h times 0.99": ("b_h=bias_sum(dzs, dtype)", "b_h=bias_sum(dzs, dtype) * 0.99"),
    "dW_h times 1.01": ("outer_sum(dzs, hs_before, dtype)",
                        "1.01 * outer_sum(dzs, hs_before, dtype)"),
    "one element of dW_y zero": ("outer_sum(dys, hs_y, dtype)",
                                 "outer_sum(dys, hs_y, dtype).at[0, 0].set(0)"),
    "weights ignored": ("weights[..., None] * loss.error(ys, targets)", "loss.error(ys, targets)"),
    "divided by all steps": ("step_weights(batch, dtype).sum())",
                             "jnp.asarray(batch.mask.size, dtype))"),
    "sign of the error": ("loss.error(ys, targets)", "-loss.error(ys, targets)"),
    "blocks not joined": ("return (dh_next, jax.tree", "return (0 * dh_next, jax.tree"),
    "gradient of one block alone": ("jax.tree.map(jnp.add, sums, block_sums)", "block_sums"),
    "steps of two blocks counted twice": ("mask & per_step(is_new, mask)", "mask"),
    "last block left out": ("jnp.arange(-(-T // K))", "jnp.arange(T // K)"),
    "last block a step late": ("arange(K) >= start", "arange(K) > start"),
    "every block from the first state": (
        "h, states = saved\n", "h, states = saved\n        h = h_0\n"
    ),
    "recomputed from a zero state": ("block, h, activation, leak) if states is None",
                                     "block, h_0, activation, leak) if states is None"),
}  # fmt: skip

FORWARD = {
    "W_h transposed": ("h_before @ W_h.T  #", "h_before @ W_h  #"),
    "no recurrence": ("z_x + h_before @ W_h.T  #", "z_x  #"),
    "f forgotten": ("f_z = activation.f(z)", "f_z = z"),
    "mask ignored": ("h = hold(valid, leaky(leak, h_before, f_z), h)",
                     "h = leaky(leak, h_before, f_z)"),
    "reset ignored": ("h_before = unless_reset(reset_t, h)\n", "h_before = h\n"),
    "reset after the step": (
        "return h, (h, None",
        "return unless_reset(reset_t, h), (h, None",
    ),
    "b_h forgotten": ("@ params.W_x.T, params.b_h)", "@ params.W_x.T, 0 * params.b_h)"),
    "b_y forgotten": ("hs @ params.W_y.T, params.b_y)", "hs @ params.W_y.T, 0 * params.b_y)"),
}  # fmt: skip

TANGENT = {
    "f' forgotten": ("f_prime * (z_dot", "(z_dot"),
    "f' of the step before": ("derivatives(activation, leak, hs, fs, zs)",
                              "derivatives(activation, leak, hs_before, fs, zs)"),
    "W_h transposed": ("h_dot_before @ W_h.T", "h_dot_before @ W_h"),
    "no recurrence": ("(z_dot + h_dot_before @ W_h.T)", "z_dot"),
    "reset ignored": ("h_dot_before = unless_reset(reset_t, h_dot)", "h_dot_before = h_dot"),
    "mask ignored": ("h_dot = hold(valid, h_dot_new, h_dot)", "h_dot = h_dot_new"),
    "h_t for h_{t-1}": ("zs_x_dot + hs_before @ W_h_dot.T", "zs_x_dot + hs @ W_h_dot.T"),
    "reset ignored in h_{t-1}": ("hs_before = previous(hs, h_0, mask, reset)",
                                 "hs_before = previous(hs, h_0, mask, None)"),
    "h_0 left out of W_h_dot h_{t-1}": ("hs_before = previous(hs, h_0, mask, reset)",
                                        "hs_before = previous(hs, 0 * h_0, mask, reset)"),
    "h_0_dot forgotten": ("body, h_0_dot, inputs", "body, 0 * h_0_dot, inputs"),
}  # fmt: skip

LEAK = {
    "alpha forgotten in dz": ("f_primes if leak is None else leak * f_primes", "f_primes"),
    "1 - alpha forgotten in dh": ("dh_before + (1 - leak) * dh\n", "dh_before + dh\n"),
    "dh not passed on": ("dh_before + (1 - leak) * dh\n", "dh_before\n"),
    "dz passed on for dh": ("dh_before + (1 - leak) * dh\n", "dh_before + (1 - leak) * dz\n"),
    "dh passes a reset": (
        "unless_reset(reset_t, dh_before)",
        "(unless_reset(reset_t, dh_before) + jnp.where(per_step(reset_t, dh), (1 - leak) * dh, 0))",
    ),
    "f' read off h": ("activation.df(hs if fs is None else fs)", "activation.df(hs)"),
    "drive left out": ("zs_x if drive is None else", "zs_x if True else"),
    "alpha and 1 - alpha exchanged": ("(1 - leak) * h + leak * f_z", "leak * h + (1 - leak) * f_z"),
    "leak from the state before a reset": ("leaky(leak, h_before,", "leaky(leak, h,"),
}  # fmt: skip

LEAK_TANGENT = {
    "1 - alpha forgotten": ("h_dot_new + (1 - leak) * h_dot_before", "h_dot_new + h_dot_before"),
    "drive read where masked": ("where_exists(mask, drive.astype(zs_x.dtype))",
                                "drive.astype(zs_x.dtype)"),
    "no leak": ("h_dot_new + (1 - leak) * h_dot_before", "h_dot_new"),
    "leak from the state before a reset": ("(1 - leak) * h_dot_before", "(1 - leak) * h_dot"),
    "alpha forgotten in f'": ("f_primes if leak is None else leak * f_primes", "f_primes"),
    "no derivative by alpha": ("h_dot_new + leak_dot", "h_dot_new"),
    "h_{t-1} forgotten in the derivative by alpha": ("(fs - hs_before)", "fs"),
    "z without the recurrence": ("return zs_x + hs_before @ W_h.T", "return zs_x"),
    "f' read off h": ("activation.df(hs if fs is None else fs)", "activation.df(hs)"),
}  # fmt: skip

UPDATE = {
    "gradient ascent": ("p - jnp.asarray", "p + jnp.asarray"),
    "a bad update is applied": ("jnp.where, finite)", "jnp.where, True)"),
    "h_T may be NaN": ("(value, norm, params, h))", "(value, norm, params))"),
    "the value may be NaN": ("(value, norm, params, h))", "(norm, params, h))"),
    "consecutive skips not counted": ("state.skipped + 1)", "1)"),
    "skips counted for ever": ("jnp.where(finite, 0, state.skipped + 1)",
                               "state.skipped + jnp.where(finite, 0, 1)"),
    "step not counted": ("TrainState(state.step + 1,", "TrainState(state.step,"),
    "h not carried": ("else lax.stop_gradient(h_T)", "else state.h"),
    "h not passed": ("batch, state.h, **keywords", "batch, 0 * state.h, **keywords"),
    "one key for all updates": ("jax.random.fold_in(state.key, state.step)", "state.key"),
    "norm of the parameters": ("d.astype(dtype), grads))", "d.astype(dtype), state.params))"),
    "all steps counted": ("step_weights(batch, dtype).sum(), skipped)",
                          "jnp.asarray(batch.mask.size, dtype), skipped)"),
}  # fmt: skip


def names(faults):
    return pytest.mark.parametrize("fault", faults, ids=lambda fault: fault.replace(" ", "-"))


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


def leak_gradient_agrees(module, cases) -> bool:
    """The gradients of `sequence_loss` by the leak and the parameters."""

    def gradients(loss_fn, case):
        def value(leak, params):
            keywords = case.keywords | {"leak": leak}
            return loss_fn(params, case.batch, case.h_0, **keywords)[0]

        return jax.jit(jax.grad(value, (0, 1)))(case.leak, case.params)

    ((case, _),) = cases
    errors = relative_errors(gradients(module.sequence_loss, case), gradients(plain_loss, case))
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
    """A random gradient function; a batch whose weights are large has a NaN in h_T or the loss."""
    (value, h_T), grads = jaxrnn.bptt(params, batch, h)
    grads = jax.tree.map(lambda d: d + jax.random.normal(key, d.shape), grads)
    bad = batch.weights.max()
    h_T = jnp.where(bad == 7, jnp.nan, h_T)
    return (jnp.where(bad == 8, jnp.nan, value), h_T), grads


def update_agrees(module) -> bool:
    """Five updates, of which the second and third are skipped, against the rule written out."""
    key, rate = jax.random.key(3), 0.5
    params, h = jaxrnn.init(jax.random.key(0), 3, 4, 2), jnp.ones((2, 4))
    rule = partial(module.sgd, learning_rate=rate)
    step = module.make_update(noisy, rule)
    state = module.init_state(params, rule, h, key=key)
    skipped = 0
    for n, bad in enumerate([1, 7, 8, 1, 1]):
        xs = jax.random.normal(jax.random.key(10 + n), (6, 2, 3))
        mask = jnp.arange(12).reshape(6, 2) < 9
        batch = Batch(xs, jnp.zeros((6, 2), int), mask, weights=jnp.full((6, 2), float(bad)))
        (_, h_T), grads = noisy(params, batch, h, jax.random.fold_in(key, n))
        state, metrics = step(state, batch)
        skipped = skipped + 1 if bad > 1 else 0
        if bad == 1:
            params = jax.tree.map(lambda p, d: p - rate * d, params, grads)
            h = h_T
        expected = (*params, h, n + 1, skipped, skipped, optax.tree.norm(grads), 9.0 * bad)
        got = (*state.params, state.h, state.step, state.skipped)
        got = (*got, metrics.skipped, metrics.gradient_norm, metrics.counted)
        if not all(
            np.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(got, expected, strict=True)
        ):
            return False
    return True


@pytest.mark.usefixtures("x64")
@names(BACKWARD)
def test_a_fault_in_the_backward_pass_is_caught(fault, cases):
    faulty = with_fault([blocks, recurrence, backward], *BACKWARD[fault])
    faulty.block_steps = lambda *_: 32  # by default a sequence so small is one block
    assert not bptt_agrees(faulty, cases, CAUGHT), "this fault would have passed"


@pytest.mark.usefixtures("x64")
@names(FORWARD)
def test_a_fault_in_the_forward_pass_is_caught(fault, cases):
    faulty = with_fault([recurrence, forward], *FORWARD[fault])
    assert not sequence_loss_agrees(faulty, cases, CAUGHT), "this fault would have passed"


@pytest.mark.usefixtures("x64")
@names(TANGENT)
def test_a_fault_in_the_derivative_rule_is_caught(fault, cases):
    faulty = with_fault([recurrence, forward], *TANGENT[fault])
    assert not sequence_loss_agrees(faulty, cases, CAUGHT), "this fault would have passed"


@pytest.mark.usefixtures("x64")
@names(LEAK)
def test_a_fault_in_the_leak_is_caught(fault, leaky_cases):
    faulty = with_fault([blocks, recurrence, backward], *LEAK[fault])
    faulty.block_steps = lambda *_: 32
    assert not bptt_agrees(faulty, leaky_cases, CAUGHT), "this fault would have passed"


@pytest.mark.usefixtures("x64")
@names(LEAK_TANGENT)
def test_a_fault_in_the_derivative_rule_of_the_leak_is_caught(fault, leaky_cases):
    faulty = with_fault([recurrence, forward], *LEAK_TANGENT[fault])
    assert not leak_gradient_agrees(faulty, leaky_cases), "this fault would have passed"


@names(UPDATE)
def test_a_fault_in_the_update_is_caught(fault):
    assert not update_agrees(with_fault([update], *UPDATE[fault])), "this fault would have passed"


@pytest.mark.usefixtures("x64")
def test_without_a_fault_the_same_comparisons_pass(cases, leaky_cases, monkeypatch):
    monkeypatch.setattr(backward, "block_steps", lambda _, batch: min(32, len(batch.xs)))
    assert bptt_agrees(jaxrnn, cases, AGREEMENT)
    assert sequence_loss_agrees(jaxrnn, cases, AGREEMENT)
    assert bptt_agrees(jaxrnn, leaky_cases, AGREEMENT)
    assert leak_gradient_agrees(jaxrnn, leaky_cases)
    with jax.enable_x64(False):
        assert update_agrees(jaxrnn)
