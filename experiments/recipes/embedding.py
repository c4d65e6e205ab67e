"""An embedding before the network and a head after it: the parameters are one dict.

    x_t = embedding[token_t]        y_t = W relu(W_y h_t + b_y) + b

W_y and b_y of `Params` are the first layer of the head, W and b its second. Without an embedding,
a token selects a column of W_x.
Run: python -m experiments.recipes.embedding
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxrnn
from jaxrnn import Batch


def init(key, vocabulary_size, embedding_size, hidden_size, head_size, label_count):
    key_embedding, key_rnn, key_head = jax.random.split(key, 3)
    return {
        "embedding": jax.random.normal(key_embedding, (vocabulary_size, embedding_size)),
        "rnn": jaxrnn.init(key_rnn, embedding_size, hidden_size, head_size),
        "head": {
            "W": jax.random.normal(key_head, (label_count, head_size)) * head_size**-0.5,
            "b": jnp.zeros(label_count),
        },
    }


def unroll(params, tokens, h_0=None, *, mask=None, reset=None):
    """tokens (T, *batch) -> h_T (*batch, H) and ys (T, *batch, O)."""
    xs = params["embedding"][tokens]
    h_T, ys = jaxrnn.unroll(params["rnn"], xs, h_0, mask=mask, reset=reset)
    return h_T, jax.nn.relu(ys) @ params["head"]["W"].T + params["head"]["b"]


def loss(params, batch, h_0=None):
    """(mean loss, h_T). It does not read `drive`."""
    h_T, ys = unroll(params, batch.xs, h_0, mask=batch.mask, reset=batch.reset)
    return jaxrnn.mean_loss(ys, batch), h_T


gradient_fn = jax.value_and_grad(loss, has_aux=True)


def main() -> None:
    text = "she sells sea shells by the sea shore; the shells she sells are sea shells. " * 8
    letters, tokens = np.unique(list(text), return_inverse=True)
    columns = jnp.array(tokens.reshape(8, -1).T)  # (T, 8)
    batch = Batch(columns[:-1], columns[1:])
    params = init(jax.random.key(0), len(letters), 8, 32, 16, len(letters))
    result = jaxrnn.fit(
        jax.random.key(1), params, batch,
        optimizer=optax.adam(1e-2), gradient_fn=gradient_fn, max_epochs=150,
    )  # fmt: skip
    print(f"loss: {result.history[0].train_loss:.3f} to {result.history[-1].train_loss:.3f}")
    _, ys = unroll(result.best, batch.xs[:, 0])
    print("predicted:", "".join(letters[ys.argmax(axis=-1)]))


if __name__ == "__main__":
    main()
