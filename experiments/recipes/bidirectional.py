"""Bidirectional layers over sequences of unequal length.

A step that the mask excludes holds the state. So xs and the mask, reversed in time, run each
sequence backwards within its own length: its padding comes first and changes nothing. Equal,
gradient included, to torch.nn.RNN(num_layers=2, bidirectional=True) on packed sequences.
Run: python -m experiments.recipes.bidirectional
"""

import jax
import jax.numpy as jnp
import optax

import jaxrnn
from jaxrnn import Batch


def both_directions(function, forward, backward, xs, mask):
    """The outputs of `hidden_states` or `unroll`, forward in time and backward."""
    _, forward_out = function(forward, xs, mask=mask)
    _, backward_out = function(backward, xs[::-1], mask=None if mask is None else mask[::-1])
    return forward_out, backward_out[::-1]


def unroll_bidirectional(layers, xs, mask):
    """layers: pairs (forward, backward) of Params; each layer above the first has 2 H inputs.

    ys (T, *batch, O): the sum of the top layer's two readouts is one readout of both states.
    """
    for forward, backward in layers[:-1]:
        hs = both_directions(jaxrnn.hidden_states, forward, backward, xs, mask)
        xs = jnp.concatenate(hs, axis=-1)
    forward, backward = layers[-1]
    return sum(both_directions(jaxrnn.unroll, forward, backward, xs, mask))


def loss(layers, batch, h=None):
    """(mean loss, None): no state is carried, as the backward direction reads the future.

    It does not read `reset` and `drive`.
    """
    return jaxrnn.mean_loss(unroll_bidirectional(layers, batch.xs, batch.mask), batch), None


def main() -> None:
    # Do the bits before and after this one differ? Outside a sequence the bits are 0.
    key_init, key_data, key_lengths = jax.random.split(jax.random.key(0), 3)
    mask = jaxrnn.mask_from_lengths(jax.random.randint(key_lengths, (64,), 1, 11), 10)
    bits = mask * jax.random.randint(key_data, mask.shape, 0, 2)
    around = jnp.pad(bits, ((1, 1), (0, 0)))
    batch = Batch(bits[..., None].astype(float), around[:-2] ^ around[2:], mask)
    layers = [
        tuple(jaxrnn.init(key, input_size, 8, 2) for key in pair)
        for pair, input_size in zip(jax.random.split(key_init, (2, 2)), (1, 16), strict=True)
    ]
    result = jaxrnn.fit(
        jax.random.key(1), layers, batch,
        optimizer=optax.adam(2e-2), gradient_fn=jax.value_and_grad(loss, has_aux=True),
    )  # fmt: skip
    print(f"loss: {result.history[0].train_loss:.3f} to {result.history[-1].train_loss:.3f}")


if __name__ == "__main__":
    main()
