"""Learning forward in time: gradients without a pass back over the sequence.

    dtheta = sum_t dh_t^T J_t        dh_t = W_y^T dy_t        J_t = dh_t / dtheta

The influence J_t of the parameters on the state is carried beside the state, so memory does not
grow with T, and the parameters may change while a stream runs. `rtrl` carries J_t whole, `snap1`
its diagonal, `uoro` a random matrix of rank one; see influence.py.
"""

from jax import Array

from jaxrnn.activations import Activation, tanh
from jaxrnn.backward import bptt
from jaxrnn.batches import Batch
from jaxrnn.influence import Influence, diagonal, full, rank_one
from jaxrnn.losses import Loss, check_loss_arguments, cross_entropy
from jaxrnn.params import AnyArray, Params
from jaxrnn.recurrence import initial_state
from jaxrnn.streams import start_stream, stream_gradient

__all__ = ["rtrl", "snap1", "uoro"]


def sequence_gradient(
    params: Params,
    batch: Batch,
    h_0: AnyArray | None,
    influence: Influence,
    activation: Activation,
    leak: float | AnyArray | None,
    loss: Loss,
    key: Array | None = None,
) -> tuple[tuple[Array, Array], Params]:
    """The gradient over a whole sequence: a stream that starts at h_0."""
    check_loss_arguments(params, batch, h_0, activation, leak, loss)
    h_0 = initial_state(params, batch.xs, h_0, (batch, leak))
    start = start_stream(params, h_0, influence)
    (value, stream), grads = stream_gradient(
        params, batch, start, influence=influence, key=key,
        activation=activation, leak=leak, loss=loss,
    )  # fmt: skip
    return (value, stream.h), grads


def rtrl(
    params: Params,
    batch: Batch,
    h_0: AnyArray | None = None,
    *,
    activation: Activation = tanh,
    leak: float | AnyArray | None = None,
    loss: Loss = cross_entropy,
) -> tuple[tuple[Array, Array], Params]:
    """The gradient by real-time recurrent learning (Williams and Zipser 1989).

        J_t = (1 - alpha) J_{t-1} + alpha f'(z_t) * (W_h J_{t-1} + dz_t / dtheta)
        dtheta = sum_t dh_t^T J_t        dh_t = W_y^T dy_t

    The result is that of `bptt`, to rounding, in one pass forward. J_t is (*batch, H, N, H) with
    N = I + H + 1: O(B H^2 N) memory, whatever T is, and O(T B H^3 N) time, where `bptt` takes
    O(T B H) memory and O(T B H N) time. With many tokens, I is large.

    The arguments and errors are those of `bptt`, without `checkpoint_every` and `loop`. To update
    the parameters while a stream runs, use `streams.stream_gradient`.

    Returns:
      (L, h_T), grads, as `bptt`.

    >>> import jax, jax.numpy as jnp, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> batch = Batch(xs=jnp.ones((7, 4, 3)), targets=jnp.zeros((7, 4), int))
    >>> (value, h_T), grads = rtrl(params, batch)
    >>> bool(jnp.allclose(grads.W_h, jaxrnn.bptt(params, batch)[1].W_h, atol=1e-6))
    True
    """
    return sequence_gradient(params, batch, h_0, full, activation, leak, loss)


def snap1(
    params: Params,
    batch: Batch,
    h_0: AnyArray | None = None,
    *,
    activation: Activation = tanh,
    leak: float | AnyArray | None = None,
    loss: Loss = cross_entropy,
) -> tuple[tuple[Array, Array], Params]:
    """The diagonal approximation of `rtrl`, SnAp-1 (Menick et al. 2021).

        D_t = (1 - alpha) D_{t-1} + alpha f'(z_t) * (diag(W_h) D_{t-1} + u_t^T)
        dtheta = sum_t diag(dh_t) D_t        theta = [W_x W_h b_h]        u_t = [x_t; h_{t-1}; 1]

    D_t (*batch, H, N) holds dh_j / dtheta_jn: what the weights into unit j do to unit j itself. It
    leaves out what they do to other units, and through these to unit j later. So it is exact if W_h
    is diagonal; else dW_x, dW_h and db_h are biased, and dW_y and db_y exact. O(B H N) memory and
    O(T B H N) time, as a forward pass.

    The arguments, errors and results are those of `rtrl`.

    >>> import jax, jax.numpy as jnp, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), 3, 5, 2, W_h_init=jaxrnn.scaled_identity(0.9))
    >>> batch = Batch(xs=jnp.ones((7, 4, 3)), targets=jnp.zeros((7, 4), int))
    >>> (value, h_T), grads = snap1(params, batch)
    >>> bool(jnp.allclose(grads.W_h, jaxrnn.bptt(params, batch)[1].W_h, atol=1e-6))
    True
    """
    return sequence_gradient(params, batch, h_0, diagonal, activation, leak, loss)


def uoro(
    params: Params,
    batch: Batch,
    h_0: AnyArray | None = None,
    *,
    key: Array | None = None,
    activation: Activation = tanh,
    leak: float | AnyArray | None = None,
    loss: Loss = cross_entropy,
) -> tuple[tuple[Array, Array], Params]:
    """A random gradient whose mean over keys is the gradient: UORO (Tallec and Ollivier 2018).

        a_t = rho_t A_t a_{t-1} + sigma_t nu_t        A_t = (1 - alpha) + alpha f'(z_t) * W_h
        b_t = b_{t-1} / rho_t + nu_t^T D_t / sigma_t  D_t = alpha f'(z_t) * dz_t / dtheta
        dtheta = sum_t (dh_t^T a_t) b_t

    With random signs nu_t, a_t b_t, a column times a row, is J_t in the mean; rho_t and sigma_t,
    which give both factors of a product the same norm, keep its variance small. The variance of the
    gradient grows with the number of units and of steps. O(B H N) memory and O(T B H N) time, as a
    forward pass.

    The other arguments and the errors are those of `rtrl`.

    Args:
      key: a key from `jax.random.key`. Training passes one for each update: `init_state(..., key=)`
        or `fit(..., gradient_key=)`. If None, the gradient is the mean over keys, by `bptt`.

    Returns:
      (L, h_T), grads. L and h_T are not random, nor are dW_y and db_y.

    >>> import jax, jax.numpy as jnp, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> batch = Batch(xs=jnp.ones((7, 4, 3)), targets=jnp.zeros((7, 4), int))
    >>> keys = jax.random.split(jax.random.key(1), 2000)
    >>> grads = jax.vmap(lambda key: uoro(params, batch, key=key)[1])(keys)
    >>> error = grads.W_h.mean(0) - jaxrnn.bptt(params, batch)[1].W_h
    >>> bool((abs(error) < 4 * grads.W_h.std(0) / 2000**0.5).all())
    True
    """
    if key is None:
        return bptt(params, batch, h_0, activation=activation, leak=leak, loss=loss)
    return sequence_gradient(params, batch, h_0, rank_one, activation, leak, loss, key)
