"""Many networks trained at once: `jit(vmap(...))` over seeds, sharded over the devices.

Seeds do not communicate, so the cores of a CPU, one device each, train them side by side.
"""

import contextlib
import os

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike


def use_all_cores() -> None:
    """Makes each core of the CPU a device, unless JAX has started already."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", os.cpu_count())


def shard_seeds(tree):
    """Shards the first axis of every leaf, the seeds, over as many devices as divide it.

    The results of `jit(vmap(function))` are sharded in the same way.
    """
    seeds = jax.tree.leaves(tree)[0].shape[0]
    count = max(n for n in range(1, len(jax.devices()) + 1) if seeds % n == 0)
    mesh = Mesh(jax.devices()[:count], "seeds")
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("seeds")))


def nan_if_skipped(tree, skipped: ArrayLike):
    """The same tree, or NaN in every leaf if an update was skipped.

    An update that is not finite leaves the parameters as they are, and training may go on. In these
    experiments a network counts as diverged from its first skipped update on: with parameters of
    NaN, every later loss is NaN.

    Args:
      tree: the parameters after some updates, or a loss.
      skipped: `Metrics.skipped` of these updates.

    >>> nan_if_skipped(jnp.zeros(2), jnp.array([0, 1, 0])).tolist()
    [nan, nan]
    """
    diverged = jnp.any(jnp.asarray(skipped) > 0)
    return jax.tree.map(lambda leaf: jnp.where(diverged, jnp.nan, leaf), tree)
