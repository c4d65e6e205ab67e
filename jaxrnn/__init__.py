"""jaxrnn: the recurrent network written out in JAX.

    z_t = W_x x_t + W_h h_{t-1} + b_h        h_t = f(z_t)                     forward.py
    y_t = W_y h_t + b_y                      y_hat_t = g(y_t)

    dy_t = (y_hat_t - target_t) / n                                           losses.py
    dh_t = W_y^T dy_t + W_h^T dz_{t+1}       dz_t = f'(z_t) * dh_t            recurrence.py
    dW_y = sum dy_t h_t^T    dW_x = sum dz_t x_t^T    dW_h = sum dz_t h_{t-1}^T    backward.py
    db_y = sum dy_t          db_h = sum dz_t

    theta <- theta - eta dtheta                                               update.py

With a leak alpha, the units of a rate network:

    h_t = (1 - alpha) h_{t-1} + alpha f(z_t)
    dh_t = W_y^T dy_t + W_h^T dz_{t+1} + (1 - alpha) dh_{t+1}         dz_t = alpha f'(z_t) * dh_t

Shapes: T steps, zero or more batch axes, time first: xs (T, *batch, I), hs (T, *batch, H),
ys (T, *batch, O). A plural is a trajectory. A leading d is the derivative of the loss,
which is the mean over n steps, those that count.

Call the passes under `jax.jit`: outside it, each call compiles its loops again. An `Activation` or
a `Loss` is not an array: bind it by `functools.partial`, or name it in `static_argnames`.
"""

from jaxrnn import checkpoints, curvature, interop, kernels, serialization, streams
from jaxrnn.activations import Activation, identity, relu, sigmoid, softplus, tanh
from jaxrnn.backward import bptt
from jaxrnn.batches import Batch
from jaxrnn.curvature import gauss_newton_product
from jaxrnn.dynamics import Flow, gradient_flow
from jaxrnn.epochs import Diverged
from jaxrnn.equilibria import FixedPoints, Stability, distinct, fixed_points, stability
from jaxrnn.evaluation import evaluate
from jaxrnn.forward import hidden_states, sequence_loss, step, unroll
from jaxrnn.gradients import reparametrized
from jaxrnn.jacobians import jacobian, jacobian_products, lyapunov_exponents
from jaxrnn.losses import Loss, binary_cross_entropy, cross_entropy, mean_loss, squared_error
from jaxrnn.online import rtrl, snap1, uoro
from jaxrnn.parallel import data_parallel
from jaxrnn.params import Params, init, scaled_identity
from jaxrnn.products import readout
from jaxrnn.sequences import buckets, mask_from_lengths, pad, unpad, windows
from jaxrnn.serialization import load_fit, save_fit
from jaxrnn.training import Evaluation, Fit, fit
from jaxrnn.update import Metrics, TrainState, init_state, make_update, sgd
from jaxrnn.value_checks import check_values

__version__ = "0.2.0.dev0"

__all__ = [
    "Activation",
    "Batch",
    "Diverged",
    "Evaluation",
    "Fit",
    "FixedPoints",
    "Flow",
    "Loss",
    "Metrics",
    "Params",
    "Stability",
    "TrainState",
    "binary_cross_entropy",
    "bptt",
    "buckets",
    "check_values",
    "checkpoints",
    "cross_entropy",
    "curvature",
    "data_parallel",
    "distinct",
    "evaluate",
    "fit",
    "fixed_points",
    "gauss_newton_product",
    "gradient_flow",
    "hidden_states",
    "identity",
    "init",
    "init_state",
    "interop",
    "jacobian",
    "jacobian_products",
    "kernels",
    "load_fit",
    "lyapunov_exponents",
    "make_update",
    "mask_from_lengths",
    "mean_loss",
    "pad",
    "readout",
    "relu",
    "reparametrized",
    "rtrl",
    "save_fit",
    "scaled_identity",
    "sequence_loss",
    "serialization",
    "sgd",
    "sigmoid",
    "snap1",
    "softplus",
    "squared_error",
    "stability",
    "step",
    "streams",
    "tanh",
    "unpad",
    "unroll",
    "uoro",
    "windows",
]
