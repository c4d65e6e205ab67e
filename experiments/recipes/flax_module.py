"""The network inside a Flax NNX module: the module holds the parameters, jaxrnn the functions.

`nnx.split` separates the parameters of a module, which `fit` trains, from its structure.
Run: python -m experiments.recipes.flax_module (needs flax: pip install -e '.[peers]')
"""

from functools import partial

import jax
import optax

import jaxrnn
from jaxrnn import Batch

try:
    from flax import nnx
except ImportError:
    raise SystemExit("flax: not installed; pip install -e '.[peers]' installs it") from None


class Recurrent(nnx.Module):
    """xs (T, *batch, I) -> ys (T, *batch, O)."""

    def __init__(self, input_size, hidden_size, output_size, *, rngs: nnx.Rngs):
        params = jaxrnn.init(rngs.params(), input_size, hidden_size, output_size)
        self.params = nnx.data(jax.tree.map(nnx.Param, params))

    def __call__(self, xs, h_0=None, *, mask=None, reset=None):
        params = jaxrnn.Params(*(leaf[...] for leaf in self.params))
        return jaxrnn.unroll(params, xs, h_0, mask=mask, reset=reset)[1]


def loss(graphdef, params, batch, h=None):
    """(mean loss, None) of the module that `nnx.split` separated. No state is carried."""
    model = nnx.merge(graphdef, params)
    return jaxrnn.mean_loss(model(batch.xs, mask=batch.mask, reset=batch.reset), batch), None


def main() -> None:
    bits = jax.random.bernoulli(jax.random.key(0), 0.5, (6, 64, 1)).astype(float)
    batch = Batch(bits, bits[..., 0].cumsum(axis=0).astype(int) % 2)
    model = Recurrent(1, 16, 2, rngs=nnx.Rngs(1))
    graphdef, params = nnx.split(model)
    result = jaxrnn.fit(
        jax.random.key(2), params, batch, optimizer=optax.adam(1e-2),
        gradient_fn=jax.value_and_grad(partial(loss, graphdef), has_aux=True),
    )  # fmt: skip
    nnx.update(model, result.best)
    accuracy = (model(bits).argmax(axis=-1) == batch.targets).mean()
    print(f"loss {result.history[-1].train_loss:.3f}, accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
