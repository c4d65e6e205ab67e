"""Optax optimisers: `make_update` and `fit` take any whose gradient is shaped like the parameters.

`Params` is a NamedTuple, so a mask over the parameters is one too. An optimiser that asks for
`value`, `grad` or `value_fn`, such as `optax.lbfgs` with its line search, gets them.
Run: python -m experiments.recipes.optimizers
"""

import jax
import jax.numpy as jnp
import optax
from jax import lax

import jaxrnn
from jaxrnn import Batch


def among(*names):
    """A mask over Params that is True for these names."""
    return lambda params: type(params)(*(name in names for name in params._fields))


clipped_adam = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.scale_by_adam(),
    optax.masked(optax.add_decayed_weights(1e-4), among("W_x", "W_h", "W_y")),
    optax.scale_by_learning_rate(1e-2),
)
# One update by the mean gradient of 4 batches; exact if each batch counts as many steps.
four_batches = optax.MultiSteps(clipped_adam, every_k_schedule=4)
# An echo state network: only the readout learns.
readout_only = optax.chain(
    optax.adam(1e-2), optax.masked(optax.set_to_zero(), among("W_x", "W_h", "b_h"))
)
# Quasi-Newton with a line search, for a deterministic gradient of all the data.
lbfgs = optax.lbfgs()
# No schedule; the parameters to evaluate are an average (Defazio et al. 2024).
schedule_free = optax.contrib.schedule_free_adamw(2e-2, warmup_steps=10)


def train(params, batch, optimizer, updates):
    """The TrainState after some updates on one batch, in one compiled call."""
    update = jaxrnn.make_update(jaxrnn.bptt, optimizer)
    state = jaxrnn.init_state(params, optimizer)
    run = jax.jit(lambda state: lax.scan(lambda s, _: update(s, batch), state, length=updates)[0])
    return run(state)


def main() -> None:
    key_init, key_data = jax.random.split(jax.random.key(0))
    xs = jax.random.normal(key_data, (20, 32, 1))
    batch = Batch(xs, (xs[..., 0].cumsum(axis=0) > 0).astype(int))
    params = jaxrnn.init(key_init, input_size=1, hidden_size=16, output_size=2)
    for name, optimizer in [
        ("clipped Adam", clipped_adam),
        ("four batches", four_batches),
        ("readout only", readout_only),
        ("L-BFGS", lbfgs),
        ("schedule-free", schedule_free),
    ]:
        state = train(params, batch, optimizer, 50)
        trained = state.params
        if optimizer is schedule_free:
            trained = optax.contrib.schedule_free_eval_params(state.opt_state, state.params)
        moved = jnp.abs(trained.W_h - params.W_h).max()
        print(f"{name}: loss {jaxrnn.evaluate(trained, batch):.3f}, W_h moved by {moved:.3f}")


if __name__ == "__main__":
    main()
