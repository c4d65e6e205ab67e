"""2. The forward pass: one step, all steps, the loss.

`step` under `lax.scan` is the specification. `hidden_states` computes the same with every product
that is not sequential taken out of the loop over time, in the forward pass and in what autodiff
derives from it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrnn import checks
from jaxrnn.activations import Activation, tanh
from jaxrnn.losses import Loss, cross_entropy
from jaxrnn.params import Params, at_least_float32
from jaxrnn.sequences import Batch


class Loop(NamedTuple):
    """How the loops over time are cut, by backend, as measured (README).

    Attributes:
      unroll: steps written out in a loop's body; a GPU idles between two turns of a loop.
      block: steps whose products `bptt` takes together: few enough to stay in a CPU's cache, enough
        to fill a GPU.
    """

    unroll: int
    block: int


def loop() -> Loop:
    return Loop(8, 128) if jax.default_backend() == "gpu" else Loop(1, 32)


def step(
    params: Params, h: Array, x: Array, *, activation: Activation = tanh
) -> tuple[Array, Array]:
    """One step of the network (Elman 1990).

        h_t = f(W_x x_t + W_h h_{t-1} + b_h)        y_t = W_y h_t + b_y

    A plain scan over it, `lax.scan(lambda h, x: step(params, h, x), h_0, xs)`, is the
    specification of `unroll`.

    Args:
      params: Params.
      h: h_{t-1}, (*batch, H).
      x: x_t, (*batch, I), or an integer token (*batch,).
      activation: f.

    Returns:
      h_t (*batch, H) and y_t (*batch, O), in the parameters' dtype.

    Raises:
      TypeError, ValueError: a dtype or shape that does not fit; the message names it.

    >>> import jax, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> h, y = step(params, jnp.zeros(5), jnp.ones(3))
    >>> h.shape, y.shape
    ((5,), (2,))
    """
    checks.check_step(params, h, x, activation)
    h = activation.f(input_product(params, x) + h.astype(params.W_h.dtype) @ params.W_h.T)
    return h, readout(params, h)


def input_product(params: Params, xs: Array) -> Array:
    """W_x x + b_h, for one step or for all at once; a token x looks up its column of W_x."""
    if checks.is_integer(xs):
        return plus(params.W_x.T[xs], params.b_h)
    return plus(xs.astype(params.W_x.dtype) @ params.W_x.T, params.b_h)


def readout(params: Params, hs: Array) -> Array:
    """W_y h + b_y, for one step or for all at once."""
    return plus(hs @ params.W_y.T, params.b_y)


def plus(products: Array, b: Array) -> Array:
    """products + b, in float32 at least: autodiff sums db in the dtype of the addition."""
    dtype = at_least_float32(b.dtype)
    return (products.astype(dtype) + b.astype(dtype)).astype(b.dtype)


def per_step(flags: Array, xs: Array) -> Array:
    """flags (T, *batch) with as many trailing axes of size 1 as make it broadcast over xs."""
    return flags.reshape(flags.shape + (1,) * (xs.ndim - flags.ndim))


def where_exists(mask: Array | None, xs: Array) -> Array:
    """xs where the mask is True, else 0."""
    return xs if mask is None else jnp.where(per_step(mask, xs), xs, jnp.zeros_like(xs))


def unless_reset(reset: Array | None, h: Array) -> Array:
    """h, or zeros where a reset comes just before the step that reads it."""
    return h if reset is None else jnp.where(per_step(reset, h), jnp.zeros_like(h), h)


def hold(mask: Array | None, h_new: Array, h: Array) -> Array:
    """h_new where the step exists, else h as it was."""
    return h_new if mask is None else jnp.where(per_step(mask, h), h_new, h)


def previous(hs: Array, h_0: Array, reset: Array | None) -> Array:
    """h_{t-1} as step t reads it: the states shifted by one step, zeros after a reset."""
    return unless_reset(reset, jnp.concatenate([h_0[None], hs[:-1]])[: hs.shape[0]])


def initial_state(params: Params, xs: Array, h_0: Array | None) -> Array:
    """h_0 in the parameters' dtype; zeros where none is given."""
    shape = (*checks.steps_shape(xs)[1:], params.W_h.shape[0])
    h_0 = jnp.zeros(shape, params.W_h.dtype) if h_0 is None else h_0.astype(params.W_h.dtype)
    return vary_as(vary_as(h_0, xs), params.W_h)


def vary_as(tree, like: Array):
    """The tree as it is; inside `shard_map`, marked as varying over the mesh axes of `like`.

    A scan's carry must vary from the start as it will after the first step. The result of a `where`
    varies as its arguments do, in every version of JAX; compiled, nothing of it is left.
    """
    unread = lax.stop_gradient(like).sum()
    return jax.tree.map(lambda leaf: jnp.where(False, unread.astype(leaf.dtype), leaf), tree)


def recur(activation, W_h, zs, h_0, mask, reset) -> Array:
    """h_t = f(z_t + W_h h_{t-1}) where z_t = W_x x_t + b_h: the one loop over time.

    Returns the state after each step, (T, *batch, H), held where the mask is False.
    """

    def body(h, now):
        z, exists, cut = now
        h = hold(exists, activation.f(z + unless_reset(cut, h) @ W_h.T), h)
        return h, h

    return lax.scan(body, h_0, (zs, mask, reset), unroll=loop().unroll)[1]


_recur = jax.custom_jvp(recur, nondiff_argnums=(0,))


