"""Gradient functions: their type, the check of what they return, and reparametrisation."""

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn import checks
from jaxrnn.params import at_least_float32
from jaxrnn.sharding import match_varying_axes

PyTree: TypeAlias = Any
"""A pytree of arrays."""

GradientFn: TypeAlias = Callable[..., tuple[tuple[Array, PyTree], PyTree]]
"""A function that returns a loss, the last state, and the gradient with respect to the parameters:

    gradient_fn(params, batch, h_0)           -> ((value, h_T), grads)
    gradient_fn(params, batch, h_0, key=key)  -> the same, with dropout or noise drawn from the key

`bptt` is one, and so is `jax.value_and_grad(loss, has_aux=True)` of any function `loss(params,
batch, h_0) -> (value, h_T)`. Parameters, gradient and state are any pytrees; the state is None if
none is carried. Without a key the function must be deterministic: `fit` calls it so to evaluate. It
is called with a key only if `init_state` or `fit` was given one.
"""


def value_dtype(params: PyTree) -> jnp.dtype:
    """The dtype of the loss and of sums over time: that of the parameters, float32 at least."""
    return at_least_float32(jnp.result_type(*jax.tree.leaves(params)))


def call_gradient(
    gradient_fn: GradientFn, params: PyTree, batch: Any, h: PyTree, /, **keywords: Any
) -> tuple[tuple[Array, PyTree], PyTree]:
    """What gradient_fn(params, batch, h) returns.

    Raises TypeError unless that is a scalar value, an h_T like h where h is carried, and a gradient
    like params.
    """
    if keywords and not takes(gradient_fn, "key"):
        raise TypeError(
            f"gradient_fn: expected one that takes a key, since one was given, got {gradient_fn!r}"
        )
    result: Any = gradient_fn(params, batch, h, **keywords)
    match result:
        case ((value, h_T), grads) if checks.is_scalar(value):
            if alike(grads, params) and (h is None or alike(h_T, h)):
                return (value, h_T), grads
    expected = (((), "h_T" if h is None else _shapes(h)), _shapes(params))
    raise TypeError(
        f"gradient_fn: expected ((value, h_T), grads) of shapes {expected}, got {_shapes(result)}"
    )


def takes(function: Callable[..., Any], keyword: str) -> bool:
    """Whether a function takes an argument of this name, as far as its signature tells."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # of a builtin
        return True
    return keyword in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


class SameObject:
    """A cache key that compares functions by identity, and keeps them alive.

    Functions that compare equal may differ: two bound methods of an object that has changed do.
    """

    def __init__(self, *functions: Any):
        self.functions = functions

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SameObject):
            return NotImplemented
        return [*map(id, self.functions)] == [*map(id, other.functions)]

    def __hash__(self) -> int:
        return hash((*map(id, self.functions),))


def alike(tree: PyTree, like: PyTree, kind: Callable[[Any], Any] = jnp.shape) -> bool:
    """Whether two pytrees have the same structure, and leaves of the same kind."""
    structures: list[Any] = [jax.tree.structure(tree), jax.tree.structure(like)]
    if structures[0] != structures[1]:  # a leaf of another structure may have no shape
        return False
    return jax.tree.all(jax.tree.map(lambda a, b: kind(a) == kind(b), tree, like))


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.shape, tree)


def value_fn(
    gradient_fn: Callable[[PyTree], tuple[tuple[Array, PyTree], PyTree]],
) -> Callable[[PyTree], Array]:
    """The loss as a function of params, with gradient_fn as its derivative, for line searches."""

    @jax.custom_vjp
    def value(params: PyTree) -> Array:
        return gradient_fn(params)[0][0]

    def forward(params: PyTree) -> tuple[Array, PyTree]:
        (value, _), grads = gradient_fn(params)
        return value, grads

    def backward(grads: PyTree, d_value: Array) -> tuple[PyTree]:
        return (jax.tree.map(lambda d: jnp.asarray(d_value, d.dtype) * d, grads),)

    value.defvjp(forward, backward)
    return value


def reparametrized(gradient_fn: GradientFn, to_params: Callable[[PyTree], PyTree]) -> GradientFn:
    """The gradient with respect to theta, where params = to_params(theta).

        dtheta = J^T dparams        J = the Jacobian of to_params at theta

    Constraints that hold at every update, such as signs (Dale's law), sparsity, frozen or low-rank
    weights, are functions of an unconstrained theta. `gradient_fn` is called once, for dparams. The
    chain rule is applied outside the loop over time.

    Args:
      gradient_fn: (params, batch, h) -> ((value, h_T), grads): `bptt` or a function like it.
      to_params: theta -> params, differentiable. Both are pytrees of floating-point arrays.

    Returns:
      The gradient function of theta, for `make_update`, `fit` and `data_parallel`.

    Raises:
      TypeError: an argument is not a function; when called, if to_params does not return
        floating-point arrays, or gradient_fn not ((value, h_T), grads).

    >>> import jax, jax.numpy as jnp, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> excitatory = lambda theta: theta._replace(W_h=jnp.abs(theta.W_h))
    >>> batch = jaxrnn.Batch(xs=jnp.ones((7, 4, 3)), targets=jnp.zeros((7, 4), int))
    >>> (value, h_T), grads = reparametrized(jaxrnn.bptt, excitatory)(params, batch)
    >>> auto = jax.grad(lambda theta: jaxrnn.sequence_loss(excitatory(theta), batch)[0])(params)
    >>> bool(jnp.allclose(grads.W_h, auto.W_h, atol=1e-6))
    True
    """
    for name, function in (("gradient_fn", gradient_fn), ("to_params", to_params)):
        checks.check_function(name, function)

    def gradient(theta: PyTree, batch: Any, h_0: PyTree = None, **keywords: Any) -> Any:
        theta = match_varying_axes(theta, (theta, batch, h_0))  # as the gradient does

        def varying(theta: PyTree) -> PyTree:  # also the weights that theta does not determine
            params = to_params(theta)
            checks.check_float_tree("to_params(theta)", params)
            return match_varying_axes(params, (theta, batch, h_0))

        params, pullback = jax.vjp(varying, theta)
        (value, h_T), grads = call_gradient(gradient_fn, params, batch, h_0, **keywords)
        (dtheta,) = pullback(jax.tree.map(lambda d, leaf: d.astype(leaf.dtype), grads, params))
        return (value, h_T), dtheta

    return gradient
