"""The Jacobian of a step, and how perturbations of the state grow and shrink over many.

    z_t = W_x x_t + W_h h_{t-1} + b_h        h_t = (1 - alpha) h_{t-1} + alpha f(z_t)
    J_t = dh_t/dh_{t-1} = diag(1 - alpha) + diag(alpha f'(z_t)) W_h

Autodiff takes f', so f may be any elementwise function.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxrnn import checks
from jaxrnn.activations import Activation, autodiff_f_prime, check_activation, tanh
from jaxrnn.batches import check_sequence, check_step
from jaxrnn.forward import hidden_states
from jaxrnn.params import AnyArray, Params, as_leak, check_leak, check_params, state_dtype
from jaxrnn.products import input_zs, per_unit
from jaxrnn.recurrence import initial_state, previous
from jaxrnn.sharding import full_as, match_varying_axes, split_automatically


def jacobian(
    params: Params,
    h: AnyArray,
    x: AnyArray,
    *,
    activation: Activation = tanh,
    leak: float | AnyArray | None = None,
    drive: AnyArray | None = None,
) -> Array:
    """The derivative of the next state F(h, x) with respect to the state, dF/dh at any states h.

        J = diag(1 - alpha) + diag(alpha f'(z)) W_h        z = W_x x + W_h h + b_h + drive

    The Jacobians along a trajectory without mask and reset, one for each step, are
    `jacobian(params, jnp.concatenate([h_0[None], hs[:-1]]), xs)`.

    Args:
      params: Params.
      h: the states before the step, (*batch, H).
      x: (*batch, I), or integer tokens (*batch,).
      activation: f.
      leak: alpha in (0, 1], a scalar or (H,); None is 1.
      drive: (*batch, H), or None.

    Returns:
      (*batch, H, H), in the parameters' dtype; row i is the derivative of unit i of the next state.

    Raises:
      TypeError, ValueError: a dtype, shape or setting does not fit; the message names the argument.

    >>> import jax, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> J = jacobian(params, jnp.zeros(5), jnp.zeros(3))
    >>> bool(jnp.allclose(J, params.W_h))  # tanh'(0) = 1
    True
    """
    check_params(params)
    check_activation(activation, params.W_h.dtype)
    check_leak(leak, params)
    check_step(params, h, x, drive)
    h = jnp.asarray(h, state_dtype(params))
    z_x = input_zs(params, x, drive)
    return state_jacobian(activation, params.W_h, z_x, h, as_leak(params, leak))


def state_jacobian(
    activation: Activation, W_h: Array, z_x: Array, h: Array, leak: Array | None
) -> Array:
    """J at the states h (*batch, H), where z_x is W_x x + b_h."""
    z = z_x + h @ W_h.T
    f_prime = autodiff_f_prime(activation.f, z)[..., None]
    J: Array = f_prime * per_unit(W_h, f_prime)  # diag(f') W_h
    if leak is None:
        return J
    alpha = per_unit(jnp.atleast_1d(leak)[:, None], J)
    return (1 - alpha) * per_unit(jnp.eye(h.shape[-1], dtype=W_h.dtype), J) + alpha * J


def check_factorised_dtype(params: Params) -> None:
    """Raises TypeError unless the parameters are float32 or float64, as factorisations need."""
    if params.W_h.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"params: expected float32 or float64, got {params.W_h.dtype}")


def jacobian_products(Js: AnyArray) -> Array:
    """How a perturbation of the state after step t reaches the last step: dh_T/dh_t.

        dh_T/dh_t = J_T J_{T-1} ... J_{t+1}        dh_T/dh_T = identity

    The singular values of dh_T/dh_t are the factors by which perturbations grow or shrink (Pascanu,
    Mikolov, Bengio 2013). The product of many Jacobians overflows or collapses to one direction:
    for growth per step over many steps there is `lyapunov_exponents`.

    Args:
      Js: J_1 ... J_T, (T, *batch, H, H).

    Returns:
      dh_T/dh_t for t = 0 ... T, (T + 1, *batch, H, H).

    Raises:
      TypeError, ValueError: Js is not an array of square matrices with a time axis in front.

    >>> products = jacobian_products(jnp.array([[[2.0]], [[3.0]], [[5.0]]]))
    >>> products.ravel().tolist()
    [30.0, 15.0, 5.0, 1.0]
    """
    checks.check_float_array("Js", Js)
    if Js.ndim < 3 or Js.shape[-2] != Js.shape[-1]:
        raise ValueError(f"Js: expected shape (T, *batch, H, H), got {Js.shape}")
    Js = jnp.asarray(Js)

    def body(product: Array, J: Array) -> tuple[Array, Array]:
        return product @ J, product

    first, products = lax.scan(body, identities(Js.sum(axis=0)), Js, reverse=True)
    return jnp.concatenate([first[None], products])


def lyapunov_exponents(
    params: Params,
    xs: AnyArray,
    h_0: AnyArray | None = None,
    *,
    activation: Activation = tanh,
    leak: float | AnyArray | None = None,
    drive: AnyArray | None = None,
) -> Array:
    """The mean growth per step, in nats, of perturbations of the state along a trajectory.

        Q_t R_t = J_t Q_{t-1}        exponents = mean_t log |diag R_t|

    The QR factorisation at each step keeps the directions apart (Benettin et al. 1980; for
    recurrent networks Engelken, Wolf, Abbott 2023). Q_0 is a dense orthogonal matrix: from the
    identity, an inactive unit could hide a direction that grows. A largest exponent
    below 0 means that nearby trajectories with the same inputs meet; above 0 that they separate. A
    transient is left out by starting from the h_T that it ends with. The directions start from
    those of Q_0, which adds an error of order 1/T.

    Args:
      params: Params.
      xs: (T, *batch, I), or integer tokens (T, *batch), with T at least 1.
      h_0: (*batch, H); zeros if None.
      activation: f.
      leak: alpha in (0, 1], a scalar or (H,); None is 1.
      drive: (T, *batch, H), added to z_t; None is 0.

    Returns:
      (*batch, H), largest first, in the parameters' dtype. Where J_t is singular, a step
      adds -inf to the last ones, or by rounding about the logarithm of the dtype's eps.

    Raises:
      TypeError, ValueError: a dtype or shape does not fit, or there is no step; the message names
        the argument.

    >>> import jax, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> bool((lyapunov_exponents(params, jnp.ones((100, 3))) < 0).all())
    True
    """
    check_params(params)
    check_factorised_dtype(params)
    check_activation(activation, params.W_h.dtype)
    check_leak(leak, params)
    check_sequence(params, xs, h_0, drive, None, None)
    if xs.shape[0] == 0:
        raise ValueError(f"xs: expected at least 1 step, got shape {xs.shape}")
    h_0 = initial_state(params, xs, h_0, (xs, drive, leak))
    _, hs = hidden_states(params, xs, h_0, activation=activation, leak=leak, drive=drive)

    def factorised(A: Array) -> tuple[Array, Array]:
        Q, R = jnp.linalg.qr(A)
        return Q, jnp.log(jnp.abs(jnp.diagonal(R, axis1=-2, axis2=-1)))

    def body(Q: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        A = state_jacobian(activation, params.W_h, *inputs, as_leak(params, leak)) @ Q
        # JAX has no rule for the QR factorisation of arrays whose sharding is explicit.
        return split_automatically(factorised, (A, h_0))(A)

    Q_0 = identities(h_0[..., None] * h_0[..., None, :]) @ dense_basis(h_0)
    _, growth = lax.scan(body, Q_0, (input_zs(params, xs, drive), previous(hs, h_0, None, None)))
    return jnp.sort(growth.mean(axis=0), axis=-1)[..., ::-1]


def dense_basis(h: Array) -> Array:
    """An orthogonal matrix (H, H) whose leading columns are independent in any set of units."""
    H = h.shape[-1]
    return jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(H, H)))[0], h.dtype)


def identities(like: Array) -> Array:
    """Identity matrices in the shape of `like` (*batch, H, H), split and varying as they are."""
    zeros = match_varying_axes(full_as(like, 0), like)
    return zeros + per_unit(jnp.eye(like.shape[-1], dtype=like.dtype), zeros)
