"""Penalties on firing rates and weights, beside the loss of the task.

    L + lambda_h mean |h_t|^2 / H + lambda_W sum |W_h|

The rates are penalised at the steps that count in L: `mean_loss` of the states takes the mask and
the weights of the batch. So the examples of weight 0 that fill the last minibatch of `fit` are left
out. The gradient is that of autodiff.
Run: python -m experiments.recipes.penalties
"""

import jax
import jax.numpy as jnp
import optax

import jaxrnn
from jaxrnn import Batch, Loss

OPTIONS: dict = {"activation": jaxrnn.softplus, "leak": 0.2}

rates = Loss(
    g=jaxrnn.identity.f,
    value=lambda h, target: (h * h).mean(axis=-1),
    error=lambda h, target: 2 * h / h.shape[-1],
)
"""|h|^2 / H of a step. It reads no target."""


def penalised(lambda_h, lambda_W):
    """A gradient function for `make_update` and `fit`."""

    def loss(params, batch, h_0=None):
        h_T, hs = jaxrnn.hidden_states(
            params, batch.xs, h_0, drive=batch.drive, mask=batch.mask, reset=batch.reset, **OPTIONS
        )
        value = jaxrnn.mean_loss(jaxrnn.readout(params, hs), batch)
        penalty = lambda_h * jaxrnn.mean_loss(hs, batch, rates)
        return value + penalty + lambda_W * jnp.abs(params.W_h).sum(), h_T

    return jax.value_and_grad(loss, has_aux=True)


def main() -> None:
    # Is the sum of all inputs so far positive?
    key_init, key_data, key_fit = jax.random.split(jax.random.key(0), 3)
    xs = jax.random.normal(key_data, (20, 256, 1))
    train = Batch(xs, (xs.cumsum(axis=0)[..., 0] > 0).astype(int))
    params = jaxrnn.init(key_init, input_size=1, hidden_size=32, output_size=2)
    for lambda_h, lambda_W in ((0, 0), (0.01, 0), (0.01, 0.001)):
        best = jaxrnn.fit(
            key_fit, params, train, optimizer=optax.adam(1e-2),
            gradient_fn=penalised(lambda_h, lambda_W), batch_size=50, max_epochs=30,
        ).best  # fmt: skip
        _, hs = jaxrnn.hidden_states(best, xs, **OPTIONS)
        right = (jaxrnn.readout(best, hs).argmax(axis=-1) == train.targets).mean()
        print(
            f"lambda {lambda_h}, {lambda_W}: {100 * right:.0f} % right, mean rate {hs.mean():.2f}, "
            f"sum |W_h| {jnp.abs(best.W_h).sum():.0f}"
        )


if __name__ == "__main__":
    main()
