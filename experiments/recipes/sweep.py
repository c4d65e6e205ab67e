"""A sweep over learning rates: the whole run is a function of the rate, mapped over rates.

`lax.map` runs them one after the other in one compiled call, `jax.vmap` side by side: which is
faster on a CPU is measured in experiments/recipes/ensemble.py.
Run: python -m experiments.recipes.sweep
"""

import jax
import jax.numpy as jnp
from jax import lax

import jaxrnn
from jaxrnn import Batch


def train(learning_rate, params, batch, updates):
    """The parameters after some updates, and the loss before each of them, (updates,)."""

    def update(params, _):
        (value, _), grads = jaxrnn.bptt(params, batch)
        return jaxrnn.sgd(params, grads, learning_rate), value

    return lax.scan(update, params, length=updates)


def main() -> None:
    key_init, key_data = jax.random.split(jax.random.key(0))
    bits = jax.random.bernoulli(key_data, 0.5, (8, 64, 1)).astype(float)
    batch = Batch(bits, bits[..., 0].cumsum(axis=0).astype(int) % 2)
    params = jaxrnn.init(key_init, input_size=1, hidden_size=16, output_size=2)
    rates = jnp.logspace(-2, 1, 7)
    _, values = jax.jit(lambda rates: lax.map(lambda eta: train(eta, params, batch, 200), rates))(
        rates
    )
    for rate, value in zip(rates, values[:, -1], strict=True):
        print(f"learning rate {rate:6.3f}: loss {value:.3f}")


if __name__ == "__main__":
    main()
