"""Every recipe: run as printed, and its functions against a result found in another way."""

import importlib
import io
import subprocess
import sys
from functools import partial
from pathlib import Path

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
    ensemble,
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
from jaxrnn import Batch, Params
from tests.reference import plain_loss, relative_errors, separate_pieces_loss

RECIPES = Path(__file__).parent.parent / "experiments" / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("[a-z]*.py"))
AGREEMENT = 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_and_fits_on_a_screen(name, capsys):
    if name.endswith("_module"):
        pytest.importorskip(name.removesuffix("_module"))
    importlib.import_module(f"experiments.recipes.{name}").main()
    assert capsys.readouterr().out
    text = (RECIPES / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 70
    assert f"python -m experiments.recipes.{name}" in text


def draw(seed, *shape):
    return 0.5 * np.random.default_rng(seed).standard_normal(shape)


def network(seed, I, H, O=2):
    shapes = Params(W_x=(H, I), W_h=(H, H), W_y=(O, H), b_h=(H,), b_y=(O,))
    return Params(*(jnp.asarray(draw([seed, n], *shape)) for n, shape in enumerate(shapes)))


def looped(params, xs, *, keep=1.0):
    """hs and ys of one sequence (T, I), in NumPy; keep multiplies the state that is read."""
    W_x, W_h, W_y, b_h, b_y = (np.asarray(leaf) for leaf in params)
    h, hs = np.zeros(len(W_h)), []
    for x in xs:
        h = np.tanh(W_x @ x + W_h @ (keep * h) + b_h)
        hs.append(h)
    hs = np.array(hs).reshape(len(xs), len(W_h))
    return hs, hs @ W_y.T + b_y


@pytest.mark.usefixtures("x64")
def test_stack_is_one_layer_after_the_other():
    layers = stack.init_stack(jax.random.key(0), 3, [4, 5, 2], 2)
    layers = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), layers)
    xs, lengths = draw(0, 6, 3, 3), [6, 0, 4]
    mask = jaxrnn.mask_from_lengths(np.array(lengths), 6)
    h_0s = [np.zeros((3, H)) for H in (4, 5, 2)]
    h_Ts, ys = jax.jit(stack.unroll_stack)(layers, xs, h_0s, mask=mask)
    for n, length in enumerate(lengths):
        inputs = xs[:length, n]
        for h_T, layer in zip(h_Ts, layers, strict=True):
            inputs, expected = looped(layer, inputs)
            np.testing.assert_allclose(h_T[n], inputs[-1] if length else 0, atol=1e-14)
        np.testing.assert_allclose(ys[:length, n], expected, atol=1e-14)
    first, _ = jax.jit(stack.unroll_stack)(layers, xs[:3], h_0s, mask=mask[:3])
    again, _ = jax.jit(stack.unroll_stack)(layers, xs[3:], first, mask=mask[3:])
    assert max(relative_errors(again, h_Ts)) <= AGREEMENT


@pytest.mark.usefixtures("x64")
def test_dropout_multiplies_what_goes_into_a_layer():
    layers = [network(0, 3, 4), network(1, 4, 5)]
    xs, T, B = draw(0, 6, 2, 3), 6, 2
    fixed = dropout.draw(jax.random.key(0), 0.5, (B, 3), jnp.float64)
    each = dropout.draw(jax.random.key(1), 0.5, (T, B, 4), jnp.float64)
    _, ys = jax.jit(dropout.unroll_with_dropout)(layers, xs, [fixed, each])
    h_T, recurrent = jax.jit(dropout.unroll_with_recurrent_dropout)(
        layers[0], xs, jnp.zeros((B, 4)), each[0]
    )
    for n in range(B):
        states, _ = looped(layers[0], xs[:, n] * fixed[n])
        np.testing.assert_allclose(ys[:, n], looped(layers[1], states * each[:, n])[1], atol=1e-14)
        hs, expected = looped(layers[0], xs[:, n], keep=np.asarray(each[0, n]))
        np.testing.assert_allclose(recurrent[:, n], expected, atol=1e-14)
        np.testing.assert_allclose(h_T[n], hs[-1], atol=1e-14)
    drop = dropout.draw(jax.random.key(2), 0.25, (10_000,))
    assert set(np.unique(drop)) == {np.float32(0), np.float32(1 / 0.75)}
    assert float(drop.mean()) == pytest.approx(1, abs=0.03)


def data(T=6, B=4, I=2, seed=0):
    """Inputs, with two labels, as a Batch (T, B, I)."""
    return Batch(draw(seed, T, B, I), np.random.default_rng(seed).integers(0, 2, (T, B)))


