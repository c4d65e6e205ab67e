"""Streams: gradients and updates at each step of a sequence that does not end."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn import checks
from jaxrnn.activations import Activation, tanh
from jaxrnn.backward import block_output
from jaxrnn.batches import (
    Batch,
    divide_by_count,
    per_step,
    scaled_weights,
    step_weights,
    where_exists,
)
from jaxrnn.influence import Influence, augmented_input, diagonal, full, rank_one
from jaxrnn.losses import Loss, check_loss_arguments, cross_entropy
from jaxrnn.params import AnyArray, Params, as_leak, at_least_float32, check_params
from jaxrnn.products import input_zs
from jaxrnn.recurrence import (
    derivatives,
    hold,
    leaky,
    unless_reset,
)
from jaxrnn.sharding import full_as, match_varying_axes, scalar_as

__all__ = ["Influence", "Stream", "diagonal", "full", "rank_one", "start_stream", "stream_gradient"]


class Stream(NamedTuple):
    """What passes from one step of a stream to the next.

    Attributes:
      h: the state, (*batch, H).
      influence: J, as an `Influence` carries it.
    """

    h: Array
    influence: Any


def start_stream(params: Params, h_0: AnyArray, influence: Influence) -> Stream:
    """The stream before its first step: J_0 = 0, because h_0 does not depend on the parameters.

    Args:
      params: Params.
      h_0: (*batch, H), such as zeros.
      influence: `full` (as `rtrl`), `diagonal` (as `snap1`) or `rank_one` (as `uoro`).

    Returns:
      Stream, in the parameters' dtype.

    Raises:
      TypeError, ValueError: a dtype or shape does not fit; the message names the argument.

    >>> import jax, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> start_stream(params, jnp.zeros(5), full).influence.shape  # (H, I + H + 1, H)
    (5, 9, 5)
    """
    check_params(params)
    _check_influence(influence)
    checks.check_float_array("h_0", h_0)
    H, I = params.W_x.shape
    checks.check_shape("h_0", h_0, (*h_0.shape[:-1], H), "*batch, H of W_h")
    h_0 = jnp.asarray(h_0, params.W_h.dtype)
    start = influence.start(h_0, I + H + 1)
    zeros = full_as(h_0.sum(axis=-1), 0)  # (*batch,), split over devices as J is to be
    return Stream(h_0, jax.tree.map(lambda J: J + per_step(zeros, J), start))


def _check_influence(influence: Any) -> None:
    if not isinstance(influence, Influence):
        raise TypeError(f"influence: expected an Influence such as streams.full, got {influence!r}")


def check_stream(params: Params, stream: Any, influence: Influence) -> None:
    """Raises TypeError or ValueError unless the stream fits the parameters and the influence."""
    check_params(params)
    _check_influence(influence)
    if not isinstance(stream, Stream):
        raise TypeError(f"stream: expected a Stream, got {type(stream).__name__}")
    checks.check_float_array("stream.h", stream.h)
    expected = jax.eval_shape(partial(start_stream, influence=influence), params, stream.h)
    got = jax.eval_shape(lambda stream: stream, stream)
    # Dtypes and shapes: explicit types also hold shardings.
    expected, got = (
        jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", tree)
        for tree in (expected, got)
    )
    if got != expected:
        raise ValueError(f"stream: expected {expected}, as start_stream returns it, got {got}")


def stream_gradient(
    params: Params,
    batch: Batch,
    stream: Stream,
    *,
    influence: Influence,
    key: Array | None = None,
    activation: Activation = tanh,
    leak: float | AnyArray | None = None,
    loss: Loss = cross_entropy,
) -> tuple[tuple[Array, Stream], Params]:
    """The loss and the gradient of the next steps of a stream, usually one.

        J_t = (1 - alpha) J_{t-1} + alpha f'(z_t) * (W_h J_{t-1} + dz_t / dtheta)
        dtheta = sum_t dh_t^T J_t        dh_t = W_y^T dy_t

    It reaches back over all earlier steps of the stream. If the parameters have changed since, J_t
    mixes the influences of earlier ones: the gradient is approximate, and accurate at small
    learning rates. It is a gradient function whose state is the stream:
    `make_update(partial(stream_gradient, influence=full), optimizer)`, with
    `init_state(params, optimizer, stream)`, takes one update for each batch of a single step. `fit`
    evaluates without a key, so it takes `full` and `diagonal`.

    Args:
      params: Params.
      batch: Batch of T steps. A `reset` starts a new sequence and a new J.
      stream: from `start_stream`, or from the call before.
      influence: `full`, `diagonal` or `rank_one`, as in `start_stream`.
      key: a key for `rank_one`, another for each call; the others do not use it.
      activation: f.
      leak: alpha in (0, 1], a scalar or (H,); None is 1.
      loss: g and the loss l of a step; L is the mean over the steps of this batch that count.

    Returns:
      (L, stream), grads: a scalar in float32 at least, the stream after these steps, and Params.

    Raises:
      TypeError, ValueError: a dtype, shape or setting does not fit; the message names the argument;
        stream.h is called h_0.

    >>> import jax, jaxrnn
    >>> from jaxrnn.streams import full
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> batch = Batch(xs=jnp.ones((100, 3)), targets=jnp.zeros(100, int))
    >>> def learn(carry, step):
    ...     params, stream = carry
    ...     step = jax.tree.map(lambda leaf: leaf[None], step)  # a batch of one step
    ...     (value, stream), grads = stream_gradient(params, step, stream, influence=full)
    ...     return (jaxrnn.sgd(params, grads, 0.1), stream), value
    >>> carry = params, start_stream(params, jnp.zeros(5), full)
    >>> carry, values = jax.lax.scan(learn, carry, batch)
    >>> bool(values[-1] < values[0] / 4)
    True
    """
    check_stream(params, stream, influence)
    check_loss_arguments(params, batch, stream.h, activation, leak, loss)
    leak = as_leak(params, leak)
    dtype = at_least_float32(params.W_h.dtype)
    batch, _ = scaled_weights(batch, dtype)
    weights = step_weights(batch, dtype)
    keys = None
    if influence.random:
        checks.check_key("key", key)
        keys = jax.random.split(jnp.asarray(key), weights.shape[0])

    def body(carry: Any, inputs: Any) -> tuple[Any, None]:
        stream, sums = carry
        step, key = inputs
        x = where_exists(step.mask, step.xs)
        h_before, J = jax.tree.map(partial(unless_reset, step.reset), stream)
        z = input_zs(params, x, step.drive, step.mask) + h_before @ params.W_h.T
        f_z = activation.f(z)
        f_prime = derivatives(activation, leak, f_z, f_z, lambda: z)
        u = augmented_input(params, x, h_before)
        J = influence.advance(J, params.W_h, f_prime, leak, u, key)
        new = Stream(leaky(leak, h_before, f_z), J)
        stream = jax.tree.map(partial(hold, step.mask), new, stream)
        step_sums = step_gradient(params, step, stream, influence, loss)
        return (stream, jax.tree.map(jnp.add, sums, step_sums)), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), params)
    zeros = scalar_as(stream.h, jnp.zeros((), dtype)), zeros
    key_data = None if keys is None else jax.random.key_data(keys)
    carry = match_varying_axes((stream, zeros), (params, batch, stream, leak, key_data))
    (stream, sums), _ = lax.scan(body, carry, (batch, keys))
    value, grads = divide_by_count(sums, weights.sum())
    grads = jax.tree.map(lambda d, leaf: d.astype(leaf.dtype), grads, params)
    return (value, stream), grads


def step_gradient(
    params: Params, step: Batch, stream: Stream, influence: Influence, loss: Loss
) -> tuple[Array, Params]:
    """The loss of one step and its gradient, summed over the batch."""
    value, dh, (dW_y, db_y) = block_output(params, step, stream.h, loss)
    dtheta = influence.contract(stream.influence, dh, value.dtype)
    I = params.W_x.shape[1]
    return value, Params(dtheta[:, :I], dtheta[:, I:-1], dW_y, dtheta[:, -1], db_y)
