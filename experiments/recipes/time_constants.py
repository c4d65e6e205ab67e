"""Learned time constants: alpha = dt / tau of each unit is trained as the weights are.

`bptt` gives no gradient with respect to the leak, but `jax.grad` of `sequence_loss` does, with the
weight gradients outside the loop over time. alpha = sigmoid(theta) keeps it in (0, 1).
Run: python -m experiments.recipes.time_constants
"""

import jax
import jax.numpy as jnp
import optax

import jaxrnn
from jaxrnn import Batch


def time_constants(theta):
    """tau / dt = 1 / alpha of each unit, (H,)."""
    return 1 / jax.nn.sigmoid(theta["logit"])


def loss(theta, batch, h=None):
    leak = jax.nn.sigmoid(theta["logit"])
    return jaxrnn.sequence_loss(theta["params"], batch, h, leak=leak)


gradient_fn = jax.value_and_grad(loss, has_aux=True)


def main() -> None:
    # Is the sum of all inputs so far positive? Fast units forget it.
    key_init, key_data, key_fit = jax.random.split(jax.random.key(0), 3)
    xs = jax.random.normal(key_data, (40, 256, 1))
    train = Batch(xs, (xs.cumsum(axis=0)[..., 0] > 0).astype(int))
    theta = {
        "params": jaxrnn.init(key_init, input_size=1, hidden_size=16, output_size=2),
        "logit": jnp.full(16, 1.0),
    }
    result = jaxrnn.fit(
        key_fit, theta, train, optimizer=optax.adam(2e-2), gradient_fn=gradient_fn,
        batch_size=32, max_epochs=15,
    )  # fmt: skip
    before, after = (float(time_constants(each).max()) for each in (theta, result.best))
    print(f"slowest unit: {before:.1f} to {after:.1f} steps")
    print("loss:", [round(epoch.train_loss, 3) for epoch in result.history])


if __name__ == "__main__":
    main()
