"""Recipes about derivatives, and the derivatives of every recipe, found in two ways."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrnn
from experiments.recipes import (
    bidirectional,
    documents,
    dropout,
    embedding,
    generate,
    jacobians,
    learned_h0,
    mixed_precision,
    optimizers,
    per_example,
    policy,
    stack,
    sweep,
    unequal_lengths,
)
from jaxrnn import Batch
from tests.conftest import default_and_thorough
from tests.recipe_cases import AGREEMENT, draw, labelled_batch, network
from tests.reference import plain_loss, relative_errors


@pytest.mark.usefixtures("x64")
def test_per_example_gradients_are_those_of_each_example_alone():
    params, batch = network(0, 2, 4), labelled_batch()
    values, grads = jax.tree.map(np.asarray, jax.jit(per_example.per_example)(params, batch))
    gradient_alone = jax.jit(jax.value_and_grad(plain_loss, has_aux=True))
    clipped = jax.tree.map(np.zeros_like, params)
    for n in range(4):
        example = Batch(batch.xs[:, n], batch.targets[:, n])
        (value, _), alone = jax.tree.map(np.asarray, gradient_alone(params, example))
        got = jax.tree.map(lambda leaf, n=n: leaf[n], grads)
        assert max(relative_errors((values[n], got), (value, alone))) <= AGREEMENT
        norm = np.sqrt(sum((leaf**2).sum() for leaf in alone))
        scale = min(1, 0.1 / norm) / 4
        clipped = jax.tree.map(lambda total, leaf, s=scale: total + s * leaf, clipped, alone)
    private_gradient = partial(per_example.private_gradient, norm=0.1, noise=3.0)
    (value, _), got = jax.jit(private_gradient)(params, batch)
    assert max(relative_errors((value, got), (values.mean(), clipped))) <= AGREEMENT


@pytest.mark.usefixtures("x64")
def test_a_private_gradient_leaves_out_examples_of_which_no_step_counts():
    params, batch = network(0, 2, 4), labelled_batch()
    weights = np.random.default_rng(0).random((6, 4)) * [1, 0, 1, 2]
    private_gradient = jax.jit(partial(per_example.private_gradient, norm=0.01))
    (value, _), got = private_gradient(params, batch._replace(weights=jnp.asarray(weights)))
    expected = plain_loss(params, batch._replace(weights=jnp.asarray(weights)))[0]
    some = jax.tree.map(lambda leaf: leaf[:, [0, 2, 3]], batch._replace(weights=weights))
    assert max(relative_errors((value, got), (expected, private_gradient(params, some)[1]))) < 1e-12


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
def test_the_noise_of_a_private_gradient_has_the_scale_of_one_clipped_example():
    params, batch = network(0, 2, 4), labelled_batch()
    private_gradient = jax.jit(partial(per_example.private_gradient, norm=0.1, noise=3.0))
    _, expected = private_gradient(params, batch)
    keys = jax.random.split(jax.random.key(0), 1000)
    _, grads = jax.vmap(lambda key: private_gradient(params, batch, key=key))(keys)
    for leaf, mean in zip(grads, expected, strict=True):
        np.testing.assert_allclose((leaf - mean).std(), 3.0 * 0.1 / 4, rtol=0.05)
        np.testing.assert_allclose((leaf - mean).mean(), 0, atol=0.01)


def two_layers(params):
    """The second layer takes the states of the first."""
    return [params, params._replace(W_x=params.W_h)]


XS, H_0 = draw(0, 5, 3, 2), draw(1, 3, 4)
MASK = np.asarray(jaxrnn.mask_from_lengths(np.array([5, 2, 0]), 5))
RESET = np.random.default_rng(0).uniform(size=(5, 3)) < 0.3
BATCH = Batch(XS, np.zeros((5, 3), int), MASK, RESET)
TOKENS = BATCH._replace(xs=np.arange(15).reshape(5, 3) % 4)
SEQUENCES = [Batch(XS[: 2 + n, n], np.zeros(2 + n, int)) for n in range(3)]


def embedded(params):
    """Four tokens, each with a row of W_h as its two inputs, and W_y as the head."""
    head = {"W": params.W_y[:, :2], "b": params.b_y}
    return {"embedding": params.W_h[:, :2], "rnn": params, "head": head}


def decayed(params, grads):
    """One update by clipped gradient descent with weight decay on the matrices only."""
    decay = optax.masked(optax.add_decayed_weights(0.1), optimizers.among("W_x", "W_h", "W_y"))
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), decay, optax.scale(-0.5))
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    return optax.apply_updates(params, updates)


def rollout_value(params):
    actor = policy.Actor(
        jnp.arange(3), jnp.zeros((3, 2)), jnp.ones(3, bool), jnp.asarray(H_0, params.W_h.dtype)
    )

    def env_step(t, _):
        return t + 1, jnp.ones((3, 2)), jnp.zeros(3), t % 2 == 0

    last, _ = policy.rollout(jax.random.key(0), params, actor, env_step, 5)
    return last.h.sum()


def two_bidirectional_layers(params):
    """The second layer takes the states of both directions."""
    second = params._replace(W_x=jnp.concatenate([params.W_h, params.W_h], axis=1))
    return [(params, params), (second, second)]


SCALARS = {
    "stack": lambda p: stack.unroll_stack(
        two_layers(p), XS, [None, None], mask=MASK, reset=RESET)[1].sum(),
    "bidirectional": lambda p: bidirectional.unroll_bidirectional(
        two_bidirectional_layers(p), XS, MASK).sum(),
    "dropout": lambda p: dropout.unroll_with_dropout(
        two_layers(p), XS, [dropout.draw(jax.random.key(0), 0.5, (3, 2), p.W_h.dtype),
                            dropout.draw(jax.random.key(1), 0.5, (5, 3, 4), p.W_h.dtype)])[1].sum(),
    "recurrent dropout": lambda p: dropout.unroll_with_recurrent_dropout(
        p, XS, jnp.asarray(H_0, p.W_h.dtype),
        dropout.draw(jax.random.key(0), 0.5, (3, 4), p.W_h.dtype))[1].sum(),
    "training": lambda p: sweep.train(0.1, p, BATCH, 2)[1].sum(),
    "per example": lambda p: per_example.per_example(p, BATCH)[1].W_h.sum(),
    "embedding": lambda p: embedding.loss(embedded(p), TOKENS)[0],
    "learned h_0": lambda p: learned_h0.loss((p, p.b_h), BATCH)[0],
    "policy": rollout_value,
    "flow": lambda p: sum((leaf**2).sum() for leaf in jaxrnn.gradient_flow(p, BATCH)),
    "Jacobians": lambda p: jacobians.growth(p, XS[:, 0], p.b_h)[0].sum(),
    "exponents": lambda p: jacobians.growth(p, XS[:, 0], p.b_h)[1][0],
    "mixed precision": lambda p: mixed_precision.loss_in(jnp.float32, p, BATCH)[0],
    "free running": lambda p: generate.generate(
        jax.random.key(0), p, jnp.asarray(H_0, p.W_h.dtype), jnp.zeros(3, int), 4)[0].sum(),
    "documents": lambda p: jaxrnn.sequence_loss(
        p, documents.side_by_side(documents.join(SEQUENCES), 2))[0],
    "unequal lengths": lambda p: sum(
        jaxrnn.sequence_loss(p, batch)[0] for batch in unequal_lengths.in_buckets(SEQUENCES, 0.1)),
    "optimizers": lambda p: jaxrnn.sequence_loss(
        decayed(p, jaxrnn.bptt(p, BATCH)[1]), BATCH)[0],
}  # fmt: skip


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", default_and_thorough(["stack", "optimizers"], SCALARS))
def test_every_composition_transforms_with_strict_dtypes(name):
    """jit, grad, jvp and vmap at once: a directional derivative by forward and by reverse mode."""
    scalar = SCALARS[name]
    params = network(0, 2, 4)
    direction = jax.tree.map(lambda leaf: jnp.cos(3 * leaf) + 0.5, params)
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)

    @jax.jit
    def derivatives(two):
        forward = jax.vmap(lambda params: jax.jvp(scalar, (params,), (direction,))[1])
        return forward(two), jax.vmap(jax.grad(scalar))(two)

    with jax.numpy_dtype_promotion("strict"):
        along, grads = derivatives(two)
    dot = sum(
        (d * leaf).reshape(2, -1).sum(axis=1) for d, leaf in zip(direction, grads, strict=True)
    )
    assert along.all()
    np.testing.assert_allclose(along, dot, rtol=1e-4 if name == "mixed precision" else 1e-10)
