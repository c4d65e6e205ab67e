"""The network linearised around its parameters, block by block of time.

For a direction v = Params(V_x, V_h, V_y, v_h, v_y), the change of the outputs along v is linear in
v. The reverse loop of `bptt`, applied to H_L y_dot, gives G v. Here a leading d is the derivative
of y_dot^T H_L y_dot / 2, not of the loss:

    z_dot_t = V_x x_t + V_h h_{t-1} + v_h + W_h h_dot_{t-1}        h_dot_t = f'(z_t) * z_dot_t
    y_dot_t = V_y h_t + v_y + W_y h_dot_t                          dy_t = H_L y_dot_t
    dh_t = W_y^T dy_t + W_h^T dz_{t+1}                             dz_t = f'(z_t) * dh_t
"""

from functools import partial
from typing import NamedTuple, TypeAlias

import jax
from jax import Array

from jaxrnn.activations import Activation
from jaxrnn.backward import block_flow, block_states, block_zs, hidden_sums, output_sums
from jaxrnn.batches import Batch, step_weights, where_exists
from jaxrnn.blocks import own_steps
from jaxrnn.losses import Loss
from jaxrnn.params import Params, at_least_float32
from jaxrnn.products import in_fast_layout, input_zs, readout
from jaxrnn.recurrence import derivatives, previous, tangent_scan


class Network(NamedTuple):
    """What does not change from block to block."""

    params: Params
    activation: Activation
    leak: Array | None
    loss: Loss


States: TypeAlias = tuple[Array, Array | None, Array]
"""h_t, f(z_t) if there is a leak, and y_t of each step of a block."""


def linearization_states(network: Network, block: Batch, h_0: Array) -> States:
    """The forward pass over a block from the state h_0 before it."""
    params, activation, leak, _ = network
    hs, fs = block_states(params, block, h_0, activation, leak)
    ys = readout(params, where_exists(block.mask, hs))
    return hs, fs, ys.astype(at_least_float32(ys.dtype))


def block_tangents(
    network: Network, v: Params, block: Batch, h_0: Array, states: States, h_0_dot: Array
) -> Array:
    """h_dot_t of each step of a block, the change of h_t along v, (K, *batch, H)."""
    (params, activation, leak, _), (hs, fs, _) = network, states
    mask, reset = block.mask, block.reset
    zs_dot = input_zs(v, block.xs, None, mask) + previous(hs, h_0, mask, reset) @ v.W_h.T
    f_primes = derivatives(activation, leak, hs, fs, partial(block_zs, params, block, h_0, hs))
    W_h = in_fast_layout(params.W_h, h_0_dot)
    return tangent_scan(W_h, h_0_dot, zs_dot, f_primes, None, leak, mask, reset)


def output_errors(
    network: Network, v: Params, block: Batch, states: States, h_dots: Array
) -> Array:
    """dy_t = H_L y_dot_t of each step of a block, (K, *batch, O), not divided by the count."""
    hs, _, ys = states
    hs, h_dots, targets = (where_exists(block.mask, leaf) for leaf in (hs, h_dots, block.targets))
    ys_dot = readout(v, hs) + h_dots @ network.params.W_y.T  # y_dot_t = V_y h_t + v_y + W_y h_dot_t
    ys_dot = ys_dot.astype(ys.dtype)
    dys: Array = jax.jvp(lambda ys: network.loss.error(ys, targets), (ys,), (ys_dot,))[1]
    weighted = (step_weights(block, ys.dtype)[..., None] * dys).astype(hs.dtype)
    return where_exists(block.mask, weighted)


def block_transpose(
    network: Network,
    v: Params,
    block: Batch,
    h_0: Array,
    states: States,
    h_dots: Array,
    dh_next: Array,
    structural: Array | None,
    last: Array | None,
) -> tuple[Array, Params]:
    """The reverse loop over a block: dh_next for the block before, and the sums of G v."""
    params, activation, leak, _ = network
    dys = output_errors(network, v, block, states, h_dots)
    dtype = at_least_float32(dys.dtype)
    dhs = dys @ params.W_y
    if structural is not None:
        counted = own_steps(where_exists(block.mask, h_dots), last).astype(dtype)
        dhs = dhs + (structural * counted).astype(dhs.dtype)
    dh_next, _, dzs = block_flow(
        params, block, h_0, states[:2], dhs, dh_next, activation, leak, last=last
    )
    dW_x, dW_h, db_h = hidden_sums(params, block, h_0, states[0], dzs)
    dW_y, db_y = output_sums(block, states[0], dys, dtype)
    return dh_next, Params(dW_x, dW_h, dW_y, db_h, db_y)
