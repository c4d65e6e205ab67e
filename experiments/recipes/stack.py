"""A stack of layers: each takes the hidden states of the one below.

A layer is a `Params`. Only the top is read out; the readouts of the others have no rows.
Run: python -m experiments.recipes.stack
"""

import jax
import jax.numpy as jnp

import jaxrnn
from jaxrnn import Params


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
    """The last state of each layer, to be carried on as the next h_0s, and the ys of the top."""
    h_Ts = []
    for layer, h_0 in zip(layers[:-1], h_0s[:-1], strict=True):
        h_T, xs = jaxrnn.hidden_states(layer, xs, h_0, mask=mask, reset=reset)
        h_Ts.append(h_T)
    h_T, ys = jaxrnn.unroll(layers[-1], xs, h_0s[-1], mask=mask, reset=reset)
    return [*h_Ts, h_T], ys


def main() -> None:
    layers = init_stack(jax.random.key(0), 3, [8, 16, 4], 2)
    mask = jaxrnn.mask_from_lengths(jnp.array([10, 7]), 10)
    h_Ts, ys = jax.jit(unroll_stack)(layers, jnp.ones((10, 2, 3)), [None] * 3, mask=mask)
    print([h_T.shape for h_T in h_Ts], ys.shape)


if __name__ == "__main__":
    main()
