"""How arrays are split over devices where their types say so: explicit mesh axes, `shard_map`."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

Tree = TypeVar("Tree")


def explicit_sharding(x: Array) -> NamedSharding | None:
    """The sharding of x, if it belongs to the type of x: if mesh axes are explicit."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def replicated(x: Array) -> NamedSharding | None:
    """The sharding of a matrix whole on each device of x's mesh; None unless axes are explicit."""
    sharding = explicit_sharding(x)
    # The vmap of a product in JAX 0.10 needs an entry for each axis.
    return None if sharding is None else NamedSharding(sharding.mesh, P(None, None))


def parts(x: Any, axis: int) -> int:
    """How many parts an axis of x is split into if mesh axes are explicit, else 1."""
    sharding = explicit_sharding(x)
    return 1 if sharding is None else x.shape[axis] // sharding.shard_shape(x.shape)[axis]


def gathered(x: Array) -> Array:
    """x, whole on each device if mesh axes are explicit."""
    sharding = explicit_sharding(x)
    if sharding is None:
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, P()))


def split_as(like: Array, x: Array) -> Array:
    """x, split over devices as `like` is if mesh axes are explicit."""
    sharding = explicit_sharding(like)
    if sharding is None:
        return x
    if explicit_sharding(x) is None:  # to reshard x, a mesh would have to be set
        return full_as(like, 0, x.dtype) + x
    return jax.sharding.reshard(x, sharding)


def full_as(like: Array, value: float, dtype: DTypeLike | None = None) -> Array:
    """`jnp.full_like`, split over devices as `like` is if mesh axes are explicit.

    `full_like` itself is split only where a mesh is set. XLA removes the `where`.
    """
    if explicit_sharding(like) is None:
        return jnp.full_like(like, value, dtype)
    dtype = like.dtype if dtype is None else dtype
    return jnp.where(False, lax.stop_gradient(like).astype(dtype), jnp.asarray(value, dtype))


def scalar_as(like: Array, value: Array) -> Array:
    """The scalar, on the mesh of `like` if mesh axes are explicit: `vmap` may split a carry."""
    if explicit_sharding(like) is None:
        return value
    return jnp.where(False, lax.stop_gradient(like).sum().astype(value.dtype), value)


def match_varying_axes(tree: Tree, like: Any) -> Tree:
    """The same values, inside `shard_map` marked as varying over the mesh axes of all of `like`.

    The carry of a scan must vary from the start as it does after the first step. The result of a
    `where` varies as its arguments do, in every version of JAX; XLA removes it.
    """
    if AxisType.Manual not in jax.sharding.get_abstract_mesh().axis_types:
        return tree

    def unread(leaf: Array) -> Array:  # it may hold NaN
        leaf = lax.stop_gradient(jnp.asarray(leaf))
        return jnp.where(False, leaf, jnp.zeros((), leaf.dtype)).sum()

    marks = [unread(leaf) for leaf in jax.tree.leaves(like)]

    def marked(leaf: Array) -> Array:
        for mark in marks:
            leaf = jnp.where(False, mark.astype(leaf.dtype), leaf)
        return leaf

    return jax.tree.map(marked, tree)


def shard_rows(function: Callable[[Any, Any], Tree], shared: Any, rows: Any) -> Tree:
    """function(shared, rows), where the rows, indices of the first axis, are independent.

    If mesh axes are explicit, each device computes its own rows, split as the first array is.
    """
    first = jax.tree.leaves(rows)[0]
    sharding = explicit_sharding(first)
    if sharding is None or parts(first, 0) == 1:
        return function(shared, rows)
    spec = P(sharding.spec[0])
    split = NamedSharding(sharding.mesh, spec)
    shared = jax.tree.map(gathered, shared)
    rows = jax.tree.map(lambda x: jax.sharding.reshard(split_as(first, x), split), rows)
    mapped = jax.shard_map(
        function,
        mesh=sharding.mesh,
        in_specs=(P(), spec),
        out_specs=spec,
        axis_names=set(explicit_axes(sharding)),
    )
    return mapped(shared, rows)


def explicit_axes(sharding: NamedSharding) -> tuple[Any, ...]:
    """The explicit axes of a mesh; the others may belong to an enclosing `shard_map`."""
    mesh = sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def split_automatically(function: Callable[..., Tree], out: Any) -> Callable[..., Tree]:
    """The function, whose operations XLA splits over devices where mesh axes are explicit.

    The results are split as `out`, a pytree of arrays, is.
    """
    found = [s for s in map(explicit_sharding, jax.tree.leaves(out)) if s is not None]
    if not found:
        return function
    whole = NamedSharding(found[0].mesh, P())
    shardings = jax.tree.map(lambda leaf: explicit_sharding(leaf) or whole, out)
    return jax.sharding.auto_axes(function, axes=explicit_axes(found[0]), out_sharding=shardings)
