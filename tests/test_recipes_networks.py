"""Recipes that build networks and batches, each against a loop over single sequences in NumPy."""

import importlib
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
    learned_h0,
    policy,
    stack,
    unequal_lengths,
)
from jaxrnn import Batch, Params
from tests.recipe_cases import (
    AGREEMENT,
    draw,
    labelled_batch,
    network,
    numpy_cross_entropy,
    numpy_unroll,
)
from tests.reference import plain_loss, relative_errors, separate_pieces_loss

LENGTHS = [6, 0, 4]
MASK = np.arange(6)[:, None] < LENGTHS


def mean_of_steps(ys, labels, lengths=LENGTHS):
    """The mean loss over the steps of sequences run one by one."""
    losses = [
        numpy_cross_entropy(y[:length], labels[:length, n])
        for n, (y, length) in enumerate(zip(ys, lengths, strict=True))
    ]
    return np.concatenate(losses).mean()


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
def test_a_stack_is_one_layer_after_the_other():
    layers = stack.init_stack(jax.random.key(0), 3, [4, 5, 2], 2)
    layers = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), layers)
    xs, _, *_ = batch = Batch(draw(0, 6, 3, 3), np.ones((6, 3), int), MASK)
    h_0s = [np.zeros((3, H)) for H in (4, 5, 2)]
    unroll = jax.jit(stack.unroll_stack)
    h_Ts, ys = unroll(layers, xs, h_0s, mask=MASK)
    expected = []
    for n, length in enumerate(LENGTHS):
        inputs = xs[:length, n]
        for h_T, layer in zip(h_Ts, layers, strict=True):
            inputs, outputs = numpy_unroll(layer, inputs)
            np.testing.assert_allclose(h_T[n], inputs[-1] if length else 0, atol=1e-14)
        np.testing.assert_allclose(ys[:length, n], outputs, atol=1e-14)
        expected.append(outputs)
    first, _ = unroll(layers, xs[:3], h_0s, mask=MASK[:3])
    again, _ = unroll(layers, xs[3:], first, mask=MASK[3:])
    assert max(relative_errors(again, h_Ts)) <= AGREEMENT
    value, last = jax.jit(stack.loss)(layers, batch)
    np.testing.assert_allclose(value, mean_of_steps(expected, batch.targets), rtol=AGREEMENT)
    assert max(relative_errors(last, h_Ts)) <= AGREEMENT


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
def test_an_embedding_selects_the_inputs_and_a_head_reads_the_readout():
    params = {
        "embedding": jnp.asarray(draw(1, 7, 2)),
        "rnn": network(0, 2, 4, 3),
        "head": {"W": jnp.asarray(draw(2, 5, 3)), "b": jnp.asarray(draw(3, 5))},
    }
    rng = np.random.default_rng(0)
    batch = Batch(rng.integers(0, 7, (6, 3)), rng.integers(0, 5, (6, 3)), MASK)
    h_T, ys = jax.jit(embedding.unroll)(params, batch.xs, mask=MASK)
    table, W, b = (np.asarray(x) for x in (params["embedding"], *params["head"].values()))
    expected = []
    for n, length in enumerate(LENGTHS):
        hs, readouts = numpy_unroll(params["rnn"], table[batch.xs[:length, n]])
        expected.append(np.maximum(readouts, 0) @ W.T + b)
        np.testing.assert_allclose(ys[:length, n], expected[n], atol=1e-14)
        np.testing.assert_allclose(h_T[n], hs[-1] if length else 0, atol=1e-14)
    value, _ = jax.jit(embedding.loss)(params, batch)
    np.testing.assert_allclose(value, mean_of_steps(expected, batch.targets), rtol=AGREEMENT)
    shapes = jax.tree.map(jnp.shape, embedding.init(jax.random.key(0), 7, 2, 4, 3, 5))
    assert shapes == jax.tree.map(jnp.shape, params)


