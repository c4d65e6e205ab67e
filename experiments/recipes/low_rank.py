"""A recurrence of low rank: W_h = m n^T with m and n (H, R), trained by gradient descent.

    z_t = W_x x_t + m kappa_{t-1} + b_h        h_t = f(z_t)        kappa_t = n^T h_t

(Mastrogiuseppe and Ostojic 2018). Only kappa, R numbers, passes from step to step: the loop never
builds W_h. Value and gradient take 0.9, 0.5, 0.3 times as long as `reparametrized(bptt, to_params)`
at H 128, 512, 1024 (2 CPU cores, R 2, T 100, B 32, I 8, O 4; minimum of 15, interleaved).
Run: python -m experiments.recipes.low_rank
"""

import jax
import jax.numpy as jnp
import optax

import jaxrnn
from jaxrnn import Batch


def init(key, input_size, hidden_size, output_size, rank):
    key_params, key_m, key_n = jax.random.split(key, 3)
    params = jaxrnn.init(key_params, input_size, hidden_size, output_size)
    m, n = (jax.random.normal(k, (hidden_size, rank)) for k in (key_m, key_n))
    theta = {"m": m, "n": n / hidden_size, **params._asdict()}
    return {name: leaf for name, leaf in theta.items() if name != "W_h"}


def to_params(theta):
    """The same network with W_h, for every function of jaxrnn: `fixed_points`, `interop`, ..."""
    rest = {name: leaf for name, leaf in theta.items() if name not in ("m", "n")}
    return jaxrnn.Params(W_h=theta["m"] @ theta["n"].T, **rest)


def unroll(theta, batch, kappa=None):
    """kappa_T (*batch, R) and ys (T, *batch, O). It does not read `drive`."""
    m, n, steps = theta["m"], theta["n"], batch.xs.shape[:-1]
    mask = jnp.ones(steps, bool) if batch.mask is None else batch.mask
    reset = jnp.zeros(steps, bool) if batch.reset is None else batch.reset
    zs_x = jnp.where(mask[..., None], batch.xs, 0) @ theta["W_x"].T + theta["b_h"]

    def body(kappa, inputs):
        z_x, valid, reset_t = inputs
        h = jnp.tanh(z_x + jnp.where(reset_t[..., None], 0, kappa) @ m.T)
        return jnp.where(valid[..., None], h @ n, kappa), h

    start = jnp.zeros((*steps[1:], m.shape[1]), m.dtype) if kappa is None else kappa
    kappa, hs = jax.lax.scan(body, start, (zs_x, mask, reset))
    return kappa, hs @ theta["W_y"].T + theta["b_y"]


def loss(theta, batch, kappa=None):
    kappa, ys = unroll(theta, batch, kappa)
    return jaxrnn.mean_loss(ys, batch), kappa


gradient_fn = jax.value_and_grad(loss, has_aux=True)


def main() -> None:
    key_init, key_data, key_fit = jax.random.split(jax.random.key(0), 3)
    xs = jax.random.normal(key_data, (20, 256, 1))
    train = Batch(xs, (xs.cumsum(axis=0)[..., 0] > 0).astype(int))  # is the sum so far positive?
    result = jaxrnn.fit(
        key_fit, init(key_init, 1, 64, 2, rank=2), train, optimizer=optax.adam(5e-3),
        gradient_fn=gradient_fn, batch_size=32, max_epochs=10,
    )  # fmt: skip
    print("loss:", [round(epoch.train_loss, 3) for epoch in result.history])


if __name__ == "__main__":
    main()
