"""jaxrnn: the recurrent network written out in JAX.

    z_t = W_x x_t + W_h h_{t-1} + b_h        h_t = f(z_t)                     forward.py
    y_t = W_y h_t + b_y                      y_hat_t = g(y_t)

    dy_t = y_hat_t - target_t                                                 losses.py
    dh_t = W_y^T dy_t + W_h^T dz_{t+1}       dz_t = f'(z_t) * dh_t            backward.py
    dW_y = sum dy_t h_t^T    dW_x = sum dz_t x_t^T    dW_h = sum dz_t h_{t-1}^T
    db_y = sum dy_t          db_h = sum dz_t

    theta <- theta - eta dtheta                                               update.py

Shapes: T steps, any number of batch axes, time first: xs (T, *batch, I), hs (T, *batch, H),
ys (T, *batch, O). A plural is a trajectory, a leading d the derivative of the loss.
"""

from jaxrnn import checkpoints, interop
from jaxrnn.activations import Activation, identity, relu, sigmoid, tanh
from jaxrnn.backward import bptt
from jaxrnn.checkpoints import Checkpoint, CheckpointError
from jaxrnn.checks import check_values
from jaxrnn.flow import Flow, gradient_flow
from jaxrnn.forward import hidden_states, sequence_loss, step, unroll
from jaxrnn.losses import Loss, binary_cross_entropy, cross_entropy, squared_error
from jaxrnn.parallel import data_parallel
from jaxrnn.params import Params, init, scaled_identity
from jaxrnn.resuming import from_arrays, load_fit, save_fit, to_arrays
from jaxrnn.sequences import Batch, buckets, mask_from_lengths, pad, unpad, windows
from jaxrnn.training import Evaluation, Fit, evaluate, fit
from jaxrnn.update import Diverged, Metrics, TrainState, init_state, make_update, sgd

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "Batch",
    "Checkpoint",
    "CheckpointError",
    "Diverged",
    "Evaluation",
    "Fit",
    "Flow",
    "Loss",
    "Metrics",
    "Params",
    "TrainState",
    "binary_cross_entropy",
    "bptt",
    "buckets",
    "check_values",
    "checkpoints",
    "cross_entropy",
    "data_parallel",
    "evaluate",
    "fit",
    "from_arrays",
    "gradient_flow",
    "hidden_states",
    "identity",
    "init",
    "init_state",
    "interop",
    "load_fit",
    "make_update",
    "mask_from_lengths",
    "pad",
    "relu",
    "save_fit",
    "scaled_identity",
    "sequence_loss",
    "sgd",
    "sigmoid",
    "squared_error",
    "step",
    "tanh",
    "to_arrays",
    "unpad",
    "unroll",
    "windows",
]
