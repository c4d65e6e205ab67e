"""Adding: which training methods teach a network to remember two numbers for T steps?

Two of T random numbers are marked, one in each half. The target at the last step is their sum
(Hochreiter and Schmidhuber 1997, task 4, in the version of Le, Jaitly and Hinton 2015). An output
is wrong if it is off by more than 0.2. The training methods are those of long_lag_tasks.

    python -m experiments.adding --out runs/adding
"""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

import jaxrnn
from experiments import cli, long_lag_tasks
from experiments.long_lag_tasks import SMOKE, Task, compare, last_step
from jaxrnn import Batch


@dataclasses.dataclass(frozen=True)
class Config(long_lag_tasks.Config):
    """Success rate in adding against the sequence length, for four training methods."""

    lengths: tuple[int, ...] = (50, 150)
    """Sequence lengths T."""
    updates: int = 9_000
    """Maximal number of updates at each T."""
    hidden_size: int = 100
    """Hidden units, H."""
    out: Path = Path("runs/adding")
    """Folder for metrics.jsonl, figure.png and summary.json."""


def adding_batch(key, T: int, B: int) -> Batch:
    """Uniform numbers and marks, one mark in each half; the target is the sum of the marked."""
    key_numbers, key_first, key_second = jax.random.split(key, 3)
    numbers = jax.random.uniform(key_numbers, (T, B))
    first = jax.random.randint(key_first, (B,), 0, T // 2)
    second = jax.random.randint(key_second, (B,), T // 2, T)
    sequence = jnp.arange(B)
    marks = jnp.zeros((T, B)).at[first, sequence].set(1).at[second, sequence].set(1)
    sums = (numbers * marks).sum(axis=0)
    xs = jnp.stack([numbers, marks], axis=-1)
    return Batch(xs, jnp.broadcast_to(sums[:, None], (T, B, 1)), weights=last_step(T, B))


TASK = Task(
    "adding", adding_batch, 2, 1, jaxrnn.squared_error,
    wrong=lambda y, target: ~(jnp.abs(y - target)[:, 0] <= 0.2),  # NaN is wrong
    published="identity ReLU",
)  # fmt: skip


def run(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: compare(cli.parse(Config, arguments, SMOKE), TASK))


if __name__ == "__main__":
    sys.exit(run())