def plain_training(batch, updates):
    """(params, optimizer) -> params, losses: a Python loop over autodiff of the plain scan."""

    @partial(jax.jit, static_argnums=0)
    def update(optimizer, params, opt_state):
        (value, _), grads = jax.value_and_grad(plain_loss, has_aux=True)(params, batch)
        changes, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, changes), opt_state, value

    def train(params, optimizer):
        opt_state, values = optimizer.init(params), []
        for _ in range(updates):
            params, opt_state, value = update(optimizer, params, opt_state)
            values.append(value)
        return params, jnp.stack(values)

    return train


def test_an_ensemble_on_two_devices_is_each_seed_alone():
    code = """
import jax, numpy as np, sys
jax.config.update("jax_num_cpu_devices", 2)
from functools import partial
from experiments.recipes import ensemble
from tests.test_recipes import data
keys = jax.random.split(jax.random.key(0), 4)
train_all = jax.jit(partial(ensemble.train_all, data(), 4, devices=jax.devices()))
params, values = train_all(keys)
assert len(values.sharding.device_set) == 2
np.savez(sys.stdout.buffer, values=values, **params._asdict())
"""
    root = RECIPES.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    together = np.load(io.BytesIO(done.stdout))
    train = plain_training(data(), 4)
    for n, key in enumerate(jax.random.split(jax.random.key(0), 4)):
        params, values = train(jaxrnn.init(key, 2, ensemble.H, 2), ensemble.optimizer)
        np.testing.assert_allclose(together["values"][n], values, rtol=1e-5)
        for name, leaf in params._asdict().items():
            np.testing.assert_allclose(together[name][n], leaf, atol=1e-4)


@pytest.mark.usefixtures("x64")
def test_a_sweep_is_each_learning_rate_alone():
    params, batch = network(0, 2, 4), data()
    rates = jnp.array([0.1, 1.0])
    train = partial(sweep.train, params=params, batch=batch, updates=5)
    got = jax.tree.map(np.asarray, jax.jit(partial(jax.lax.map, train))(rates))
    for n, rate in enumerate(rates.tolist()):
        alone = plain_training(batch, 5)(params, optax.sgd(rate))
        assert max(relative_errors(jax.tree.map(lambda leaf, n=n: leaf[n], got), alone)) < 1e-12


@pytest.mark.usefixtures("x64")
def test_per_example_gradients_are_each_example_alone():
    params, batch = network(0, 2, 4), data()
    values, grads = jax.tree.map(np.asarray, jax.jit(per_example.per_example)(params, batch))
    alone_grad = jax.jit(jax.value_and_grad(plain_loss, has_aux=True))
    clipped = jax.tree.map(np.zeros_like, params)
    for n in range(4):
        one = Batch(batch.xs[:, n], batch.targets[:, n])
        (value, _), alone = jax.tree.map(np.asarray, alone_grad(params, one))
        got = jax.tree.map(lambda leaf, n=n: leaf[n], grads)
        assert max(relative_errors((values[n], got), (value, alone))) <= AGREEMENT
        norm = np.sqrt(sum((leaf**2).sum() for leaf in alone))
        scale = min(1, 0.1 / norm) / 4
        clipped = jax.tree.map(lambda total, leaf, s=scale: total + s * leaf, clipped, alone)
    got = jax.jit(per_example.clipped_gradient)(params, batch, 0.1)
    assert max(relative_errors(got, clipped)) <= AGREEMENT


@pytest.mark.usefixtures("x64")
def test_learned_h0_has_the_sum_of_the_sequences_gradients():
    params, batch, h_0 = network(0, 2, 4), data(), jnp.asarray(draw(7, 4))
    dparams, dh_0 = jax.jit(jax.grad(learned_h0.loss))((params, h_0), batch)
    h_0s = jnp.tile(h_0, (4, 1))
    by_plain = jax.jit(jax.grad(plain_loss, (0, 2), has_aux=True))
    (expected, dh_0s), _ = by_plain(params, batch, h_0s)
    assert max(relative_errors((dparams, dh_0), (expected, dh_0s.sum(axis=0)))) <= AGREEMENT


