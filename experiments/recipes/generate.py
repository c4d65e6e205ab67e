"""Teacher forcing and free running.

With teacher forcing each step reads the true previous token. All inputs are known, so `unroll`
computes all steps at once. In free running each step reads the token that the previous step drew,
by `step` in a `lax.scan`.
Run: python -m experiments.recipes.generate
"""

import jax
import jax.numpy as jnp
import optax
from jax import lax

import jaxrnn
from jaxrnn import Batch


def generate(key, params, h, token, length, temperature=1.0):
    """Draws tokens, from the state h (*batch, H) and the first token to read, (*batch).

    Returns the last state and the tokens, (length, *batch).
    """

    def body(carry, key):
        h, token = carry
        h, y = jaxrnn.step(params, h, token)
        token = jax.random.categorical(key, y / temperature)
        return (h, token), token

    (h, _), tokens = lax.scan(body, (h, token), jax.random.split(key, length))
    return h, tokens


def main() -> None:
    key_init, key_fit, key_draw = jax.random.split(jax.random.key(0), 3)
    count = jnp.tile(jnp.arange(5), 9)[:, None]  # 0 1 2 3 4 0 1 ...
    batch = Batch(count[:-1], count[1:])
    params = jaxrnn.init(key_init, input_size=5, hidden_size=16, output_size=5)
    params = jaxrnn.fit(key_fit, params, batch, optimizer=optax.adam(1e-2)).best

    h, ys = jaxrnn.unroll(params, count[:10])
    print("teacher forcing predicts", ys.argmax(axis=-1)[:, 0])
    _, tokens = jax.jit(generate, static_argnums=4)(key_draw, params, h, count[10], 10)
    print("free running draws      ", tokens[:, 0])


if __name__ == "__main__":
    main()
