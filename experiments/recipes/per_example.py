"""Per-example gradients, to measure influence, to clip each example, or for differential privacy.

`vmap` over the batch axis, which is always axis 1. `private_gradient` is a gradient function for
training; its noise is drawn from the key of the update, as in DP-SGD (Abadi et al. 2016).
Run: python -m experiments.recipes.per_example
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax

import jaxrnn
from jaxrnn import Batch


def per_example(params, batch):
    """The loss of each example, (N,), and its gradient, Params of leaves (N, ...)."""
    (values, _), grads = jax.vmap(jaxrnn.bptt, in_axes=(None, 1))(params, batch)
    return values, grads


def private_gradient(params, batch, h=None, *, key=None, norm=1.0, noise=0.0):
    """The loss of the batch, and the mean of the examples' gradients, each clipped to `norm`.

    The mean is over the N examples of which a step counts. Gaussian noise with the standard
    deviation noise * norm / N is added; without a key there is none.
    """
    values, grads = per_example(params, batch)
    weights = jnp.ones(batch.targets.shape[:2]) if batch.weights is None else batch.weights
    counted = weights if batch.mask is None else jnp.where(batch.mask, weights, 0)
    counts = counted.astype(values.dtype).sum(axis=0)
    N = jnp.maximum((counts > 0).sum(), 1)
    scale = norm / jnp.maximum(jax.vmap(optax.tree.norm)(grads), norm)
    grads = jax.tree.map(lambda leaf: jnp.tensordot(scale, leaf, 1) / N, grads)
    if key is not None:
        drawn = optax.tree.random_like(key, grads, jax.random.normal)
        grads = jax.tree.map(lambda d, n: d + noise * norm / N * n, grads, drawn)
    value = (counts * values).sum() / jnp.where(counts.any(), counts.sum(), 1)
    return (value, None), grads


def main() -> None:
    key_init, key_data, key_fit, key_noise = jax.random.split(jax.random.key(0), 4)
    xs = jax.random.normal(key_data, (10, 128, 1))
    batch = Batch(xs, (xs[..., 0].cumsum(axis=0) > 0).astype(int))
    params = jaxrnn.init(key_init, input_size=1, hidden_size=8, output_size=2)
    _, grads = jax.jit(per_example)(params, batch)
    norms = jax.vmap(optax.tree.norm)(grads)
    print(f"norms of the examples' gradients: {norms.min():.2f} to {norms.max():.2f}")
    result = jaxrnn.fit(
        key_fit, params, batch, optimizer=optax.adam(1e-2),
        gradient_fn=partial(private_gradient, norm=0.5, noise=1.0), gradient_key=key_noise,
        batch_size=32, max_epochs=10,
    )  # fmt: skip
    print("loss:", [round(epoch.valid_loss, 3) for epoch in result.history])


if __name__ == "__main__":
    main()
