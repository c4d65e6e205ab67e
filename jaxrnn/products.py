"""The products with the weights: of all inputs and outputs at once, and with W_h in the loops."""

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrnn import checks
from jaxrnn.batches import where_exists
from jaxrnn.params import AnyArray, Params, at_least_float32
from jaxrnn.sharding import explicit_sharding


def input_product(params: Params, xs: AnyArray) -> Array:
    """W_x x, for one step or for all at once. A token x selects a column of W_x."""
    if checks.is_integer(xs):
        return select_rows(params.W_x.T, jnp.asarray(xs))
    dtype = jax.dtypes.canonicalize_dtype(params.W_x.dtype)
    return jnp.asarray(xs, dtype) @ params.W_x.T


def input_zs(
    params: Params,
    xs: AnyArray,
    drive: AnyArray | None = None,
    mask: AnyArray | None = None,
    *,
    bias: bool = True,
) -> Array:
    """The part of z_t that does not depend on h_{t-1}: W_x x_t + drive_t, plus b_h if `bias`."""
    zs_x = input_product(params, where_exists(mask, xs))
    zs_x = add_bias(zs_x, params.b_h) if bias else zs_x
    return zs_x if drive is None else zs_x + where_exists(mask, drive.astype(zs_x.dtype))


def readout(params: Params, hs: AnyArray) -> Array:
    """The outputs before g, for one step or for all at once.

        y_t = W_y h_t + b_y

    Args:
      params: Params, or any object with W_y (O, H) and b_y (O,), which alone are read.
      hs: (..., H), states in the parameters' dtype.

    Returns:
      (..., O), in the parameters' dtype.

    Raises:
      TypeError, ValueError: W_y, b_y or hs is not a floating-point array, or their shapes do not
        fit.

    >>> import jax, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> readout(params, jnp.ones((7, 4, 5))).shape
    (7, 4, 2)
    """
    for name in ("W_y", "b_y"):
        checks.check_float_array(f"params.{name}", getattr(params, name, None))
    if params.W_y.ndim != 2:
        raise ValueError(f"params.W_y: expected rank 2, got shape {params.W_y.shape}")
    checks.check_shape("params.b_y", params.b_y, params.W_y.shape[:1], "O of W_y")
    checks.check_float_array("hs", hs)
    checks.check_shape("hs", hs, (*hs.shape[:-1], params.W_y.shape[1]), "..., H of W_y")
    return add_bias(jnp.asarray(hs) @ jnp.asarray(params.W_y).T, params.b_y)


def select_rows(W: Array, tokens: Array) -> Array:
    """W[tokens], split over devices as the tokens are."""
    W = jnp.asarray(W)  # NumPy takes no traced tokens
    tokens = tokens.astype(jnp.int32)  # 8 bits hold no number of rows above 127
    sharding = explicit_sharding(tokens)
    if sharding is None:
        return W[tokens]
    return W.at[tokens].get(out_sharding=NamedSharding(sharding.mesh, P(*sharding.spec, None)))


def add_bias(products: Array, b: Array) -> Array:
    """products + b, added in float32 at least, because autodiff sums db in that dtype."""
    dtype = at_least_float32(b.dtype)
    return (products.astype(dtype) + per_unit(b, products).astype(dtype)).astype(b.dtype)


def per_unit(v: Array, hs: Array) -> Array:
    """v with leading axes of size 1, so that it broadcasts over hs by strict rules."""
    return v if v.ndim == 0 else v.reshape((1,) * (hs.ndim - v.ndim) + v.shape)


class Elementwise(NamedTuple):
    """A small matrix W, of which `h @ W` is a sum of elementwise products.

    XLA compiles it into one kernel with the rest of a step; a matrix product calls a library.
    """

    W: Array

    @property
    def T(self) -> "Elementwise":
        return Elementwise(self.W.T)

    def __rmatmul__(self, h: Array) -> Array:
        # A product may overflow float16 where the sum does not.
        dtype = at_least_float32(h.dtype)
        wide = h.astype(dtype)[..., None]
        return (wide * per_unit(self.W, wide).astype(dtype)).sum(axis=-2).astype(h.dtype)


class Transposed(NamedTuple):
    """W_h, by its transpose in memory: to be read as `h @ W_h` and `h @ W_h.T`."""

    T: Array | Elementwise

    def __rmatmul__(self, h: Array) -> Array:
        return h @ self.T.T


LoopMatrix: TypeAlias = Array | Elementwise | Transposed
"""W_h as a loop reads it: as `h @ W_h` and `h @ W_h.T`."""


def elementwise_if_small(W_h: Array, h: Array) -> Array | Elementwise:
    """W_h, for elementwise products if these usually take less time.

    On a CPU that is with 2 to 32 sequences and 32 to 1,200 multiplications: up to 6 times as fast
    in JAX 0.10, 10 in 0.12. With 2 to 6 sequences of 4 to 7 units they take up to 1.3 times as long
    in 0.10, which compiles such loops into one kernel either way. One sequence may be one of many
    under vmap, for which a matrix product takes less time.
    """
    B = _sequences(W_h, h)
    return Elementwise(W_h) if 2 <= B <= 32 and 32 <= B * W_h.size <= 1200 else W_h


def in_fast_layout(W_h: Array, h: Array, *, reverse: bool = False) -> LoopMatrix:
    """W_h as a loop reads it fastest: for `h @ W_h.T`, or `h @ W_h` in reverse.

    With 2 to 32 sequences on a CPU, a product that sums over the rows of a matrix takes 0.3 to 0.8
    times as long as one that sums over its columns; with 16 or more and a matrix of 4 MB or more,
    it takes up to 1.5 times as long. Products of small networks are elementwise.
    """
    B = _sequences(W_h, h)
    over_rows = B < 16 or W_h.nbytes < 4e6
    if not 2 <= B <= 32 or over_rows == reverse:
        return elementwise_if_small(W_h, h)
    transposed = lax.optimization_barrier(W_h.T)  # XLA would undo the transposition
    return Transposed(elementwise_if_small(transposed, h))


def _sequences(W_h: Array, h: Array) -> int:
    """The number of states in h; 0 on other backends than the CPU, or if it is a symbol."""
    if jax.default_backend() != "cpu" or not isinstance(h.size, int):
        return 0
    return h.size // len(W_h)