@pytest.mark.usefixtures("x64")
def test_free_running_reads_what_it_has_drawn():
    params = network(0, 5, 8, 5)
    h, token = jnp.zeros((3, 8)), jnp.array([0, 1, 4])
    run = jax.jit(partial(generate.generate, length=7, temperature=1e-6))
    h_T, tokens = run(jax.random.key(0), params, h, token)
    for n in range(3):
        read = [int(token[n])]
        for _ in range(7):  # greedy: the whole sequence again for every token
            hs, ys = looped(params, np.eye(5)[read])
            read.append(int(ys[-1].argmax()))
        assert read[1:] == tokens[:, n].tolist()
        np.testing.assert_allclose(h_T[n], hs[-1], atol=1e-13)


@pytest.mark.usefixtures("x64")
def test_a_policys_rollout_is_unrolled_again_with_its_resets():
    T, B = 9, 3
    params = network(0, 3, 4)
    actor = policy.Actor(
        jnp.arange(B), jnp.zeros((B, 3)), jnp.array([True, False, False]), draw(0, B, 4)
    )
    run = jax.jit(partial(policy.rollout, env_step=policy.recall, length=T))
    key = jax.random.key(1)
    last, (xs, reset, actions, rewards) = run(key, params, actor)
    ended = (np.arange(B) + np.arange(T)[:, None]) % 4 == 3
    np.testing.assert_array_equal(reset[1:], ended[:-1])
    np.testing.assert_array_equal(reset[0], actor.done)
    np.testing.assert_array_equal(last.done, ended[-1])
    right = actions == np.arange(B) % 2
    np.testing.assert_array_equal(rewards, ended & right)

    h_T, logits = jaxrnn.unroll(params, xs, actor.h, reset=reset)
    np.testing.assert_allclose(h_T, last.h, atol=1e-14)
    drawn = jax.vmap(jax.random.categorical)(jax.random.split(key, T), logits)
    np.testing.assert_array_equal(drawn, actions)

    batch = Batch(xs, actions, np.ones((T, B), bool), np.asarray(reset))
    expected = jax.jit(jax.value_and_grad(partial(separate_pieces_loss, batch=batch), has_aux=True))
    got = jax.jit(jaxrnn.bptt)(params, batch, actor.h)
    assert max(relative_errors(got, expected(params, h_0=actor.h))) <= AGREEMENT


@pytest.mark.usefixtures("x64")
def test_four_batches_make_one_update_of_their_mean():
    params = network(0, 2, 4)
    grads = [jax.tree.map(lambda leaf, n=n: jnp.sin(n + leaf), params) for n in range(4)]
    state = optimizers.four_batches.init(params)
    update = jax.jit(optimizers.four_batches.update)
    for n, grad in enumerate(grads):
        changes, state = update(grad, state, params)
        assert all(bool(leaf.any()) == (n == 3) for leaf in changes)
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 4, *grads)
    once = optimizers.clipped_adam
    expected, _ = jax.jit(once.update)(mean, once.init(params), params)
    assert max(relative_errors(changes, expected)) <= 1e-9


def test_a_mask_chooses_among_the_parameters():
    params = jaxrnn.init(jax.random.key(0), 2, 4, 2)._replace(b_h=jnp.ones(4), b_y=jnp.ones(2))
    nothing = jax.tree.map(jnp.zeros_like, params)
    optimizer = optimizers.clipped_adam
    changes, _ = jax.jit(optimizer.update)(nothing, optimizer.init(params), params)
    np.testing.assert_allclose(changes.W_h, -1e-2 * 1e-4 * params.W_h, rtol=1e-6)
    assert not changes.b_h.any()
    grads = jax.tree.map(jnp.ones_like, params)
    optimizer = optimizers.readout_alone
    changes, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    moved = [name for name, leaf in changes._asdict().items() if leaf.any()]
    assert moved == ["W_y", "b_y"]


def value_in_a_module(model):
    mask = jaxrnn.mask_from_lengths(jnp.array([4, 2, 0]), 4)
    return model(jnp.ones((4, 3, 2)), mask=mask).sum()


def value_by_unroll(params):
    return value_in_a_module(lambda *args, **keywords: jaxrnn.unroll(params, *args, **keywords)[1])


def test_inside_a_flax_module_the_gradient_is_the_same():
    nnx = pytest.importorskip("flax.nnx")
    flax_module = importlib.import_module("experiments.recipes.flax_module")
    model = flax_module.Recurrent(2, 5, 2, rngs=nnx.Rngs(0))
    got = nnx.to_pure_dict(nnx.jit(nnx.grad(value_in_a_module))(model))["params"]
    params = Params(*(leaf[...] for leaf in model.params))
    expected = jax.jit(jax.grad(value_by_unroll))(params)
    assert max(relative_errors(Params(**got), expected)) <= 1e-6


