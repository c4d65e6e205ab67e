"""Layers in both directions over sequences of unequal length.

A step that does not exist holds the state, so turning time around with its mask runs each sequence
backwards within its own length: padding comes first then, and changes nothing. Equal, gradient
included, to torch.nn.RNN(num_layers=2, bidirectional=True) on packed sequences.
Run: python -m experiments.recipes.bidirectional
"""

import jax
import jax.numpy as jnp

import jaxrnn


def both_ways(function, forth, back, xs, mask):
    """`hidden_states` or `unroll`, once forth and once back in time, each at its own step."""
    _, forth_out = function(forth, xs, mask=mask)
    _, back_out = function(back, xs[::-1], mask=mask[::-1])
    return forth_out, back_out[::-1]


def unroll_bidirectional(layers, xs, mask):
    """layers: pairs (forth, back) of Params; each layer above the first has 2 H inputs.

    ys (T, *batch, O): the sum of the top's two readouts is one readout of both states.
    """
    for forth, back in layers[:-1]:
        xs = jnp.concatenate(both_ways(jaxrnn.hidden_states, forth, back, xs, mask), axis=-1)
    forth, back = layers[-1]
    return sum(both_ways(jaxrnn.unroll, forth, back, xs, mask))


def main() -> None:
    keys = jax.random.split(jax.random.key(0), (2, 2))
    layers = [
        tuple(jaxrnn.init(key, input_size, 8, 2) for key in pair)
        for pair, input_size in zip(keys, (3, 16), strict=True)
    ]
    mask = jaxrnn.mask_from_lengths(jnp.array([10, 7, 0]), 10)
    print(jax.jit(unroll_bidirectional)(layers, jnp.ones((10, 3, 3)), mask).shape)


if __name__ == "__main__":
    main()
