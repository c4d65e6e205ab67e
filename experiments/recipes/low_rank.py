"""A recurrence of low rank: W_h = m n^T with m and n (H, R), trained by gradient descent.

    z_t = W_x x_t + m kappa_{t-1} + b_h        h_t = f(z_t)        kappa_t = n^T h_t

(Mastrogiuseppe and Ostojic 2018). The state that passes from step to step is kappa, R numbers, so
the loop takes two thin products and never builds W_h. Autodiff of a scan is enough here, since the
accumulators of dm and dn are thin as well. On 2 CPU cores, rank 2, T 100, B 32, value and gradient
took 3.4, 99, 103 ms at H 128, 512, 1024; `reparametrized(bptt, to_params)`, whose loop has the
product with W_h, 5.1, 134, 473 ms (minimum of 9, interleaved, cores shared with other work).
Run: python -m experiments.recipes.low_rank
"""

import jax
import jax.numpy as jnp
import optax
from jax import lax

import jaxrnn
from jaxrnn import Batch


def init(key, input_size, hidden_size, output_size, rank):
    key_params, key_m, key_n = jax.random.split(key, 3)
    params = jaxrnn.init(key_params, input_size, hidden_size, output_size)
    m, n = (jax.random.normal(k, (hidden_size, rank)) for k in (key_m, key_n))
    rest = {name: leaf for name, leaf in params._asdict().items() if name != "W_h"}
    return {"m": m, "n": n / hidden_size, **rest}


def to_params(theta):
    """The same network with W_h, for every function of jaxrnn: `fixed_points`, `interop`, ..."""
    rest = {name: leaf for name, leaf in theta.items() if name not in ("m", "n")}
    return jaxrnn.Params(W_h=theta["m"] @ theta["n"].T, **rest)


def unroll(theta, batch, kappa_0=None):
    """kappa_T (*batch, R) and ys (T, *batch, O); xs are numbers."""
    m, n = theta["m"], theta["n"]
    steps, R = batch.xs.shape[:-1], m.shape[1]
    mask = jnp.ones(steps, bool) if batch.mask is None else batch.mask
    reset = jnp.zeros(steps, bool) if batch.reset is None else batch.reset
    kappa_0 = jnp.zeros((*steps[1:], R), m.dtype) if kappa_0 is None else kappa_0
    zs_x = jnp.where(mask[..., None], batch.xs, 0) @ theta["W_x"].T + theta["b_h"]

    def body(kappa, inputs):
        z_x, valid, reset_t = inputs
        h = jnp.tanh(z_x + jnp.where(reset_t[..., None], 0, kappa) @ m.T)
        return jnp.where(valid[..., None], h @ n, kappa), h

    kappa_T, hs = lax.scan(body, kappa_0, (zs_x, mask, reset))
    return kappa_T, hs @ theta["W_y"].T + theta["b_y"]


def loss(theta, batch, kappa_0=None):
    kappa_T, ys = unroll(theta, batch, kappa_0)
    return jaxrnn.mean_loss(ys, batch), kappa_T


gradient_fn = jax.value_and_grad(loss, has_aux=True)


def main() -> None:
    # Is the sum of all inputs so far positive?
    key_init, key_data, key_fit = jax.random.split(jax.random.key(0), 3)
    xs = jax.random.normal(key_data, (20, 256, 1))
    train = Batch(xs, (xs.cumsum(axis=0)[..., 0] > 0).astype(int))
    result = jaxrnn.fit(
        key_fit, init(key_init, 1, 64, 2, rank=2), train, optimizer=optax.adam(5e-3),
        gradient_fn=gradient_fn, batch_size=32, max_epochs=10,
    )  # fmt: skip
    print("loss:", [round(epoch.train_loss, 3) for epoch in result.history])


if __name__ == "__main__":
    main()