def test_inside_an_equinox_module_the_gradient_is_the_same():
    pytest.importorskip("equinox")
    equinox_module = importlib.import_module("experiments.recipes.equinox_module")
    model = equinox_module.Recurrent(2, 5, 2, key=jax.random.key(0))
    got = jax.jit(jax.grad(value_in_a_module))(model).params
    expected = jax.jit(jax.grad(value_by_unroll))(model.params)
    assert max(relative_errors(got, expected)) <= 1e-6


@pytest.mark.usefixtures("x64")
def test_a_label_counts_at_the_last_step_of_its_sequence_alone():
    params, lengths = network(0, 2, 3), [3, 1, 5, 4]
    drawn = [draw(T, T, 2) for T in lengths]
    sequences = [unequal_lengths.labelled(xs, n % 2) for n, xs in enumerate(drawn)]
    (batch,) = unequal_lengths.in_buckets(sequences, padding=0.5)
    apart = unequal_lengths.in_buckets(sequences, padding=0.1)
    assert [one.xs.shape[:2] for one in apart] == [(5, 2), (3, 1), (1, 1)]
    last = [looped(params, xs)[1][-1] for xs in drawn]
    losses = [np.log(np.exp(y).sum()) - y[n % 2] for n, y in enumerate(last)]
    value, _ = jax.jit(jaxrnn.sequence_loss)(params, batch)
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-7)


@pytest.mark.usefixtures("x64")
def test_documents_in_a_stream_are_the_documents_apart():
    params, rng = network(0, 2, 3), np.random.default_rng(0)
    runs = [Batch(draw(T, T, 2), rng.integers(0, 2, T)) for T in (3, 1, 0, 4, 4)]
    stream = documents.join(runs)
    assert np.flatnonzero(stream.reset).tolist() == [0, 3, 4, 8]

    def apart(params):
        total = 0.0
        for run in runs:
            batch = run._replace(mask=np.ones(len(run.xs), bool), reset=np.zeros(len(run.xs), bool))
            total += separate_pieces_loss(params, batch, jnp.zeros(3))[0] * len(run.xs)
        return total / 12

    expected, grads = jax.jit(jax.value_and_grad(apart))(params)
    got = jax.jit(jaxrnn.bptt)(params, stream, jnp.ones(3))
    assert max(relative_errors((got[0][0], got[1]), (expected, grads))) <= AGREEMENT

    # Windows of 4 begin where documents begin, so that cutting there loses no gradient.
    h, total, dtotal = jnp.ones(3), 0.0, jax.tree.map(jnp.zeros_like, params)
    for window in jaxrnn.windows(stream, 4):
        (value, h), grad = jax.jit(jaxrnn.bptt)(params, window, h)
        total, dtotal = total + value / 3, jax.tree.map(lambda a, b: a + b / 3, dtotal, grad)
    assert max(relative_errors((total, dtotal), (expected, grads))) <= AGREEMENT

    beside = documents.side_by_side(stream, 5)
    np.testing.assert_array_equal(beside.xs[:, 1], stream.xs[2:4])
    np.testing.assert_array_equal(beside.reset[:, 4], stream.reset[8:10])


@pytest.mark.usefixtures("x64")
def test_jacobian_products_are_the_jacobians_by_reverse_mode():
    params, xs, h_0 = network(0, 2, 4), jnp.asarray(draw(0, 4, 2)), jnp.asarray(draw(1, 4))

    @jax.jit
    def both(params, xs, h_0):
        _, hs = jaxrnn.hidden_states(params, xs, h_0)
        expected = [
            jax.jacobian(lambda h, t=t: jaxrnn.hidden_states(params, xs[t:], h)[0])(h)
            for t, h in enumerate([h_0, *hs])
        ]
        return jacobians.jacobian_products(jacobians.step_jacobians(params, xs, h_0)), expected

    products, expected = both(params, xs, h_0)
    assert products.shape == (5, 4, 4)
    np.testing.assert_allclose(products, expected, atol=1e-14)


