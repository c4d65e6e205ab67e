"""Per-example gradients, for influence, clipping each example, or differential privacy.

`vmap` over the batch axis, which comes second everywhere.
Run: python -m experiments.recipes.per_example
"""

import jax
import jax.numpy as jnp

import jaxrnn
from jaxrnn import Batch


def per_example(params, batch):
    """Losses (N,) and gradients, Params of leaves (N, ...), each by its own example alone."""
    (values, _), grads = jax.vmap(jaxrnn.bptt, in_axes=(None, 1))(params, batch)
    return values, grads


def clipped_gradient(params, batch, norm):
    """The mean of the examples' gradients, none of them longer than `norm`."""
    _, grads = per_example(params, batch)
    squares = [(leaf**2).reshape(len(leaf), -1).sum(axis=1) for leaf in grads]
    scale = norm / jnp.maximum(jnp.sqrt(jnp.stack(squares).sum(axis=0)), norm)
    return jax.tree.map(lambda leaf: jnp.tensordot(scale, leaf, 1) / len(scale), grads)


def main() -> None:
    params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    xs = jax.random.normal(jax.random.key(1), (7, 4, 3))
    values, grads = jax.jit(per_example)(params, Batch(xs, jnp.zeros((7, 4), int)))
    print(values, jnp.linalg.norm(grads.W_h, axis=(1, 2)))


if __name__ == "__main__":
    main()
