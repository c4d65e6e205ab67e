"""The layer inside an Equinox module: `Params` is a pytree, so it is a field like any other.

Run: python -m experiments.recipes.equinox_module (wants equinox)
"""

import equinox as eqx
import jax

import jaxrnn


class Recurrent(eqx.Module):
    """xs (T, *batch, I) -> ys (T, *batch, O)."""

    params: jaxrnn.Params

    def __init__(self, input_size, hidden_size, output_size, *, key):
        self.params = jaxrnn.init(key, input_size, hidden_size, output_size)

    def __call__(self, xs, h_0=None, *, mask=None, reset=None):
        return jaxrnn.unroll(self.params, xs, h_0, mask=mask, reset=reset)[1]


def main() -> None:
    model = Recurrent(3, 5, 2, key=jax.random.key(0))
    xs = jax.random.normal(jax.random.key(1), (7, 4, 3))

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(model):
        return (model(xs) ** 2).mean()

    print(gradient(model))


if __name__ == "__main__":
    main()
