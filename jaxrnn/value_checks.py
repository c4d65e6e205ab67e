"""Checks of values, made on the host, once, before any `jit`."""

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn import checks
from jaxrnn.activations import Activation, autodiff_f_prime, check_activation
from jaxrnn.batches import (
    Batch,
    check_batch,
    fits_as_numbers,
    per_step,
    steps_shape,
    where_exists,
)
from jaxrnn.gradients import PyTree, value_dtype
from jaxrnn.losses import Loss, check_loss
from jaxrnn.params import Params, check_params


def check_values(
    params: PyTree,
    batch: Batch,
    h_0: PyTree = None,
    *,
    activation: Activation | None = None,
    loss: Loss | None = None,
) -> None:
    """Checks values on the host. Call it once on data, before any `jit`.

    JAX clamps an index past the end, a wrong label gives a finite, wrong gradient, and 64-bit
    numbers become 32-bit ones, all silently. Steps that the mask excludes are not checked. If
    arrays span processes, every process must call this function, and each raises the same error.

    Args:
      params: Params, whose sizes give the number of tokens and labels; of other pytrees only the
        values are checked.
      batch: Batch of concrete arrays, of NumPy or JAX.
      h_0: (*batch, H), the initial state; None for zeros. Of any other pytree only the values are
        checked.
      activation: an Activation; f is checked to be elementwise, and df to equal f' by autodiff.
        None skips the check.
      loss: a Loss; with Params, loss.error is checked to equal dl/dy by autodiff. None skips the
        check.

    Raises:
      TypeError: an argument has the wrong type or dtype, such as a mask that is not bool.
      ValueError: shapes do not fit; tokens lie outside [0, I) or integer labels outside [0, O);
        parameters, states, inputs, targets, weights or drive are not finite; states, inputs or
        drive overflow the parameters' dtype, or targets the same or float32, whichever is wider; a
        weight is negative, or the sum of all overflows or underflows; a 64-bit value does not fit
        32 bits; activation.f is not elementwise, or df not its derivative; loss.error is not that
        of loss.value. The message names the first such place.

    Warns:
      UserWarning: JAX rounds float64 values to float32; or integer xs, which are tokens, look like
        features, because all are 0 or 1 and the last axis has I > 2 of them.

    >>> import jax, jax.numpy as jnp, jaxrnn
    >>> params = jaxrnn.init(jax.random.key(0), 3, 4, 2)
    >>> check_values(params, jaxrnn.Batch(jnp.array([0, 2]), jnp.array([0, 2])))
    Traceback (most recent call last):
    ValueError: targets: expected integers in [0, 2) (O labels), got 2 at (1,); 1 of 2 are outside
    """
    for name, tree in (("params", params), ("batch", batch), ("h_0", h_0)):
        checks.check_has_values(name, tree)
    network = params if isinstance(params, Params) else None
    if network is None:
        checks.check_float_tree("params", params)
    else:
        check_params(network)
    state = h_0 if jax.tree_util.all_leaves([h_0]) else None  # a Stream is a pytree
    check_batch(network, batch, state)
    if activation is not None:
        _check_activation(activation)
    wide = value_dtype(params)
    used_in: dict[str, Any] = {}
    if network is not None:
        used_in = dict.fromkeys(("xs", "drive", "h_0"), network.W_h.dtype) | {"targets": wide}
    for name, tree in (("params", params), ("h_0", h_0)):
        for path, leaf in jax.tree.leaves_with_path(tree):
            place = name + jax.tree_util.keystr(path)
            checks.check_array(place, leaf)
            if checks.is_key(leaf):  # a state may hold one
                continue
            _check_numbers(place, checks.to_numpy(leaf), dtype=used_in.get(name))

    shape = steps_shape(batch.xs)
    mask: Any = np.ones(shape, bool) if batch.mask is None else checks.to_numpy(batch.mask)
    for name in ("xs", "targets", "weights", "drive"):
        if getattr(batch, name) is None:
            continue
        values: Any = checks.to_numpy(getattr(batch, name))
        if not checks.is_integer(values) or values.ndim > len(shape):
            valid = per_step(mask, values)
            _check_numbers(name, values, valid, " where the mask is True", used_in.get(name))
        elif network is not None:
            _check_range(name, values, mask, network)
    if network is not None and checks.is_integer(batch.xs):
        _warn_of_features(network, batch, state, mask)
    if batch.weights is not None:
        _check_weights(checks.to_numpy(batch.weights), mask, wide)
    if loss is not None and network is not None:
        _check_error(loss, (*shape, network.W_y.shape[0]), wide, batch, mask)


def _check_range(name: str, values: np.ndarray, mask: np.ndarray, network: Params) -> None:
    """Tokens lie in [0, I), labels in [0, O)."""
    size, meaning = network.W_y.shape[0], "O labels"
    if name == "xs":
        size, meaning = network.W_x.shape[1], "I tokens"
    checks.check_range(name, values, mask, size, meaning)


def _check_weights(weights: np.ndarray, mask: np.ndarray, dtype: np.dtype) -> None:
    """No weight is below 0, and dtype holds their sum, by which the mean divides."""
    weights = np.where(mask, weights, 0).astype(float)
    first = checks.first_place(weights < 0)
    if first is not None:
        raise ValueError(f"weights: expected none below 0, got {weights[first]} at {first}")
    with np.errstate(over="ignore"):
        total, largest = weights.sum(), weights.max(initial=0)
        overflows = not np.isfinite(total.astype(dtype))
    if overflows or 0 < largest < np.finfo(dtype).tiny:
        raise ValueError(
            f"weights: expected a sum and a maximum that fit {dtype}, got {total} and {largest}"
        )


