"""Methods that train the networks of hessian_free for the same time: first-order ones, and SOFO."""

import dataclasses
import time
from collections.abc import Iterator
from functools import partial
from typing import Literal, TypeAlias

import jaxrnn
from experiments import long_lag_tasks, subspace
from experiments.long_lag_tasks import SOLVED, Task

Name: TypeAlias = Literal[long_lag_tasks.Name, "subspace"]


def check_every(method: Name) -> int:
    """Updates between checks."""
    return 20 if method == "subspace" else 500


def train_in_subspaces(settings: long_lag_tasks.Config, task: Task, T: int):
    """Trains all networks at once by SOFO; yields as `long_lag_tasks.train`."""
    settings = dataclasses.replace(settings, methods=("tanh",), batch_size=subspace.BATCH_SIZE)
    (tanh,) = long_lag_tasks.methods(settings)
    step = partial(subspace.sofo, loss=task.loss)
    rule = partial(jaxrnn.sgd, learning_rate=subspace.LEARNING_RATE)
    return long_lag_tasks.train_networks(settings, task, T, tanh, step, rule, random=True)


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
