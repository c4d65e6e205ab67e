"""1. Initialisation: the parameters and their initial values."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jaxrnn import checks

AnyArray: TypeAlias = Array | np.ndarray
"""An array of JAX, or of NumPy, which JAX converts."""

Initializer: TypeAlias = Callable[..., Array]


class Params(NamedTuple):
    """The parameters of the network, a pytree. A gradient has the same type.

        z_t = W_x x_t + W_h h_{t-1} + b_h        y_t = W_y h_t + b_y

    Attributes:
      W_x: (H, I), input to hidden.
      W_h: (H, H), hidden to hidden.
      W_y: (O, H), hidden to output.
      b_h: (H,), hidden bias.
      b_y: (O,), output bias.
    """

    W_x: Array
    W_h: Array
    W_y: Array
    b_h: Array
    b_y: Array


def check_params(params: Any) -> None:
    """Raises TypeError or ValueError unless params are Params of one dtype and fitting shapes."""
    if not isinstance(params, Params):
        raise TypeError(f"params: expected Params, got {type(params).__name__}")
    for name, leaf in params._asdict().items():
        checks.check_float_array(f"params.{name}", leaf)
    for name, leaf in params._asdict().items():
        rank = 2 if name.startswith("W") else 1
        if leaf.ndim != rank:
            raise ValueError(f"params.{name}: expected rank {rank}, got shape {leaf.shape}")
        if leaf.dtype != params.W_h.dtype:
            raise TypeError(
                f"params.{name}: expected {params.W_h.dtype} as W_h has, got {leaf.dtype}"
            )
    H, I, O = params.W_h.shape[0], params.W_x.shape[1], params.W_y.shape[0]
    checks.check_shape("params.W_h", params.W_h, (H, H), "H, H")
    if H == 0:
        raise ValueError("params.W_h: expected at least one unit, got shape (0, 0)")
    checks.check_shape("params.W_x", params.W_x, (H, I), "H, I with H of W_h")
    checks.check_shape("params.W_y", params.W_y, (O, H), "O, H with H of W_h")
    checks.check_shape("params.b_h", params.b_h, (H,), "H of W_h")
    checks.check_shape("params.b_y", params.b_y, (O,), "O of W_y")


def check_leak(leak: Any, params: Params) -> None:
    """Raises TypeError or ValueError unless leak is None, or in (0, 1], a scalar or (H,).

    Below the dtype's eps, the rounding error of 1 - alpha may be alpha / 4 or more; at the
    smallest alpha, 1 - alpha is 1. The values of a traced array are not checked.
    """
    if leak is None:
        return
    if isinstance(leak, bool) or not isinstance(leak, float | int):
        checks.check_float_array("leak", leak, "a number or an array")
    shape, H = np.shape(leak), params.W_h.shape[0]
    if shape not in ((), (H,)):
        raise ValueError(f"leak: expected a scalar or shape ({H},) (H of W_h), got {shape}")
    if not isinstance(leak, jax.core.Tracer):
        dtype = state_dtype(params)
        values = np.atleast_1d(np.asarray(leak, np.float64))
        wrong = values[~((values > 0) & (values <= 1))]
        if wrong.size:
            raise ValueError(f"leak: expected values in (0, 1], got {wrong[0]}")
        eps, smallest = float(jnp.finfo(dtype).eps), values.min()
        if smallest < eps:
            raise ValueError(
                f"leak: expected values of at least {eps:.2g}, because 1 - alpha may be rounded "
                f"in {dtype}, got {smallest}"
            )


def state_dtype(params: Params) -> jnp.dtype:
    """The dtype of states and outputs: that of the parameters, which JAX narrows without x64."""
    return jax.dtypes.canonicalize_dtype(params.W_h.dtype)


def as_leak(params: Params, leak: float | AnyArray | None) -> Array | None:
    """The leak as an array of the parameters' dtype."""
    return None if leak is None else jnp.asarray(leak, state_dtype(params))


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of sums over time: the given one if it has at least 32 bits, else float32.

    Without x64, float64 is float32.
    """
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def scaled_identity(scale: float = 1.0) -> Initializer:
    """W_h = scale * identity. With ReLU and scale 1, the IRNN (Le, Jaitly, Hinton 2015).

    Args:
      scale: the diagonal of W_h.

    Returns:
      (key, shape, dtype) -> W_h, for `init(..., W_h_init=)`. The key is not used.

    >>> scaled_identity(0.5)(None, (2, 2)).tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """

    def initializer(
        key: Array | None, shape: tuple[int, int], dtype: DTypeLike = jnp.float32
    ) -> Array:
        del key  # the initial value is not random
        return jnp.asarray(scale, dtype) * jnp.eye(*shape, dtype=dtype)

    return initializer


_fan_in = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=0)
_orthogonal = jax.nn.initializers.orthogonal()


def init(
    key: Array,
    input_size: int,
    hidden_size: int,
    output_size: int,
    *,
    W_h_init: Initializer = _orthogonal,
    dtype: DTypeLike = jnp.float32,
) -> Params:
    """Draws the parameters.

    W_x ~ N(0, 1/I), W_y ~ N(0, 1/H), and the biases are zero. By default W_h is orthogonal, so
    multiplication by it preserves the norm of a state (Saxe, McClelland, Ganguli 2013).

    Args:
      key: a key from `jax.random.key`.
      input_size: I, the features of x_t, or the number of tokens.
      hidden_size: H.
      output_size: O.
      W_h_init: (key, (H, H), dtype) -> W_h, such as `jax.nn.initializers.orthogonal(scale=0.9)`,
        whose spectral radius is 0.9, or `scaled_identity()`.
      dtype: dtype of the parameters, states and outputs. Losses are float32 at least.

    Returns:
      Params.

    Raises:
      TypeError: a size is not an integer, the key is not a key, W_h_init is not a function that
        returns floats, or the dtype is not a float.
      ValueError: a size is below 1, or W_h_init returns another shape.

    >>> import jax, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> [leaf.shape for leaf in params]
    [(5, 3), (5, 5), (2, 5), (5,), (2,)]
    """
    checks.check_size("input_size", input_size)
    checks.check_size("hidden_size", hidden_size)
    checks.check_size("output_size", output_size)
    checks.check_function("W_h_init", W_h_init)
    if not checks.is_float(dtype):
        raise TypeError(f"dtype: expected a floating-point dtype, got {jnp.dtype(dtype).name}")
    checks.check_key("key", key)

    key_x, key_h, key_y = jax.random.split(key, 3)
    draw_dtype = at_least_float32(dtype)  # QR factorisation needs at least float32
    W_h = W_h_init(key_h, (hidden_size, hidden_size), draw_dtype)
    checks.check_float_array("W_h_init(key, (H, H), dtype)", W_h)
    checks.check_shape("W_h_init(key, (H, H), dtype)", W_h, (hidden_size, hidden_size), "H, H")
    drawn = Params(
        W_x=_fan_in(key_x, (hidden_size, input_size), draw_dtype),
        W_h=W_h,
        W_y=_fan_in(key_y, (output_size, hidden_size), draw_dtype),
        b_h=jnp.zeros(hidden_size, draw_dtype),
        b_y=jnp.zeros(output_size, draw_dtype),
    )
    params: Params = jax.tree.map(lambda leaf: leaf.astype(dtype), drawn)
    check_params(params)
    return params
