"""Temporal order: which training methods teach a network to remember two symbols for T steps?

Two of the T symbols are relevant, one between 10 and 20 % of the sequence and one between 50 and
60 %; the others are distractors. The network classifies which two symbols they were, in order
(Hochreiter and Schmidhuber 1997, task 6a, in the version of Pascanu, Mikolov and Bengio 2013). The
training methods are those of long_lag_tasks.

    python -m experiments.temporal_order --out runs/temporal_order
"""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

import jaxrnn
from experiments import cli, long_lag_tasks
from experiments.long_lag_tasks import SMOKE, Task, compare, last_step
from experiments.multi_seed import is_wrong_class
from jaxrnn import Batch


@dataclasses.dataclass(frozen=True)
class Config(long_lag_tasks.Config):
    """Success rate in temporal order against the sequence length, for four training methods."""

    lengths: tuple[int, ...] = (50, 100, 200)
    """Sequence lengths T."""
    updates: int = 12_000
    """Maximal number of updates at each T."""
    hidden_size: int = 50
    """Hidden units, H."""
    out: Path = Path("runs/temporal_order")
    """Folder for metrics.jsonl, figure.png and summary.json."""


def order_batch(key, T: int, B: int) -> Batch:
    """Symbols 0 and 1 are relevant, 2 to 5 distractors; the last step's target is one of four."""
    key_others, key_first, key_second, key_which = jax.random.split(key, 4)
    xs = jax.random.randint(key_others, (T, B), 2, 6)
    first = jax.random.randint(key_first, (B,), T // 10, T // 5)
    second = jax.random.randint(key_second, (B,), T // 2, T // 2 + T // 10)
    which = jax.random.randint(key_which, (2, B), 0, 2)
    sequence = jnp.arange(B)
    xs = xs.at[first, sequence].set(which[0]).at[second, sequence].set(which[1])
    targets = jnp.broadcast_to(which[0] + 2 * which[1], (T, B))
    return Batch(xs, targets, weights=last_step(T, B))


TASK = Task(
    "temporal order", order_batch, 6, 4, jaxrnn.cross_entropy,
    wrong=is_wrong_class,
    published="+ regulariser",
)  # fmt: skip


def run(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: compare(cli.parse(Config, arguments, SMOKE), TASK))


if __name__ == "__main__":
    sys.exit(run())
