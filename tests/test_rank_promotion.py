"""With `jax_numpy_rank_promotion="raise"`, as strict projects set it, every function works."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrnn
from jaxrnn import Activation, Batch
from tests.conftest import default_and_thorough

T, B, I, H, O = 7, 4, 3, 5, 2
XS = np.random.default_rng(0).standard_normal((T, B, I)).astype(np.float32)
LABELS = np.zeros((T, B), np.int32)
MASK = np.arange(T * B).reshape(T, B) % 3 > 0
LEAK = np.full(H, 0.5, np.float32)


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def params():
    return jaxrnn.init(jax.random.key(0), I, H, O)


def full(xs=XS, targets=LABELS):
    """A Batch with every field."""
    weights, drive = MASK.astype(np.float32), np.ones((T, B, H), np.float32)
    return Batch(xs, targets, MASK, ~MASK, weights, drive)


INPUTS = {"numbers": XS, "tokens": LABELS}
LEAKS = {"no leak": None, "leak": 0.5, "leaks": LEAK}
ACTIVATIONS = {"tanh": jaxrnn.tanh, "gelu": Activation(jax.nn.gelu)}
FEW = [("numbers", "leaks", "gelu")]


@pytest.mark.parametrize(
    ("xs", "leak", "activation"),
    default_and_thorough(FEW, list(itertools.product(INPUTS, LEAKS, ACTIVATIONS)), unpack=True),
)
def test_gradients_and_states(xs, leak, activation, params):
    keywords = {"activation": ACTIVATIONS[activation], "leak": LEAKS[leak]}
    xs, h_0 = INPUTS[xs], jnp.ones((B, H))
    batch = full(xs)
    gradients = jax.value_and_grad(partial(jaxrnn.sequence_loss, **keywords), (0, 2), has_aux=True)
    calls = [
        partial(jaxrnn.bptt, **keywords),
        partial(jaxrnn.bptt, checkpoint_every=3, **keywords),
        partial(jaxrnn.gradient_flow, **keywords),
        gradients,
    ]
    for call in calls:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(call(params, batch, h_0)))
    h, y = jaxrnn.step(params, h_0, xs[0], **keywords)
    assert (h.shape, y.shape) == ((B, H), (B, O))
    unrolled = partial(jaxrnn.unroll, mask=MASK, reset=~MASK, **keywords)
    _, tangents = jax.jvp(lambda params: unrolled(params, xs, h_0)[1], (params,), (params,))
    assert tangents.shape == (T, B, O)


@pytest.mark.thorough
@pytest.mark.parametrize("leak", list(LEAKS))
def test_dynamics_curvature_and_online_learning(leak, params):
    leak = LEAKS[leak]
    key, batch, x = jax.random.key(1), full(), XS[0]
    by_theta = jaxrnn.reparametrized(partial(jaxrnn.bptt, leak=leak), lambda theta: theta)
    results = [
        jaxrnn.fixed_points(params, jnp.ones((6, H)), x[0], leak=leak),
        jaxrnn.jacobian(params, jnp.ones((B, H)), x, leak=leak),
        jaxrnn.lyapunov_exponents(params, XS, leak=leak),
        jaxrnn.gauss_newton_product(params, batch, params, leak=leak),
        jaxrnn.rtrl(params, batch, leak=leak),
        jaxrnn.snap1(params, batch, leak=leak),
        jaxrnn.uoro(params, batch, leak=leak, key=key),
        by_theta(params, batch),
    ]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))


@pytest.mark.parametrize("loss", ["squared_error", "binary_cross_entropy", "cross_entropy"])
def test_losses(loss, params):
    batch, loss = full(targets=np.full((T, B, O), 0.5, np.float32)), getattr(jaxrnn, loss)
    (value, _), _ = jaxrnn.bptt(params, batch, loss=loss)
    _, ys = jaxrnn.unroll(params, batch.xs, mask=MASK, reset=~MASK, drive=batch.drive)
    np.testing.assert_allclose(jaxrnn.mean_loss(ys, batch, loss), value, rtol=1e-6)


OPTIMIZERS = {"adam": optax.adam(1e-2), "sgd": partial(jaxrnn.sgd, learning_rate=0.1)}
DATA = {"examples": {"batch_size": 3}, "windows": {"h_0": np.zeros((B, H), np.float32)}}


@pytest.mark.parametrize(
    ("data", "optimizer"),
    default_and_thorough(
        [("windows", "adam")], list(itertools.product(DATA, OPTIMIZERS)), unpack=True
    ),
)
def test_training(data, optimizer, params):
    train = full() if data == "examples" else list(jaxrnn.windows(full(), 4))
    valid = None if data == "examples" else train
    result = jaxrnn.fit(
        jax.random.key(0), params, train, valid, optimizer=OPTIMIZERS[optimizer], max_epochs=2,
        **DATA[data],
    )  # fmt: skip
    assert np.isfinite(jaxrnn.evaluate(result.best, full()))


def test_devices_and_padding(params):
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("batch",))
    (value, _), _ = jax.jit(jaxrnn.data_parallel(jaxrnn.bptt, mesh))(params, full())
    np.testing.assert_allclose(value, jax.jit(jaxrnn.bptt)(params, full())[0][0], rtol=1e-6)
    padded = jaxrnn.pad([Batch(XS[:n, 0], LABELS[:n, 0]) for n in (7, 3)])
    jaxrnn.check_values(params, padded)
    np.testing.assert_array_equal(jaxrnn.mask_from_lengths(jnp.array([7, 3]), T), padded.mask)
    assert np.isfinite(jaxrnn.sequence_loss(params, padded)[0])
