"""The influence of the parameters on the state, dh_t / dtheta: exact, diagonal, of rank one.

    z_t = theta u_t        theta = [W_x W_h b_h]        u_t = [x_t; h_{t-1}; 1]
    J_t = (1 - alpha) J_{t-1} + alpha f'(z_t) * (W_h J_{t-1} + dz_t / dtheta)

theta has H rows and N = I + H + 1 columns, and dz_i / dtheta_jn = u_n if i = j, else 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxrnn import checks
from jaxrnn.params import Params
from jaxrnn.products import per_unit
from jaxrnn.recurrence import carried
from jaxrnn.sharding import full_as, replicated


def augmented_input(params: Params, x: Array, h_before: Array) -> Array:
    """u_t = [x_t; h_{t-1}; 1], (*batch, I + H + 1); a token x is a one-hot vector."""
    if checks.is_integer(x):
        x = jax.nn.one_hot(x.astype(jnp.int32), params.W_x.shape[1])
    ones = full_as(h_before[..., :1], 1)
    return jnp.concatenate([x.astype(h_before.dtype), h_before, ones], axis=-1)


class Influence(NamedTuple):
    """A way to carry J_t: three pure functions and a flag.

    Three are given, here with memory and time for one step of one sequence:

        full        J_t itself, (*batch, H, N, H): real-time recurrent learning (Williams and
                    Zipser 1989). Memory O(H^2 N), time O(H^3 N).
        diagonal    the elements dh_j / dtheta_jn of J_t, (*batch, H, N): SnAp-1 (Menick et al.
                    2021). Memory and time O(H N), the time of the forward pass.
        rank_one    a random matrix of rank one whose mean is J_t: UORO (Tallec and Ollivier 2018).
                    Memory and time O(H N).

    Attributes:
      start: (h, N) -> J_0 = 0, for a state h (*batch, H).
      advance: (J, W_h, f_prime, leak, u, key) -> J_t from J = J_{t-1}, with f_prime (*batch, H)
        alpha f'(z_t), leak alpha or None, u (*batch, N), and a key or None.
      contract: (J, dh, dtype) -> sum of dh_t^T J_t over the batch, (H, N), summed in dtype.
      random: whether `advance` needs a key.
    """

    start: Callable[[Array, int], Any]
    advance: Callable[..., Any]
    contract: Callable[[Any, Array, DTypeLike], Array]
    random: bool = False


def _full_start(h: Array, N: int) -> Array:
    return jnp.zeros((*h.shape, N, h.shape[-1]), h.dtype)


def _full_advance(
    J: Array, W_h: Array, f_prime: Array, leak: Array | None, u: Array, key: None
) -> Array:
    """J[..., j, n, :] is dh / dtheta_jn, a tangent of the state."""
    del key  # nothing is random
    direct = u[..., None, :, None] * per_unit(jnp.eye(len(W_h), dtype=u.dtype)[:, None, :], J)
    return carried(leak, J, f_prime[..., None, None, :] * (J @ W_h.T + direct))


def _full_contract(J: Array, dh: Array, dtype: DTypeLike) -> Array:
    return jnp.einsum(
        "...jni,...i->jn", J, dh, preferred_element_type=dtype, out_sharding=replicated(dh)
    )


full = Influence(_full_start, _full_advance, _full_contract)


def _diagonal_start(h: Array, N: int) -> Array:
    return jnp.zeros((*h.shape, N), h.dtype)


def _diagonal_advance(
    J: Array, W_h: Array, f_prime: Array, leak: Array | None, u: Array, key: None
) -> Array:
    """J[..., j, n] is dh_j / dtheta_jn through the unit j alone."""
    del key  # nothing is random
    leak = None if leak is None else jnp.broadcast_to(leak, f_prime.shape)[..., None]
    W_jj = per_unit(jnp.diagonal(W_h)[:, None], J)
    return carried(leak, J, f_prime[..., None] * (W_jj * J + u[..., None, :]))


def _diagonal_contract(J: Array, dh: Array, dtype: DTypeLike) -> Array:
    return jnp.einsum(
        "...jn,...j->jn", J, dh, preferred_element_type=dtype, out_sharding=replicated(dh)
    )


diagonal = Influence(_diagonal_start, _diagonal_advance, _diagonal_contract)


class RankOne(NamedTuple):
    """J_t as an outer product: dh_i / dtheta_jn is a_i b_jn in the mean over random signs.

    Attributes:
      a: (*batch, H).
      b: (*batch, H, N).
    """

    a: Array
    b: Array


def balance(J: RankOne) -> RankOne:
    """The same outer product from factors of equal norm, which keeps the variance small."""
    a_square, b_square = (J.a**2).sum(-1), (J.b**2).sum((-2, -1))
    some = (a_square > 0) & (b_square > 0)
    # The square root of 0 has no derivative.
    a_norm, b_norm = (jnp.sqrt(jnp.where(some, x, 1)) for x in (a_square, b_square))
    ratio = b_norm / a_norm
    rho = jnp.where(some, jnp.sqrt(ratio), 0)
    inverse = jnp.where(some, 1 / jnp.sqrt(ratio), 0)
    return RankOne(rho[..., None] * J.a, inverse[..., None, None] * J.b)


def _rank_one_start(h: Array, N: int) -> RankOne:
    return RankOne(jnp.zeros_like(h), jnp.zeros((*h.shape, N), h.dtype))


def _rank_one_advance(
    J: RankOne, W_h: Array, f_prime: Array, leak: Array | None, u: Array, key: Array
) -> RankOne:
    """Replaces the sum of two outer products by one whose mean over random signs nu is that sum:

    E (a + nu) (b + nu^T D) = a b + D        since E nu = 0 and E nu nu^T = I
    """
    signs = jax.random.rademacher(key, f_prime.shape, f_prime.dtype)
    past = balance(RankOne(carried(leak, J.a, f_prime * (J.a @ W_h.T)), J.b))
    new = balance(RankOne(signs, (signs * f_prime)[..., None] * u[..., None, :]))
    return RankOne(past.a + new.a, past.b + new.b)


def _rank_one_contract(J: RankOne, dh: Array, dtype: DTypeLike) -> Array:
    scale = (dh.astype(dtype) * J.a.astype(dtype)).sum(-1)
    return jnp.einsum("...,...jn->jn", scale, J.b.astype(dtype), out_sharding=replicated(dh))


rank_one = Influence(_rank_one_start, _rank_one_advance, _rank_one_contract, random=True)