@pytest.mark.usefixtures("x64")
def test_the_loss_of_bidirectional_layers_is_that_of_each_sequence_alone():
    layers = [(network(0, 2, 4), network(1, 2, 4)), (network(2, 8, 3), network(3, 8, 3))]
    batch = labelled_batch(B=3)._replace(mask=MASK)
    expected = []
    for n, length in enumerate(LENGTHS):
        xs = batch.xs[:length, n]
        for forward, backward in layers:
            hs, ys = numpy_unroll(forward, xs)
            hs_back, ys_back = numpy_unroll(backward, xs[::-1])
            xs = np.concatenate([hs, hs_back[::-1]], axis=1)
        expected.append(ys + ys_back[::-1])
    value, h_T = jax.jit(bidirectional.loss)(layers, batch)
    np.testing.assert_allclose(value, mean_of_steps(expected, batch.targets), rtol=AGREEMENT)
    assert h_T is None


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
def test_dropout_multiplies_the_inputs_of_a_layer_or_the_state_that_the_recurrence_reads():
    layers = [network(0, 3, 4), network(1, 4, 5)]
    xs, T, B = draw(0, 6, 2, 3), 6, 2
    shared = dropout.draw(jax.random.key(0), 0.5, (B, 3), jnp.float64)
    each_step = dropout.draw(jax.random.key(1), 0.5, (T, B, 4), jnp.float64)
    _, ys = jax.jit(dropout.unroll_with_dropout)(layers, xs, [shared, each_step])
    h_T, recurrent = jax.jit(dropout.unroll_with_recurrent_dropout)(
        layers[0], xs, jnp.zeros((B, 4)), each_step[0]
    )
    for n in range(B):
        states, _ = numpy_unroll(layers[0], xs[:, n] * shared[n])
        expected = numpy_unroll(layers[1], states * each_step[:, n])[1]
        np.testing.assert_allclose(ys[:, n], expected, atol=1e-14)
        hs, expected = numpy_unroll(layers[0], xs[:, n], drop=np.asarray(each_step[0, n]))
        np.testing.assert_allclose(recurrent[:, n], expected, atol=1e-14)
        np.testing.assert_allclose(h_T[n], hs[-1], atol=1e-14)
    reset = np.zeros((T, B), bool)
    reset[2] = True
    _, ys = jax.jit(dropout.unroll_with_dropout)(layers, xs, [shared, each_step], reset=reset)
    _, after = dropout.unroll_with_dropout(layers, xs[2:], [shared, each_step[2:]])
    np.testing.assert_allclose(ys[2:], after, atol=1e-14)
    drop = dropout.draw(jax.random.key(2), 0.25, (10_000,))
    assert set(np.unique(drop)) == {np.float32(0), np.float32(1 / 0.75)}
    assert float(drop.mean()) == pytest.approx(1, abs=0.03)


@pytest.mark.usefixtures("x64")
def test_the_gradient_by_a_learned_h0_is_the_sum_over_the_sequences():
    params, batch, h_0 = network(0, 2, 4), labelled_batch(), jnp.asarray(draw(7, 4))
    got = jax.jit(learned_h0.gradient_fn)((params, h_0), batch)
    by_both = jax.jit(jax.value_and_grad(plain_loss, (0, 2), has_aux=True))
    value_and_state, (dparams, dh_0s) = by_both(params, batch, jnp.tile(h_0, (4, 1)))
    expected = value_and_state, (dparams, dh_0s.sum(axis=0))
    assert max(relative_errors(got, expected)) <= AGREEMENT


@pytest.mark.usefixtures("x64")
def test_free_running_reads_the_tokens_that_it_drew():
    params = network(0, 5, 8, 5)
    h, token = jnp.zeros((3, 8)), jnp.array([0, 1, 4])
    run = jax.jit(partial(generate.generate, length=7, temperature=1e-6))
    h_T, tokens = run(jax.random.key(0), params, h, token)
    for n in range(3):
        read = [int(token[n])]
        for _ in range(7):  # greedy: the whole sequence again for every token
            hs, ys = numpy_unroll(params, np.eye(5)[read])
            read.append(int(ys[-1].argmax()))
        assert read[1:] == tokens[:, n].tolist()
        np.testing.assert_allclose(h_T[n], hs[-1], atol=1e-13)


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
def test_a_rollout_of_a_policy_is_unrolled_again_with_its_resets():
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

    h_T, logits = jax.jit(jaxrnn.unroll)(params, xs, actor.h, reset=reset)
    np.testing.assert_allclose(h_T, last.h, atol=1e-14)
    drawn = jax.jit(jax.vmap(jax.random.categorical))(jax.random.split(key, T), logits)
    np.testing.assert_array_equal(drawn, actions)

    batch = Batch(xs, actions, np.ones((T, B), bool), np.asarray(reset))
    pieces = jax.value_and_grad(partial(separate_pieces_loss, batch=batch), has_aux=True)
    got = jax.jit(jaxrnn.bptt)(params, batch, actor.h)
    assert max(relative_errors(got, jax.jit(pieces)(params, h_0=actor.h))) <= AGREEMENT

    returns = np.random.default_rng(0).uniform(size=(T, B))

    def reinforce(params):
        _, logits = jaxrnn.unroll(params, xs, actor.h, reset=reset)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), actions[..., None], axis=-1)
        return -(returns * log_p[..., 0]).sum()

    batch = Batch(xs, actions, reset=reset, weights=returns)
    (_, _), grads = jax.jit(jaxrnn.bptt)(params, batch, actor.h)
    grads = jax.tree.map(lambda leaf: leaf * returns.sum(), grads)
    assert max(relative_errors(grads, jax.jit(jax.grad(reinforce))(params))) <= AGREEMENT