@_recur.defjvp
def _recur_jvp(activation, primals, tangents):
    """dh_t = f'(z_t) (dz_t + dW_h h_{t-1} + W_h dh_{t-1}), with dW_h h_{t-1} outside the loop.

    Transposed, the product outside the loop is the one contraction over all steps that gives
    dL/dW_h; autodiff of the scan itself would add one outer product per step to an (H, H) carry.
    All of it is ordinary JAX, so forward mode, vmap and higher derivatives follow.
    """
    W_h, zs, h_0, mask, reset = primals
    dW_h, dzs, dh_0, _, _ = tangents
    hs = _recur(activation, W_h, zs, h_0, mask, reset)
    dzs = dzs + previous(hs, h_0, reset) @ dW_h.T

    def body(dh, now):
        dz, f_prime, exists, cut = now
        dh = hold(exists, f_prime * (dz + unless_reset(cut, dh) @ W_h.T), dh)
        return dh, dh

    return hs, lax.scan(body, dh_0, (dzs, activation.df(hs), mask, reset), unroll=loop().unroll)[1]


def hidden_states(
    params: Params,
    xs: Array,
    h_0: Array | None = None,
    *,
    activation: Activation = tanh,
    mask: Array | None = None,
    reset: Array | None = None,
) -> tuple[Array, Array]:
    """The hidden states of all steps.

        z_t = W_x x_t + W_h h_{t-1} + b_h        h_t = f(z_t)

    Args:
      params: Params.
      xs: (T, *batch, I), or integer tokens (T, *batch).
      h_0: (*batch, H); zeros if None.
      activation: f.
      mask: (T, *batch) bool, a step exists; else the state is held and xs is not read.
      reset: (T, *batch) bool, h_{t-1} is replaced by zeros before step t, where step t exists.

    Returns:
      h_T (*batch, H), the state after the last step that exists, and hs (T, *batch, H), zeros
      where the mask is False. With T = 0 or no step that exists, h_T is h_0.

    Raises:
      TypeError, ValueError: a dtype or shape that does not fit; the message names it.

    >>> import jax, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> h_T, hs = hidden_states(params, jnp.ones((7, 4, 3)))
    >>> hs.shape, bool((hs[-1] == h_T).all())
    ((7, 4, 5), True)
    """
    checks.check_sequence(params, xs, h_0, activation, mask, reset)
    h_0 = initial_state(params, xs, h_0)
    zs = input_product(params, where_exists(mask, xs))
    hs = _recur(activation, params.W_h, zs, h_0, mask, reset)
    h_T = hs[-1] if hs.shape[0] else h_0
    return h_T, where_exists(mask, hs)


def unroll(
    params: Params,
    xs: Array,
    h_0: Array | None = None,
    *,
    activation: Activation = tanh,
    mask: Array | None = None,
    reset: Array | None = None,
) -> tuple[Array, Array]:
    """The outputs of all steps, before g: `hidden_states` and then y_t = W_y h_t + b_y.

    Takes what `hidden_states` takes, and raises what it raises.

    Returns:
      h_T (*batch, H), and ys (T, *batch, O), zeros where the mask is False.

    >>> import jax, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> xs = jnp.ones((7, 4, 3))
    >>> h_T, ys = unroll(params, xs)
    >>> _, plain = jax.lax.scan(lambda h, x: step(params, h, x), jnp.zeros((4, 5)), xs)
    >>> bool(jnp.allclose(ys, plain, atol=1e-6))
    True
    """
    h_T, hs = hidden_states(params, xs, h_0, activation=activation, mask=mask, reset=reset)
    return h_T, where_exists(mask, readout(params, hs))


def step_weights(batch: Batch, dtype=jnp.float32) -> Array:
    """How much each step counts, (T, *batch): weights * mask."""
    ones = jnp.ones(checks.steps_shape(batch.xs), dtype)
    weights = ones if batch.weights is None else batch.weights.astype(dtype)
    return where_exists(batch.mask, weights)


def mean_weights(batch: Batch, dtype) -> Array:
    """weights * mask / sum(weights * mask), so that a sum over steps is the mean; 0 where none."""
    weights = step_weights(batch, dtype)
    total = weights.sum()
    return weights / jnp.where(total == 0, jnp.ones_like(total), total)


def sum_dtype(params: Params):
    """What sums over time accumulate in: the parameters' dtype, but float32 at least."""
    return at_least_float32(params.W_h.dtype)


def sequence_loss(
    params: Params,
    batch: Batch,
    h_0: Array | None = None,
    *,
    activation: Activation = tanh,
    loss: Loss = cross_entropy,
) -> tuple[Array, Array]:
    """The mean loss over the steps that count, and the last state.

        L = sum_t weights_t mask_t l(y_t, target_t) / sum_t weights_t mask_t

    over steps and batch; 0 where no step counts. Differentiate it as you like, or take `bptt` for
    value and gradient.

    Args:
      params: Params.
      batch: Batch.
      h_0: (*batch, H); zeros if None.
      activation: f.
      loss: g and its loss.

    Returns:
      L, a scalar, in float32 at least, and h_T (*batch, H).

    Raises:
      TypeError, ValueError: a dtype or shape that does not fit; the message names it.

    >>> import jax, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), input_size=3, hidden_size=5, output_size=2)
    >>> batch = Batch(xs=jnp.ones((7, 4, 3)), targets=jnp.zeros((7, 4), int))
    >>> value, h_T = sequence_loss(params, batch)
    >>> value.shape, h_T.shape
    ((), (4, 5))
    """
    checks.check_batch(params, batch, h_0, activation, loss)
    h_T, ys = unroll(
        params, batch.xs, h_0, activation=activation, mask=batch.mask, reset=batch.reset
    )
    dtype = sum_dtype(params)
    losses = loss.value(ys.astype(dtype), where_exists(batch.mask, batch.targets))
    return (mean_weights(batch, dtype) * losses).sum(), h_T
