"""Any optax optimiser: clipping, weight decay on the matrices alone, many batches for one update.

Parameters are a NamedTuple, so a mask over them is one too.
Run: python -m experiments.recipes.optimizers
"""

import jax
import jax.numpy as jnp
import optax

import jaxrnn
from jaxrnn import Batch


def among(*names):
    """A mask over Params: True for these."""
    return lambda params: type(params)(*(name in names for name in params._fields))


clipped_adam = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.scale_by_adam(),
    optax.masked(optax.add_decayed_weights(1e-4), among("W_x", "W_h", "W_y")),
    optax.scale_by_learning_rate(1e-2),
)

# The mean gradient of 4 batches, then one update: right where each batch counts as many steps.
four_batches = optax.MultiSteps(clipped_adam, every_k_schedule=4).gradient_transformation()

# An echo state network: only the readout learns.
readout_alone = optax.chain(
    optax.adam(1e-2), optax.masked(optax.set_to_zero(), among("W_x", "W_h", "b_h"))
)


def main() -> None:
    key_init, key_data = jax.random.split(jax.random.key(0))
    xs = jax.random.normal(key_data, (20, 32, 1))
    batch = Batch(xs, (xs[..., 0].cumsum(axis=0) > 0).astype(int))
    params = jaxrnn.init(key_init, input_size=1, hidden_size=16, output_size=2)
    for name, optimizer in [
        ("clipped Adam", clipped_adam),
        ("four batches", four_batches),
        ("readout alone", readout_alone),
    ]:
        update = jaxrnn.make_update(jaxrnn.bptt, optimizer)
        state = jaxrnn.init_state(params, optimizer)
        for _ in range(100):
            state, metrics = update(state, batch)
        moved = jnp.abs(state.params.W_h - params.W_h).max()
        print(f"{name}: loss {metrics.loss:.3f}, W_h moved by {moved:.3f} at most")


if __name__ == "__main__":
    main()
