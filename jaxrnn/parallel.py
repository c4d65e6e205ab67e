"""The batch split over devices: CPU cores, GPUs, TPU chips, many processes."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxrnn import checks
from jaxrnn.forward import step_weights, sum_dtype, vary_as
from jaxrnn.update import GradientFn


def data_parallel(gradient_fn: GradientFn, mesh: Mesh) -> GradientFn:
    """The same gradient function with the batch split over the mesh's first axis.

    Each device runs its share of the sequences with no word to the others; one reduction at the
    end weighs the shares by the steps n_k that they counted, so that unequal masks do no harm:

        L = sum_k n_k L_k / sum_k n_k        dtheta = sum_k n_k dtheta_k / sum_k n_k

    Args:
      gradient_fn: (params, batch, h_0) -> ((value, h_T), grads): `bptt` or a function like it.
      mesh: devices; two devices on a CPU come with `jax.config.update("jax_num_cpu_devices", 2)`
        before JAX is first used.

    Returns:
      The gradient function: values as of the whole batch; h_T stays split over the devices.

    Raises:
      ValueError: when called, if the first batch axis does not divide by the number of devices.

    >>> import jax, jaxrnn
    >>> from functools import partial
    >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("batch",))
    >>> params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    >>> batch = jaxrnn.Batch(xs=jnp.ones((7, 4, 3)), targets=jnp.zeros((7, 4), int))
    >>> (value, h_T), grads = jax.jit(data_parallel(jaxrnn.bptt, mesh))(params, batch)
    >>> bool(jnp.allclose(value, jaxrnn.sequence_loss(params, batch)[0]))
    True
    """
    axis = mesh.axis_names[0]

    def of_a_share(params, batch, h_0):
        # Parameters that vary have a gradient of this share; autodiff would sum that of the others.
        (value, h_T), grads = gradient_fn(vary_as(params, batch.xs), batch, h_0)
        counted = step_weights(batch, sum_dtype(params)).sum()
        weighted = jax.tree.map(lambda leaf: counted * leaf.astype(counted.dtype), (value, grads))
        total, summed = lax.psum((counted, weighted), axis)
        total = jnp.where(total == 0, jnp.ones_like(total), total)
        value, grads = jax.tree.map(
            lambda leaf, like: (leaf / total).astype(like.dtype), summed, (value, grads)
        )
        return (value, h_T), grads

    split = jax.shard_map(
        of_a_share,
        mesh=mesh,
        in_specs=(P(), P(None, axis), P(axis)),
        out_specs=((P(), P(axis)), P()),
    )

    def gradient_of_the_whole(params, batch, h_0=None):
        sequences = checks.steps_shape(batch.xs)[1:2]
        if not sequences or sequences[0] % mesh.shape[axis]:
            raise ValueError(
                f"batch: expected a first batch axis that divides by {mesh.shape[axis]} devices, "
                f"got xs of shape {batch.xs.shape}"
            )
        return split(params, batch, h_0)

    return gradient_of_the_whole
