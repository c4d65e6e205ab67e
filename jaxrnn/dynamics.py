"""How the gradient flows back through time.

The gradient shrinks or grows with each step back, which is why plain recurrent networks are hard to
train (Hochreiter 1991; Bengio, Simard, Frasconi 1994).
"""

from typing import NamedTuple

from jax import Array

from jaxrnn.activations import Activation, tanh
from jaxrnn.backward import block_flow, block_output, block_states
from jaxrnn.batches import Batch, mean_weights
from jaxrnn.losses import Loss, check_loss_arguments, cross_entropy
from jaxrnn.params import AnyArray, Params, as_leak, at_least_float32
from jaxrnn.recurrence import initial_state
from jaxrnn.sharding import full_as, match_varying_axes


class Flow(NamedTuple):
    """dL/dh_t and dL/dz_t of each step.

    Attributes:
      dhs: dL/dh_t, (T, *batch, H), through the output of step t and through all later steps.
      dzs: dL/dz_t, (T, *batch, H); zeros where the mask is False.
    """

    dhs: Array
    dzs: Array


def gradient_flow(
    params: Params,
    batch: Batch,
    h_0: AnyArray | None = None,
    *,
    activation: Activation = tanh,
    leak: float | AnyArray | None = None,
    loss: Loss = cross_entropy,
) -> Flow:
    """dh_t and dz_t of every step, which `bptt` sums and discards (Werbos 1990).

        dh_t = W_y^T dy_t + W_h^T dz_{t+1}        dz_t = f'(z_t) * dh_t        dz_{T+1} = 0

    With a leak alpha, dz_t = alpha f'(z_t) * dh_t, and (1 - alpha) dh_{t+1} is added to dh_t.

    `jnp.linalg.norm(flow.dhs, axis=-1)` is the norm of the gradient at each step. With `weights`
    that count one step alone, it shows how far back the error of that step reaches.

    Args:
      params: Params.
      batch: Batch. Where its mask is False, dh_t is the gradient that passes the step.
      h_0: (*batch, H); zeros if None.
      activation: f.
      leak: alpha in (0, 1], a scalar or (H,); None is 1.
      loss: g and the loss l of a step; L is the mean over the steps that count.

    Returns:
      Flow, in the parameters' dtype. Float16 loses numbers below 6e-8, which long or wide batches
      have: use float32.

    Raises:
      TypeError, ValueError: a dtype, shape or setting does not fit; the message names the argument.

    >>> import jax, jax.numpy as jnp, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> batch = Batch(xs=jnp.ones((7, 4, 3)), targets=jnp.zeros((7, 4), int))
    >>> flow = gradient_flow(params, batch)
    >>> _, grads = jaxrnn.bptt(params, batch)
    >>> bool(jnp.allclose(flow.dzs.sum(axis=(0, 1)), grads.b_h, atol=1e-6))
    True
    """
    check_loss_arguments(params, batch, h_0, activation, leak, loss)
    h_0 = initial_state(params, batch.xs, h_0, (batch, leak))
    batch = batch._replace(weights=mean_weights(batch, at_least_float32(params.W_h.dtype)))
    leak = as_leak(params, leak)
    states = block_states(params, batch, h_0, activation, leak)
    dh_next = match_varying_axes(full_as(h_0, 0), h_0)  # dz_{T+1} = 0
    _, dhs_y, _ = block_output(params, batch, states[0], loss)
    _, dhs, dzs = block_flow(params, batch, h_0, states, dhs_y, dh_next, activation, leak)
    return Flow(dhs, dzs)
