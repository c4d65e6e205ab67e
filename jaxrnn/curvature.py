"""Curvature: products with the Gauss-Newton matrix of the loss (Schraudolph 2002; Martens 2010).

    G = J^T H_L J        J = dy / dtheta of all outputs        H_L = d2L / dy2

dl/dy is the output error, so H_L y_dot is the change of the errors along y_dot. G v takes a loop
forward, which gives the change y_dot_t of the outputs along v, and the reverse loop of `bptt`; see
linearization.py. What both read of the forward pass, h_t and y_t, is computed once for any number
of products. As in `bptt`, all products but that with W_h are taken by blocks of time.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import checks
from jaxrnn.activations import Activation, tanh
from jaxrnn.batches import Batch, divide_by_count, scaled_weights, step_weights
from jaxrnn.blocks import at_step, block_steps, near_divisor, scan_blocks
from jaxrnn.linearization import (
    Network,
    block_tangents,
    block_transpose,
    linearization_states,
)
from jaxrnn.losses import Loss, check_loss_arguments, cross_entropy
from jaxrnn.params import AnyArray, Params, as_leak, at_least_float32
from jaxrnn.recurrence import initial_state
from jaxrnn.sharding import full_as, match_varying_axes

__all__ = ["Product", "damped", "gauss_newton", "gauss_newton_product"]

Product: TypeAlias = Callable[..., Params]
"""v -> G v; with structural=c, G v + c S v."""


def check_direction(v: Any, params: Params) -> None:
    """Raises TypeError or ValueError unless v has the structure, shapes and dtype of params."""
    if not isinstance(v, Params):
        raise TypeError(f"v: expected Params, got {type(v).__name__}")
    for name, leaf in v._asdict().items():
        like = getattr(params, name)
        checks.check_array(f"v.{name}", leaf)
        checks.check_shape(f"v.{name}", leaf, like.shape, f"as params.{name}")
        expected, got = map(jax.dtypes.canonicalize_dtype, (like.dtype, leaf.dtype))
        if got != expected:  # NumPy's float64 is float32 without x64
            raise TypeError(f"v.{name}: expected {expected} as params.{name}, got {got}")


def gauss_newton(
    params: Params,
    batch: Batch,
    h_0: AnyArray | None = None,
    *,
    activation: Activation = tanh,
    leak: float | AnyArray | None = None,
    loss: Loss = cross_entropy,
    checkpoint_every: int | None = None,
) -> Product:
    """The function v -> G v, for many products at the same parameters, as conjugate gradients take.

    The forward pass is computed here, once. Call it and the products under the same `jit`. G is
    symmetric, and positive semidefinite if the loss is convex in y, as that of every matched pair
    is.

    Args:
      params: Params.
      batch: Batch.
      h_0: (*batch, H); zeros if None. It does not depend on the parameters.
      activation: f.
      leak: alpha in (0, 1], a scalar or (H,); None is 1. It is fixed.
      loss: g and the loss l of a step; L is the mean over the steps that count. `error` is
        differentiated once.
      checkpoint_every: K stores about every K-th state and change of state. Each product then
        computes the others again, in three more loops over time. Memory is proportional to T/K + K
        instead of T. None stores the states and outputs of all steps.

    Returns:
      product(v, structural=None): v are Params; G v are Params of the same dtype, summed over time
      in float32 at least. With a number c, it is G v + c S v, where S is the Gauss-Newton matrix of
      sum_t |h_t|^2 / 2 over the steps that exist, divided by the same count as the loss: the
      structural damping of `damped`.

    Raises:
      TypeError, ValueError: a dtype, shape or setting does not fit; the message names the argument.

    >>> import jax, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> batch = Batch(xs=jnp.ones((7, 4, 3)), targets=jnp.zeros((7, 4), int))
    >>> _, grads = jaxrnn.bptt(params, batch)
    >>> product = damped(gauss_newton(params, batch), 0.1)
    >>> step, _ = jax.scipy.sparse.linalg.cg(product, grads, maxiter=50)
    >>> new = jax.tree.map(jnp.subtract, params, step)
    >>> bool(jaxrnn.sequence_loss(new, batch)[0] < jaxrnn.sequence_loss(params, batch)[0] / 2)
    True
    """
    check_loss_arguments(params, batch, h_0, activation, leak, loss)
    if checkpoint_every is not None:
        checks.check_size("checkpoint_every", checkpoint_every)
    h_0 = initial_state(params, batch.xs, h_0, (batch, leak))
    network = Network(params, activation, as_leak(params, leak), loss)
    T = batch.xs.shape[0]
    if checkpoint_every is None:
        K = block_steps(params, batch)
    else:
        K = near_divisor(T, checkpoint_every)

    def forward(h: Array, block: Batch, last: Array | None, _: None) -> tuple[Array, Any]:
        states = linearization_states(network, block, h)
        return at_step(last, states[0]), (h, states if checkpoint_every is None else None)

    saved = scan_blocks(forward, h_0, batch, K)[1] if T else None

    def product(v: Params, structural: float | AnyArray | None = None) -> Params:
        check_direction(v, params)
        _check_structural(structural)
        if T == 0:
            return jax.tree.map(jnp.zeros_like, v)
        return _product(network, batch, h_0, K, saved, v, structural)

    return product


def _check_structural(structural: Any) -> None:
    checks.check_scalar("structural", 0 if structural is None else structural)


def _product(
    network: Network,
    batch: Batch,
    h_0: Array,
    K: int,
    saved: Any,
    v: Params,
    structural: float | AnyArray | None,
) -> Params:
    """G v, from the states before each block and, unless they are None, those within."""

    def forward(h_dot: Array, block: Batch, last: Array | None, saved: Any) -> tuple[Array, Any]:
        h, states = saved
        stored = states is not None
        states = states if stored else linearization_states(network, block, h)
        h_dots = block_tangents(network, v, block, h, states, h_dot)
        return at_step(last, h_dots), (h_dot, h_dots if stored else None)

    def backward(carry: Any, block: Batch, last: Array | None, saved: Any) -> tuple[Any, None]:
        dh_next, means = carry
        (h, states), (h_dot, h_dots) = saved
        if states is None:
            states = linearization_states(network, block, h)
            h_dots = block_tangents(network, v, block, h, states, h_dot)
        dh_next, sums = block_transpose(network, v, block, h, states, h_dots, dh_next, c, last)
        return (dh_next, jax.tree.map(jnp.add, means, divide_by_count(sums, count))), None

    dtype = at_least_float32(v.W_h.dtype)
    batch, scale = scaled_weights(batch, dtype)
    c = None if structural is None else jnp.asarray(structural, dtype) / scale
    count = step_weights(batch, dtype).sum()
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), v)
    h_0_dot = full_as(h_0, 0)  # h_0 does not depend on the parameters
    h_0_dot, carry = match_varying_axes((h_0_dot, (h_0_dot, zeros)), (h_0, v))
    _, tangents = scan_blocks(forward, h_0_dot, batch, K, saved)
    (_, means), _ = scan_blocks(backward, carry, batch, K, (saved, tangents), reverse=True)
    return jax.tree.map(lambda d, leaf: d.astype(leaf.dtype), means, v)


def damped(
    product: Product, damping: float | AnyArray, structural: float | AnyArray | None = None
) -> Callable[[Params], Params]:
    """The product with the damped matrix, which conjugate gradients invert.

        v -> G v + lambda v                     Levenberg-Marquardt (Martens 2010)
        v -> G v + lambda v + lambda mu S v     structural damping (Martens and Sutskever 2011)

    The first penalises the change of the parameters, |v|^2; the second also the change of the
    hidden states, which small changes of the parameters can make large: v^T S v is the sum of
    |h_dot_t|^2 over the steps that exist, divided by the count of the loss.

    Args:
      product: from `gauss_newton`.
      damping: lambda, a number.
      structural: mu, a number; None leaves the term out.

    Returns:
      v -> the product, with the structure of v.

    Raises:
      TypeError: product is not a function, or damping or structural not a number.

    >>> double = lambda v, structural=None: jax.tree.map(lambda leaf: 2 * leaf, v)
    >>> float(damped(double, 0.5)(jnp.array(4.0)))
    10.0
    """
    checks.check_function("product", product)
    checks.check_scalar("damping", damping)
    _check_structural(structural)

    def add(g: Array, leaf: Array) -> Array:
        dtype = at_least_float32(leaf.dtype)
        damping_term = jnp.asarray(damping, dtype) * leaf.astype(dtype)
        return (g.astype(dtype) + damping_term).astype(leaf.dtype)

    def damped_product(v: Params) -> Params:
        Gv = product(v) if structural is None else product(v, structural=damping * structural)
        return jax.tree.map(add, Gv, v)

    return damped_product


def gauss_newton_product(
    params: Params,
    batch: Batch,
    v: Params,
    h_0: AnyArray | None = None,
    *,
    activation: Activation = tanh,
    leak: float | AnyArray | None = None,
    loss: Loss = cross_entropy,
    checkpoint_every: int | None = None,
) -> Params:
    """G v = J^T H_L J v, the product with the Gauss-Newton matrix of the loss (Schraudolph 2002).

        J = dy / dtheta of all outputs        H_L = d2L / dy2        L as in `sequence_loss`

    G is the Hessian of the loss if the network is replaced by its linearisation at theta. For
    several products at the same parameters, `curvature.gauss_newton` shares the forward pass.

    Args:
      params: Params.
      batch: Batch.
      v: the direction, Params of the shapes and dtype of `params`.
      h_0: (*batch, H); zeros if None.
      activation: f.
      leak: alpha in (0, 1], a scalar or (H,); None is 1.
      loss: g and the loss l of a step.
      checkpoint_every: as in `curvature.gauss_newton`.

    Returns:
      G v, Params in the parameters' dtype, summed over time in float32 at least.

    Raises:
      TypeError, ValueError: a dtype, shape or setting does not fit; the message names the argument.

    >>> import jax, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> batch = Batch(xs=jnp.ones((7, 4, 3)), targets=jnp.zeros((7, 4), int))
    >>> Gv = gauss_newton_product(params, batch, params)
    >>> outputs = lambda params: jaxrnn.unroll(params, batch.xs)[1]
    >>> y, y_dot = jax.jvp(outputs, (params,), (params,))
    >>> y_hat = jax.nn.softmax(y)
    >>> vHv = (y_hat * y_dot**2).sum(-1) - (y_hat * y_dot).sum(-1) ** 2
    >>> vGv = sum(jnp.vdot(a, b) for a, b in zip(params, Gv))
    >>> bool(jnp.allclose(vGv, vHv.mean(), atol=1e-5))
    True
    """
    product = gauss_newton(
        params, batch, h_0, activation=activation, leak=leak, loss=loss,
        checkpoint_every=checkpoint_every,
    )  # fmt: skip
    return product(v)
