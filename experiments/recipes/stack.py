"""A stack of layers: each layer takes the hidden states of the layer below.

The parameters are a list of `Params`. The carried state is a list too, an h for each layer.
Only the top layer has outputs, so the W_y and b_y of the other layers have no rows.
Run: python -m experiments.recipes.stack
"""

import jax
import jax.numpy as jnp
import optax

import jaxrnn
from jaxrnn import Batch, Params


def init_stack(key, input_size, hidden_sizes, output_size) -> list[Params]:
    keys = jax.random.split(key, len(hidden_sizes))
    input_sizes = [input_size, *hidden_sizes[:-1]]
    layers = [
        jaxrnn.init(key, I, H, output_size)
        for key, I, H in zip(keys, input_sizes, hidden_sizes, strict=True)
    ]
    lower = [layer._replace(W_y=layer.W_y[:0], b_y=layer.b_y[:0]) for layer in layers[:-1]]
    return [*lower, layers[-1]]


def unroll_stack(layers, xs, h_0s, *, mask=None, reset=None):
    """The last state of each layer, and the outputs ys of the top layer."""
    h_Ts = []
    for layer, h_0 in zip(layers[:-1], h_0s[:-1], strict=True):
        h_T, xs = jaxrnn.hidden_states(layer, xs, h_0, mask=mask, reset=reset)
        h_Ts.append(h_T)
    h_T, ys = jaxrnn.unroll(layers[-1], xs, h_0s[-1], mask=mask, reset=reset)
    return [*h_Ts, h_T], ys


def loss(layers, batch, h_0s=None):
    """(mean loss, h_Ts), as `fit` expects. It does not read `drive`."""
    h_0s = [None] * len(layers) if h_0s is None else h_0s
    h_Ts, ys = unroll_stack(layers, batch.xs, h_0s, mask=batch.mask, reset=batch.reset)
    return jaxrnn.mean_loss(ys, batch), h_Ts


gradient_fn = jax.value_and_grad(loss, has_aux=True)


def main() -> None:
    # Does the current bit differ from the bit two steps earlier?
    key_init, key_data, key_fit = jax.random.split(jax.random.key(0), 3)
    bits = jax.random.bernoulli(key_data, 0.5, (202, 8, 1)).astype(float)
    stream = Batch(bits[2:], (bits[2:] != bits[:-2])[..., 0].astype(int))
    result = jaxrnn.fit(
        key_fit,
        init_stack(key_init, 1, [16, 8], 2),
        list(jaxrnn.windows(stream, 20)),
        optimizer=optax.adam(1e-2),
        gradient_fn=gradient_fn,
        h_0=[jnp.zeros((8, 16)), jnp.zeros((8, 8))],
        max_epochs=30,
    )
    print("loss by epoch:", [round(epoch.train_loss, 3) for epoch in result.history[::5]])


if __name__ == "__main__":
    main()
