"""The layer inside a Flax NNX module: its parameters are the module's, its functions jaxrnn's.

Run: python -m experiments.recipes.flax_module (wants flax)
"""

import jax
import jax.numpy as jnp
from flax import nnx

import jaxrnn


class Recurrent(nnx.Module):
    """xs (T, *batch, I) -> ys (T, *batch, O)."""

    def __init__(self, input_size, hidden_size, output_size, *, rngs: nnx.Rngs):
        params = jaxrnn.init(rngs.params(), input_size, hidden_size, output_size)
        self.params = nnx.data(jax.tree.map(nnx.Param, params))

    def __call__(self, xs, h_0=None, *, mask=None, reset=None):
        params = jaxrnn.Params(*(leaf[...] for leaf in self.params))
        return jaxrnn.unroll(params, xs, h_0, mask=mask, reset=reset)[1]


def main() -> None:
    model = Recurrent(3, 5, 2, rngs=nnx.Rngs(0))
    xs = jax.random.normal(jax.random.key(0), (7, 4, 3))
    grads = nnx.jit(nnx.grad(lambda model: (model(xs) ** 2).mean()))(model)
    print(jax.tree.map(jnp.shape, nnx.to_pure_dict(grads)))


if __name__ == "__main__":
    main()
