"""The gradient functions that training takes: `bptt` and every function like it."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from jaxrnn.params import at_least_float32

PyTree: TypeAlias = Any
"""A pytree of arrays."""

GradientFn: TypeAlias = Callable[..., tuple[tuple[Array, PyTree], PyTree]]
"""A function that returns a loss, the last state, and the gradient with respect to the parameters:

    gradient_fn(params, batch, h)           -> ((value, h_T), grads)
    gradient_fn(params, batch, h, key=key)  -> the same, with dropout or noise drawn from the key

`bptt` is one, and so is `jax.value_and_grad(loss, has_aux=True)` of any function
`loss(params, batch, h) -> (value, h_T)`. Parameters, gradient and state are any pytrees; the state
is None if none is carried. Without a key the function is deterministic, and `fit` evaluates with
it. It is called with a key only if `init_state` or `fit` was given one.
"""


def value_dtype(params: PyTree) -> jnp.dtype:
    """The dtype of the loss and of sums over time: that of the parameters, float32 at least."""
    return at_least_float32(jnp.result_type(*jax.tree.leaves(params)))
