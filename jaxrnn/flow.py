"""The gradient through time made visible: what reaches each step of the backward pass.

How it shrinks or grows on its way is why plain recurrent networks are hard to train (Hochreiter
1991; Bengio, Simard, Frasconi 1994).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxrnn import checks
from jaxrnn.activations import Activation, tanh
from jaxrnn.backward import reverse_scan
from jaxrnn.forward import (
    hidden_states,
    hold,
    mean_weights,
    readout,
    sum_dtype,
    unless_reset,
    where_exists,
)
from jaxrnn.losses import Loss, cross_entropy
from jaxrnn.params import Params
from jaxrnn.sequences import Batch


class Flow(NamedTuple):
    """The derivative of the loss by each step's state and pre-activation.

    Attributes:
      dhs: dL/dh_t, (T, *batch, H), through the step's own output and through all steps after it.
      dzs: dL/dz_t, (T, *batch, H); zeros where the mask is False.
    """

    dhs: Array
    dzs: Array


def gradient_flow(
    params: Params,
    batch: Batch,
    h_0: Array | None = None,
    *,
    activation: Activation = tanh,
    loss: Loss = cross_entropy,
) -> Flow:
    """The dh and dz of every step, which `bptt` sums up and forgets (Werbos 1990).

        dh_t = W_y^T dy_t + W_h^T dz_{t+1}        dz_t = f'(z_t) * dh_t        dz_{T+1} = 0

    Plot the norms over t: `jnp.linalg.norm(flow.dhs, axis=-1)`. With `weights` that count one step
    alone, they are how far that one error reaches back.

    Args:
      params: Params.
      batch: Batch. Where its mask is False, dh_t is what passes by.
      h_0: (*batch, H); zeros if None.
      activation: f.
      loss: g and its loss, the mean over the steps that count.

    Returns:
      Flow, in the parameters' dtype.

    Raises:
      TypeError, ValueError: a dtype or shape that does not fit; the message names it.

    >>> import jax, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> batch = Batch(xs=jnp.ones((7, 4, 3)), targets=jnp.zeros((7, 4), int))
    >>> flow = gradient_flow(params, batch)
    >>> (_, _), grads = jaxrnn.bptt(params, batch)
    >>> bool(jnp.allclose(flow.dzs.sum(axis=(0, 1)), grads.b_h, atol=1e-6))
    True
    """
    checks.check_batch(params, batch, h_0, activation, loss)
    dtype = sum_dtype(params)
    mask, reset = batch.mask, batch.reset
    _, hs = hidden_states(params, batch.xs, h_0, activation=activation, mask=mask, reset=reset)
    targets = where_exists(mask, batch.targets)
    errors = loss.error(readout(params, hs).astype(dtype), targets)
    dys = (mean_weights(batch, dtype)[..., None] * errors).astype(hs.dtype)
    from_outputs = dys @ params.W_y
    nothing = jnp.zeros(hs.shape[1:], hs.dtype)
    _, dzs = reverse_scan(params.W_h, nothing, from_outputs, activation.df(hs), mask, reset)

    # dh once more, for the loop that finds dz keeps none: what comes from after a step, held over
    # those that do not exist, and from the step's own output.
    def body(from_after, now):
        from_output, to_before, exists = now
        return hold(exists, to_before, from_after), from_output + from_after

    to_before = unless_reset(reset, dzs @ params.W_h)
    _, dhs = lax.scan(body, nothing, (from_outputs, to_before, mask), reverse=True)
    return Flow(dhs, dzs)
