"""Checks of rank, shape, dtype and static values, made while tracing, and their messages.

Each message names the argument, what was expected and what came. The check of a type stands beside
the type; `check_values` checks values on the host.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.typing import DTypeLike


def is_integer(x: Any) -> bool:
    """Whether the array has an integer dtype."""
    return bool(jnp.issubdtype(x.dtype, jnp.integer))


def is_float(dtype: DTypeLike) -> bool:
    """Whether the dtype is a floating-point one."""
    return bool(jnp.issubdtype(dtype, jnp.floating))


def is_key(x: Any) -> bool:
    """Whether the array holds keys from `jax.random.key`."""
    return bool(jnp.issubdtype(x.dtype, jax.dtypes.prng_key))


def to_numpy(x: Any) -> np.ndarray:
    """The values of an array; where it spans processes, of all its shards.

    Each of these processes must call it, and gets the same values.
    """
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


@contextmanager
def noted(note: str) -> Iterator[None]:
    """Adds a note to an error, such as the name of the argument."""
    try:
        yield
    except Exception as error:
        error.add_note(note)
        raise


def check_has_values(name: str, tree: Any) -> None:
    """Raises TypeError if an array of the tree is traced."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
        raise TypeError(
            f"{name}: expected arrays with values, got traced ones: call the function outside of "
            "jit, grad and vmap"
        )


def check_array(name: str, x: Any, expected: str = "an array") -> None:
    """Raises TypeError unless x is an array of JAX or NumPy, or converts itself to one."""
    if not isinstance(x, jax.Array | np.ndarray | np.generic) and not hasattr(x, "__jax_array__"):
        kind = f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")
        raise TypeError(f"{name}: expected {expected}, got {kind}")


def check_float_array(name: str, x: Any, expected: str = "an array") -> None:
    """Raises TypeError unless x is an array of floating-point numbers."""
    check_array(name, x, expected)
    if not is_float(x.dtype):
        raise TypeError(f"{name}: expected a floating-point dtype, got {x.dtype}")


def check_float_tree(name: str, tree: Any) -> None:
    """Raises TypeError unless tree has leaves, all arrays of floating-point numbers."""
    leaves = jax.tree.leaves_with_path(tree)
    if not leaves:
        raise TypeError(
            f"{name}: expected a pytree with at least one array, got an empty {type(tree).__name__}"
        )
    for path, leaf in leaves:
        check_float_array(name + jax.tree_util.keystr(path), leaf)


def check_shape(name: str, x: Any, shape: Sequence[int], meaning: str) -> None:
    """Raises TypeError or ValueError unless x has this shape."""
    if not hasattr(x, "shape"):
        raise TypeError(f"{name}: expected an array, got {type(x).__name__}")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)} ({meaning}), got {x.shape}")


def check_function(name: str, function: Any) -> None:
    """Raises TypeError unless function can be called, with traced arrays."""
    if not callable(function):
        raise TypeError(f"{name}: expected a function, got {function!r}")
    if isinstance(function, np.ufunc):
        raise TypeError(f"{name}: expected a function of JAX arrays, got NumPy's {function!r}")


def is_scalar(x: Any) -> bool:
    """Whether x is one number or an array of rank 0, and no container of them."""
    return isinstance(x, Array | np.ndarray | Real) and getattr(x, "shape", ()) == ()


def check_scalar(name: str, x: Any) -> None:
    """Raises TypeError unless x is one number, which may be an array, also a traced one."""
    if not is_scalar(x):
        raise TypeError(f"{name}: expected a number, got {x!r}")


def check_number(name: str, number: Any) -> None:
    """Raises TypeError unless number is one, of Python or NumPy."""
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"{name}: expected a number, got {number!r}")


def check_positive(name: str, number: Any) -> None:
    """Raises TypeError or ValueError unless number is finite and above 0."""
    check_number(name, number)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: expected above 0 and finite, got {number}")


def check_size(name: str, size: Any, minimum: int = 1) -> None:
    """Raises TypeError or ValueError unless size is an integer of at least `minimum`."""
    if isinstance(size, bool) or not isinstance(size, int | np.integer):
        raise TypeError(f"{name}: expected an integer, got {size!r}")
    if size < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {size}")


def check_key(name: str, key: Any) -> None:
    """Raises TypeError unless key is one key from `jax.random.key`."""
    is_array = hasattr(key, "dtype")
    if not is_array or not is_key(key) or key.shape != ():
        got = f"{key.dtype} of shape {key.shape}" if is_array else repr(key)
        raise TypeError(f"{name}: expected one key from jax.random.key, got {got}")


def first_place(condition: np.ndarray) -> tuple[int, ...] | None:
    """The first index at which the condition is True, or None."""
    if not condition.any():
        return None
    return tuple(int(i) for i in np.unravel_index(condition.argmax(), condition.shape))


def check_range(name: str, values: np.ndarray, valid: Any, size: int, meaning: str) -> None:
    """Raises ValueError unless the valid values, on the host, lie in [0, size)."""
    wrong = ((values < 0) | (values >= size)) & valid
    first = first_place(wrong)
    if first is not None:
        raise ValueError(
            f"{name}: expected integers in [0, {size}) ({meaning}), got {int(values[first])} at "
            f"{first}; {wrong.sum()} of {values.size} are outside"
        )
