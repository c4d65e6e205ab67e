"""Mixed precision: parameters in float32, computation in bfloat16, by a cast at the call.

Everything is computed in the dtype of the parameters; the loss and the sums over time are float32
at least. The gradient is cast back, so the state of the optimiser and the updates are float32.
Autodiff through the cast also returns the gradient in float32.

Relative error against float64, H 128, T 128, B 32, I and O 32, CPU, JAX 0.10.2, 2026-11-25:

                                 value    dW_x     dW_h     dW_y     db_h     db_y
    bptt in bfloat16             3.3e-05  6.6e-03  8.0e-03  3.9e-03  8.2e-03  2.7e-03
    autodiff in bfloat16         3.3e-05  6.6e-03  8.0e-03  3.9e-03  8.2e-03  2.7e-03
    bptt in float32              3.6e-08  3.6e-07  5.2e-07  2.5e-07  2.9e-07  7.2e-08

Run: python -m experiments.recipes.mixed_precision
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxrnn
from jaxrnn import Batch, Params


def cast(params, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def loss_in(dtype, params, batch, h_0=None):
    """`sequence_loss` computed in dtype."""
    return jaxrnn.sequence_loss(cast(params, dtype), batch, h_0)


def bptt_in(dtype, params, batch, h_0=None):
    """A gradient function: `bptt` computed in dtype, the gradient in the parameters' dtype."""
    result, grads = jaxrnn.bptt(cast(params, dtype), batch, h_0)
    return result, cast(grads, params.W_h.dtype)


def main() -> None:
    key_init, key_xs, key_targets = jax.random.split(jax.random.key(0), 3)
    params = jaxrnn.init(key_init, 32, 128, 32)
    xs = jax.random.normal(key_xs, (128, 32, 32), jnp.float32)
    batch = Batch(xs, jax.random.randint(key_targets, (128, 32), 0, 32))
    with jax.enable_x64(True):
        (exact, _), exact_grads = jax.jit(jaxrnn.bptt)(cast(params, jnp.float64), batch)
    exact_grads = jax.tree.map(np.asarray, exact_grads)
    for dtype in (jnp.bfloat16, jnp.float32):
        (value, _), grads = jax.jit(bptt_in, static_argnums=0)(dtype, params, batch)
        errors = [f"value {abs(float(value) / float(exact) - 1):.1e}"]
        for name, leaf, exact_leaf in zip(Params._fields, grads, exact_grads, strict=True):
            error = np.linalg.norm(np.asarray(leaf) - exact_leaf) / np.linalg.norm(exact_leaf)
            errors.append(f"d{name} {error:.1e}")
        print(jnp.dtype(dtype).name, *errors)
        result = jaxrnn.fit(
            jax.random.key(1), params, batch, optimizer=optax.adam(1e-3),
            gradient_fn=partial(bptt_in, dtype), max_epochs=5,
        )  # fmt: skip
        losses = [round(epoch.valid_loss, 4) for epoch in result.history]
        print(jnp.dtype(dtype).name, "loss by epoch:", losses)


if __name__ == "__main__":
    main()
