"""A rate network with noise at each update: private noise of each unit, drawn from a key.

    h_t = (1 - alpha) h_{t-1} + alpha f(W_x x_t + W_h h_{t-1} + b_h + drive_t)
    drive_t ~ normal with standard deviation sigma sqrt(2 / alpha)

For small alpha, a linear unit without recurrence then has the standard deviation sigma, whatever
the time step (Yang et al. 2019). A gradient function that takes `key=` may be random:
`fit(gradient_key=...)` calls it with another key at each update, and without a key to evaluate.
Run: python -m experiments.recipes.noise
"""

import jax
import optax

import jaxrnn
from jaxrnn import Batch

ALPHA, SIGMA = 0.2, 0.1
OPTIONS: dict = {"activation": jaxrnn.softplus, "leak": ALPHA}


def with_noise(params, batch, key):
    shape = (*batch.xs.shape[:-1], len(params.b_h))
    drive = SIGMA * (2 / ALPHA) ** 0.5 * jax.random.normal(key, shape)
    return batch._replace(drive=drive)


def gradient_fn(params, batch, h=None, *, key=None):
    """`bptt` with new noise for each key, without noise if there is none."""
    if key is not None:
        batch = with_noise(params, batch, key)
    return jaxrnn.bptt(params, batch, h, **OPTIONS)


def main() -> None:
    # Is the mean of the inputs so far positive?
    key_init, key_data, key_fit, key_noise = jax.random.split(jax.random.key(0), 4)
    xs = 0.5 + jax.random.normal(key_data, (20, 512, 1))
    train = Batch(xs, (xs.cumsum(axis=0)[..., 0] > 0).astype(int))
    params = jaxrnn.init(key_init, input_size=1, hidden_size=32, output_size=2)
    result = jaxrnn.fit(
        key_fit, params, train, optimizer=optax.adam(3e-3), gradient_fn=gradient_fn,
        gradient_key=key_noise, batch_size=32, max_epochs=10,
    )  # fmt: skip
    print("loss without noise:", [round(epoch.valid_loss, 3) for epoch in result.history])


if __name__ == "__main__":
    main()
