"""An ensemble: 64 seeds trained in one compiled call, each as if it had been trained alone.

`lax.map` runs the seeds of a device one after the other, `shard_map` the devices side by side; for
a CPU's cores set `jax_num_cpu_devices` before anything else. `vmap` instead makes 64 products of
(16, 32) and (32, 32) at every step, which XLA runs on a CPU no faster than one after the other;
under `shard_map` on two CPU devices, `vmap` of `init`, with its QR factorisation, hung.

Milliseconds for one update of all 64, minimum / median of 11, interleaved; H 32, T 50, B 16,
float32, 2 CPU cores (AMD EPYC), JAX 0.10.2, 2026-11-23:

    updates in a call    64 calls       vmap           lax.map        this, on two devices
    1                    15.2 / 15.7    16.1 / 18.9    11.4 / 11.7    5.6 / 5.7
    20                    9.9 / 10.2     8.7 / 9.0      9.6 / 9.7     4.5 / 4.6

Run: python -m experiments.recipes.ensemble
"""

from functools import partial

import jax
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import jaxrnn
from jaxrnn import Batch

SEEDS, T, B, H = 64, 50, 16, 32
optimizer = optax.adam(1e-2)
update = jaxrnn.make_update(jaxrnn.bptt, optimizer)


def train(batch, updates, key):
    """One run as a function of its key: the parameters, and the loss before each update."""
    params = jaxrnn.init(key, batch.xs.shape[-1], H, 2)
    state = jaxrnn.init_state(params, optimizer)
    state, metrics = lax.scan(lambda state, _: update(state, batch), state, length=updates)
    return state.params, metrics.loss


def train_all(batch, updates, keys, devices):
    """The same for all keys; their number is a multiple of the devices'."""
    seeds = PartitionSpec("seeds")
    # Nothing is communicated, so there is nothing to check of what varies between devices.
    return jax.shard_map(
        partial(lax.map, partial(train, batch, updates)),
        mesh=Mesh(devices, "seeds"), in_specs=seeds, out_specs=seeds, check_vma=False,
    )(keys)  # fmt: skip


def main() -> None:
    bits = jax.random.bernoulli(jax.random.key(0), 0.5, (T, B, 1)).astype(float)
    batch = Batch(bits, bits[..., 0].cumsum(axis=0).astype(int) % 2)
    keys = jax.random.split(jax.random.key(1), SEEDS)
    _, values = jax.jit(partial(train_all, batch, 10, devices=jax.devices()))(keys)
    last = values[:, -1]
    print(f"loss after 10 updates: {last.mean():.3f}, {last.min():.3f} to {last.max():.3f}")


if __name__ == "__main__":
    main()
