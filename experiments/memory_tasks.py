"""More tasks in which a network has to remember for T steps, for hessian_free.

They are those of Hochreiter and Schmidhuber (1997), in the versions that Martens and Sutskever
(2011) train by Hessian-free optimisation:

    multiplication              the product of two marked numbers
    3-bit temporal order        which three symbols came, in order
    random permutation          the first symbol, after a permutation of others
    5-bit memorisation          five symbols of two, after T steps
    20-bit memorisation         ten symbols of four, after T steps
"""

from functools import partial

import jax
import jax.numpy as jnp

import jaxrnn
from experiments.adding import adding_batch
from experiments.long_lag_tasks import Task, last_step
from experiments.multi_seed import is_wrong_class
from jaxrnn import Batch

DISTRACTORS = 98
"""Symbols of the random permutation that are not to be remembered."""


def multiplication_batch(key, T: int, B: int) -> Batch:
    """The inputs of adding; the target of the last step is the product of the marked numbers."""
    batch = adding_batch(key, T, B)
    numbers, marks = batch.xs[..., 0], batch.xs[..., 1]
    product = jnp.where(marks > 0, numbers, 1).prod(axis=0)
    return batch._replace(targets=jnp.broadcast_to(product[:, None], (T, B, 1)))


def three_bit_batch(key, T: int, B: int) -> Batch:
    """Symbols 0 and 1 at 10 to 20, 33 to 43 and 66 to 76 % of T; distractors 2 to 5; 8 classes."""
    key_others, key_which, *keys = jax.random.split(key, 5)
    xs = jax.random.randint(key_others, (T, B), 2, 6)
    which = jax.random.randint(key_which, (3, B), 0, 2)
    for key_position, symbol, percent in zip(keys, which, (10, 33, 66), strict=True):
        first = percent * T // 100
        position = jax.random.randint(key_position, (B,), first, first + T // 10)
        xs = xs.at[position, jnp.arange(B)].set(symbol)
    target = which[0] + 2 * which[1] + 4 * which[2]
    return Batch(xs, jnp.broadcast_to(target, (T, B)), weights=last_step(T, B))


def permutation_batch(key, T: int, B: int) -> Batch:
    """Symbol 0 or 1, then permutations of the others; the target of the last step is the first."""
    key_first, key_others = jax.random.split(key)
    first = jax.random.randint(key_first, (B,), 0, 2)
    rounds = jnp.broadcast_to(jnp.arange(2, 2 + DISTRACTORS)[:, None], (DISTRACTORS, B))
    keys = jax.random.split(key_others, -(-T // DISTRACTORS))
    others = [jax.random.permutation(key, rounds, axis=0, independent=True) for key in keys]
    xs = jnp.concatenate([first[None], *others])[:T]
    return Batch(xs, jnp.broadcast_to(first, (T, B)), weights=last_step(T, B))


def memorisation_batch(key, T: int, B: int, *, length: int, symbols: int) -> Batch:
    """`length` symbols, T - 1 blanks, a cue, and `length` blanks in which they are to be repeated.

    Only the steps of the repetition count.
    """
    blank, cue = symbols, symbols + 1
    which = jax.random.randint(key, (length, B), 0, symbols)
    waiting = jnp.full((T, B), blank).at[-1].set(cue)
    xs = jnp.concatenate([which, waiting, jnp.full((length, B), blank)])
    targets = jnp.zeros_like(xs).at[-length:].set(which)
    return Batch(xs, targets, weights=jnp.zeros(xs.shape).at[-length:].set(1))


def memorisation(name: str, length: int, symbols: int) -> Task:
    batch = partial(memorisation_batch, length=length, symbols=symbols)
    return Task(name, batch, symbols + 2, symbols, jaxrnn.cross_entropy, is_wrong_class)


TASKS = (
    Task(
        "multiplication", multiplication_batch, 2, 1, jaxrnn.squared_error,
        wrong=lambda y, target: ~(jnp.abs(y - target)[:, 0] <= 0.04),  # NaN is wrong
    ),
    Task("3-bit temporal order", three_bit_batch, 6, 8, jaxrnn.cross_entropy, is_wrong_class),
    Task(
        "random permutation", permutation_batch, 2 + DISTRACTORS, 2, jaxrnn.cross_entropy,
        is_wrong_class,
    ),
    memorisation("5-bit memorisation", length=5, symbols=2),
    memorisation("20-bit memorisation", length=10, symbols=4),
)  # fmt: skip
