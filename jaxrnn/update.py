"""4. The update: the algorithm's own rule, or any optax optimiser, as one jitted step."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from jaxrnn.backward import bptt
from jaxrnn.forward import step_weights, sum_dtype
from jaxrnn.params import Params
from jaxrnn.sequences import Batch

GradientFn = Callable[..., tuple[tuple[Array, Array], Params]]
Optimizer: TypeAlias = Any
"""An `optax.GradientTransformation`, or a rule (params, grads) -> params."""


def sgd(params, grads, learning_rate):
    """Gradient descent, theta <- theta - eta dtheta, on any pytree.

    Args:
      params: theta, a pytree of arrays.
      grads: dtheta, the same.
      learning_rate: eta, a scalar.

    Returns:
      The new theta.

    >>> sgd({"w": jnp.array(1.0)}, {"w": jnp.array(0.5)}, 0.5)["w"].item()
    0.75
    """
    return jax.tree.map(lambda p, d: p - jnp.asarray(learning_rate, p.dtype) * d, params, grads)


class TrainState(NamedTuple):
    """All that an update changes, a pytree.

    Attributes:
      step: batches seen, a scalar; those whose update was skipped are among them.
      params: Params.
      opt_state: the optimiser's state; () for a rule such as `sgd`, which has none.
      h: the hidden state carried from batch to batch, (*batch, H), or None: every batch starts
        from zeros.
      skipped: updates skipped in a row up to now, a scalar; 0 after one that was done.
    """

    step: Array
    params: Params
    opt_state: Any
    h: Array | None = None
    skipped: Array | int = 0


class Metrics(NamedTuple):
    """What an update reports, scalars on the device.

    Attributes:
      loss: the batch's mean loss before the update.
      gradient_norm: the Euclidean norm of the whole gradient, in float32 at least.
      counted: sum(weights * mask), the steps that the mean was taken over.
      skipped: updates skipped in a row, this one included; 0 where this one was done.
    """

    loss: Array
    gradient_norm: Array
    counted: Array
    skipped: Array


class Diverged(ArithmeticError):
    """Training was stopped: one update after the other had to be skipped.

    Attributes:
      step: the batch at which it was stopped.
      skipped: the updates skipped in a row.
      gradient_norms: of the last updates, oldest first.
    """

    def __init__(self, step: int, skipped: int, gradient_norms: Sequence[float]):
        norms = ", ".join(f"{norm:.3g}" for norm in gradient_norms)
        super().__init__(
            f"step {step}: expected loss, gradient and parameters to be finite, got {skipped} "
            f"updates in a row where they are not; gradient norms up to here: {norms}. Try a "
            "smaller learning rate, optax.clip_by_global_norm, or check_values on the data"
        )
        self.step, self.skipped, self.gradient_norms = step, skipped, list(gradient_norms)


def init_state(params: Params, optimizer: Optimizer, h: Array | None = None) -> TrainState:
    """The state before the first update, in memory of its own, since an update donates it.

    >>> from functools import partial
    >>> import jax, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    >>> init_state(params, partial(sgd, learning_rate=0.1)).step.item()
    0
    """
    opt_state = optimizer.init(params) if _is_optax(optimizer) else ()
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(step=zero, params=params, opt_state=opt_state, h=h, skipped=zero)
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)


def _is_optax(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, optax.GradientTransformation)


def _all_finite(tree) -> Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def make_update(
    gradient_fn: GradientFn = bptt, optimizer: Optimizer = None
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Makes the update step: gradient, then optimiser, jitted, with the state donated.

        (L, h_T), grads = gradient_fn(params, batch, h)        params <- optimizer(params, grads)

    A hidden state in the state is carried on from batch to batch; no gradient flows across
    (truncated backpropagation through time; Williams and Peng 1990).

    Where the loss, the gradient's norm, the new parameters or h_T are not finite, the update is
    skipped: parameters, optimiser state and h stay as they were, bit for bit, and `skipped` counts
    on. So nothing is waited for; a loop looks at `skipped` when it likes and raises `Diverged`.

    Args:
      gradient_fn: (params, batch, h_0) -> ((value, h_T), grads): `bptt`, or
        `jax.value_and_grad(sequence_loss, has_aux=True)`, perhaps with activation and loss bound
        by `functools.partial`.
      optimizer: an optax optimiser, or a rule (params, grads) -> params such as
        `functools.partial(sgd, learning_rate=0.1)`. There is no default.

    Returns:
      update: (state, batch) -> (state, Metrics), pure but for the donation: use the state that it
      returns, not the one that it was given.

    Raises:
      TypeError: optimizer is neither.

    >>> from functools import partial
    >>> import jax, jaxrnn
    >>> rule = partial(sgd, learning_rate=0.1)
    >>> update = make_update(bptt, rule)
    >>> state = init_state(jaxrnn.init(jax.random.key(0), 3, 5, 2), rule)
    >>> batch = Batch(xs=jnp.ones((7, 4, 3)), targets=jnp.zeros((7, 4), int))
    >>> state, before = update(state, batch)
    >>> state, after = update(state, batch)
    >>> bool(after.loss < before.loss)
    True
    """
    if not callable(optimizer) and not _is_optax(optimizer):
        raise TypeError(
            f"optimizer: expected an optax optimiser or a rule (params, grads) -> params, got "
            f"{optimizer!r}"
        )

    def apply(params, grads, opt_state):
        if not _is_optax(optimizer):
            return optimizer(params, grads), ()
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def update(state, batch):
        (value, h_T), grads = gradient_fn(state.params, batch, state.h)
        dtype = sum_dtype(state.params)
        norm = optax.tree.norm(jax.tree.map(lambda d: d.astype(dtype), grads))
        params, opt_state = apply(state.params, grads, state.opt_state)
        h = None if state.h is None else lax.stop_gradient(h_T)

        finite = _all_finite((value, norm, params, h))
        before, after = (state.params, state.opt_state, state.h), (params, opt_state, h)
        params, opt_state, h = jax.tree.map(partial(jnp.where, finite), after, before)
        skipped = jnp.where(finite, 0, state.skipped + 1)
        metrics = Metrics(value, norm, step_weights(batch, dtype).sum(), skipped)
        return TrainState(state.step + 1, params, opt_state, h, skipped), metrics

    return jax.jit(update, donate_argnums=0)
