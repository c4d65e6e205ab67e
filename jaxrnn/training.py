"""5. The training loop: epochs over batches until the held-out loss stops falling."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxrnn import checks
from jaxrnn.backward import bptt
from jaxrnn.forward import sequence_loss, step_weights, sum_dtype
from jaxrnn.params import Params
from jaxrnn.sequences import Batch
from jaxrnn.update import Diverged, GradientFn, Optimizer, TrainState, init_state, make_update

LossFn = Callable[..., tuple[Array, Array]]


@partial(jax.jit, static_argnums=0)
def _value_state_count(loss_fn, params, batch, h):
    value, h_T = loss_fn(params, batch, h)
    return value, h_T, step_weights(batch, sum_dtype(params)).sum()


def evaluate(
    params: Params,
    batches: Batch | Iterable[Batch],
    h_0: Array | None = None,
    *,
    loss_fn: LossFn = sequence_loss,
) -> float:
    """The mean loss over all steps that count in all batches.

    Args:
      params: Params.
      batches: a Batch, or several.
      h_0: the state before the first batch, carried on from batch to batch; None starts each from
        zeros.
      loss_fn: (params, batch, h) -> (value, h_T). Compiled once for each function that it is given,
        so name it outside a loop.

    Returns:
      The mean, a float; 0 where no step counts.

    >>> import jax, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    >>> batch = Batch(xs=jnp.ones((7, 4, 3)), targets=jnp.zeros((7, 4), int))
    >>> abs(evaluate(params, [batch, batch]) - sequence_loss(params, batch)[0].item()) < 1e-6
    True
    """
    total = count = 0.0
    h = h_0
    for batch in [batches] if isinstance(batches, Batch) else batches:
        checks.check_is_batch(batch)
        value, h_T, counted = _value_state_count(loss_fn, params, batch, h)
        total, count = total + value.item() * counted.item(), count + counted.item()
        h = None if h_0 is None else h_T
    return total / count if count else 0.0


class Evaluation(NamedTuple):
    """One epoch: the mean loss over its updates, that on held-out data after it, and how many
    updates were skipped, as their loss or gradient was not finite."""

    epoch: int
    train_loss: float
    valid_loss: float
    skipped: int = 0


class Fit(NamedTuple):
    """What training has come to.

    Attributes:
      state: TrainState after the last update.
      best: the parameters with the lowest held-out loss.
      history: an Evaluation for each epoch.
      converged: whether the loss had stopped improving, rather than the budget ended.
    """

    state: TrainState
    best: Params
    history: list[Evaluation]
    converged: bool


def _make_epoch(update, batch_size: int):
    """One compiled call: shuffles the examples, axis 1, and updates on each minibatch in turn."""

    @partial(jax.jit, donate_argnums=0)
    def epoch(state, train, key):
        N = checks.steps_shape(train.xs)[1]
        count = -(-N // batch_size)
        order = jax.random.permutation(key, N)
        order = jnp.resize(order, (count, batch_size))
        # The last minibatch is filled up with examples that have had their turn: they do not count.
        fresh = (jnp.arange(count * batch_size) < N).reshape(count, batch_size)

        def body(state, now):
            examples, fresh = now
            batch = jax.tree.map(lambda leaf: leaf[:, examples], train)
            if N % batch_size:
                weights = step_weights(batch, sum_dtype(state.params))
                fresh = fresh.reshape(batch_size, *(1,) * (weights.ndim - 2))
                batch = batch._replace(weights=weights * fresh.astype(weights.dtype))
            return update(state, batch)

        return lax.scan(body, state, (order, fresh))

    return epoch


@jax.jit
def _mean_loss(metrics) -> Array:
    """Over the updates that were done; NaN where none was."""
    done = metrics.skipped == 0
    counted = jnp.where(done, metrics.counted, 0).sum()
    total = jnp.where(done, metrics.loss * metrics.counted, 0).sum()
    return jnp.where(done.any(), total / jnp.where(counted == 0, 1.0, counted), jnp.nan)


def _stream_epoch(update, state, train, h_0, max_skipped):
    """Updates on each batch in turn, the state carried from h_0 on where there is one."""
    state = state._replace(h=None if h_0 is None else jnp.array(h_0, copy=True))
    metrics = []
    for batch in train:
        state, reported = update(state, batch)
        metrics.append(reported)
        # Looked at now and then, so that the host need not wait for each update.
        if len(metrics) % max_skipped == 0 and reported.skipped.item() >= max_skipped:
            break
    if not metrics:
        raise ValueError("train: expected at least one batch, got none")
    return state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *metrics)


def _count_skipped(metrics, step: int, norms: list[float], max_skipped: int) -> int:
    """How many of the updates up to `step` were skipped: fewer than max_skipped in a row."""
    skipped = np.asarray(metrics.skipped)
    norms += metrics.gradient_norm.tolist()
    too_many = skipped >= max_skipped
    if too_many.any():
        after = len(skipped) - 1 - int(too_many.argmax())
        recent = norms[: len(norms) - after][-2 * max_skipped :]
        raise Diverged(step - after, max_skipped, recent)
    del norms[: -2 * max_skipped]
    count = int((skipped > 0).sum())
    if count:
        warnings.warn(
            f"train: {count} of the {len(skipped)} updates up to step {step} skipped, as the loss "
            "or the gradient was not finite",
            stacklevel=3,
        )
    return count


def _checked(params, h_0, batches):
    """The batches, each looked at as it comes; `_check_fit` has looked at a Batch."""

    def look(batch):
        checks.check_values(params, batch, h_0)
        return batch

    return batches if isinstance(batches, Batch) else map(look, batches)


def _check_fit(key, params, train, valid, batch_size, h_0, max_epochs, patience, max_skipped):
    checks.check_key(key)
    checks.check_params(params)
    checks.check_size("max_epochs", max_epochs)
    checks.check_size("patience", patience)
    checks.check_size("max_skipped", max_skipped)
    if isinstance(train, Batch):
        if h_0 is not None:
            raise ValueError("h_0: expected None, as examples of a Batch are shuffled, got a state")
        if len(checks.steps_shape(train.xs)) < 2 or 0 in checks.steps_shape(train.xs)[1:]:
            raise ValueError(f"train: expected xs (T, examples, ...), got shape {train.xs.shape}")
        if batch_size is not None:
            checks.check_size("batch_size", batch_size)
    elif not isinstance(train, Iterable):
        raise TypeError(f"train: expected a Batch or an iterable of them, got {train!r}")
    elif batch_size is not None:
        raise ValueError(f"batch_size: expected None, for train is batches, got {batch_size}")
    elif isinstance(train, Iterator) and max_epochs > 1:
        raise ValueError(
            "train: expected batches that can be gone through once per epoch, such as a list, got "
            f"the one-pass iterator {train!r}"
        )
    for data in (train, valid):
        if isinstance(data, Batch):
            checks.check_values(params, data, h_0)


def _start(params, optimizer, h_0, resume):
    """What to go on from: a copy of it, since an update donates its state."""
    state = init_state(params, optimizer, h_0)
    if resume is None:
        return Fit(state, params, [], converged=False)
    if not isinstance(resume, Fit):
        raise TypeError(f"resume: expected a Fit or None, got {type(resume).__name__}")
    expected, got = (jax.tree.map(jnp.shape, each) for each in (state, resume.state))
    if expected != got:
        raise ValueError(
            f"resume: expected the state of these params, optimizer and h_0, {expected}, got {got}"
        )
    state, best = jax.tree.map(jnp.copy, (resume.state, resume.best))
    return Fit(state, best, list(resume.history), converged=False)


def _wait(lowest: float, waited: int, row: Evaluation, tolerance: float) -> tuple[float, int]:
    """The lowest loss so far, and the epochs since one was lower by `tolerance`."""
    if math.isnan(row.train_loss):  # nothing was trained: for max_skipped to judge
        return lowest, waited
    waited = 0 if row.valid_loss < lowest - tolerance else waited + 1
    return min(lowest, row.valid_loss), waited


def fit(
    key: Array,
    params: Params,
    train: Batch | Iterable[Batch],
    valid: Batch | Iterable[Batch] | None = None,
    *,
    optimizer: Optimizer,
    gradient_fn: GradientFn = bptt,
    batch_size: int | None = None,
    h_0: Array | None = None,
    max_epochs: int = 100,
    patience: int = 5,
    tolerance: float = 0.0,
    max_skipped: int = 10,
    callback: Callable[[Fit], None] | None = None,
    resume: Fit | None = None,
) -> Fit:
    """Trains until the held-out loss has not improved by `tolerance` for `patience` epochs.

    A function of its arguments alone: the same key and data give the same parameters.

    Args:
      key: orders the examples of each epoch.
      params: Params to start from; they stay as they are.
      train: a Batch of examples along axis 1, shuffled into minibatches anew each epoch, the whole
        epoch one compiled call; or batches, taken in their order each epoch.
      valid: held-out data, a Batch or batches; the training loss takes its place if None.
      optimizer: an optax optimiser, or a rule (params, grads) -> params.
      gradient_fn: `bptt` or a function like it.
      batch_size: examples of a minibatch; None takes all of them. With a Batch only.
      h_0: the state at the start of an epoch, carried from batch to batch; None starts each batch
        from zeros. With batches only; those of `valid` must then have the same batch axes.
      max_epochs: the budget.
      patience: epochs without improvement after which training ends.
      tolerance: how much lower than the best a loss must be to count as improvement.
      max_skipped: how many updates in a row may be skipped before training is given up; see
        `make_update`.
      callback: called with the Fit so far after each epoch. Its state is donated to the next epoch:
        copy what you keep, or save it with `save_fit`.
      resume: the Fit to go on from, as the callback was given it or `load_fit` found it. With the
        other arguments the same, what comes out is what would have without the interruption, bit
        for bit.

    Returns:
      Fit.

    Raises:
      TypeError, ValueError: an argument that does not fit, or values that `check_values` refuses,
        which is asked once for each batch.
      Diverged: max_skipped updates in a row were skipped; the callback is not called again.

    >>> import optax, jaxrnn
    >>> key_init, key_data, key_fit = jax.random.split(jax.random.key(0), 3)
    >>> xs = jax.random.bernoulli(key_data, 0.5, (10, 64, 1)).astype(float)
    >>> parity = Batch(xs, targets=xs[..., 0].cumsum(axis=0).astype(int) % 2)
    >>> params = jaxrnn.init(key_init, input_size=1, hidden_size=16, output_size=2)
    >>> result = fit(key_fit, params, parity, optimizer=optax.adam(1e-2), batch_size=16)
    >>> result.history[-1].train_loss < result.history[0].train_loss
    True
    """
    _check_fit(key, params, train, valid, batch_size, h_0, max_epochs, patience, max_skipped)
    update = make_update(gradient_fn, optimizer)
    result = _start(params, optimizer, h_0, resume)
    if isinstance(train, Batch):
        N = checks.steps_shape(train.xs)[1]
        shuffled_epoch = _make_epoch(update, min(batch_size or N, N))

    def loss_fn(params, batch, h):
        return gradient_fn(params, batch, h)[0]

    state, best, history, _ = result
    lowest, waited = float("inf"), 0
    for row in history:
        lowest, waited = _wait(lowest, waited, row, tolerance)
    norms: list[float] = []
    first = len(history) + 1
    for epoch in range(first, max_epochs + 1):
        if waited >= patience:
            break
        look = partial(_checked, params, h_0) if epoch == first else lambda batches: batches
        if isinstance(train, Batch):
            state, metrics = shuffled_epoch(state, train, jax.random.fold_in(key, epoch))
        else:
            state, metrics = _stream_epoch(update, state, look(train), h_0, max_skipped)
        skipped = _count_skipped(metrics, state.step.item(), norms, max_skipped)
        train_loss = held_out = _mean_loss(metrics).item()
        if valid is not None:
            held_out = evaluate(state.params, look(valid), h_0, loss_fn=loss_fn)
        history.append(Evaluation(epoch, train_loss, held_out, skipped))
        if held_out < lowest:
            best = jax.tree.map(jnp.copy, state.params)
        lowest, waited = _wait(lowest, waited, history[-1], tolerance)
        result = Fit(state, best, history, converged=waited >= patience)
        if callback is not None:
            callback(result)
    return result._replace(converged=waited >= patience)
