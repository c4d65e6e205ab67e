"""The batch split over devices: CPU cores, GPUs, TPU chips, one process or many."""

from typing import Any

import jax
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrnn import checks
from jaxrnn.batches import Batch, check_is_batch, divide_by_count, step_weights, steps_shape
from jaxrnn.gradients import GradientFn, call_gradient, value_dtype
from jaxrnn.sharding import match_varying_axes


def data_parallel(gradient_fn: GradientFn, mesh: Mesh) -> GradientFn:
    """The same gradient function, with the batch split over the first axis of the mesh.

    Each device runs its share of the sequences without communication. One reduction at the end
    weighs the shares by n_k, the sum of weights * mask in each, so that unequal masks are right:

        L = sum_k n_k L_k / sum_k n_k        dtheta = sum_k n_k dtheta_k / sum_k n_k

    The dtype of the loss must hold n_k L_k and n_k dtheta_k.

    Args:
      gradient_fn: (params, batch, h_0) -> ((value, h_T), grads): `bptt` or a function like it.
      mesh: the devices. `jax.config.update("jax_num_cpu_devices", 2)`, before JAX is first used,
        makes two devices of a CPU.

    Returns:
      The gradient function. Its value and gradient are those of the whole batch; h_T stays split
      over the devices. Each device folds its index into `key`.

    Raises:
      TypeError: gradient_fn is not a function, or mesh not a Mesh; when called, if the batch is not
        a Batch, or gradient_fn does not return ((value, h_T), grads).
      ValueError: when called, if the first batch axis is missing or not a multiple of the first
        mesh axis; `fit` fills the last minibatch, but not the data that it evaluates.

    >>> import jax, jax.numpy as jnp, jaxrnn
    >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("batch",))
    >>> params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    >>> batch = jaxrnn.Batch(xs=jnp.ones((7, 4, 3)), targets=jnp.zeros((7, 4), int))
    >>> (value, h_T), grads = jax.jit(data_parallel(jaxrnn.bptt, mesh))(params, batch)
    >>> bool(jnp.allclose(value, jaxrnn.sequence_loss(params, batch)[0]))
    True
    """
    checks.check_function("gradient_fn", gradient_fn)
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(f"mesh: expected a Mesh, got {mesh!r}")
    axis = mesh.axis_names[0]

    def shard_gradient(params: Any, batch: Batch, h_0: Any, key: Array | None) -> Any:
        # Parameters that vary over devices get the gradient of this share alone.
        params = match_varying_axes(params, batch.xs)
        keywords = {} if key is None else {"key": jax.random.fold_in(key, lax.axis_index(axis))}
        (value, h_T), grads = call_gradient(gradient_fn, params, batch, h_0, **keywords)
        counted = step_weights(batch, value_dtype(params)).sum()
        weighted = jax.tree.map(lambda leaf: counted * leaf.astype(counted.dtype), (value, grads))
        total, sums = lax.psum((counted, weighted), axis)
        means = divide_by_count(sums, total)
        value, grads = jax.tree.map(lambda d, like: d.astype(like.dtype), means, (value, grads))
        return (value, h_T), grads

    in_specs = P(), P(None, axis), P(axis), P()
    out_specs = (P(), P(axis)), P()
    shard_map = jax.shard_map(shard_gradient, mesh=mesh, in_specs=in_specs, out_specs=out_specs)

    def sharded_gradient(
        params: Any, batch: Batch, h_0: Any = None, *, key: Array | None = None
    ) -> Any:
        check_is_batch(batch)
        sequences = steps_shape(batch.xs)[1:2]
        if not sequences or sequences[0] % mesh.shape[axis]:
            raise ValueError(
                f"batch: expected a first batch axis that is a multiple of {mesh.shape[axis]} "
                f"devices, got xs of shape {batch.xs.shape}"
            )
        if mesh.axis_types[0] == AxisType.Explicit:
            params, batch, h_0, key = (
                jax.sharding.reshard(tree, NamedSharding(mesh, spec))
                for tree, spec in zip((params, batch, h_0, key), in_specs, strict=True)
            )
        return shard_map(params, batch, h_0, key)

    return sharded_gradient
