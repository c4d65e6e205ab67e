"""The loss of a batch that is split over devices, for Hessian-free optimisation."""

import jax
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh

import jaxrnn
from experiments.hessian_free_update import Objective
from experiments.long_lag_tasks import Task
from jaxrnn import Batch, curvature
from jaxrnn.batches import step_weights


def objective(task: Task, batch: Batch, unravel) -> Objective:
    """The loss of a batch, each device with its share of the sequences: means over `batch`.

    All shares count the same number of steps, so the mean of their means is that of the batch.
    """

    def local(theta):
        return unravel(lax.pcast(theta, "batch", to="varying"))

    def value(theta):
        return lax.pmean(jaxrnn.sequence_loss(local(theta), batch, loss=task.loss)[0], "batch")

    def value_and_gradient(theta):
        (f, _), grads = jaxrnn.bptt(local(theta), batch, loss=task.loss)
        return lax.pmean((f, ravel_pytree(grads)[0]), "batch")

    def gauss_newton(theta):
        product = curvature.gauss_newton(local(theta), batch, loss=task.loss)

        def of_all(v, structural=None):
            return lax.pmean(ravel_pytree(product(local(v), structural))[0], "batch")

        return of_all

    return Objective(value, value_and_gradient, gauss_newton)


def wrong_sequences(task: Task, params, batch: Batch) -> Array:
    """(B,) bool: the output is wrong at a step that counts."""
    _, ys = jaxrnn.unroll(params, batch.xs)
    wrong = jax.vmap(task.wrong)(ys, batch.targets)
    return (wrong & (step_weights(batch, params.W_h.dtype) > 0)).any(axis=0)


def devices_for(size: int) -> Mesh:
    """As many devices as divide the size."""
    count = max(n for n in range(1, len(jax.devices()) + 1) if size % n == 0)
    return Mesh(jax.devices()[:count], ("batch",))
