"""The recurrence: its loops over time, and the one custom derivative rule.

    z_t = W_x x_t + W_h h_{t-1} + b_h        h_t = f(z_t)               `recur`, forward
    dh_t = W_y^T dy_t + W_h^T dz_{t+1}       dz_t = f'(z_t) * dh_t      `reverse_scan`, reverse

With a leak alpha:

    h_t = (1 - alpha) h_{t-1} + alpha f(z_t)
    dh_t = W_y^T dy_t + W_h^T dz_{t+1} + (1 - alpha) dh_{t+1}           dz_t = alpha f'(z_t) * dh_t

Only the product with W_h is sequential. Every other product is taken for all steps at once, outside
the loops. Where `mask` is False the state, or the gradient, passes the step unchanged; where
`reset` is True nothing passes from step t-1 to step t. Each is left out where it is None.

`recur` and `reverse_scan` pass their step to a `Loop`, which runs it for all steps: `scan`, or
another one that gives the same, such as `kernels.loop`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from jaxrnn.activations import Activation, autodiff_f_prime
from jaxrnn.batches import per_step, steps_shape, where_exists
from jaxrnn.params import AnyArray, Params
from jaxrnn.products import (
    LoopMatrix,
    elementwise_if_small,
    in_fast_layout,
    input_product,
    per_unit,
)
from jaxrnn.sharding import full_as, match_varying_axes, split_as

Loop: TypeAlias = Callable[..., tuple[Any, Any]]
"""A function that applies a step at all steps; `scan` defines its arguments and results."""

LoopNetwork: TypeAlias = tuple[Array, tuple[Array | None, Array | None]]
"""What each step reads: W_h (H, H), and b_h (H,) and alpha () or (H,), or None."""


def scan_unroll() -> int:
    """Steps unrolled in the body of a loop over time. A GPU idles between two iterations."""
    return 8 if jax.default_backend() == "gpu" else 1


def scan(
    step: Callable[..., tuple[Any, Any]],
    network: LoopNetwork,
    carry: Array,
    inputs: Any,
    *,
    reverse: bool = False,
) -> tuple[Any, Any]:
    """carry, outputs_t = step(network, carry, inputs_t) for each step, by `lax.scan`.

    Args:
      step: a pure function.
      network: W_h, and b_h and alpha or None.
      carry: (*batch, H), what passes from step to step.
      inputs: a pytree of (T, *batch, H) numbers and (T, *batch) flags.
      reverse: from the last step to the first.

    Returns:
      The last carry, and the outputs of all steps, (T, *batch, H).
    """
    W_h, units = network
    body = partial(step, (in_fast_layout(W_h, carry, reverse=reverse), units))
    return lax.scan(body, carry, inputs, reverse=reverse, unroll=scan_unroll())


def hold(mask: AnyArray | None, h_new: Array, h: Array) -> Array:
    """h_new where the step exists, else h."""
    return h_new if mask is None else jnp.where(per_step(mask, h), h_new, h)


def unless_reset(reset: AnyArray | None, h: Array) -> Array:
    """h, or zeros where a reset comes before the step that reads it."""
    return h if reset is None else jnp.where(per_step(reset, h), jnp.zeros((), h.dtype), h)


def carried(leak: Array | None, h: Array, new: Array) -> Array:
    """(1 - alpha) h + new, for a tangent or a gradient of the state; alpha is 1 if None."""
    return new if leak is None else (1 - per_unit(leak, h)) * h + new


def leaky(leak: Array | None, h: Array, f_z: Array) -> Array:
    """(1 - alpha) h_{t-1} + alpha f(z_t)."""
    if leak is None:
        return f_z
    leak = per_unit(leak, h)
    return (1 - leak) * h + leak * f_z


def previous(hs: Array, h_0: Array, mask: AnyArray | None, reset: AnyArray | None) -> Array:
    """h_{t-1} as step t reads it, zeros after a reset and where step t does not exist."""
    shifted = jnp.concatenate([h_0[None], hs[:-1]])[: hs.shape[0]]
    return where_exists(mask, unless_reset(reset, shifted))


def initial_state(params: Params, xs: AnyArray, h_0: AnyArray | None, others: Any) -> Array:
    """h_0 in the parameters' dtype, zeros if None; split over devices as the inputs are.

    Inside `shard_map` it varies over devices as the parameters and `others`, a pytree, do.
    """
    shape = (*steps_shape(xs)[1:], params.W_h.shape[0])
    unread = full_as(jnp.asarray(xs), 0)  # the values of xs may be NaN where the mask is False
    z_x = input_product(params, unread[0]) if xs.shape[0] else jnp.zeros(shape)
    h_0 = full_as(z_x, 0) if h_0 is None else split_as(z_x, jnp.asarray(h_0))
    return match_varying_axes(h_0.astype(params.W_h.dtype), (params, others))


def recur(
    activation: Activation,
    W_h: Array,
    zs_x: Array,
    h_0: Array,
    leak: Array | None,
    mask: AnyArray | None,
    reset: AnyArray | None,
    loop: Loop = scan,
    b_h: Array | None = None,
) -> tuple[Array, Array | None]:
    """The forward loop: h_t = (1 - alpha) h_{t-1} + alpha f(z_t), or f(z_t) without a leak.

    Args:
      activation: f.
      W_h: (H, H).
      zs_x: W_x x_t + drive_t + b_h, (T, *batch, H), without b_h if it is given.
      h_0: (*batch, H).
      leak: alpha, a scalar or (H,), or None.
      mask: (T, *batch) bool or None.
      reset: (T, *batch) bool or None.
      loop: what runs the steps.
      b_h: (H,), added in the loop, which on a CPU takes less time than a pass over zs_x.

    Returns:
      hs, h_t after each step, (T, *batch, H), held where the mask is False; and fs, f(z_t) of each
      step, or None without a leak.
    """

    def step(network: Any, h: Array, inputs: Any) -> tuple[Array, tuple[Array, Array | None]]:
        W_h, (b_h, leak) = network
        z_x, valid, reset_t = inputs
        h_before = unless_reset(reset_t, h)
        z_x = z_x if b_h is None else z_x + per_unit(b_h, h)
        z = z_x + h_before @ W_h.T  # z_t = W_x x_t + b_h + W_h h_{t-1}
        f_z = activation.f(z)
        h = hold(valid, leaky(leak, h_before, f_z), h)  # h_t = (1 - alpha) h_{t-1} + alpha f(z_t)
        return h, (h, None if leak is None else f_z)

    _, (hs, fs) = loop(step, (W_h, (b_h, leak)), h_0, (zs_x, mask, reset))
    return hs, fs


def reverse_scan(
    W_h: Array,
    dh_next: Array,
    dhs_y: Array,
    f_primes: Array,
    leak: Array | None,
    mask: AnyArray | None,
    reset: AnyArray | None,
    loop: Loop = scan,
) -> tuple[Array, tuple[Array, Array]]:
    """The reverse loop: dh_t and dz_t of each step.

    Args:
      W_h: (H, H).
      dh_next: W_h^T dz_{T+1} + (1 - alpha) dh_{T+1}, (*batch, H).
      dhs_y: W_y^T dy_t, (T, *batch, H).
      f_primes: alpha f'(z_t), (T, *batch, H).
      leak: alpha, a scalar or (H,), or None.
      mask: (T, *batch) bool or None.
      reset: (T, *batch) bool or None.
      loop: what runs the steps.

    Returns:
      W_h^T dz_1 + (1 - alpha) dh_1, (*batch, H), and (dhs, dzs), each (T, *batch, H). XLA removes
      the one not used.
    """

    def step(network: Any, dh_next: Array, inputs: Any) -> tuple[Array, tuple[Array, Array]]:
        W_h, (_, leak) = network
        dh_y, f_prime, valid, reset_t = inputs
        dh = dh_y + dh_next  # dh_t = W_y^T dy_t + W_h^T dz_{t+1} + (1 - alpha) dh_{t+1}
        dz = where_exists(valid, f_prime * dh)  # dz_t = alpha f'(z_t) * dh_t
        dh_before = carried(leak, dh, dz @ W_h)
        dh_next = hold(valid, unless_reset(reset_t, dh_before), dh)
        return dh_next, (dh, dz)

    return loop(step, (W_h, (None, leak)), dh_next, (dhs_y, f_primes, mask, reset), reverse=True)


def tangent_scan(
    W_h: LoopMatrix,
    h_0_dot: Array,
    zs_dot: Array,
    f_primes: Array,
    leaks_dot: Array | None,
    leak: Array | None,
    mask: AnyArray | None,
    reset: AnyArray | None,
) -> Array:
    """The forward loop of the tangents: h_dot_t of each step, (T, *batch, H).

        h_dot_t = (1 - alpha) h_dot_{t-1} + alpha f'(z_t) * (z_dot_t + W_h h_dot_{t-1})

    `zs_dot` is the part of z_dot_t that comes from the weights and inputs, `f_primes` is
    alpha f'(z_t), and `leaks_dot` the part of h_dot_t that comes from alpha, or None.
    """

    def body(h_dot: Array, inputs: Any) -> tuple[Array, Array]:
        z_dot, f_prime, leak_dot, valid, reset_t = inputs
        h_dot_before = unless_reset(reset_t, h_dot)
        h_dot_new = carried(leak, h_dot_before, f_prime * (z_dot + h_dot_before @ W_h.T))
        if leak_dot is not None:
            h_dot_new = h_dot_new + leak_dot
        h_dot = hold(valid, h_dot_new, h_dot)
        return h_dot, h_dot

    inputs = zs_dot, f_primes, leaks_dot, mask, reset
    return lax.scan(body, h_0_dot, inputs, unroll=scan_unroll())[1]


def derivatives(
    activation: Activation,
    leak: Array | None,
    hs: Array,
    fs: Array | None,
    zs: Callable[[], Array],
) -> Array:
    """dh_t / dz_t = alpha f'(z_t) for each step.

    f' follows from f(z_t), which is h_t without a leak; without a df it is computed from z_t. With
    a leak, f(z_t) recovered from h_t would have a rounding error multiplied by 1 / alpha.
    """
    if activation.df is not None:
        f_primes = activation.df(hs if fs is None else fs)
    else:
        f_primes = autodiff_f_prime(activation.f, zs())
    return f_primes if leak is None else per_unit(leak, f_primes) * f_primes


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def hoisted_recur(
    loop: Loop,
    activation: Activation,
    W_h: Array,
    zs_x: Array,
    h_0: Array,
    leak: Array | None,
    mask: AnyArray | None,
    reset: AnyArray | None,
) -> Array:
    """The states of `recur`, with a rule that takes the weight gradient out of the loop."""
    return recur(activation, W_h, zs_x, h_0, leak, mask, reset, loop)[0]


def _instantiate(tangent: Array | SymbolicZero, primal: Array) -> Array:
    """The tangent as an array, zeros if nothing depends on it."""
    return full_as(primal, 0) if isinstance(tangent, SymbolicZero) else tangent


def _hoisted_recur_jvp(
    loop: Loop, activation: Activation, primals: Any, tangents: Any
) -> tuple[Array, Array]:
    """h_dot_t = (1 - alpha) h_dot_{t-1} + alpha f'(z_t) * (z_dot_t + W_h h_dot_{t-1})

    Here z_dot_t is the tangent of z_t by x_t, b_h and W_h. A tangent of alpha adds
    alpha_dot (f(z_t) - h_{t-1}) to h_dot_t. W_h_dot h_{t-1} is one product for all steps, outside
    the loop. Its transpose is the one contraction over all steps that gives dL/dW_h; autodiff of
    the scan itself adds an outer product to an (H, H) carry at each step. The rule is ordinary JAX,
    so forward mode, vmap and higher derivatives follow from it.
    """
    W_h, zs_x, h_0, leak, mask, reset = primals
    W_h_dot, zs_x_dot, h_0_dot = map(_instantiate, tangents[:3], primals[:3])
    hs = hoisted_recur(loop, activation, *primals)
    hs_before = previous(hs, h_0, mask, reset)
    zs_dot = zs_x_dot + hs_before @ W_h_dot.T

    def zs() -> Any:
        return zs_x + hs_before @ W_h.T

    fs = None if leak is None else activation.f(zs())
    f_primes = where_exists(mask, derivatives(activation, leak, hs, fs, zs))
    leaks_dot = None
    if fs is not None and not isinstance(tangents[3], SymbolicZero):
        leaks_dot = per_unit(tangents[3], hs) * (fs - hs_before)

    W_h_in_loop = elementwise_if_small(W_h, h_0_dot)
    return hs, tangent_scan(W_h_in_loop, h_0_dot, zs_dot, f_primes, leaks_dot, leak, mask, reset)


hoisted_recur.defjvp(_hoisted_recur_jvp, symbolic_zeros=True)
