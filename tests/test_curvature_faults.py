"""Each fault planted in the Gauss-Newton product is caught by the comparison with J^T H_L J."""

import jax
import pytest
from jax.flatten_util import ravel_pytree

from jaxrnn import curvature, linearization, recurrence
from tests.faults import with_fault
from tests.reference import relative_errors
from tests.test_curvature import AGREEMENT, dense, draw, random_direction

CAUGHT = 1e-3

FAULTS = {
    "W_h transposed in the tangent": ("h_dot_before @ W_h.T", "h_dot_before @ W_h"),
    "V_h transposed": ("reset) @ v.W_h.T", "reset) @ v.W_h"),
    "V_h forgotten": ("+ previous(hs, h_0, mask, reset) @ v.W_h.T", ""),
    "h_t for h_{t-1}": ("previous(hs, h_0, mask, reset) @ v", "hs @ v"),
    "reset ignored in V_h h_{t-1}": ("previous(hs, h_0, mask, reset) @ v",
                                     "previous(hs, h_0, mask, None) @ v"),
    "reset ignored in the tangent": ("f_primes, None, leak, mask, reset)",
                                     "f_primes, None, leak, mask, None)"),
    "mask ignored in the tangent": ("f_primes, None, leak, mask, reset)",
                                    "f_primes, None, leak, None, reset)"),
    "leak ignored in the tangent": ("f_primes, None, leak, mask, reset)",
                                    "f_primes, None, None, mask, reset)"),
    "V_y forgotten": ("readout(v, hs) + h_dots", "h_dots"),
    "states fixed": ("readout(v, hs) + h_dots @ network.params.W_y.T", "readout(v, hs)"),
    "H_L forgotten": ("lambda ys: network.loss.error(ys, targets)", "lambda ys: ys"),
    "errors for their change": ("(ys,), (ys_dot,))[1]", "(ys,), (ys_dot,))[0]"),
    "weights ignored": ("step_weights(block, ys.dtype)[..., None] * dys", "dys"),
    "W_y transposed": ("dhs = dys @ params.W_y", "dhs = dys @ params.W_y.T"),
    "mask ignored in the reverse loop": (
        "params, block, h_0, states[:2], dhs,",
        "params, block._replace(mask=None), h_0, states[:2], dhs,",
    ),
    "reset ignored in the reverse loop": (
        "params, block, h_0, states[:2], dhs,",
        "params, block._replace(reset=None), h_0, states[:2], dhs,",
    ),
    "no structural damping": ("if structural is not None", "if False"),
    "masked steps in the structural damping": ("own_steps(where_exists(block.mask, h_dots), last)",
                                               "own_steps(h_dots, last)"),
    "steps of two blocks in the structural damping": (
        "own_steps(where_exists(block.mask, h_dots), last)", "where_exists(block.mask, h_dots)"
    ),
    "dh_next behind the first block": ("dh_next, activation, leak, last=last",
                                       "dh_next, activation, leak"),
    "blocks not joined forward": ("return at_step(last, h_dots), (h_dot",
                                  "return h_dot, (h_dot"),
    "blocks not joined in reverse": ("return (dh_next, jax.tree", "return (0 * dh_next, jax.tree"),
    "one block alone": ("jax.tree.map(jnp.add, means, divide_by_count(sums, count))",
                        "divide_by_count(sums, count)"),
    "blocks forward in time": ("(saved, tangents), reverse=True)", "(saved, tangents))"),
    "divided by all steps": ("count = step_weights(batch, dtype).sum()",
                             "count = jnp.asarray(batch.mask.size, dtype)"),
    "forward pass from zeros": ("scan_blocks(forward, h_0, batch, K)",
                                "scan_blocks(forward, 0 * h_0, batch, K)"),
    "recomputed from a zero tangent": (
        "            h_dots = block_tangents(network, v, block, h, states, h_dot)",
        "            h_dots = block_tangents(network, v, block, h, states, 0 * h_dot)",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def fault_case():
    """Square weights, so that a transposition keeps its shape; every option; blocks of
    three steps, which do not divide T."""
    with jax.enable_x64(True):
        case = draw(
            2, values=1, sizes=(3, 3, 3), batch_shape=(2,), T=11, activation="tanh",
            loss="cross_entropy", labels=True, tokens=False, mask=True, reset=True, weights=True,
            h_0=True,
        )  # fmt: skip
        v = random_direction(case.params)
        return case, v, dense(case, 0.3) @ ravel_pytree(v)[0]


def agrees(module, fault_case, tolerance) -> bool:
    """The product with structural damping, with stored and with recomputed states."""
    case, v, expected = fault_case

    for checkpoint_every in (None, 1):

        @jax.jit
        def product_of(params, batch, h_0, K=checkpoint_every):
            options = case.keywords | {"checkpoint_every": K}
            product = module.gauss_newton(params, batch, h_0, **options)
            return ravel_pytree(product(v, structural=0.3))[0]

        if not max(relative_errors(product_of(*case.arguments), expected)) <= tolerance:
            return False
    return True


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_is_caught(fault, fault_case):
    faulty = with_fault([recurrence, linearization, curvature], *FAULTS[fault])
    faulty.block_steps = lambda *_: 3
    assert not agrees(faulty, fault_case, CAUGHT), "this fault would have passed"


@pytest.mark.usefixtures("x64")
def test_without_a_fault_the_same_comparison_passes(fault_case, monkeypatch):
    monkeypatch.setattr(curvature, "block_steps", lambda *_: 3)
    assert agrees(curvature, fault_case, AGREEMENT)
