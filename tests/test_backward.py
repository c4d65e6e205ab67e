"""The hand-written gradient against autodiff, an oracle without it, and planted faults."""

import inspect
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from jaxrnn import Batch, backward
from tests.reference import (
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
@pytest.mark.parametrize("structure", range(43))
def test_three_gradients_agree(structure):
    """43 structures (sizes, T, activation, loss, options) with 6 draws of all values each."""
    cases = [random_case(structure, values=draw) for draw in range(6)]
    by_hand = compiled(jaxrnn.bptt, cases[0], checkpoint_every=cases[0].checkpoint_every)
    fast = compiled(by_autodiff, cases[0])
    plain = compiled(by_plain_autodiff, cases[0])
    for case in cases:
        expected = plain(*case.arguments)
        assert max(relative_errors(by_hand(*case.arguments), expected)) <= AGREEMENT
        assert max(relative_errors(fast(*case.arguments), expected)) <= AGREEMENT


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("structure", range(24))
def test_agrees_with_the_oracle_that_uses_no_autodiff(structure):
    case = random_case(1000 + structure, largest_T=6, largest_size=3)
    by_hand = compiled(jaxrnn.bptt, case, checkpoint_every=case.checkpoint_every)
    (value, _), grads = by_hand(*case.arguments)
    assert max(relative_errors((value, grads), oracle_value_and_grad(case))) <= AGREEMENT


@pytest.mark.usefixtures("x64")
def test_a_softmax_over_one_class_has_no_gradient():
    case = random_case(1, sizes=(2, 3, 1), loss="cross_entropy")
    (value, _), grads = compiled(jaxrnn.bptt, case)(*case.arguments)
    assert max(float(jnp.abs(leaf).max()) for leaf in (value, *grads)) <= 1e-15


FAULTS = {
    "f' forgotten": ("f_prime * (dh_y + dh)", "dh_y + dh"),
    "f' forgotten in what flows back, as in the outline": ("dz @ W_h", "(dh_y + dh) @ W_h"),
    "f' of the step before": ("activation.df(hs)", "activation.df(previous(hs, h, None))"),
    "W_h transposed": ("dz @ W_h", "dz @ W_h.T"),
    "W_y transposed": ("dys @ params.W_y,", "dys @ params.W_y.T,"),
    "dW_h transposed": ("outer_sum(dzs, previous(hs, h, block.reset), dtype)",
                        "outer_sum(dzs, previous(hs, h, block.reset), dtype).T"),
    "forward in time": ("mask, reset), reverse=True,", "mask, reset),"),
    "blocks forward in time": ("        reverse=True,\n", ""),
    "no recurrence": ("f_prime * (dh_y + dh)", "f_prime * dh_y"),
    "no output error": ("f_prime * (dh_y + dh)", "f_prime * dh"),
    "mask ignored in dz": ("where_exists(exists, f_prime * (dh_y + dh))", "f_prime * (dh_y + dh)"),
    "gradient not held over a masked step": ("hold(exists, unless_reset(cut, dz @ W_h), dh)",
                                             "unless_reset(cut, dz @ W_h)"),
    "mask a step late": ("W_h, dh, dhs, f_primes, block.mask,",
                         "W_h, dh, dhs, f_primes, jnp.roll(block.mask, 1, 0),"),
    "reset ignored": ("unless_reset(cut, dz @ W_h)", "dz @ W_h"),
    "reset a step late": ("f_prime * (dh_y + dh)", "f_prime * (dh_y + unless_reset(cut, dh))"),
    "reset ignored in h_{t-1}": ("previous(hs, h, block.reset)", "previous(hs, h, None)"),
    "h_t for h_{t-1}": ("outer_sum(dzs, previous(hs, h, block.reset), dtype)",
                        "outer_sum(dzs, hs, dtype)"),
    "h_0 left out of dW_h": ("previous(hs, h, block.reset)",
                             "previous(hs, jnp.zeros_like(h), block.reset)"),
    "dW_h skips the first step": ("outer_sum(dzs, previous(hs, h, block.reset), dtype)",
                                  "outer_sum(dzs[1:], previous(hs, h, block.reset)[1:], dtype)"),
    "db_h skips the last step": ("bias_sum(dzs, dtype)", "bias_sum(dzs[:-1], dtype)"),
    "db_y skips the first step": ("bias_sum(dys, dtype)", "bias_sum(dys[1:], dtype)"),
    "db_h times 0.99": ("b_h=bias_sum(dzs, dtype)", "b_h=bias_sum(dzs, dtype) * 0.99"),
    "dW_h times 1.01": ("outer_sum(dzs, previous(hs, h, block.reset), dtype)",
                        "1.01 * outer_sum(dzs, previous(hs, h, block.reset), dtype)"),
    "one element of dW_y zero": ("outer_sum(dys, hs, dtype)",
                                 "outer_sum(dys, hs, dtype).at[0, 0].set(0)"),
    "weights ignored": ("weights[..., None] * loss.error(ys, targets)", "loss.error(ys, targets)"),
    "divided by all steps": ("sum / jnp.where(total == 0, 1, total)", "sum / batch.mask.size"),
    "sign of the error": ("loss.error(ys, targets)", "-loss.error(ys, targets)"),
    "blocks not joined": ("        return dh, jax.tree", "        return 0 * dh, jax.tree"),
    "gradient of one block alone": ("jax.tree.map(jnp.add, sums, block_sums)", "block_sums"),
    "left-over steps left out": ("carry = backward(carry, rest, kept_rest)", "pass"),
    "left-over steps from a zero state": ("backward(carry, rest, kept_rest)",
                                          "backward(carry, rest, (h_0, kept_rest[1]))"),
    "recomputed from a zero state": ("block, h, activation) if hs is None",
                                     "block, h_0, activation) if hs is None"),
}  # fmt: skip


@pytest.fixture(scope="module")
def fault_cases():
    """Square weights, so that a transposition keeps its shape; every option once."""
    fixed = {"sizes": (4, 4, 4), "batch_shape": (3,), "activation": "tanh", "T": 70}
    fixed |= {"mask": True, "reset": True, "weights": True, "h_0": True, "tokens": False}
    with jax.enable_x64(True):
        cases = [
            random_case(1, **fixed, loss="cross_entropy", labels=True, checkpoint_every=None),
            random_case(2, **fixed, loss="squared_error", checkpoint_every=16),
        ]
        return [(case, compiled(by_plain_autodiff, case)(*case.arguments)) for case in cases]


def agrees(bptt, fault_cases, tolerance) -> bool:
    for case, expected in fault_cases:
        by_hand = compiled(bptt, case, checkpoint_every=case.checkpoint_every)
        if not max(relative_errors(by_hand(*case.arguments), expected)) <= tolerance:
            return False
    return True


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.replace(" ", "-"))
def test_a_planted_fault_is_caught(fault, fault_cases):
    right, wrong = FAULTS[fault]
    source = inspect.getsource(backward)
    assert source.count(right) == 1, "the fault no longer applies: plant it anew"
    faulty = types.ModuleType("faulty")
    exec(compile(source.replace(right, wrong), "faulty", "exec"), faulty.__dict__)
    assert not agrees(faulty.bptt, fault_cases, 1e-3), "this fault would have passed"


@pytest.mark.usefixtures("x64")
def test_without_a_fault_the_same_cases_pass(fault_cases):
    assert agrees(jaxrnn.bptt, fault_cases, AGREEMENT)


@pytest.mark.usefixtures("x64")
def test_float32_error_is_at_most_twice_autodiffs():
    """The error of the whole gradient, against float64; the mean over 5 draws."""
    for T, checkpoint_every in [(40, None), (200, 14)]:
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


@pytest.mark.parametrize("nothing", ["mask", "weights", "T"])
def test_no_counted_step_gives_zero(nothing):
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

    for name in ("grad", "vjp", "value_and_grad", "jvp", "linearize", "jacrev"):
        monkeypatch.setattr(jax, name, refuse)
    params = jaxrnn.init(jax.random.key(0), 2, 3, 2)
    text = str(jax.make_jaxpr(jaxrnn.bptt)(params, Batch(jnp.ones((5, 2)), jnp.zeros(5, int))))
    assert "transpose_jvp" not in text
    assert "jax.grad" not in inspect.getsource(backward.bptt).split('"""')[2]
