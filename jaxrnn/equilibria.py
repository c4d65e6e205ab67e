"""The fixed points of a network with a constant input, and their stability.

    h = F(h, x)        F(h, x) = (1 - alpha) h + alpha f(W_x x + W_h h + b_h)

A trained network holds a memory near a stable fixed point, and saddles lie between the memories
(Sussillo and Barak 2013).
"""

import math
import warnings
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxrnn import checks
from jaxrnn.activations import Activation, check_activation, tanh
from jaxrnn.batches import check_input, features_message, steps_shape
from jaxrnn.jacobians import check_factorised_dtype, state_jacobian
from jaxrnn.params import AnyArray, Params, as_leak, check_leak, check_params, state_dtype
from jaxrnn.products import input_zs, per_unit
from jaxrnn.sharding import match_varying_axes, scalar_as, shard_rows

STEP_SIZES = 0.5 ** np.arange(10), 0.5 ** np.arange(12, 30, 3)
"""Multiples of a step that are tried, the largest first, and those where none of them lowers q."""

SUFFICIENT = 1e-4
"""A step lowers q by at least this share of what the gradient of q predicts (Armijo 1966)."""


class FixedPoints(NamedTuple):
    """What `fixed_points` found from each of N starts, a pytree.

    Attributes:
      h: the states, (N, H).
      speed: |h - F(h, x)|^2 / 2 at each of them, (N,); 0 at a fixed point.
      jacobian: dF/dh at each of them, (N, H, H).
      converged: bool (N,), |h - f(z)|^2 / 2 <= tolerance.
    """

    h: Array
    speed: Array
    jacobian: Array
    converged: Array


def fixed_points(
    params: Params,
    h: AnyArray,
    x: AnyArray,
    *,
    activation: Activation = tanh,
    leak: float | AnyArray | None = None,
    steps: int = 100,
    tolerance: float = 1e-12,
) -> FixedPoints:
    """Searches for a fixed point of the network from each of many states, by Newton's method.

        r = h - f(z)        q = |r|^2 / 2        A = dr/dh = I - df(z)/dh        dq/dh = A^T r

    Each step takes h to h - s A^{-1} r with the largest s of 1, 1/2, ..., 1/512 for which q falls
    enough. If A is singular or q falls for no s, it takes a step down the gradient of q instead,
    h - s c A^T r, where c makes the linear model of r smallest; if that fails too, both with s from
    2^-12 to 2^-27. So q never rises. A search ends one step after q has reached the tolerance,
    since that step squares a small error; or where q no longer falls, such as at another minimum of
    q, a slow point (Sussillo and Barak 2013); or after `steps`. `converged` marks those whose q is
    at most the tolerance.

    Newton's method finds unstable fixed points as well as stable ones. Starts are usually states of
    trajectories, and means of them, with noise added. No choice of starts is sure to find all. But
    a step of a tanh network maps the cube [-1, 1]^H into itself, so the signs of det(I - dF/dh) at
    all of them add up to 1 if none is 0 (Lefschetz): any other sum means that some are missing.

    A leak moves no fixed point: search and tolerance are those without one, speeds and Jacobians
    with it. Derivatives are those of the root, dh = A^{-1} df with h held in df; 0 elsewhere.

    Starts split by explicit sharding are searched on their own devices. Those split by automatic
    sharding need `jax.shard_map`: under plain `jit` devices wait for one another after each step,
    in which XLA on a CPU can deadlock.

    Args:
      params: Params in float32 or float64. Add a constant drive to b_h.
      h: the starts, (N, H).
      x: the input, (I,) or an integer token (), or one for each start, (N, I) or tokens (N,).
      activation: f.
      leak: alpha in (0, 1], a scalar or (H,); None is 1.
      steps: the number of steps at most.
      tolerance: the highest q that counts as converged; float32 rounds q to at least 5e-15 |h|^2.

    Returns:
      FixedPoints, in the order of the starts and in the parameters' dtype. `distinct` removes
      duplicates and points that have not converged. If none is left, look at the speed; with a
      scalar leak, q is speed / alpha^2. If q is slightly above the tolerance, take more steps or
      float64; if it is far above, other starts.

    Raises:
      TypeError, ValueError: a dtype, shape or setting does not fit; the message names the argument.

    >>> W_h, W_y = jnp.array([[2.0]]), jnp.ones((1, 1))  # one unit with h = tanh(2 h)
    >>> params = Params(W_x=jnp.ones((1, 1)), W_h=W_h, W_y=W_y, b_h=jnp.zeros(1), b_y=jnp.zeros(1))
    >>> points = fixed_points(params, jnp.array([[-2.0], [0.1], [0.9], [3.0]]), jnp.zeros(1))
    >>> [round(float(h), 3) for h in points.h[:, 0]]
    [-0.958, 0.0, 0.958, 0.958]
    """
    check_params(params)
    check_factorised_dtype(params)
    check_activation(activation, params.W_h.dtype)
    check_leak(leak, params)
    _check_starts(params, h, x)
    checks.check_size("steps", steps)
    checks.check_positive("tolerance", tolerance)
    tolerance = float(tolerance)  # a number of NumPy is not cast to the dtype of the speed
    h = jnp.asarray(h, state_dtype(params))
    z_x = jnp.broadcast_to(input_zs(params, x), h.shape)

    def search_all(network: Any, starts: Any) -> FixedPoints:
        (W_h, leak), (h, z_x) = network, starts
        search = partial(_search, activation, W_h, steps=steps, tolerance=tolerance)
        h = jax.vmap(search)(h, z_x)
        r = _residual(activation, W_h, z_x, h)
        J = state_jacobian(activation, W_h, z_x, h, leak)
        moved = r if leak is None else per_unit(leak, r) * r  # h - F(h, x)
        return FixedPoints(h, _speed(moved), J, _speed(r) <= tolerance)

    return shard_rows(search_all, (params.W_h, as_leak(params, leak)), (h, z_x))


