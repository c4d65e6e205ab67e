"""A sweep over learning rates: a run is a function of the rate, and is mapped over rates.

Inside `jit`, `vmap` and `scan` the update of `make_update` is an ordinary function, so the rate may
be traced. `lax.map` trains one rate after the other in one compiled call, `jax.vmap` all at once:
experiments/recipes/ensemble.py measures which is faster on a CPU.
Run: python -m experiments.recipes.sweep
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

import jaxrnn
from jaxrnn import Batch


def train(learning_rate, params, batch, updates):
    """The parameters after some updates, and the loss before each update, (updates,)."""
    rule = partial(jaxrnn.sgd, learning_rate=learning_rate)
    update = jaxrnn.make_update(jaxrnn.bptt, rule)
    state = jaxrnn.init_state(params, rule)
    state, metrics = lax.scan(lambda state, _: update(state, batch), state, length=updates)
    return state.params, metrics.loss


def main() -> None:
    key_init, key_data = jax.random.split(jax.random.key(0))
    bits = jax.random.bernoulli(key_data, 0.5, (8, 64, 1)).astype(float)
    batch = Batch(bits, bits[..., 0].cumsum(axis=0).astype(int) % 2)
    params = jaxrnn.init(key_init, input_size=1, hidden_size=16, output_size=2)
    rates = jnp.logspace(-2, 1, 7)
    train_one = partial(train, params=params, batch=batch, updates=200)
    _, losses = jax.jit(partial(lax.map, train_one))(rates)
    for rate, loss in zip(rates, losses[:, -1], strict=True):
        print(f"learning rate {rate:6.3f}: loss {loss:.3f}")


if __name__ == "__main__":
    main()
