"""A trained network as bytes, served without its Python code.

`jax.export` writes the compiled function with its parameters. T and B are symbols, so that the
function takes any number of sequences of any length. `unroll` continues from a state, so a stream
can be sent in pieces. The server needs JAX, and neither jaxrnn nor the parameters.
Run: python -m experiments.recipes.serving
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export

import jaxrnn
from jaxrnn import Batch, Params


def to_bytes(params: Params, platforms: tuple[str, ...] = ("cpu", "cuda", "tpu")) -> bytearray:
    """(xs, h_0) -> (h_T, probabilities), for float32 xs (T, B, I) and h_0 (B, H), as bytes."""

    @jax.jit
    def predict(xs: jax.Array, h_0: jax.Array) -> tuple[jax.Array, jax.Array]:
        h_T, ys = jaxrnn.unroll(params, xs, h_0)
        return h_T, jaxrnn.cross_entropy.g(ys)

    T, B = export.symbolic_shape("T, B")
    (H, I), dtype = params.W_x.shape, params.W_x.dtype
    arguments = jax.ShapeDtypeStruct((T, B, I), dtype), jax.ShapeDtypeStruct((B, H), dtype)
    return export.export(predict, platforms=platforms)(*arguments).serialize()


def main() -> None:
    key_init, key_data, key_fit = jax.random.split(jax.random.key(0), 3)
    xs = jax.random.bernoulli(key_data, 0.5, (10, 64, 1)).astype(jnp.float32)
    parity = Batch(xs, xs[..., 0].cumsum(axis=0).astype(int) % 2)
    params = jaxrnn.init(key_init, input_size=1, hidden_size=16, output_size=2)
    params = jaxrnn.fit(
        key_fit, params, parity, optimizer=optax.adam(1e-2), batch_size=16, max_epochs=300
    ).best

    path = Path(tempfile.mkdtemp()) / "parity.bin"
    path.write_bytes(to_bytes(params))

    # The server. A stream of one sequence comes in pieces of unequal length.
    predict = jax.jit(export.deserialize(bytearray(path.read_bytes())).call)
    stream, h = np.array([1, 1, 1, 0, 1, 0, 0], np.float32), jnp.zeros((1, 16))
    for piece in np.split(stream, [3, 4]):
        h, probabilities = predict(piece[:, None, None], h)
        odd = probabilities[:, 0, 1]
        print(f"{piece.astype(int)}: odd with probability {np.round(odd, 2)}")
    print(f"{path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
