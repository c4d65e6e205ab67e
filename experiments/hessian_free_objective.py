"""The loss of a batch that is split over devices, for Hessian-free optimisation."""

import jax
from jax import lax
from jax.flatten_util import ravel_pytree

import jaxrnn
from experiments.hessian_free_update import Objective
from experiments.long_lag_tasks import Task
from jaxrnn import Batch, curvature


def objective(task: Task, batches: Batch, unravel) -> Objective:
    """The mean loss of the batches, with the curvature of the first, each device with its share.

    All shares count the same number of steps, so the mean of their means is that of the batch.

    Args:
      task: Task.
      batches: a Batch with a leading axis, that of the batches.
      unravel: theta -> Params.
    """
    batch = jax.tree.map(lambda leaf: leaf[0], batches)

    def local(theta):
        return unravel(lax.pcast(theta, "batch", to="varying"))

    def value(theta):
        def of_one(batch):
            return jaxrnn.sequence_loss(local(theta), batch, loss=task.loss)[0]

        return lax.pmean(lax.map(of_one, batches).mean(), "batch")

    def gradient(theta):
        def of_one(batch):
            return ravel_pytree(jaxrnn.bptt(local(theta), batch, loss=task.loss)[1])[0]

        return lax.pmean(lax.map(of_one, batches).mean(axis=0), "batch")

    def gauss_newton(theta):
        product = curvature.gauss_newton(local(theta), batch, loss=task.loss)

        def of_all(v, structural=None):
            return lax.pmean(ravel_pytree(product(local(v), structural))[0], "batch")

        return of_all

    return Objective(value, gradient, gauss_newton)
