"""The mean loss over held-out data."""

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import checks
from jaxrnn.batches import Batch, check_is_batch, step_weights
from jaxrnn.forward import sequence_loss
from jaxrnn.gradients import PyTree, SameObject, value_dtype

LossFn: TypeAlias = Callable[..., tuple[Array, Any]]
"""(params, batch, h) -> (value, h_T)."""

NO_STEP = "expected at least one step that counts, got none"


def value_state_count(
    loss_fn: LossFn, params: PyTree, batch: Batch, h: PyTree
) -> tuple[Array, PyTree, Array]:
    """The mean loss of one batch, its last state, and sum(weights * mask), by which it divides."""
    result: Any = loss_fn(params, batch, h)
    match result:
        case (value, h_T) if checks.is_scalar(value):
            return value, h_T, step_weights(batch, value_dtype(params)).sum()
    shapes = jax.tree.map(jnp.shape, result)
    raise TypeError(f"loss_fn: expected (value, h_T) of shapes ((), h_T), got {shapes}")


@lru_cache(maxsize=32)
def _compiled(key: SameObject) -> Callable[[PyTree, Batch, PyTree], tuple[Array, PyTree, Array]]:
    """`value_state_count` of a loss function."""
    return jax.jit(partial(value_state_count, *key.functions))


def check_batches(name: str, data: Any) -> None:
    """Raises TypeError or ValueError unless data is a Batch, or an iterable that may have some."""
    if not isinstance(data, Iterable):
        raise TypeError(f"{name}: expected a Batch or an iterable of them, got {data!r}")
    if type(data) in (list, tuple) and not data:
        raise ValueError(f"{name}: expected at least one batch, got none")


def mean_over_batches(
    name: str,
    compiled: Callable[[PyTree, Batch, PyTree], tuple[Array, PyTree, Array]],
    params: PyTree,
    batches: Batch | Iterable[Batch],
    h_0: PyTree,
) -> float:
    """`evaluate` with a compiled `value_state_count`. `name` is the argument in errors."""
    checks.check_has_values("params", params)
    total = count = 0.0
    h = h_0
    for n, batch in enumerate([batches] if isinstance(batches, Batch) else batches):
        check_is_batch(batch, f"{name}[{n}]")
        checks.check_has_values(f"{name}[{n}]", batch)
        value, h_T, counted = compiled(params, batch, h)
        if steps := counted.item():
            total, count = total + value.item() * steps, count + steps
        h = None if h_0 is None else h_T
    if count == 0:
        raise ValueError(f"{name}: {NO_STEP}")
    return total / count


def evaluate(
    params: PyTree,
    batches: Batch | Iterable[Batch],
    h_0: PyTree = None,
    *,
    loss_fn: LossFn = sequence_loss,
) -> float:
    """The mean loss over all steps that count in all batches, on the host.

    Args:
      params: the parameters.
      batches: a Batch, or several.
      h_0: the state before the first batch, carried from batch to batch; None starts each batch
        from zeros.
      loss_fn: (params, batch, h) -> (value, h_T). It is compiled once per function object, and the
        last 32 are kept: create a partial or a lambda outside the loop that evaluates, and assign a
        bound method to a name, because each access makes a new object. Bind the options used in
        training, such as
        `partial(sequence_loss, activation=relu)`.

    Returns:
      The mean, a float.

    Raises:
      TypeError: batches are not Batches, loss_fn does not return (value, h_T), or an array is
        traced: in a transformation, use `sequence_loss`.
      ValueError: there is no batch, or no step counts.

    >>> import jax, jax.numpy as jnp, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    >>> batch = Batch(xs=jnp.ones((7, 4, 3)), targets=jnp.zeros((7, 4), int))
    >>> abs(evaluate(params, [batch, batch]) - sequence_loss(params, batch)[0].item()) < 1e-6
    True
    """
    check_batches("batches", batches)
    checks.check_function("loss_fn", loss_fn)
    return mean_over_batches("batches", _compiled(SameObject(loss_fn)), params, batches, h_0)
