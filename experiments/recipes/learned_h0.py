"""A learned initial state: one h_0 (H,) for all sequences, a parameter like the others.

`bptt` gives no gradient by h_0; `sequence_loss` is differentiable by all of its arguments.
Run: python -m experiments.recipes.learned_h0
"""

import jax
import jax.numpy as jnp

import jaxrnn
from jaxrnn import Batch


def loss(theta, batch):
    """theta: (Params, h_0); h_0 is repeated for each sequence of the batch."""
    params, h_0 = theta
    h_0s = jnp.broadcast_to(h_0, (batch.xs.shape[1], *h_0.shape))
    return jaxrnn.sequence_loss(params, batch, h_0s)[0]


def main() -> None:
    # The first output is wanted before the state has seen anything that tells it.
    batch = Batch(jnp.zeros((3, 4, 1)), jnp.tile(jnp.array([[1], [0], [1]]), (1, 4)))
    theta = jaxrnn.init(jax.random.key(0), input_size=1, hidden_size=8, output_size=2), jnp.zeros(8)
    update = jax.jit(lambda theta: jaxrnn.sgd(theta, jax.grad(loss)(theta, batch), 0.5))
    print("before:", loss(theta, batch))
    for _ in range(100):
        theta = update(theta)
    print("after: ", loss(theta, batch))


if __name__ == "__main__":
    main()
