"""Many networks trained at once: `jit(vmap(...))` over seeds, sharded over the devices.

Seeds do not communicate, so the cores of a CPU, one device each, train them side by side.
"""

import contextlib
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from jaxrnn import Batch, TrainState


def use_all_cores() -> None:
    """Makes each core of the CPU a device, unless JAX has started already."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", os.cpu_count())


def stack(trees):
    """One tree whose leaves are those of the trees, stacked along a new first axis.

    >>> stack([(1.0, jnp.zeros(2)), (3.0, jnp.ones(2))])[1].shape
    (2, 2)
    """
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def devices_for(size: int, axis: str) -> Mesh:
    """As many devices as divide the size, along a mesh axis of that name."""
    count = max(n for n in range(1, len(jax.devices()) + 1) if size % n == 0)
    return Mesh(jax.devices()[:count], axis)


def shard_seeds(tree):
    """Shards the first axis of every leaf, the seeds, over as many devices as divide it.

    The results of `jit(vmap(function))` are sharded in the same way.
    """
    seeds = jax.tree.leaves(tree)[0].shape[0]
    return jax.device_put(tree, NamedSharding(devices_for(seeds, "seeds"), PartitionSpec("seeds")))


def is_wrong_class(y, target):
    """Whether the first of the largest outputs (*batch, O) is not that of the target.

    NaN is wrong.

    >>> is_wrong_class(jnp.array([[1.0, 2.0], [jnp.nan, jnp.nan]]), jnp.array([1, 0])).tolist()
    [False, True]
    """
    return (y.argmax(axis=-1) != target) | jnp.isnan(y).any(axis=-1)


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


def update_on_new_batches(
    update: Callable, make_batch: Callable[..., Batch], state: TrainState, key, count: int
) -> TrainState:
    """The state after `count` updates, each on a new batch `make_batch(key)`.

    The parameters of a network that has diverged are NaN.
    """
    keys = jax.random.split(key, count)
    state, metrics = lax.scan(lambda state, key: update(state, make_batch(key)), state, keys)
    return state._replace(params=nan_if_skipped(state.params, metrics.skipped))


def train_seeds(
    updates_and_check: Callable, states: TrainState, key, updates: int, check_every: int, *settings
):
    """Trains all networks at once; yields the updates so far and the results of each check.

    Args:
      updates_and_check: (state, key, *settings) -> (state, results), of one network:
        `check_every` updates and a check.
      states: the initial states of all networks, stacked.
      key: of all batches.
      updates: the number of updates.
      check_every: the number of updates between checks; a divisor of `updates`.
      *settings: arrays with a value for each network.
    """
    networks, devices = len(states.step), len(jax.devices())
    # Copies of the first networks, whose results are dropped, leave no core idle.
    copies = -networks % devices if networks > devices else 0

    def spread(tree):
        return shard_seeds(jax.tree.map(lambda x: jnp.concatenate([x, x[:copies]]), tree))

    states, settings = spread((states, settings))
    run = jax.jit(jax.vmap(updates_and_check))
    for done in range(check_every, updates + 1, check_every):
        keys = jax.random.split(jax.random.fold_in(key, done), networks)
        states, results = run(states, spread(keys), *settings)
        yield done, jax.tree.map(lambda x: np.asarray(x)[:networks], results)