@pytest.mark.usefixtures("x64")
def test_lyapunov_exponents_of_a_linear_network_are_its_eigenvalues():
    basis = np.linalg.qr(draw(0, 3, 3))[0]
    W_h = basis @ np.diag([1.2, 0.5, 0.1]) @ basis.T
    params = network(0, 2, 3)._replace(W_h=jnp.asarray(W_h))
    xs = jnp.asarray(draw(1, 3000, 2))

    @partial(jax.jit, static_argnames="activation")
    def exponents_and_Js(xs, activation):
        Js = jacobians.step_jacobians(params, xs, jnp.zeros(3), activation)
        return jacobians.lyapunov_exponents(Js), Js

    exponents, _ = exponents_and_Js(xs, jaxrnn.identity)
    np.testing.assert_allclose(exponents, np.log([1.2, 0.5, 0.1]), atol=1e-3)
    exponents, Js = exponents_and_Js(xs[:9], jaxrnn.tanh)
    log_determinant = np.linalg.slogdet(np.linalg.multi_dot(np.asarray(Js)[::-1])).logabsdet
    np.testing.assert_allclose(exponents.sum() * 9, log_determinant)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("way", ["bptt_in", "autodiff"])
def test_mixed_precision_gradients_come_back_in_the_parameters_dtype(way):
    params = jaxrnn.init(jax.random.key(0), 8, 32, 2)
    batch = data(T=40, B=16, I=8)
    gradient = mixed_precision.bptt_in
    if way == "autodiff":
        gradient = jax.value_and_grad(mixed_precision.loss_in, 1, has_aux=True)
    gradient = jax.jit(gradient, static_argnums=0)
    (value, h_T), grads = gradient(jnp.bfloat16, params, batch)
    assert value.dtype == jnp.float32
    assert h_T.dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in grads} == {"float32"}
    (exact, _), exact_grads = jax.jit(jaxrnn.bptt)(mixed_precision.cast(params, jnp.float64), batch)
    assert abs(value - exact) < 2e-3
    for leaf, exact_leaf in zip(grads, exact_grads, strict=True):
        error = jnp.linalg.norm(leaf - exact_leaf) / jnp.linalg.norm(exact_leaf)
        assert 1e-4 < error < 0.03


def two_layers(params):
    """A second layer that takes the states of the first."""
    return [params, params._replace(W_x=params.W_h)]


XS, H_0 = draw(0, 5, 3, 2), draw(1, 3, 4)
MASK = np.asarray(jaxrnn.mask_from_lengths(np.array([5, 2, 0]), 5))
RESET = np.random.default_rng(0).uniform(size=(5, 3)) < 0.3
BATCH = Batch(XS, np.zeros((5, 3), int), MASK, RESET)


SEQUENCES = [Batch(XS[: 2 + n, n], np.zeros(2 + n, int)) for n in range(3)]


def decayed(params, grads):
    """One update by clipped gradient descent with weight decay on the matrices alone."""
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


def wide(params):
    """Both directions: the second layer takes the states of both."""
    second = params._replace(W_x=jnp.concatenate([params.W_h, params.W_h], axis=1))
    return [(params, params), (second, second)]


SCALARS = {
    "stack": lambda p: stack.unroll_stack(
        two_layers(p), XS, [None, None], mask=MASK, reset=RESET)[1].sum(),
    "bidirectional": lambda p: bidirectional.unroll_bidirectional(wide(p), XS, MASK).sum(),
    "dropout": lambda p: dropout.unroll_with_dropout(
        two_layers(p), XS, [dropout.draw(jax.random.key(0), 0.5, (3, 2), p.W_h.dtype),
                            dropout.draw(jax.random.key(1), 0.5, (5, 3, 4), p.W_h.dtype)])[1].sum(),
    "recurrent dropout": lambda p: dropout.unroll_with_recurrent_dropout(
        p, XS, jnp.asarray(H_0, p.W_h.dtype),
        dropout.draw(jax.random.key(0), 0.5, (3, 4), p.W_h.dtype))[1].sum(),
    "training": lambda p: sweep.train(0.1, p, BATCH, 2)[1].sum(),
    "per example": lambda p: per_example.per_example(p, BATCH)[1].W_h.sum(),
    "learned h_0": lambda p: learned_h0.loss((p, p.b_h), BATCH),
    "policy": rollout_value,
    "flow": lambda p: sum((leaf**2).sum() for leaf in jaxrnn.gradient_flow(p, BATCH)),
    "Jacobians": lambda p: jacobians.jacobian_products(
        jacobians.step_jacobians(p, jnp.asarray(XS[:, 0]), p.b_h))[0].sum(),
    "exponents": lambda p: jacobians.lyapunov_exponents(
        jacobians.step_jacobians(p, jnp.asarray(XS[:, 0]), p.b_h))[0],
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
@pytest.mark.parametrize("name", SCALARS)
def test_every_composition_transforms_with_strict_dtypes(name):
    """jit, grad, jvp and vmap at once: the derivative along a direction, found in two ways."""
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
