"""Sequences of unequal length with one label each, padded in batches of similar length.

`mask` is True at the steps of a sequence, `weights` are 1 at its last step, where the label counts,
and 0 elsewhere.
Run: python -m experiments.recipes.unequal_lengths
"""

import jax
import numpy as np
import optax

import jaxrnn
from jaxrnn import Batch


def labelled(xs, label) -> Batch:
    """One sequence xs (T, I) whose label counts at the last step only."""
    T = len(xs)
    return Batch(xs, label * np.ones(T, int), weights=(np.arange(T) == T - 1).astype(np.float32))


def in_buckets(sequences: list[Batch], padding: float) -> list[Batch]:
    """Padded batches; at most the fraction `padding` of each is padding. Each shape compiles."""
    lengths = [len(sequence.xs) for sequence in sequences]
    found = jaxrnn.buckets(lengths, padding=padding)
    return [jaxrnn.pad([sequences[n] for n in bucket]) for bucket in found]


def main() -> None:
    # Which of the two inputs has the larger sum?
    rng = np.random.default_rng(0)
    drawn = [rng.normal(size=(T, 2)).astype(np.float32) for T in rng.integers(5, 21, 256)]
    batches = in_buckets([labelled(xs, xs.sum(axis=0).argmax()) for xs in drawn], padding=0.25)
    print("batches (T, N):", [batch.xs.shape[:2] for batch in batches])
    params = jaxrnn.init(jax.random.key(0), input_size=2, hidden_size=16, output_size=2)
    adam = optax.adam(1e-2)
    result = jaxrnn.fit(jax.random.key(1), params, batches, optimizer=adam, max_epochs=30)
    print(f"loss: {result.history[0].train_loss:.3f} to {result.history[-1].train_loss:.3f}")


if __name__ == "__main__":
    main()
