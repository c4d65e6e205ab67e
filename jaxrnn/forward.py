"""2. The forward pass: one step, all steps, the loss.

`step` under `lax.scan` is the specification. `hidden_states` computes the same with every product
that is not sequential taken out of the loop over time, in the forward pass and in the gradient that
autodiff derives from it.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import checks
from jaxrnn.activations import Activation, check_activation, has_traced_values, tanh
from jaxrnn.batches import Batch, check_sequence, check_step, where_exists
from jaxrnn.losses import Loss, check_loss_arguments, cross_entropy, mean_loss
from jaxrnn.params import AnyArray, Params, as_leak, check_leak, check_params, state_dtype
from jaxrnn.products import input_zs, readout
from jaxrnn.recurrence import Loop, hoisted_recur, initial_state, leaky, recur, scan


def step(
    params: Params,
    h: AnyArray,
    x: AnyArray,
    *,
    activation: Activation = tanh,
    leak: float | AnyArray | None = None,
    drive: AnyArray | None = None,
) -> tuple[Array, Array]:
    """One step of the network (Elman 1990).

        z_t = W_x x_t + W_h h_{t-1} + b_h + drive_t
        h_t = (1 - alpha) h_{t-1} + alpha f(z_t)        y_t = W_y h_t + b_y

    Without a leak, alpha is 1 and h_t = f(z_t). With alpha = dt / tau these are the units of a rate
    network, with time constant tau and time step dt.

    A plain scan over it, `lax.scan(lambda h, x: step(params, h, x), h_0, xs)`, is the
    specification of `unroll`.

    Args:
      params: Params.
      h: h_{t-1}, (*batch, H).
      x: x_t, (*batch, I), or an integer token (*batch,).
      activation: f.
      leak: alpha in (0, 1], a scalar or (H,); None is 1.
      drive: drive_t, (*batch, H); None is 0.

    Returns:
      h_t (*batch, H) and y_t (*batch, O), in the parameters' dtype.

    Raises:
      TypeError, ValueError: a dtype, shape or setting does not fit; the message names the argument.

    >>> import jax, jax.numpy as jnp, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> h, y = step(params, jnp.zeros(5), jnp.ones(3))
    >>> h.shape, y.shape
    ((5,), (2,))
    """
    check_params(params)
    check_activation(activation, params.W_h.dtype)
    check_leak(leak, params)
    check_step(params, h, x, drive)
    h = jnp.asarray(h, state_dtype(params))
    z = input_zs(params, x, drive) + h @ params.W_h.T
    h = leaky(as_leak(params, leak), h, activation.f(z))
    return h, readout(params, h)


def hidden_states(
    params: Params,
    xs: AnyArray,
    h_0: AnyArray | None = None,
    *,
    activation: Activation = tanh,
    leak: float | AnyArray | None = None,
    drive: AnyArray | None = None,
    mask: AnyArray | None = None,
    reset: AnyArray | None = None,
    loop: Loop = scan,
) -> tuple[Array, Array]:
    """The hidden states of all steps.

        z_t = W_x x_t + W_h h_{t-1} + b_h + drive_t
        h_t = (1 - alpha) h_{t-1} + alpha f(z_t)

    Args:
      params: Params.
      xs: (T, *batch, I), or integer tokens (T, *batch). Integers of three axes or more may be
        ambiguous: h_0, drive, a mask or a reset that fits tokens shows that they are tokens.
      h_0: (*batch, H); zeros if None.
      activation: f.
      leak: alpha in (0, 1], a scalar or (H,), such as dt / tau; None is 1, and h_t = f(z_t). In 16
        bits 1 - alpha has few digits: with a small alpha, use parameters in float32.
      drive: (T, *batch, H), added to z_t: noise, a perturbation, an embedding; None is 0.
      mask: (T, *batch) bool, True where step t exists; elsewhere the state is held, and xs and
        drive are not read. If None, every step exists.
      reset: (T, *batch) bool, True where h_{t-1} is replaced by zeros before step t. Ignored where
        the mask is False. If None, there is no reset.
      loop: what runs the steps, such as `kernels.loop`.

    Returns:
      h_T (*batch, H), the state after the last step that exists, and hs (T, *batch, H), zeros where
      the mask is False. h_T is h_0 if no step exists.

    Raises:
      TypeError, ValueError: a dtype, shape or setting does not fit; the message names the argument.

    >>> import jax, jax.numpy as jnp, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> h_T, hs = hidden_states(params, jnp.ones((7, 4, 3)))
    >>> hs.shape, bool((hs[-1] == h_T).all())
    ((7, 4, 5), True)
    """
    check_params(params)
    check_activation(activation, params.W_h.dtype)
    check_leak(leak, params)
    check_sequence(params, xs, h_0, drive, mask, reset)
    checks.check_function("loop", loop)
    h_0 = initial_state(params, xs, h_0, (xs, drive, mask, reset, leak))
    zs_x = input_zs(params, xs, drive, mask)
    # The custom rule has no gradient for values closed over by the activation; autodiff has one.
    arguments = activation, params.W_h, zs_x, h_0, as_leak(params, leak), mask, reset
    traced = has_traced_values(activation.f, jax.ShapeDtypeStruct((1, 2), params.W_h.dtype))
    hs = recur(*arguments, loop)[0] if traced else hoisted_recur(loop, *arguments)
    h_T = hs[-1] if hs.shape[0] else h_0
    return h_T, where_exists(mask, hs)


def unroll(
    params: Params,
    xs: AnyArray,
    h_0: AnyArray | None = None,
    *,
    activation: Activation = tanh,
    leak: float | AnyArray | None = None,
    drive: AnyArray | None = None,
    mask: AnyArray | None = None,
    reset: AnyArray | None = None,
    loop: Loop = scan,
) -> tuple[Array, Array]:
    """The outputs of all steps, before g.

        z_t = W_x x_t + W_h h_{t-1} + b_h + drive_t
        h_t = (1 - alpha) h_{t-1} + alpha f(z_t)        y_t = W_y h_t + b_y

    The arguments and errors are those of `hidden_states`.

    Returns:
      h_T (*batch, H), and ys (T, *batch, O), zeros where the mask is False.

    >>> import jax, jax.numpy as jnp, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> xs = jnp.ones((7, 4, 3))
    >>> h_T, ys = unroll(params, xs)
    >>> _, plain = jax.lax.scan(lambda h, x: step(params, h, x), jnp.zeros((4, 5)), xs)
    >>> bool(jnp.allclose(ys, plain, atol=1e-6))
    True
    """
    h_T, hs = hidden_states(
        params,
        xs,
        h_0,
        activation=activation,
        leak=leak,
        drive=drive,
        mask=mask,
        reset=reset,
        loop=loop,
    )
    return h_T, where_exists(mask, readout(params, hs))


def sequence_loss(
    params: Params,
    batch: Batch,
    h_0: AnyArray | None = None,
    *,
    activation: Activation = tanh,
    leak: float | AnyArray | None = None,
    loss: Loss = cross_entropy,
    loop: Loop = scan,
) -> tuple[Array, Array]:
    """The mean loss over the steps that count, and the last state.

        L = sum_t weights_t mask_t l(y_t, target_t) / sum_t weights_t mask_t

    over steps and batch; 0 where no step counts. It is differentiable with respect to every
    floating-point argument, in forward and reverse mode. On a CPU, `bptt` usually returns its value
    and gradient faster and in less memory.

    Args:
      params: Params.
      batch: Batch.
      h_0: (*batch, H); zeros if None.
      activation: f.
      leak: alpha in (0, 1], a scalar or (H,); None is 1.
      loss: g and the loss l of a step.
      loop: what runs the steps, such as `kernels.loop`. Autodiff's loop back in time is a scan.

    Returns:
      L, a scalar, in float32 at least, and h_T (*batch, H).

    Raises:
      TypeError, ValueError: a dtype, shape or setting does not fit; the message names the argument.

    >>> import jax, jax.numpy as jnp, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> batch = Batch(xs=jnp.ones((7, 4, 3)), targets=jnp.zeros((7, 4), int))
    >>> value, h_T = sequence_loss(params, batch)
    >>> value.shape, h_T.shape
    ((), (4, 5))
    """
    check_loss_arguments(params, batch, h_0, activation, leak, loss)
    h_0 = initial_state(params, batch.xs, h_0, (batch, leak))  # its shape tells tokens apart
    h_T, hs = hidden_states(
        params,
        batch.xs,
        h_0,
        activation=activation,
        leak=leak,
        drive=batch.drive,
        mask=batch.mask,
        reset=batch.reset,
        loop=loop,
    )
    return mean_loss(readout(params, hs), batch, loss), h_T