def _check_activation(activation: Activation) -> None:
    """f is elementwise, and df(f(z)) is f'(z), on a grid without integers, where kinks may be."""
    check_activation(activation, jnp.float32)
    zs = jnp.linspace(-5.03, 5.02, 256)
    together, alone = (np.asarray(f(zs)) for f in (activation.f, jax.vmap(activation.f)))
    if not np.allclose(together, alone, rtol=1e-2, atol=1e-3, equal_nan=True):
        raise ValueError(
            f"activation.f: expected an elementwise function, got {activation.f!r}, whose values "
            "depend on several numbers each"
        )
    if activation.df is None:
        return
    got = np.asarray(activation.df(activation.f(zs)))
    expected = np.asarray(autodiff_f_prime(activation.f, zs))
    wrong = np.flatnonzero(~np.isclose(got, expected, rtol=1e-2, atol=1e-3, equal_nan=True))
    if wrong.size:
        first = wrong[0]
        raise ValueError(
            f"activation.df: expected f'(z) = {expected[first]:.4g} at z = {zs[first]:.4g}, got "
            f"{got[first]:.4g}; where f' does not follow from h, use Activation(f)"
        )


def _check_error(
    loss: Loss, shape: tuple[int, ...], dtype: np.dtype, batch: Batch, mask: np.ndarray
) -> None:
    """loss.error is the derivative of loss.value, for outputs between -2 and 2."""
    check_loss(loss, shape, dtype, batch.targets)
    targets = where_exists(mask, checks.to_numpy(batch.targets))
    ys = 2 * jnp.sin(1.3 * jnp.arange(math.prod(shape), dtype=dtype)).reshape(shape)
    got = np.asarray(loss.error(ys, targets))
    expected = np.asarray(jax.grad(lambda ys: loss.value(ys, targets).sum())(ys))
    same = np.isclose(got, expected, rtol=1e-2, atol=1e-3, equal_nan=True)
    first = checks.first_place(~same & mask[..., None])
    if first is not None:
        raise ValueError(
            f"loss.error: expected dl/dy = {expected[first]:.4g} at y = {ys[first]:.4g}, as "
            f"loss.value has, got {got[first]:.4g} at {first}"
        )


def _warn_of_features(network: Params, batch: Batch, h_0: Any, mask: np.ndarray) -> None:
    """Warns if tokens that also fit as numbers are all 0 or 1, with 3 or more in the last axis."""
    shape = batch.xs.shape
    if not fits_as_numbers(network, batch, h_0) or shape[-1] <= 2:
        return
    if checks.to_numpy(batch.xs)[mask].max(initial=0) <= 1:
        warnings.warn(
            f"xs: integers of shape {shape} are tokens, yet all are 0 or 1. Convert features with "
            ".astype(jnp.float32)",
            stacklevel=3,
        )


def _check_numbers(
    name: str, values: np.ndarray, valid: Any = True, where: str = "", dtype: Any = None
) -> None:
    """The values are finite, also after JAX narrows them and in the dtype of the passes."""
    _check_finite(name, values, valid, where)
    _check_narrowing(name, values, valid)
    if dtype is not None:
        _check_fits(name, values, valid, dtype)


def _check_finite(name: str, values: np.ndarray, valid: Any, where: str) -> None:
    wrong = ~np.isfinite(values.astype(np.float64)) & valid
    first = checks.first_place(wrong)
    if first is not None:
        raise ValueError(
            f"{name}: expected finite numbers{where}, got {values[first]} at {first}; "
            f"{wrong.sum()} of {values.size} are not finite"
        )


def _check_fits(name: str, values: np.ndarray, valid: Any, dtype: np.dtype) -> None:
    """The passes convert each value to this dtype, which depends on the parameters'."""
    with np.errstate(over="ignore"):
        wrong = ~np.isfinite(values.astype(dtype).astype(float)) & valid
    first = checks.first_place(wrong)
    if first is not None:
        raise ValueError(
            f"{name}: expected numbers that fit {dtype}, which follows from the parameters, got "
            f"{values[first]} at {first}; {wrong.sum()} of {values.size} do not fit"
        )


def _check_narrowing(name: str, values: np.ndarray, valid: Any) -> None:
    """Without x64, JAX silently converts 64-bit numbers to 32-bit ones."""
    with np.errstate(over="ignore"):
        narrow = values.astype(jax.dtypes.canonicalize_dtype(values.dtype))
    changed = (narrow.astype(values.dtype) != values) & valid
    first = checks.first_place(changed)
    if first is None:
        return
    message = (
        f"{name}: expected values that fit {narrow.dtype}, to which JAX converts {values.dtype}, "
        f"got {values[first].item()} at {first}, which becomes {narrow[first].item()}; "
        f"{changed.sum()} of {values.size} change"
    )
    if checks.is_integer(narrow) or not np.isfinite(narrow[changed]).all():
        raise ValueError(message)
    warnings.warn(f"{message}. Convert with .astype({narrow.dtype}) to accept it", stacklevel=4)
