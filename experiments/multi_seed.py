"""Several seeds trained at once: `vmap` over them, and each device has its share of them.

Nothing is communicated between seeds, so the cores of a CPU, as devices, run them side by side.
"""

import contextlib
import os

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def use_all_cores() -> None:
    """Makes each core of the CPU a device; where JAX is in use already, it stays as it is."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", os.cpu_count())


def share_out(tree):
    """Splits the first axis of every leaf, the seeds, over as many devices as divide it.

    What is computed from it by `jit(vmap(function))` stays split likewise.
    """
    seeds = jax.tree.leaves(tree)[0].shape[0]
    count = max(n for n in range(1, len(jax.devices()) + 1) if seeds % n == 0)
    mesh = Mesh(jax.devices()[:count], "seeds")
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("seeds")))
