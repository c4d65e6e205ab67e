"""Methods that train the networks of hessian_free for the same time: first-order ones, and SOFO."""

import dataclasses
import time
from collections.abc import Iterator
from functools import partial
from typing import Literal, TypeAlias

import jax

import jaxrnn
from experiments import long_lag_tasks, subspace
from experiments.long_lag_tasks import SOLVED, Task, error_rate, init_networks
from experiments.multi_seed import train_seeds, update_on_new_batches

Name: TypeAlias = long_lag_tasks.Name | Literal["subspace"]


def check_every(method: Name) -> int:
    """Updates between checks."""
    return 20 if method == "subspace" else 500


def train_in_subspaces(settings: long_lag_tasks.Config, task: Task, T: int):
    """Trains all networks at once by SOFO; yields as `long_lag_tasks.train`."""
    (tanh,) = long_lag_tasks.methods(dataclasses.replace(settings, methods=("tanh",)))
    rule = partial(jaxrnn.sgd, learning_rate=subspace.LEARNING_RATE)
    update = jaxrnn.make_update(partial(subspace.sofo, loss=task.loss), rule)

    def make_batch(key):
        return task.batch(key, T, subspace.BATCH_SIZE)

    def updates_and_check(state, key):
        key_train, key_test = jax.random.split(key)
        state = update_on_new_batches(update, make_batch, state, key_train, settings.check_every)
        return state, error_rate(settings, task, T, tanh.activation, state.params, key_test)

    key_init, key_train = jax.random.split(jax.random.fold_in(jax.random.key(settings.seed), T))
    networks = init_networks(settings, task, tanh, key_init)
    keys = jax.random.split(jax.random.fold_in(key_train, 0), settings.seeds)
    states = jax.vmap(lambda params, key: jaxrnn.init_state(params, rule, key=key))(networks, keys)
    schedule = settings.updates, settings.check_every
    for updates, errors in train_seeds(updates_and_check, states, key_train, *schedule):
        yield updates, errors.tolist()


def train_for(
    limit: float, settings: long_lag_tasks.Config, task: Task, T: int, method: Name
) -> Iterator[list[dict]]:
    """Trains all networks at once by the method until the time is up, or all have solved the task.

    Yields the rows of all seeds at each check.

    Args:
      limit: the time, in seconds.
      settings: those of the networks.
      task: Task.
      T: the sequence length.
      method: the name of the method.
    """
    every = check_every(method)
    settings = dataclasses.replace(settings, check_every=every, updates=10**6 * every)
    if method == "subspace":
        checks = train_in_subspaces(settings, task, T)
    else:
        settings = dataclasses.replace(settings, methods=(method,))
        checks = long_lag_tasks.train(settings, task, T, *long_lag_tasks.methods(settings))
    start = time.monotonic()
    for updates, errors in checks:
        seconds = time.monotonic() - start
        row = {"T": T, "method": method, "updates": updates, "seconds": seconds}
        yield [row | {"seed": seed, "error": error} for seed, error in enumerate(errors)]
        if seconds >= limit or max(errors) <= SOLVED:
            break
