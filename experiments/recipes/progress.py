"""A progress bar and an early stop: `fit` calls a function after each epoch.

The callback gets the Fit so far. It never changes later, so it may be kept. Training ends if the
callback returns True. `functools.partial(jaxrnn.save_fit, folder)` is a callback too.
Run: python -m experiments.recipes.progress
"""

from functools import partial

import jax
import optax
from tqdm import tqdm

import jaxrnn
from jaxrnn import Batch


def report(bar, target, result):
    """Moves the bar by one epoch; True as soon as the held-out loss is below the target."""
    epoch = result.history[-1]
    losses = {"train": f"{epoch.train_loss:.3f}", "valid": f"{epoch.valid_loss:.3f}"}
    bar.set_postfix(losses, refresh=False)
    bar.update()
    return epoch.valid_loss < target


def parity(key, T, N):
    """Is the number of ones so far odd?"""
    bits = jax.random.bernoulli(key, 0.5, (T, N, 1)).astype(float)
    return Batch(bits, bits[..., 0].cumsum(axis=0).astype(int) % 2)


def main() -> None:
    key_init, key_train, key_valid, key_fit = jax.random.split(jax.random.key(0), 4)
    max_epochs = 200
    with tqdm(total=max_epochs, unit="epoch") as bar:
        result = jaxrnn.fit(
            key_fit,
            jaxrnn.init(key_init, input_size=1, hidden_size=16, output_size=2),
            parity(key_train, 10, 256),
            parity(key_valid, 10, 64),
            optimizer=optax.adam(1e-2),
            batch_size=32,
            max_epochs=max_epochs,
            callback=partial(report, bar, 0.1),
        )
    epochs, last = len(result.history), result.history[-1]
    print(f"stopped after {epochs} epochs with a held-out loss of {last.valid_loss:.3f}")


if __name__ == "__main__":
    main()