def _residual(activation: Activation, W_h: Array, z_x: Array, h: Array) -> Array:
    """r = h - f(z), for states (..., H)."""
    return h - activation.f(per_unit(z_x, h) + h @ W_h.T)


def _speed(r: Array) -> Array:
    """q = |r|^2 / 2."""
    return (r * r).sum(axis=-1) / 2


def _search(
    activation: Activation, W_h: Array, h: Array, z_x: Array, *, steps: int, tolerance: float
) -> Array:
    """The state (H,) at which the search from h (H,) ends, with the derivative of a root of r."""
    residual = partial(_residual, activation, W_h, z_x)
    sizes = [jnp.asarray(some, h.dtype)[:, None] for some in STEP_SIZES]

    def unfinished(carry: tuple[Array, Array, Array, Array]) -> Array:
        n, _, q_before, fell = carry
        return (n < steps) & (q_before > tolerance) & fell

    def body(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        n, h, _, _ = carry
        r = residual(h)
        q = _speed(r)
        A = jnp.eye(h.shape[-1], dtype=h.dtype) - state_jacobian(activation, W_h, z_x, h, None)
        gradient = A.T @ r  # dq/dh
        newton = -jnp.linalg.solve(A, r)
        descent = -gradient * _speed(gradient) / _speed(A @ gradient)
        candidates = jnp.concatenate([s * d[None] for s in sizes for d in (newton, descent)])
        predicted = jnp.minimum(candidates @ gradient, 0)
        # A candidate that is not finite gives NaN, which is not below anything.
        falls = _speed(residual(h[None] + candidates)) < q + SUFFICIENT * predicted
        h = jnp.where(falls.any(), h + candidates[jnp.argmax(falls)], h)
        return n + 1, h, q, falls.any()

    def search(_: Any, h: Array) -> Array:
        n, q, fell = jnp.int32(0), jnp.asarray(jnp.finfo(h.dtype).max, h.dtype), jnp.bool_(True)
        n, q, fell = (scalar_as(h, scalar) for scalar in (n, q, fell))
        return lax.while_loop(unfinished, body, match_varying_axes((n, h, q, fell), residual(h)))[1]

    def has_root(h: Array) -> Array:  # r, or h - held where h has not converged: derivative 0
        held = lax.stop_gradient(h)
        return jnp.where(_speed(residual(held)) <= tolerance, residual(h), h - held)

    def solve(A_times: Any, y: Array) -> Any:
        return jnp.linalg.solve(jax.jacobian(A_times)(y), y)

    h = match_varying_axes(h, residual(h))
    return jnp.asarray(lax.custom_root(has_root, h, search, solve))


def distinct(points: FixedPoints, tolerance: float) -> FixedPoints:
    """The fixed points that differ from one another, on the host.

    From the lowest speed up, each point is kept unless a kept one is within `tolerance` of it.
    Points that have not converged are left out; if none has, the result holds no points.

    Args:
      points: what `fixed_points` returns for one network.
      tolerance: the Euclidean distance up to which two points are one. The distance of a point from
        the exact one is about |(I - J)^{-1}| sqrt(2 speed).

    Returns:
      FixedPoints of NumPy arrays, (K, H), (K,), (K, H, H) and (K,), the lowest speed first.

    Raises:
      TypeError: points are not FixedPoints, or the tolerance is not a number.
      ValueError: points are those of several networks, or the tolerance is not above 0 and finite.

    Warns:
      UserWarning: no point has converged.

    >>> points = FixedPoints(
    ...     h=jnp.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1e-6], [5.0, 5.0]]),
    ...     speed=jnp.array([1e-15, 1e-16, 1e-14, 1.0]),
    ...     jacobian=jnp.zeros((4, 2, 2)),
    ...     converged=jnp.array([True, True, True, False]),
    ... )
    >>> distinct(points, tolerance=1e-3).h.tolist()
    [[0.0, 0.0], [1.0, 0.0]]
    """
    if not isinstance(points, FixedPoints):
        raise TypeError(f"points: expected FixedPoints, got {type(points).__name__}")
    if points.h.ndim != 2:
        raise ValueError(
            f"points.h: expected shape (N, H), the points of one network, got {points.h.shape}"
        )
    checks.check_positive("tolerance", tolerance)
    h, speed = np.asarray(points.h), np.asarray(points.speed)
    left = np.flatnonzero(np.asarray(points.converged))
    if not left.size:
        lowest = f"none of {len(h)}, with a lowest speed of {speed.min(initial=math.inf):.1e}"
        warnings.warn(f"points: expected one that converged, got {lowest}", stacklevel=2)
    left, kept = left[np.argsort(speed[left], kind="stable")], []
    while left.size:
        kept.append(left[0])
        left = left[np.linalg.norm(h[left] - h[left[0]], axis=-1) > tolerance]
    return jax.tree.map(lambda leaf: np.asarray(leaf)[np.array(kept, int)], points)


class Stability(NamedTuple):
    """How a network behaves near fixed points.

    Attributes:
      eigenvalues: of the Jacobians, (*batch, H) complex, the largest modulus first.
      unstable_dim: (*batch) int, the number of directions in which perturbations grow: eigenvalues
        outside the unit circle. A point with k of them, 0 < k < H, is a saddle of index k.
      marginal: (*batch) bool, an eigenvalue is on the unit circle, where the linear model does not
        decide, as at the points of a line attractor.
      stable: (*batch) bool, all eigenvalues are inside the unit circle: perturbations die out.
    """

    eigenvalues: np.ndarray
    unstable_dim: np.ndarray
    marginal: np.ndarray
    stable: np.ndarray


def stability(jacobian: AnyArray, margin: float = 1e-6) -> Stability:
    """The eigenvalues of Jacobians and what they say about the fixed points, on the host.

    Args:
      jacobian: dF/dh at fixed points, (*batch, H, H), finite.
      margin: how far from the unit circle an eigenvalue counts as on it, at least 0.

    Returns:
      Stability, as NumPy arrays.

    Raises:
      TypeError: jacobian is not an array of floats, or margin is not a number.
      ValueError: the matrices are not square or not finite, or the margin is below 0 or not finite.

    >>> found = stability(np.array([[[0.5, 0], [0, -0.9]], [[2, 0], [0, 0]], [[0, 1], [-1, 0]]]))
    >>> found.unstable_dim.tolist(), found.stable.tolist(), found.marginal.tolist()
    ([0, 1, 0], [True, False, False], [False, False, True])
    """
    checks.check_float_array("jacobian", jacobian)
    Js = np.asarray(jacobian)
    if Js.ndim < 2 or Js.shape[-2] != Js.shape[-1]:
        raise ValueError(f"jacobian: expected shape (*batch, H, H), got {Js.shape}")
    if not np.isfinite(Js).all():
        raise ValueError(f"jacobian: expected finite numbers, got {Js[~np.isfinite(Js)][0]}")
    checks.check_number("margin", margin)
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin: expected at least 0 and finite, got {margin}")
    eigenvalues = np.linalg.eigvals(Js.astype(np.float64)).astype(np.complex128)
    order = np.argsort(-np.abs(eigenvalues), axis=-1, kind="stable")
    eigenvalues = np.take_along_axis(eigenvalues, order, axis=-1)
    modulus = np.abs(eigenvalues)
    unstable_dim = (modulus > 1 + margin).sum(axis=-1)
    marginal = (np.abs(modulus - 1) <= margin).any(axis=-1)
    stable = (modulus < 1 - margin).all(axis=-1)
    return Stability(eigenvalues, *map(np.asarray, (unstable_dim, marginal, stable)))


def _check_starts(params: Params, h: Any, x: Any) -> None:
    """Raises TypeError or ValueError unless h is (N, H), and x one input or one for each of h."""
    check_input("x", params, x, "N")
    checks.check_float_array("h", h)
    H = params.W_h.shape[0]
    if h.ndim != 2 or h.shape[1] != H:
        raise ValueError(f"h: expected shape (N, {H}), H of W_h, got {h.shape}")
    if steps_shape(x) not in ((), h.shape[:1]):
        if x.shape in ((params.W_x.shape[1],), (len(h), params.W_x.shape[1])):
            raise ValueError(features_message("x", x, "N"))
        given = f"N = {h.shape[0]} {'tokens' if checks.is_integer(x) else 'inputs'}"
        raise ValueError(f"x: expected one input, or {given} as h has, got shape {x.shape}")
