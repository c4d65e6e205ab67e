"""The network inside an Equinox module: `Params` is a pytree, so it is a field like any other.

`eqx.partition` separates the arrays of a module, which `fit` trains, from everything else in it.
Run: python -m experiments.recipes.equinox_module (needs equinox: pip install -e '.[peers]')
"""

from functools import partial

import jax
import optax

import jaxrnn
from jaxrnn import Batch

try:
    import equinox as eqx
except ImportError:
    raise SystemExit("equinox: not installed; pip install -e '.[peers]' installs it") from None


class Recurrent(eqx.Module):
    """xs (T, *batch, I) -> ys (T, *batch, O)."""

    params: jaxrnn.Params

    def __init__(self, input_size, hidden_size, output_size, *, key):
        self.params = jaxrnn.init(key, input_size, hidden_size, output_size)

    def __call__(self, xs, h_0=None, *, mask=None, reset=None):
        return jaxrnn.unroll(self.params, xs, h_0, mask=mask, reset=reset)[1]


def loss(static, arrays, batch, h=None):
    """(mean loss, None) of the module that `eqx.partition` separated. No state is carried."""
    model = eqx.combine(arrays, static)
    return jaxrnn.mean_loss(model(batch.xs, mask=batch.mask, reset=batch.reset), batch), None


def main() -> None:
    bits = jax.random.bernoulli(jax.random.key(0), 0.5, (6, 64, 1)).astype(float)
    batch = Batch(bits, bits[..., 0].cumsum(axis=0).astype(int) % 2)
    model = Recurrent(1, 16, 2, key=jax.random.key(1))
    arrays, static = eqx.partition(model, eqx.is_array)
    result = jaxrnn.fit(
        jax.random.key(2), arrays, batch, optimizer=optax.adam(1e-2),
        gradient_fn=jax.value_and_grad(partial(loss, static), has_aux=True),
    )  # fmt: skip
    model = eqx.combine(result.best, static)
    accuracy = (model(bits).argmax(axis=-1) == batch.targets).mean()
    print(f"loss {result.history[-1].train_loss:.3f}, accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
