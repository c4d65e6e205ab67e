"""Shared blocks: populations of units that are copies of each other, in a W_h of few parameters.

With G groups of n units, the weight between two units is that of their groups, and a unit's weight
on itself differs:

    W_h = kron(between, ones (n, n) / n) + kron(diag(within), I_n)

`between` (G, G) and `within` (G,) are all there is to learn in W_h. `reparametrized` sums the
gradient over the copies. `jnp.kron` writes W_h once, outside the loop over time.
Run: python -m experiments.recipes.shared_blocks
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

import jaxrnn
from jaxrnn import Batch


class Theta(NamedTuple):
    """The weights that are not shared stay in `rest`, a Params whose W_h has no rows."""

    between: Array
    within: Array
    rest: jaxrnn.Params


def init_theta(key, input_size, groups, copies, output_size):
    key_between, key_within, key_rest = jax.random.split(key, 3)
    rest = jaxrnn.init(key_rest, input_size, groups * copies, output_size)
    between = jax.random.normal(key_between, (groups, groups)) / groups**0.5
    within = 0.5 * jax.random.normal(key_within, (groups,))
    return Theta(between, within, rest._replace(W_h=rest.W_h[:0]))


def to_params(theta, copies):
    """Params with H = groups * copies units; the copies of a group follow each other."""
    dtype = theta.between.dtype
    shared = jnp.kron(theta.between, jnp.full((copies, copies), 1 / copies, dtype))
    own = jnp.kron(jnp.diag(theta.within), jnp.eye(copies, dtype=dtype))
    return theta.rest._replace(W_h=shared + own)


def main() -> None:
    # Is the sum of all inputs so far positive?
    key_init, key_data, key_fit = jax.random.split(jax.random.key(0), 3)
    xs = jax.random.normal(key_data, (20, 256, 1))
    batch = Batch(xs, (xs[..., 0].cumsum(axis=0) > 0).astype(int))
    theta = init_theta(key_init, 1, groups=4, copies=8, output_size=2)
    result = jaxrnn.fit(
        key_fit, theta, batch, optimizer=optax.adam(1e-2), batch_size=32, max_epochs=10,
        gradient_fn=jaxrnn.reparametrized(jaxrnn.bptt, partial(to_params, copies=8)),
    )  # fmt: skip
    print("loss by epoch:", [round(epoch.train_loss, 3) for epoch in result.history])
    print(f"parameters of W_h: {theta.between.size + theta.within.size} for 32 x 32 weights")


if __name__ == "__main__":
    main()
