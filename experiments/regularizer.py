"""The vanishing-gradient regulariser of Pascanu, Mikolov and Bengio (2013), section 3.3."""

import jax.numpy as jnp
from jax import Array, lax

import jaxrnn
from jaxrnn import Activation, Batch, Loss, Params, cross_entropy, tanh

NOTHING = 1e-20
"""|dL/dh|^2 below which there is no gradient whose norm could be kept."""


def regularizer(
    params: Params,
    batch: Batch,
    h_0: Array | None = None,
    *,
    activation: Activation = tanh,
    loss: Loss = cross_entropy,
) -> Array:
    """Omega, which asks that the gradient keep its norm on its way back through each step.

        Omega = mean_t ( |W_h^T dz_{t+1}|^2 / |dh_{t+1}|^2 - 1 )^2

    over the steps that exist and that a gradient reaches. An ordinary function to be added to the
    loss: `jax.grad` of it goes to W_h alone, where it is written; dz and dh count as given, as in
    the paper, whose authors' code squares the norms too.

    >>> params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    >>> batch = Batch(jnp.ones((7, 4, 3)), jnp.zeros((7, 4), int))
    >>> [name for name, d in jax.grad(regularizer)(params, batch)._asdict().items() if d.any()]
    ['W_h']
    """
    given = lax.stop_gradient(params)
    dhs, dzs = jaxrnn.gradient_flow(given, batch, h_0, activation=activation, loss=loss)
    before = ((dzs[1:] @ params.W_h) ** 2).sum(axis=-1)
    after = (dhs[1:] ** 2).sum(axis=-1)
    counts = after > NOTHING
    if batch.mask is not None:
        counts &= batch.mask[1:]
    if batch.reset is not None:
        counts &= ~batch.reset[1:]
    ratios = jnp.where(counts, before / jnp.where(counts, after, 1), 1)
    return ((ratios - 1) ** 2).sum() / jnp.maximum(1, counts.sum())
