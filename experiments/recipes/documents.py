"""Documents of any length in one stream, trained in windows with the state carried between them.

`reset[t]` marks step t as the first of a document: neither state nor gradient passes from step t-1
to step t. Documents do not leak into each other, and no step is padding.
Run: python -m experiments.recipes.documents
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxrnn
from jaxrnn import Batch


def join(sequences: list[Batch]) -> Batch:
    """Joins sequences, each (T_n, ...), end to end, with a reset at the first step of each.

    That is the first step that exists, since a reset is not read where the mask is False.
    """

    def marked(sequence: Batch) -> Batch:
        exists = np.ones(len(sequence.xs), bool) if sequence.mask is None else sequence.mask
        return sequence._replace(reset=exists & (np.cumsum(exists) == 1))

    sequences = [marked(sequence) for sequence in sequences]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *sequences)


def side_by_side(stream: Batch, N: int) -> Batch:
    """(T, ...) -> (T // N, N, ...): the stream in N parts of equal length, as a batch."""
    T = stream.xs.shape[0] // N
    return jax.tree.map(
        lambda leaf: leaf[: T * N].reshape(N, T, *leaf.shape[1:]).swapaxes(0, 1), stream
    )


def main() -> None:
    # Each document counts up to 9 from a random number; its last target is that number.
    rng = np.random.default_rng(0)
    runs = [jnp.arange(start, 10) for start in rng.integers(0, 9, 400)]
    stream = side_by_side(join([Batch(run, jnp.roll(run, -1)) for run in runs]), 8)
    params = jaxrnn.init(jax.random.key(0), input_size=10, hidden_size=32, output_size=10)
    result = jaxrnn.fit(
        jax.random.key(1),
        params,
        list(jaxrnn.windows(stream, 25)),
        optimizer=optax.adam(1e-2),
        h_0=jnp.zeros((8, 32)),
        max_epochs=30,
    )
    print("loss by epoch:", [round(epoch.train_loss, 3) for epoch in result.history[::5]])


if __name__ == "__main__":
    main()
