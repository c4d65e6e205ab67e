"""4. The update: the algorithm's own rule, or any optax optimiser, as one jitted step."""

from collections.abc import Callable
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
      step: updates done, a scalar.
      params: Params.
      opt_state: the optimiser's state; () for a rule such as `sgd`, which has none.
      h: the hidden state carried from batch to batch, (*batch, H), or None: every batch starts
        from zeros.
    """

    step: Array
    params: Params
    opt_state: Any
    h: Array | None = None


class Metrics(NamedTuple):
    """What an update reports, scalars on the device.

    Attributes:
      loss: the batch's mean loss before the update.
      gradient_norm: the Euclidean norm of the whole gradient.
      counted: sum(weights * mask), the steps that the mean was taken over.
    """

    loss: Array
    gradient_norm: Array
    counted: Array


def init_state(params: Params, optimizer: Optimizer, h: Array | None = None) -> TrainState:
    """The state before the first update, in memory of its own, since an update donates it.

    >>> from functools import partial
    >>> import jax, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    >>> init_state(params, partial(sgd, learning_rate=0.1)).step.item()
    0
    """
    opt_state = optimizer.init(params) if _is_optax(optimizer) else ()
    state = TrainState(jnp.zeros((), jnp.int32), params, opt_state, h)
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)


def _is_optax(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, optax.GradientTransformation)


def make_update(
    gradient_fn: GradientFn = bptt, optimizer: Optimizer = None
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Makes the update step: gradient, then optimiser, jitted, with the state donated.

        (L, h_T), grads = gradient_fn(params, batch, h)        params <- optimizer(params, grads)

    A hidden state in the state is carried on from batch to batch; no gradient flows across
    (truncated backpropagation through time; Williams and Peng 1990).

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
        params, opt_state = apply(state.params, grads, state.opt_state)
        h = None if state.h is None else lax.stop_gradient(h_T)
        counted = step_weights(batch, sum_dtype(params)).sum()
        metrics = Metrics(value, optax.tree.norm(grads), counted)
        return TrainState(state.step + 1, params, opt_state, h), metrics

    return jax.jit(update, donate_argnums=0)
