"""A small state-space model of one long record, fitted by L-BFGS in float64.

    h_t = f(A h_{t-1} + B u_t + b)        y_t = C h_t + d        H is the order of the model

With f = identity this is linear system identification by the simulation error (Ljung 1999), whose
poles are the eigenvalues of A = W_h. The whole record is one gradient, so a quasi-Newton method
with a line search converges within a hundred updates, where Adam takes thousands.
Run: python -m experiments.recipes.state_space
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxrnn
from jaxrnn import Batch


def stable_init(key, input_size, order, output_size):
    """Parameters in float64, with all poles of modulus 0.5."""
    params = jaxrnn.init(key, input_size, order, output_size, dtype=jnp.float64)
    return params._replace(W_h=0.5 * params.W_h)


def identify(key, us, ys, order, activation=jaxrnn.identity, updates=300):
    """The Fit of a record us (T, I), ys (T, O): one update an epoch, until the loss is 1e-20."""
    key_init, key_fit = jax.random.split(key)
    params = stable_init(key_init, us.shape[1], order, ys.shape[1])
    gradient_fn = partial(jaxrnn.bptt, activation=activation, loss=jaxrnn.squared_error)
    return jaxrnn.fit(
        key_fit, params, [Batch(us, ys)], optimizer=optax.lbfgs(), gradient_fn=gradient_fn,
        max_epochs=updates, patience=20, callback=lambda fit: fit.history[-1].valid_loss < 1e-20,
    )  # fmt: skip


def poles(params):
    """The eigenvalues of W_h, sorted."""
    return np.sort_complex(np.linalg.eigvals(np.asarray(params.W_h)))


def record(key, T, activation=jaxrnn.identity):
    """Inputs, and the outputs of a damped oscillator: poles 0.95 exp(+-0.3 i)."""
    key_init, key_inputs = jax.random.split(key)
    params = stable_init(key_init, 1, 2, 1)
    rotation = jnp.array([[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]])
    params = params._replace(W_h=0.95 * rotation)
    us = jax.random.normal(key_inputs, (T, 1), jnp.float64)
    return us, jaxrnn.unroll(params, us, activation=activation)[1]


def main() -> None:
    with jax.enable_x64(True):
        key_record, key_fit = jax.random.split(jax.random.key(0))
        us, ys = record(key_record, 1000)
        result = identify(key_fit, us, ys, order=2)
        print(
            f"linear: loss {result.history[-1].valid_loss:.1e} after {len(result.history)} updates"
        )
        print("poles", poles(result.best).round(6), "of", (0.95 * np.exp([-0.3j, 0.3j])).round(6))
        us, ys = record(key_record, 1000, jaxrnn.tanh)
        result = identify(key_fit, us, ys, 4, jaxrnn.tanh)
        error = (2 * result.history[-1].valid_loss / ys.var()) ** 0.5
        print(f"tanh, order 4: error {error:.1e} of the output's standard deviation")


if __name__ == "__main__":
    main()
