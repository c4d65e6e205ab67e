"""The vanishing-gradient regulariser of Pascanu, Mikolov and Bengio (2013), section 3.3."""

import jax.numpy as jnp
from jax import Array, lax

import jaxrnn
from jaxrnn import Activation, Batch, Loss, Params, cross_entropy, tanh

VANISHED = 1e-20
"""|dL/dh|^2 up to which a gradient counts as vanished, and its step is left out."""


def regularizer(
    params: Params,
    batch: Batch,
    h_0: Array | None = None,
    *,
    activation: Activation = tanh,
    loss: Loss = cross_entropy,
) -> Array:
    """Omega, which is zero if the gradient keeps its norm on its way back through each step.

        Omega = mean_t ( |W_h^T dz_{t+1}|^2 / |dh_{t+1}|^2 - 1 )^2

    over the steps that exist and whose gradient has not vanished. It is added to the loss. As in
    the paper, dz and dh are constants, so its derivative is nonzero for the W_h of the equation
    only. The squares of the norms are those of the authors' code.

    The arguments are those of `jaxrnn.sequence_loss`.

    >>> params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    >>> batch = Batch(jnp.ones((7, 4, 3)), jnp.zeros((7, 4), int))
    >>> [name for name, d in jax.grad(regularizer)(params, batch)._asdict().items() if d.any()]
    ['W_h']
    """
    constant = lax.stop_gradient(params)
    dhs, dzs = jaxrnn.gradient_flow(constant, batch, h_0, activation=activation, loss=loss)
    squares_back = ((dzs[1:] @ params.W_h) ** 2).sum(axis=-1)  # |W_h^T dz_{t+1}|^2
    squares = (dhs[1:] ** 2).sum(axis=-1)  # |dh_{t+1}|^2
    counts = squares > VANISHED
    if batch.mask is not None:
        counts &= batch.mask[1:]
    if batch.reset is not None:
        counts &= ~batch.reset[1:]
    ratios = jnp.where(counts, squares_back / jnp.where(counts, squares, 1), 1)
    return ((ratios - 1) ** 2).sum() / jnp.maximum(1, counts.sum())
