"""5. The training loop: epochs until the held-out loss stops falling."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrnn import checks
from jaxrnn.backward import bptt
from jaxrnn.batches import Batch, steps_shape
from jaxrnn.epochs import (
    check_once,
    compile_functions,
    count_skipped,
    epoch_runner,
    mean_loss_of_updates,
    raise_if_diverged,
)
from jaxrnn.evaluation import NO_STEP, check_batches, mean_over_batches
from jaxrnn.gradients import GradientFn, PyTree, alike, value_dtype
from jaxrnn.update import Optimizer, TrainState, init_state
from jaxrnn.value_checks import check_values


class Evaluation(NamedTuple):
    """One epoch of `fit`.

    Attributes:
      epoch: the number of the epoch, from 1.
      train_loss: the mean loss over the steps of its applied updates, before each; NaN if none.
      valid_loss: the mean loss on the held-out data after the epoch; without held-out data,
        see `valid` in `fit`.
      skipped: the number of updates skipped, see make_update.
    """

    epoch: int
    train_loss: float
    valid_loss: float
    skipped: int = 0


class Fit(NamedTuple):
    """Result of `fit`. It never changes: a later epoch makes a new one.

    Attributes:
      state: TrainState after the last update.
      best: the parameters of the epoch of least `valid_loss`, the initial ones if none is finite.
      history: an Evaluation for each epoch.
      converged: True if patience ended training; False if training ended for another reason.
    """

    state: TrainState
    best: PyTree
    history: tuple[Evaluation, ...]
    converged: bool


def fit(
    key: Array,
    params: PyTree,
    train: Batch | Iterable[Batch],
    valid: Batch | Iterable[Batch] | None = None,
    *,
    optimizer: Optimizer,
    gradient_fn: GradientFn = bptt,
    gradient_key: Array | None = None,
    batch_size: int | None = None,
    h_0: PyTree = None,
    max_epochs: int = 100,
    patience: int = 5,
    tolerance: float = 0.0,
    max_skipped: int = 10,
    callback: Callable[[Fit], bool | None] | None = None,
    resume: Fit | None = None,
) -> Fit:
    """Trains until the held-out loss has not improved by `tolerance` for `patience` epochs.

    The result is a function of the arguments: the same keys and data give the same parameters.
    Ctrl-C ends training with a warning, and `fit` returns the result of the last whole epoch.
    Arrays may span processes, with `gradient_fn=data_parallel(bptt, mesh)`: each process calls
    `fit` with the same arguments, and gets the same result.

    Args:
      key: a key from `jax.random.key`, which shuffles the examples of a Batch in each epoch;
        batches are not shuffled.
      params: the initial parameters, any pytree of floating-point arrays.
      train: a Batch of examples along axis 1, shuffled into minibatches each epoch, with one
        compiled call per epoch; or batches, taken in order each epoch.
      valid: held-out data, a Batch or batches. If None, `valid_loss` is the loss on `train` after
        the epoch if `train` is a Batch or a sequence, and `train_loss` if it is another iterable.
      optimizer: an optax optimiser, or a rule (params, grads) -> params. Calls of `fit` with the
        same two objects, gradient_fn and optimizer, share a compilation; the last 8 pairs are kept.
      gradient_fn: `bptt` or a function like it, see `make_update`. Without a key it is
        deterministic, and evaluates the held-out data.
      gradient_key: a key for a random gradient function, for dropout or noise; update n draws from
        `jax.random.fold_in(gradient_key, n)`.
      batch_size: examples in a minibatch; all of them if None or larger. With a Batch only. The
        last minibatch is filled with examples of weight 0, so `gradient_fn` must apply
        `batch.weights`.
      h_0: the state at the start of an epoch, carried from batch to batch; None starts each batch
        from zeros. With batches only; those of `valid` then have the same batch axes.
      max_epochs: the largest number of epochs, those of `resume` included.
      patience: epochs without improvement after which training ends.
      tolerance: how much lower than the lowest loss a loss must be to count as an improvement.
      max_skipped: consecutive skipped updates after which training fails; see `make_update`.
      callback: called with the Fit after each epoch; it returns None or a bool. Training ends if it
        returns True.
      resume: the Fit to continue from, as a callback received it or `load_fit` returned it. With
        the same other arguments the result equals that of an uninterrupted run, bit for bit. Of
        `params` and `gradient_key`, only structure, shapes and dtypes are then read. With other
        data, give `resume._replace(history=())`: losses on different data do not compare.

    Returns:
      Fit.

    Raises:
      TypeError, ValueError: an argument does not fit, `check_values` rejects a batch, or no step
        counts. A Batch or a list of them is checked before the first update, another iterable
        during the first epoch.
      Diverged: max_skipped consecutive updates were skipped.

    Warns:
      UserWarning: updates were skipped, Ctrl-C ended training, or `check_values` warns of a batch.

    >>> import optax, jaxrnn
    >>> key_init, key_data, key_fit = jax.random.split(jax.random.key(0), 3)
    >>> xs = jax.random.bernoulli(key_data, 0.5, (10, 64, 1)).astype(float)
    >>> parity = Batch(xs, targets=xs[..., 0].cumsum(axis=0).astype(int) % 2)
    >>> params = jaxrnn.init(key_init, input_size=1, hidden_size=16, output_size=2)
    >>> result = fit(key_fit, params, parity, optimizer=optax.adam(1e-2), batch_size=16)
    >>> result.history[-1].train_loss < result.history[0].train_loss
    True
    """
    checks.check_key("key", key)
    _check_settings(max_epochs, patience, tolerance, max_skipped, callback)
    _check_data(train, valid, batch_size, h_0, max_epochs)
    state = init_state(params, optimizer, h_0, key=gradient_key)
    initial = Fit(state, _copy(state.params), (), False)
    result = initial if resume is None else _check_resume(resume, initial)
    progress = _Progress()
    for row in result.history:
        progress = progress.after(row, tolerance)
    result = result._replace(converged=progress.waited >= patience)
    compiled = compile_functions(gradient_fn, optimizer)
    train, held_out = _checked(compiled.evaluate, params, train, valid, h_0)
    evaluated = "train" if valid is None else "valid"
    run_epoch = epoch_runner(compiled, key, train, batch_size, h_0, max_skipped)

    norms: list[float] = []
    try:
        for epoch in range(len(result.history) + 1, max_epochs + 1):
            if result.converged:
                break
            state, metrics = run_epoch(result.state, epoch)
            if not metrics.counted.any():
                raise ValueError(f"train: {NO_STEP}")
            norms = [*norms[-2 * max_skipped :], *metrics.gradient_norm.tolist()]
            raise_if_diverged(metrics, state.step.item(), norms, max_skipped)
            train_loss = valid_loss = mean_loss_of_updates(metrics)
            if held_out is not None:
                valid_loss = mean_over_batches(
                    evaluated, compiled.evaluate, state.params, held_out, h_0
                )
            skipped = count_skipped(metrics, state.step.item())
            row = Evaluation(epoch, train_loss, valid_loss, skipped)
            # A copy, because an update that continues from the state donates its parameters.
            best = _copy(state.params) if row.valid_loss < progress.lowest else result.best
            progress = progress.after(row, tolerance)
            result = Fit(state, best, (*result.history, row), progress.waited >= patience)
            if callback is not None and _stops(callback(result)):
                break
    except KeyboardInterrupt:
        warnings.warn(
            f"interrupted: fit returns the result of epoch {len(result.history)}", stacklevel=2
        )
    return result


class _Progress(NamedTuple):
    """What decides which parameters are the best, and when training ends.

    Attributes:
      lowest: the lowest valid_loss so far.
      waited: the epochs since it fell by more than the tolerance, of those that applied an update.
    """

    lowest: float = math.inf
    waited: int = 0

    def after(self, row: Evaluation, tolerance: float) -> "_Progress":
        """The progress after one more epoch. min keeps its first argument if the other is NaN."""
        waited = self.waited
        if not math.isnan(row.train_loss):  # else no update was applied: max_skipped decides
            waited = 0 if row.valid_loss < self.lowest - tolerance else waited + 1
        return _Progress(min(self.lowest, row.valid_loss), waited)


def _copy(params: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, params)


def _stops(returned: Any) -> bool:
    """Whether a callback ends the training. A path or a loss that it returns is a mistake."""
    is_bool = isinstance(returned, bool) or getattr(returned, "dtype", None) == np.bool_
    if returned is not None and not (is_bool and np.ndim(returned) == 0):
        raise TypeError(
            f"callback: expected a function that returns None or a bool, got {returned!r}"
        )
    return bool(returned)


def _check_settings(
    max_epochs: Any, patience: Any, tolerance: Any, max_skipped: Any, callback: Any
) -> None:
    checks.check_size("max_epochs", max_epochs)
    checks.check_size("patience", patience)
    checks.check_size("max_skipped", max_skipped)
    checks.check_number("tolerance", tolerance)
    if callback is not None:
        checks.check_function("callback", callback)
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance: expected at least 0 and finite, got {tolerance}")


def _check_data(train: Any, valid: Any, batch_size: Any, h_0: Any, max_epochs: int) -> None:
    for name, data in (("train", train), ("valid", valid)):
        if data is None and name == "valid":
            continue
        check_batches(name, data)
        if isinstance(data, Iterator) and max_epochs > 1:
            raise ValueError(
                f"{name}: expected batches that can be iterated once per epoch, such as a list, "
                f"got the one-pass iterator {data!r}"
            )
    if not isinstance(train, Batch):
        if batch_size is not None:
            raise ValueError(f"batch_size: expected None, as train is batches, got {batch_size}")
        return
    if h_0 is not None:
        raise ValueError("h_0: expected None, as the examples of a Batch are shuffled, got a state")
    checks.check_array("train.xs", train.xs)
    if len(steps_shape(train.xs)) < 2 or 0 in steps_shape(train.xs)[1:]:
        raise ValueError(f"train: expected xs (T, examples, ...), got shape {train.xs.shape}")
    if batch_size is not None:
        checks.check_size("batch_size", batch_size)


def _checked(
    evaluate: Callable[..., Any], params: PyTree, train: Any, valid: Any, h_0: PyTree
) -> tuple[Any, Any]:
    """`train` and the held-out data, or None, whose values are checked before they are used."""
    check = partial(check_values, params, h_0=h_0)

    def check_held_out(batch: Batch) -> None:
        check(batch)
        jax.eval_shape(evaluate, params, batch, h_0)

    dtype = value_dtype(params)
    if valid is not None:
        train = check_once("train", check, train, dtype)
        return train, check_once("valid", check_held_out, valid, dtype)
    # A Batch is a tuple. Another iterable may give other batches the next time.
    if not isinstance(train, Sequence):
        return check_once("train", check, train, dtype), None
    train = check_once("train", check_held_out, train, dtype)
    return train, train


def _check_resume(resume: Any, initial: Fit) -> Fit:
    """The Fit to continue from, as JAX arrays, if it fits the other arguments."""
    if not isinstance(resume, Fit):
        raise TypeError(f"resume: expected a Fit or None, got {type(resume).__name__}")
    expected, got = (_kinds({"state": f.state, "best": f.best}) for f in (initial, resume))
    for name in expected | got:
        kinds = expected.get(name, "nothing"), got.get(name, "nothing")
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"resume: expected {kinds[0]} at {name}, as params, optimizer, h_0 and "
                f"gradient_key give, got {kinds[1]}"
            )
    if not alike(resume.state.opt_state, initial.state.opt_state):
        raise ValueError("resume: expected the state of the optimizer given, got that of another")
    state, best = jax.tree.map(jnp.asarray, (resume.state, resume.best))
    return Fit(state, best, tuple(resume.history), False)


def _kinds(tree: PyTree) -> dict[str, str]:
    """The dtype and shape of each leaf, by its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (
            f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"
        )
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
