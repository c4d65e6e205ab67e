"""Dale's law and sparsity: constraints on W_h that hold at every update.

    W_h = |theta_h| diag(signs) * connected

Column j holds the weights from unit j to all others: they have one sign, and a missing connection
stays 0. `reparametrized` gives the gradient with respect to theta, and training takes it as it is
(Song, Yang, Wang 2016). Frozen weights and shared blocks are other functions theta -> params:

    def frozen(theta): return Params(W_h=W_h, **theta)                        theta has no W_h
    def shared(theta): return theta["rest"]._replace(W_h=jnp.kron(jnp.eye(2), theta["block"]))

Run: python -m experiments.recipes.dales_law
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxrnn
from jaxrnn import Batch

H, EXCITATORY = 40, 32
SIGNS = np.where(np.arange(H) < EXCITATORY, 1.0, -1.0)
CONNECTED = np.random.default_rng(0).random((H, H)) < 0.5


def to_params(theta):
    return theta._replace(W_h=jnp.abs(theta.W_h) * SIGNS * CONNECTED)


gradient_fn = jaxrnn.reparametrized(partial(jaxrnn.bptt, leak=0.5), to_params)


def init(key):
    """theta for which excitation and inhibition cancel in the mean."""
    theta = jaxrnn.init(key, input_size=1, hidden_size=H, output_size=2)
    sizes = np.where(SIGNS > 0, 1 / EXCITATORY, 1 / (H - EXCITATORY))
    return theta._replace(W_h=2 * jnp.abs(theta.W_h) * H**0.5 * sizes)


def main() -> None:
    # Is the sum of all inputs so far positive?
    key_init, key_data, key_fit = jax.random.split(jax.random.key(0), 3)
    xs = jax.random.normal(key_data, (20, 256, 1))
    train = Batch(xs, (xs.cumsum(axis=0)[..., 0] > 0).astype(int))
    result = jaxrnn.fit(
        key_fit, init(key_init), train, optimizer=optax.adam(1e-2), gradient_fn=gradient_fn,
        batch_size=32, max_epochs=10,
    )  # fmt: skip
    W_h = to_params(result.best).W_h
    print("loss:", [round(epoch.train_loss, 3) for epoch in result.history])
    print(f"weights of the wrong sign: {int((W_h * SIGNS < 0).sum())} of {W_h.size}")


if __name__ == "__main__":
    main()
