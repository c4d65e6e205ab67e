"""4. The update: the rule of gradient descent, or any optax optimiser, as one jitted step."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.extend.core import get_opaque_trace_state

from jaxrnn import checks
from jaxrnn.batches import Batch, check_is_batch, step_weights
from jaxrnn.gradients import GradientFn, PyTree, alike, call_gradient, takes, value_dtype, value_fn
from jaxrnn.sharding import split_as

Optimizer: TypeAlias = optax.GradientTransformation | Callable[[PyTree, PyTree], PyTree]
"""An optax optimiser, or a rule (params, grads) -> params."""


def sgd(params: PyTree, grads: PyTree, learning_rate: float | Array) -> PyTree:
    """Gradient descent on any pytree.

        theta <- theta - eta dtheta

    Args:
      params: theta, a pytree of arrays.
      grads: dtheta, the same.
      learning_rate: eta, a scalar.

    Returns:
      The new theta, in the dtypes of params.

    Raises:
      TypeError, ValueError: learning_rate is not a number, or a gradient has another shape.

    >>> sgd({"w": jnp.array(1.0)}, {"w": jnp.array(0.5)}, 0.5)["w"].item()
    0.75
    """
    checks.check_scalar("learning_rate", learning_rate)

    def descend(p: Array, d: Array) -> Array:
        checks.check_shape("grads", d, jnp.shape(p), "as in params")
        return (p - jnp.asarray(learning_rate, p.dtype) * d).astype(p.dtype)

    return jax.tree.map(descend, params, grads)


class TrainState(NamedTuple):
    """Everything that an update changes, a pytree.

    Attributes:
      step: batches seen, a scalar; skipped updates are counted too.
      params: the parameters, any pytree of arrays.
      opt_state: the state of the optimiser; () for a rule such as `sgd`, which has none.
      h: the hidden state carried from batch to batch, any pytree such as (*batch, H); None if each
        batch starts from zeros.
      skipped: consecutive updates skipped, a scalar; 0 after an update that was applied.
      key: the key that the randomness of each update is drawn from, or None.
    """

    step: Array
    params: PyTree
    opt_state: Any
    h: PyTree = None
    skipped: Array | int = 0
    key: Array | None = None


class Metrics(NamedTuple):
    """The metrics of an update, scalars on the device.

    Attributes:
      loss: the mean loss of the batch before the update.
      gradient_norm: the Euclidean norm of the whole gradient, in float32 at least.
      counted: sum(weights * mask), by which the mean divides.
      skipped: consecutive updates skipped, this one included; 0 if this one was applied.
    """

    loss: Array
    gradient_norm: Array
    counted: Array
    skipped: Array


def init_state(
    params: PyTree, optimizer: Optimizer, h: PyTree = None, *, key: Array | None = None
) -> TrainState:
    """The state before the first update. Arrays are copied, because an update donates its state.

    Args:
      params: the initial parameters, any pytree of floating-point arrays.
      optimizer: an optax optimiser, or a rule (params, grads) -> params.
      h: the hidden state before the first batch, to be carried from batch to batch; None starts
        each batch from zeros.
      key: a key for a random gradient function. Update n calls
        `gradient_fn(params, batch, h, key=jax.random.fold_in(key, n))`.

    Returns:
      TrainState.

    Raises:
      TypeError: a leaf is not a floating-point array, optimizer is not an Optimizer, or key not a
        key.

    >>> from functools import partial
    >>> import jax, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    >>> init_state(params, partial(sgd, learning_rate=0.1)).step.item()
    0
    """
    checks.check_float_tree("params", params)
    if key is not None:
        checks.check_key("key", key)
    check_optimizer(optimizer)
    with checks.noted(_IN_OPTIMIZER):
        opt_state = optimizer.init(params) if _is_optax(optimizer) else ()  # type: ignore[union-attr]
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, params, opt_state, h, skipped=zero, key=key)
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)


with jax.ensure_compile_time_eval():  # outside of any transformation
    _EAGER = get_opaque_trace_state()
_IN_OPTIMIZER = "The error is in the optimizer."
_CALL_FIRST = ". Call the optax function first: optax.adam(1e-3)"


def check_optimizer(optimizer: Any) -> None:
    """Raises TypeError unless optimizer is an optax optimiser or a function that may be a rule."""
    if _is_optax(optimizer):
        return
    # Called as a rule, optax.adam fails somewhere inside optax, or returns an optimiser.
    uncalled = str(getattr(optimizer, "__module__", "")).startswith("optax.")
    if uncalled or not callable(optimizer):
        raise TypeError(
            "optimizer: expected an optax optimiser or a rule (params, grads) -> params, got "
            f"{optimizer!r}{_CALL_FIRST if uncalled else ''}"
        )


def _is_optax(optimizer: Any) -> bool:
    return isinstance(optimizer, optax.GradientTransformation | optax.MultiSteps)


def _apply(
    optimizer: Any, params: PyTree, grads: PyTree, opt_state: Any, **extra: Any
) -> tuple[PyTree, Any]:
    """The new parameters and optimiser state. The optimiser gets what it takes of `extra`."""
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)
    if _is_optax(optimizer):
        optimizer = optax.with_extra_args_support(optimizer)
        extra = {name: x for name, x in extra.items() if takes(optimizer.update, name)}
        updates, opt_state = optimizer.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state
    new = optimizer(params, grads)
    if not alike(new, params, lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf))):
        raise TypeError(
            "optimizer: expected a rule that returns new parameters of the same shapes and dtypes, "
            f"got {new!r} from {optimizer!r}{_CALL_FIRST if _is_optax(new) else ''}"
        )
    return new, opt_state


def _all_finite(tree: PyTree) -> Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _in_range(after: PyTree, before: PyTree) -> Array:
    """No number of a float16 state, such as a mean of squares, has left the range of float16."""
    pairs = zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)
    stay = [
        (jnp.isfinite(new) | ~jnp.isfinite(old)).all()
        for new, old in pairs
        if jnp.asarray(old).dtype == jnp.float16
    ]
    return jnp.array(stay, bool).all()


def _select(condition: Array, new: Array, old: Array) -> Array:
    """new or old, in the dtype of the old: some optimisers widen their state."""
    new, old = jnp.asarray(new), jnp.asarray(old)
    # A key has no astype.
    return jnp.where(condition, new if new.dtype == old.dtype else new.astype(old.dtype), old)


def make_update(
    gradient_fn: GradientFn, optimizer: Optimizer
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Makes the update step: the gradient, then the optimiser, jitted, with the state donated.

        (L, h_T), grads = gradient_fn(params, batch, h)        params <- optimizer(params, grads)

    A hidden state in the TrainState is carried from batch to batch. No gradient flows across
    (truncated backpropagation through time; Williams and Peng 1990).

    If the loss, the norm of the gradient, the new parameters or a carried h_T are not finite, or
    float16 cannot hold the optimiser's state, the update is skipped: parameters, optimiser state
    and h stay as they are, bit for bit, and `skipped` counts the consecutive skips. A derivative
    through a skipped update is NaN. There is no host synchronisation: poll `skipped` when
    convenient. A batch in which no step counts is an update by a gradient of zero, which moves the
    parameters if the optimiser has momentum or decay.

    Args:
      gradient_fn: (params, batch, h) -> ((value, h_T), grads) for any pytree of parameters: `bptt`,
        or `jax.value_and_grad(loss, has_aux=True)`, with options bound by `functools.partial`. If
        the state has a key, the function is called with `key=jax.random.fold_in(state.key, step)`.
      optimizer: an optax optimiser, or a rule (params, grads) -> params such as
        `functools.partial(sgd, learning_rate=0.1)`. Optimisers that take `value`, `grad` and
        `value_fn`, such as `optax.lbfgs`, get them.

    Returns:
      update: (state, batch) -> (state, Metrics). It donates the state, so use the one it returns.
      Inside `jit`, `vmap`, `grad` or `scan` nothing is donated. JAX may read NumPy arrays after the
      call returns, so do not write to those of the batch.

    Raises:
      TypeError: gradient_fn is not a function, or optimizer neither an optax optimiser nor a
        function; when called, if the state is not a TrainState or the batch not a Batch, or if
        gradient_fn does not return ((value, h_T), grads), or the rule not parameters of the same
        shapes and dtypes.

    >>> from functools import partial
    >>> import jax, jaxrnn
    >>> rule = partial(sgd, learning_rate=0.1)
    >>> update = make_update(jaxrnn.bptt, rule)
    >>> state = init_state(jaxrnn.init(jax.random.key(0), 3, 5, 2), rule)
    >>> batch = Batch(xs=jnp.ones((7, 4, 3)), targets=jnp.zeros((7, 4), int))
    >>> state, before = update(state, batch)
    >>> state, after = update(state, batch)
    >>> bool(after.loss < before.loss)
    True
    """
    checks.check_function("gradient_fn", gradient_fn)
    check_optimizer(optimizer)

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        keywords = {} if state.key is None else {"key": jax.random.fold_in(state.key, state.step)}

        def gradient(params: PyTree) -> tuple[tuple[Array, PyTree], PyTree]:
            return call_gradient(gradient_fn, params, batch, state.h, **keywords)

        (value, h_T), grads = gradient(state.params)
        dtype = value_dtype(state.params)
        norm = optax.tree.norm(jax.tree.map(lambda d: d.astype(dtype), grads))
        extra = {"value": value, "grad": grads, "value_fn": value_fn(gradient)}
        with checks.noted(_IN_OPTIMIZER):
            params, opt_state = _apply(optimizer, state.params, grads, state.opt_state, **extra)
        h = None if state.h is None else lax.stop_gradient(h_T)
        h = jax.tree.map(lambda new, old: split_as(old, new.astype(old.dtype)), h, state.h)

        finite = _all_finite((value, norm, params, h)) & _in_range(opt_state, state.opt_state)
        before, after = (state.params, state.opt_state, state.h), (params, opt_state, h)
        params, opt_state, h = jax.tree.map(partial(_select, finite), after, before)
        skipped = jnp.where(finite, 0, state.skipped + 1)
        metrics = Metrics(value, norm, step_weights(batch, dtype).sum(), skipped)
        return TrainState(state.step + 1, params, opt_state, h, skipped, state.key), metrics

    jitted, donating = jax.jit(update), jax.jit(update, donate_argnums=0)

    @wraps(update)
    def donate_unless_traced(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if not isinstance(state, TrainState):
            raise TypeError(f"state: expected a TrainState, got {type(state).__name__}")
        check_is_batch(batch)
        # A transformation may use the state again, or map something else.
        eager = get_opaque_trace_state() == _EAGER
        return (donating if eager else jitted)(state, batch)

    return donate_unless_traced