def trained(params, gradient_fn, batch):
    return jaxrnn.fit(
        jax.random.key(1), params, batch,
        optimizer=optax.sgd(0.5), gradient_fn=gradient_fn, max_epochs=3,
    ).state.params  # fmt: skip


def masked_batch():
    batch = labelled_batch(B=3)
    return batch._replace(xs=batch.xs.astype(np.float32), mask=MASK)


def test_a_flax_module_is_trained_as_its_parameters_alone():
    nnx = pytest.importorskip("flax.nnx")
    flax_module = importlib.import_module("experiments.recipes.flax_module")
    model = flax_module.Recurrent(2, 5, 2, rngs=nnx.Rngs(0))
    params = Params(*(leaf[...] for leaf in model.params))
    graphdef, state = nnx.split(model)
    gradient_fn = jax.value_and_grad(partial(flax_module.loss, graphdef), has_aux=True)
    got = nnx.to_pure_dict(trained(state, gradient_fn, masked_batch()))["params"]
    expected = trained(params, jaxrnn.bptt, masked_batch())
    assert max(relative_errors(Params(**got), expected)) <= 1e-5


def test_an_equinox_module_is_trained_as_its_parameters_alone():
    eqx = pytest.importorskip("equinox")
    equinox_module = importlib.import_module("experiments.recipes.equinox_module")
    model = equinox_module.Recurrent(2, 5, 2, key=jax.random.key(0))
    arrays, static = eqx.partition(model, eqx.is_array)
    gradient_fn = jax.value_and_grad(partial(equinox_module.loss, static), has_aux=True)
    got = trained(arrays, gradient_fn, masked_batch()).params
    expected = trained(model.params, jaxrnn.bptt, masked_batch())
    assert max(relative_errors(got, expected)) <= 1e-5


@pytest.mark.usefixtures("x64")
def test_a_label_counts_at_the_last_step_of_its_sequence_only():
    params, lengths = network(0, 2, 3), [3, 1, 5, 4]
    drawn = [draw(T, T, 2) for T in lengths]
    sequences = [unequal_lengths.labelled(xs, n % 2) for n, xs in enumerate(drawn)]
    (batch,) = unequal_lengths.in_buckets(sequences, padding=0.5)
    apart = unequal_lengths.in_buckets(sequences, padding=0.1)
    assert [one.xs.shape[:2] for one in apart] == [(5, 2), (3, 1), (1, 1)]
    losses = [
        numpy_cross_entropy(numpy_unroll(params, xs)[1][-1:], [n % 2]) for n, xs in enumerate(drawn)
    ]
    value, _ = jax.jit(jaxrnn.sequence_loss)(params, batch)
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-7)


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
def test_documents_in_a_stream_have_the_gradient_of_the_documents_alone():
    params, rng = network(0, 2, 3), np.random.default_rng(0)
    runs = [Batch(draw(T, T, 2), rng.integers(0, 2, T)) for T in (3, 1, 0, 4, 4)]
    stream = documents.join(runs)
    assert np.flatnonzero(stream.reset).tolist() == [0, 3, 4, 8]

    def mean_of_documents(params):
        return sum(plain_loss(params, run)[0] * len(run.xs) for run in runs if len(run.xs)) / 12

    expected = jax.jit(jax.value_and_grad(mean_of_documents))(params)
    (value, _), grads = jax.jit(jaxrnn.bptt)(params, stream, jnp.ones(3))
    assert max(relative_errors((value, grads), expected)) <= AGREEMENT

    # Windows of 4 start where documents start, so truncation loses no gradient.
    h, gradient_fn = jnp.ones(3), jax.jit(jaxrnn.bptt)
    total = jax.tree.map(jnp.zeros_like, (value, grads))
    for window in jaxrnn.windows(stream, 4):
        (value, h), grads = gradient_fn(params, window, h)
        total = jax.tree.map(lambda a, b: a + b / 3, total, (value, grads))
    assert max(relative_errors(total, expected)) <= AGREEMENT

    # The first two steps of the second document do not exist.
    masks = np.ones(4, bool), np.arange(4) >= 2
    padded = [run._replace(mask=mask) for run, mask in zip(runs[3:], masks, strict=True)]
    stream = documents.join(padded)
    assert np.flatnonzero(stream.reset).tolist() == [0, 6]
    ys = jaxrnn.unroll(params, stream.xs, mask=stream.mask, reset=stream.reset)[1]
    alone = jaxrnn.unroll(params, padded[1].xs, mask=padded[1].mask)[1]
    np.testing.assert_allclose(ys[4:], alone, rtol=1e-12)

    parts = documents.side_by_side(documents.join(runs), 5)
    np.testing.assert_array_equal(parts.xs[:, 2], runs[3].xs[:2])
    assert parts.reset[:, 4].tolist() == [True, False]
