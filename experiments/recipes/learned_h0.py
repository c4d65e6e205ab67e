"""A learned initial state: all sequences start from one h_0, which is trained as the weights are.

`bptt` does not return the gradient with respect to h_0, but `jax.grad` of `sequence_loss` does.
Training takes any pytree of parameters, here the pair (Params, h_0).
Run: python -m experiments.recipes.learned_h0
"""

from functools import partial

import jax
import jax.numpy as jnp

import jaxrnn
from jaxrnn import Batch


def loss(theta, batch, h=None):
    """theta is (Params, h_0 (H,)), xs (T, *batch, I). Each sequence starts from h_0, not from h."""
    params, h_0 = theta
    h_0s = jnp.broadcast_to(h_0, (*batch.xs.shape[1:-1], *h_0.shape))
    return jaxrnn.sequence_loss(params, batch, h_0s)


gradient_fn = jax.value_and_grad(loss, has_aux=True)


def main() -> None:
    # The inputs are zero and the labels 1, 0, 1: only the state tells the steps apart.
    batch = Batch(jnp.zeros((3, 4, 1)), jnp.tile(jnp.array([[1], [0], [1]]), (1, 4)))
    theta = jaxrnn.init(jax.random.key(0), input_size=1, hidden_size=8, output_size=2), jnp.zeros(8)
    result = jaxrnn.fit(
        jax.random.key(1), theta, batch,
        optimizer=partial(jaxrnn.sgd, learning_rate=0.5), gradient_fn=gradient_fn,
    )  # fmt: skip
    print(f"loss: {loss(theta, batch)[0]:.3f} to {loss(result.best, batch)[0]:.3f}")


if __name__ == "__main__":
    main()
