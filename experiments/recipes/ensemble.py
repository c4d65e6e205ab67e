"""An ensemble: 64 seeds trained in one compiled call."""

import jax
import jax.numpy as jnp
import optax
from jax import lax

import jaxrnn
from jaxrnn import Batch

SEEDS, T, B, H = 64, 50, 16, 32
optimizer = optax.adam(1e-2)


def train(key, batch, updates):
    """One run, a function of its seed: parameters, and the loss before each update."""
    params = jaxrnn.init(key, batch.xs.shape[-1], H, 2)

    def update(state, _):
        params, opt_state = state
        (value, _), grads = jaxrnn.bptt(params, batch)
        changes, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, changes), opt_state), value

    (params, _), values = lax.scan(update, (params, optimizer.init(params)), length=updates)
    return params, values


def train_all(keys, batch, updates):
    """The same for all keys, one after the other."""
    return lax.map(lambda key: train(key, batch, updates), keys)


def main() -> None:
    bits = jax.random.bernoulli(jax.random.key(0), 0.5, (T, B, 1)).astype(float)
    batch = Batch(bits, bits[..., 0].cumsum(axis=0).astype(int) % 2)
    keys = jax.random.split(jax.random.key(1), SEEDS)
    _, values = jax.jit(train_all, static_argnums=2)(keys, batch, 100)
    last = values[:, -1]
    print(f"loss after 100 updates: {last.mean():.3f}, {last.min():.3f} to {last.max():.3f}")


if __name__ == "__main__":
    main()
