"""The activation f of the hidden units, and its derivative f'."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxrnn import checks
from jaxrnn.sharding import full_as


class Activation(NamedTuple):
    """A pair of pure functions: f, and f' in terms of the value of f.

    Five are given: `tanh`, `relu`, `sigmoid`, `softplus` and `identity`. Their derivatives follow
    from their values, so the backward pass needs the hidden states and not the pre-activations. For
    other functions, such as `Activation(jax.nn.gelu)`, autodiff takes f' at pre-activations that
    are computed again.

    Attributes:
      f: z -> h = f(z), elementwise at any rank, keeps the dtype.
      df: f(z) -> f'(z), elementwise, keeps the dtype; None if f' does not follow from f(z).

    >>> import jax.numpy as jnp
    >>> h = tanh.f(jnp.array(0.5))
    >>> bool(jnp.allclose(tanh.df(h), 1 - jnp.tanh(0.5) ** 2))
    True
    """

    f: Callable[[Array], Array]
    df: Callable[[Array], Array] | None = None


def check_activation(activation: Any, dtype: DTypeLike) -> None:
    """Raises TypeError or ValueError unless activation is an Activation that keeps shape and dtype.

    The functions are traced, not computed.
    """
    if not isinstance(activation, Activation):
        raise TypeError(f"activation: expected an Activation(f, df), got {activation!r}")
    checks.check_function("activation.f", activation.f)
    if activation.df is not None:
        checks.check_function("activation.df", activation.df)
    dtype = jax.dtypes.canonicalize_dtype(dtype)  # NumPy's float64 is float32 without x64
    for name, function in activation._asdict().items():
        if function is not None:
            _check_elementwise(f"activation.{name}", function, dtype)


def _check_elementwise(name: str, function: Callable[[Array], Array], dtype: DTypeLike) -> None:
    zs = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((1, 2), ())]
    try:
        value, _ = (jax.eval_shape(function, z) for z in zs)
    except Exception as error:  # softmax and others that read an axis fail for one number
        raise ValueError(
            f"{name}: expected an elementwise function, got {function!r}, which fails: {error}"
        ) from error
    checks.check_shape(name, value, zs[0].shape, "elementwise")
    if value.dtype != zs[0].dtype:
        raise TypeError(f"{name}: expected dtype {zs[0].dtype}, got {value.dtype}")


def autodiff_f_prime(f: Callable[[Array], Array], z: Array) -> Array:
    """f'(z) of an elementwise f, which may have a `custom_vjp`, as a surrogate gradient has."""
    return jnp.asarray(jax.vjp(f, z)[1](full_as(z, 1))[0])


def has_traced_values(function: Any, *arguments: Any) -> bool:
    """Whether a function depends on values that are being traced, such as a slope that is learned.

    It is traced with arguments of the shapes and dtypes of these.
    """
    # A new object: JAX caches what it traces by function, and this one may read other values now.
    _, traced = jax.closure_convert(partial(function), *arguments)
    return bool(traced)


# Functions of this module can be pickled, unlike lambdas and those that JAX wraps.
def _tanh(z: Array) -> Array:
    return jnp.tanh(z)


def _relu(z: Array) -> Array:
    return jnp.where(z <= 0, 0, z)  # jnp.maximum of NaN and 0 is 0 in the GPU kernel


def _sigmoid(z: Array) -> Array:
    return jax.nn.sigmoid(z)


def _softplus(z: Array) -> Array:
    return jax.nn.softplus(z)


def _identity(z: Array) -> Array:
    return z


def _tanh_prime(h: Array) -> Array:
    return 1 - h * h


def _relu_prime(h: Array) -> Array:
    return (h > 0).astype(h.dtype)


def _sigmoid_prime(h: Array) -> Array:
    return h * (1 - h)


def _softplus_prime(h: Array) -> Array:
    return -jnp.expm1(-h)


def _identity_prime(h: Array) -> Array:
    return jnp.ones_like(h)


tanh = Activation(f=_tanh, df=_tanh_prime)
relu = Activation(f=_relu, df=_relu_prime)
sigmoid = Activation(f=_sigmoid, df=_sigmoid_prime)
softplus = Activation(f=_softplus, df=_softplus_prime)
identity = Activation(f=_identity, df=_identity_prime)
