"""One epoch of training: over the shuffled examples of a Batch, or over batches in order."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from jaxrnn import checks
from jaxrnn.batches import Batch, step_weights, steps_shape
from jaxrnn.evaluation import NO_STEP, value_state_count
from jaxrnn.gradients import GradientFn, PyTree, SameObject, call_gradient, value_dtype
from jaxrnn.sharding import explicit_sharding, parts
from jaxrnn.update import Metrics, Optimizer, TrainState, make_update


class Compiled(NamedTuple):
    """The compiled functions of a run.

    Attributes:
      update: what `make_update` returns.
      shuffled_epoch: (state, train, key, batch_size) -> (state, Metrics of each update).
      evaluate: (params, batch, h) -> (value, h_T, sum(weights * mask)).
    """

    update: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    shuffled_epoch: Callable[[TrainState, Batch, Array, int], tuple[TrainState, Metrics]]
    evaluate: Callable[[PyTree, Batch, PyTree], tuple[Array, PyTree, Array]]


def compile_functions(gradient_fn: GradientFn, optimizer: Optimizer) -> Compiled:
    """The compiled functions, cached, so that a second run with the same arguments reuses them."""
    return _compiled(SameObject(gradient_fn, optimizer))


@lru_cache(maxsize=8)
def _compiled(key: SameObject) -> Compiled:
    gradient_fn, optimizer = key.functions
    update = make_update(gradient_fn, optimizer)

    def loss_fn(params: PyTree, batch: Batch, h: PyTree) -> Any:
        return call_gradient(gradient_fn, params, batch, h)[0]  # XLA removes the gradient

    # The state is not donated, because a callback may hold the result before the epoch.
    return Compiled(
        update,
        jax.jit(partial(shuffled_epoch, update), static_argnums=3),
        jax.jit(partial(value_state_count, loss_fn)),
    )


def take_examples(examples: Array, leaf: Array) -> Array:
    """The examples, axis 1, of an array; split over devices as it is."""
    return leaf.at[:, examples].get(out_sharding=explicit_sharding(leaf))


def shuffled_epoch(
    update: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    state: TrainState,
    train: Batch,
    key: Array,
    batch_size: int,
) -> tuple[TrainState, Metrics]:
    """Shuffles the examples, axis 1, and updates on each minibatch in turn, in one scan."""
    N = steps_shape(train.xs)[1]
    count = -(-N // batch_size)
    order = jnp.resize(jax.random.permutation(key, N), (count, batch_size))
    # The last minibatch is filled with examples already used in this epoch, at weight 0.
    is_new = (jnp.arange(count * batch_size) < N).reshape(count, batch_size)

    def body(state: TrainState, inputs: tuple[Array, Array]) -> tuple[TrainState, Metrics]:
        examples, is_new = inputs
        batch = jax.tree.map(partial(take_examples, examples), train)
        if N % batch_size:
            weights = step_weights(batch, value_dtype(state.params))
            is_new = is_new.reshape(1, batch_size, *(1,) * (weights.ndim - 2))
            batch = batch._replace(weights=weights * is_new.astype(weights.dtype))
        return update(state, batch)

    return lax.scan(body, state, (order, is_new))


def streamed_epoch(
    update: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    state: TrainState,
    train: Iterable[Batch],
    h_0: PyTree,
    max_skipped: int,
) -> tuple[TrainState, Metrics]:
    """Updates on each batch in turn, the state carried from h_0 on unless it is None."""
    state = jax.tree.map(jnp.copy, state._replace(h=h_0))  # an update donates its state
    metrics = []
    for batch in train:
        # JAX may read NumPy's memory later, when the iterable has filled it again.
        batch = jax.tree.map(lambda x: np.array(x) if isinstance(x, np.ndarray) else x, batch)
        state, reported = update(state, batch)
        metrics.append(reported)
        # Polled once in max_skipped updates, so that the host does not wait for each one.
        if len(metrics) % max_skipped == 0 and reported.skipped.item() >= max_skipped:
            break
    if not metrics:
        raise ValueError("train: expected at least one batch in each epoch, got none")
    # By NumPy: XLA would compile a program for each number of batches.
    return state, jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(metrics))


def mean_loss_of_updates(metrics: Metrics) -> float:
    """The mean loss over the updates that were applied; NaN if none was, or no step counted."""
    loss, counted = (np.asarray(x, np.float64) for x in (metrics.loss, metrics.counted))
    counted = np.where(np.asarray(metrics.skipped) == 0, counted, 0)
    if not counted.any():
        return math.nan
    return float(np.where(counted > 0, loss, 0) @ counted / counted.sum())


def epoch_runner(
    compiled: Compiled,
    key: Array,
    train: Batch | Iterable[Batch],
    batch_size: int | None,
    h_0: PyTree,
    max_skipped: int,
) -> Callable[[TrainState, int], tuple[TrainState, Metrics]]:
    """(state, epoch) -> (state, Metrics of each update), for a Batch or for batches in order."""
    if not isinstance(train, Batch):
        return lambda state, _: streamed_epoch(compiled.update, state, train, h_0, max_skipped)
    N = steps_shape(train.xs)[1]
    size = min(batch_size or N, N)
    if size % parts(train.xs, 1):
        raise ValueError(
            f"batch_size: expected a multiple of the {parts(train.xs, 1)} parts into which the "
            f"type of train.xs splits the examples, got {size}"
        )
    return lambda state, epoch: compiled.shuffled_epoch(
        state, train, jax.random.fold_in(key, epoch), size
    )


class Diverged(ArithmeticError):
    """Training stopped because too many consecutive updates were skipped.

    Attributes:
      step: the batch at which training stopped.
      skipped: the number of consecutive updates skipped.
      gradient_norms: the gradient norms of the last updates, oldest first.
    """

    def __init__(self, step: int, skipped: int, gradient_norms: Sequence[float]):
        super().__init__(step, skipped, list(gradient_norms))  # these rebuild it when unpickled
        self.step, self.skipped, self.gradient_norms = step, skipped, list(gradient_norms)

    def __str__(self) -> str:
        norms = ", ".join(f"{norm:.3g}" for norm in self.gradient_norms)
        message = (
            f"step {self.step}: expected finite loss, gradient, parameters and state, got "
            f"{self.skipped} consecutive skipped updates; last gradient norms: {norms}. Try a "
            "smaller learning rate, optax.clip_by_global_norm, or check_values on the data"
        )
        last = self.gradient_norms[-self.skipped :]
        if not last or not all(math.isfinite(norm) for norm in last):
            return message
        return (
            f"{message}. The gradients are finite, but loss, new parameters or state are "
            "not. If the parameters have 16 bits, the optimiser may divide by 0. In float16, "
            "eps=1e-8 is 0: try optax.adam(..., eps=1e-4). In bfloat16, b2=0.999 is 1: try "
            "optax.inject_hyperparams(..., hyperparam_dtype=jnp.float32)"
        )


def raise_if_diverged(metrics: Metrics, step: int, norms: list[float], max_skipped: int) -> None:
    """Raises Diverged where max_skipped consecutive updates were skipped; `step` is the last."""
    too_many = np.asarray(metrics.skipped) >= max_skipped
    if too_many.any():
        later = len(too_many) - 1 - int(too_many.argmax())
        recent = norms[: len(norms) - later][-2 * max_skipped :]
        raise Diverged(step - later, max_skipped, recent)


def count_skipped(metrics: Metrics, step: int) -> int:
    """The number of updates skipped, with a warning if there are any."""
    skipped = np.asarray(metrics.skipped) > 0
    if skipped.any():
        warnings.warn(
            f"train: {skipped.sum()} of the {len(skipped)} updates up to step {step} were skipped: "
            "loss, gradient, new parameters or carried state were not finite, or float16 cannot "
            "hold the state of the optimiser",
            stacklevel=3,
        )
    return int(skipped.sum())


class CheckedOnce:
    """An iterable of batches that are checked during the first complete iteration."""

    def __init__(self, name: str, check: Callable[[Batch], None], batches: Iterable[Batch]):
        self.name, self.check, self.batches, self.checked = name, check, batches, False

    def __iter__(self) -> Iterator[Batch]:
        for n, batch in enumerate(self.batches):
            if not self.checked:
                with checks.noted(f"The batch is {self.name}[{n}]."):
                    self.check(batch)
            yield batch
        self.checked = True


def check_once(name: str, check: Callable[[Batch], None], data: Any, dtype: DTypeLike) -> Any:
    """The same data; a Batch is converted to JAX arrays.

    A Batch or a list is checked now, and some step of it must count, in `dtype`; another iterable
    is checked during its first pass.
    """
    if isinstance(data, Batch):
        at_hand = {name: data}
    elif type(data) in (list, tuple):
        at_hand = {f"{name}[{n}]": batch for n, batch in enumerate(data)}
    else:
        return CheckedOnce(name, check, data)
    for place, batch in at_hand.items():
        with checks.noted(f"The batch is {place}."):
            check(batch)
    if not any(step_weights(batch, dtype).any() for batch in at_hand.values()):
        raise ValueError(f"{name}: {NO_STEP}")
    return jax.tree.map(jnp.asarray, data) if isinstance(data, Batch) else data
