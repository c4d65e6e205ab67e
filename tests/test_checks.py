"""The error for a wrong argument names it, what was expected and what came."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from jaxrnn import Batch

I, H, O = 3, 5, 2
T, B = 7, 4
KEY = jax.random.key(0)
PARAMS = jaxrnn.init(KEY, I, H, O)
XS = jnp.ones((T, B, I))
LABELS = jnp.zeros((T, B), int)
BATCH = Batch(XS, LABELS)
RULE = partial(jaxrnn.sgd, learning_rate=0.1)


def init(key=KEY, sizes=(I, H, O), **keywords):
    return lambda: jaxrnn.init(key, *sizes, **keywords)


def with_params(**leaves):
    return lambda: jaxrnn.unroll(PARAMS._replace(**leaves), XS)


def step(h=None, x=None, **keywords):
    h = jnp.zeros((B, H)) if h is None else h
    x = jnp.ones((B, I)) if x is None else x
    return lambda: jaxrnn.step(PARAMS, h, x, **keywords)


def unroll(xs=XS, h_0=None, **keywords):
    return lambda: jaxrnn.unroll(PARAMS, xs, h_0, **keywords)


def bptt(h_0=None, loss=jaxrnn.cross_entropy, checkpoint_every=None, **fields):
    batch = BATCH._replace(**fields)
    return lambda: jaxrnn.bptt(PARAMS, batch, h_0, loss=loss, checkpoint_every=checkpoint_every)


def sequence_loss(batch=BATCH, **keywords):
    return lambda: jaxrnn.sequence_loss(PARAMS, batch, **keywords)


class Tensor:
    """An array of another library: its dtype and its shape are not those of NumPy."""

    dtype, shape, ndim = "torch.float32", (T, B, I), 3


def fit(key=KEY, train=BATCH, **keywords):
    return lambda: jaxrnn.fit(key, PARAMS, train, optimizer=RULE, **keywords)


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


def numpy_xs(value):
    """Inputs in NumPy's float64, one of them special."""
    xs = np.ones((T, B, I))
    xs[2, 1, 0] = value
    return xs


def evaluate(batches):
    return lambda: jaxrnn.evaluate(PARAMS, batches)


NAN = XS.at[2, 1, 0].set(jnp.nan)

# name: (call, exception, what the message says)
WRONG = {
    "size 0": (init(sizes=(0, H, O)), ValueError, r"input_size: expected at least 1, got 0"),
    "size below 0": (init(sizes=(I, -5, O)), ValueError, r"hidden_size: .*at least 1, got -5"),
    "size of float": (init(sizes=(I, H, 2.0)), TypeError, r"output_size: .*integer, got 2.0"),
    "size of bool": (init(sizes=(True, H, O)), TypeError, r"input_size: .*integer, got True"),
    "size of text": (init(sizes=(I, "5", O)), TypeError, r"hidden_size: .*integer, got '5'"),
    "integer dtype": (init(dtype=jnp.int32), TypeError, r"dtype: .*floating-point.*got int32"),
    "seed for key": (init(key=0), TypeError, r"key: expected one key from jax.random.key, got 0"),
    "raw key": (init(key=jax.random.PRNGKey(0)), TypeError, r"key: .*jax.random.key, got uint32"),
    "many keys": (init(key=jax.random.split(KEY)), TypeError, r"key: expected one.*\(2,\)"),
    "W_h_init of another shape": (
        init(W_h_init=lambda key, shape, dtype: jnp.zeros((2, 2), dtype)),
        ValueError, r"W_h_init.*: expected shape \(5, 5\) \(H, H\), got \(2, 2\)",
    ),
    "params of tuple": (
        lambda: jaxrnn.unroll(tuple(PARAMS), XS), TypeError, r"params: expected Params, got tuple"
    ),
    "W_h of list": (with_params(W_h=[[0.0]]), TypeError, r"params.W_h: .* an array, got list"),
    "ys of integers": (
        lambda: jaxrnn.mean_loss(LABELS, BATCH), TypeError, r"ys: expected a floating-point dtype"
    ),
    "ys of another T": (
        lambda: jaxrnn.mean_loss(zeros(9, B, O), BATCH),
        ValueError, r"ys: expected shape \(7, 4, 2\).*got \(9, 4, 2\)",
    ),
    "mean of a tuple": (
        lambda: jaxrnn.mean_loss(zeros(T, B, O), (XS, LABELS)), TypeError, r"batch: expected Batch"
    ),
    "readout of another H": (
        lambda: jaxrnn.readout(PARAMS, zeros(T, 9)), ValueError, r"hs: expected shape \(7, 5\)"
    ),
    "readout of one vector": (
        lambda: jaxrnn.readout(PARAMS._replace(W_y=zeros(H)), zeros(T, H)),
        ValueError, r"params.W_y: expected rank 2, got shape \(5,\)",
    ),
    "readout of a dict": (
        lambda: jaxrnn.readout({}, zeros(T, H)), TypeError, r"params.W_y: .* an array, got NoneType"
    ),
    "W_h_init of complex numbers": (
        init(W_h_init=lambda key, shape, dtype: jnp.eye(5) * 1j),
        TypeError, r"W_h_init.*: expected a floating-point dtype, got complex64",
    ),
    "W_h_init of number": (init(W_h_init=0.9), TypeError, r"W_h_init: expected a function"),
    "pad of an array": (lambda: jaxrnn.pad(XS), TypeError, r"sequences: expected a list of B"),
    "pad of a Batch": (lambda: jaxrnn.pad(BATCH), TypeError, r"sequences: .* list .* got Batch"),
    "xs of list in fit": (
        fit(train=Batch([[0.0]], LABELS)), TypeError, r"train.xs: expected an array, got list"
    ),
    "W_h not square": (
        with_params(W_h=zeros(H, 4)), ValueError, r"params.W_h: expected shape \(5, 5\).*\(5, 4\)"
    ),
    "W_x of another H": (
        with_params(W_x=zeros(6, I)), ValueError, r"params.W_x: expected shape \(5, 3\).*\(6, 3\)"
    ),
    "W_y transposed": (
        with_params(W_y=zeros(H, O)), ValueError, r"params.W_y: expected shape \(5, 5\).*\(5, 2\)"
    ),
    "b_h too long": (with_params(b_h=zeros(9)), ValueError, r"params.b_h: .*\(5,\).*\(9,\)"),
    "b_y of rank 2": (with_params(b_y=zeros(1, O)), ValueError, r"params.b_y: expected rank 1"),
    "no unit": (
        with_params(W_x=zeros(0, I), W_h=zeros(0, 0), W_y=zeros(O, 0), b_h=zeros(0)),
        ValueError, r"params.W_h: expected at least one unit, got shape \(0, 0\)",
    ),
    "W_h of rank 3": (with_params(W_h=zeros(1, H, H)), ValueError, r"params.W_h: expected rank 2"),
    "mixed dtypes": (
        with_params(W_y=zeros(O, H, dtype=jnp.bfloat16)),
        TypeError, r"params.W_y: expected float32 as W_h has, got bfloat16",
    ),
    "integer parameters": (
        with_params(b_h=zeros(H, dtype=jnp.int32)), TypeError, r"params.b_h: .*got int32"
    ),
    "step, x of another I": (step(x=zeros(B, 9)), ValueError, r"x: expected.*3.*got \(4, 9\)"),
    "step, h of another H": (step(h=zeros(B, 9)), ValueError, r"h: expected.*\(4, 5\).*\(4, 9\)"),
    "step, h without batch": (step(h=zeros(H)), ValueError, r"h: expected shape \(4, 5\)"),
    "step, integer h": (step(h=zeros(B, H, dtype=jnp.int32)), TypeError, r"h: .*got int32"),
    "step, activation of name": (step(activation="tanh"), TypeError, r"activation: .*got 'tanh'"),
    "xs of list": (unroll(xs=[1.0]), TypeError, r"xs: expected an array, got list"),
    "xs of another library": (unroll(xs=Tensor()), TypeError, r"xs: expected an array.*Tensor"),
    "xs of bool": (unroll(xs=XS > 0), TypeError, r"xs: .*floating-point.*got bool"),
    "xs of complex": (unroll(xs=XS + 0j), TypeError, r"xs: .*got complex64"),
    "xs of another I": (unroll(xs=zeros(T, B, 9)), ValueError, r"xs: .*3.*got \(7, 4, 9\)"),
    "xs without time": (unroll(xs=zeros(I)), ValueError, r"xs: expected a time axis.*\(3,\)"),
    "xs of rank 0": (unroll(xs=zeros()), ValueError, r"xs: expected shape.*got \(\)"),
    "one token": (unroll(xs=jnp.array(1)), ValueError, r"xs: expected a time axis.*\(\)"),
    "h_0 of another batch": (unroll(h_0=zeros(9, H)), ValueError, r"h_0: .*\(4, 5\).*got \(9, 5\)"),
    "h_0 of integers": (unroll(h_0=zeros(B, H, dtype=int)), TypeError, r"h_0: .*got int32"),
    "mask of floats": (unroll(mask=zeros(T, B)), TypeError, r"mask: expected bool, got float32"),
    "mask without batch": (unroll(mask=jnp.ones(T, bool)), ValueError, r"mask: .*\(7, 4\).*\(7,\)"),
    "mask transposed": (unroll(mask=jnp.ones((B, T), bool)), ValueError, r"mask: .*got \(4, 7\)"),
    "mask of list": (unroll(mask=[True]), TypeError, r"mask: expected an array, got list"),
    "reset of integers": (unroll(reset=zeros(T, B, dtype=int)), TypeError, r"reset: expected bool"),
    "reset too short": (unroll(reset=jnp.ones((T - 1, B), bool)), ValueError, r"reset: .*\(6, 4\)"),
    "batch of tuple": (sequence_loss((XS, LABELS)), TypeError, r"batch: expected Batch.*got tuple"),
    "loss of name": (sequence_loss(loss="mse"), TypeError, r"loss: expected a Loss.*got 'mse'"),
    "labels in floats": (
        bptt(targets=zeros(T, B)), ValueError, r"targets: .*\(7, 4, 2\).*labels are integers.*, 4\)"
    ),
    "loss of None": (
        sequence_loss(loss=jaxrnn.squared_error._replace(value=lambda y, target: None)),
        TypeError, r"loss.value: expected an array, got NoneType",
    ),
    "loop of unroll": (unroll(loop=True), TypeError, r"loop: .*function, got True"),
    "no batches": (evaluate(()), ValueError, r"batches: expected at least one batch, got none"),
    "loss without g": (
        sequence_loss(loss=jaxrnn.squared_error._replace(g=None)), TypeError, r"loss: expected a L"
    ),
    "jacobian, drive of another H": (
        lambda: jaxrnn.jacobian(PARAMS, zeros(B, H), zeros(B, I), drive=zeros(B, 9)),
        ValueError, r"drive: expected shape \(4, 5\).*got \(4, 9\)",
    ),
    "targets too short": (bptt(targets=LABELS[1:]), ValueError, r"targets: .*\(7, 4\).*\(6, 4\)"),
    "targets without batch": (bptt(targets=LABELS[:, 0]), ValueError, r"targets: .*got \(7,\)"),
    "targets None": (bptt(targets=None), TypeError, r"targets: expected an array, got NoneType"),
    "distribution of another O": (bptt(targets=zeros(T, B, 9)), ValueError, r"targets: .*, 9\)"),
    "labels of rank 3": (
        bptt(targets=zeros(T, B, O, dtype=int)), ValueError, r"targets: .*integer labels.*, 2\)"
    ),
    "labels for squared error": (
        bptt(loss=jaxrnn.squared_error), ValueError, r"targets: .*shape of y"
    ),
    "weights of bool": (bptt(weights=jnp.ones((T, B), bool)), TypeError, r"weights: .*got bool"),
    "weights for examples": (bptt(weights=zeros(B)), ValueError, r"weights: .*\(7, 4\).*\(4,\)"),
    "checkpoint every 0": (bptt(checkpoint_every=0), ValueError, r"checkpoint_every: .*got 0"),
    "checkpoint every 2.0": (bptt(checkpoint_every=2.0), TypeError, r"checkpoint_every: .*got 2.0"),
    "loop of bptt": (
        lambda: jaxrnn.bptt(PARAMS, BATCH, loop=True), TypeError, r"loop: .*function, got True"
    ),
    "loop of sequence_loss": (
        sequence_loss(loop="kernel"), TypeError, r"loop: .*function, got 'kernel'"
    ),
    "lengths of floats": (
        lambda: jaxrnn.mask_from_lengths(zeros(B), T), TypeError, r"lengths: .*got float32"
    ),
    "lengths of None": (
        lambda: jaxrnn.mask_from_lengths(None, T), TypeError, r"lengths: .*array, got NoneType"
    ),
    "lengths of list": (
        lambda: jaxrnn.mask_from_lengths([1.0], T), TypeError, r"lengths: .*integers, got float64"
    ),
    "windows of 0": (lambda: list(jaxrnn.windows(BATCH, 0)), ValueError, r"length: .*1, got 0"),
    "optimizer None": (
        lambda: jaxrnn.make_update(jaxrnn.bptt, None), TypeError, r"optimizer: .*None"
    ),
    "optimizer of number": (
        lambda: jaxrnn.make_update(jaxrnn.bptt, 0.1), TypeError, r"optimizer: expected.*0.1"
    ),
    "labels as floats": (
        bptt(targets=zeros(T, B)), ValueError, r"targets: expected shape \(7, 4, 2\) .*got \(7, 4\)"
    ),
    "loss of one shape": (
        sequence_loss(loss=jaxrnn.cross_entropy._replace(value=lambda y, target: y.sum())),
        ValueError, r"loss.value: expected shape \(7, 4\) .*got \(\)",
    ),
    "error of one shape": (
        bptt(loss=jaxrnn.cross_entropy._replace(error=lambda y, target: y.sum(axis=(0, 1)))),
        ValueError, r"loss.error: expected shape \(7, 4, 2\) .*got \(2,\)",
    ),
    "windows of unequal T": (
        lambda: jaxrnn.windows(Batch(XS, LABELS[:3]), 2), ValueError, r"targets: .*got \(3, 4\)"
    ),
    "windows of bool": (lambda: list(jaxrnn.windows(BATCH, True)), TypeError, r"length: .* True"),
    "evaluate, number": (evaluate([BATCH, 3]), TypeError, r"batches\[1\]: expected Batch.*got int"),
    "evaluate, another I": (evaluate(Batch(zeros(T, B, 9), LABELS)), ValueError, r"xs: .*4, 9\)"),
    "fit, NaN": (fit(train=Batch(NAN, LABELS)), ValueError, r"xs: expected finite.*nan at"),
    "fit, NaN in a batch": (fit(train=[Batch(NAN, LABELS)]), ValueError, r"xs: .*finite.*nan"),
    "fit, mask of a batch": (
        fit(train=[BATCH._replace(mask=LABELS)]), TypeError, r"mask: expected bool, got int32"
    ),
    "fit, NaN held out": (fit(valid=[Batch(NAN, LABELS)]), ValueError, r"xs: expected finite.*nan"),
    "fit, state": (
        fit(train=[BATCH], h_0=zeros(B, H) + jnp.nan), ValueError, r"h_0: expected finite.*nan"
    ),
    "fit, float64": (fit(train=Batch(numpy_xs(1e39), LABELS)), ValueError, r"xs: .*1e\+39.*inf"),
    "fit, max_skipped": (fit(max_skipped=0), ValueError, r"max_skipped: .*at least 1, got 0"),
    "fit, resume": (fit(resume=PARAMS), TypeError, r"resume: expected a Fit or None, got Params"),
    "fit, seed for key": (fit(key=0), TypeError, r"key: expected one key from .*key, got 0"),
    "fit, no epochs": (fit(max_epochs=0), ValueError, r"max_epochs: expected at least 1, got 0"),
    "fit, patience 0": (fit(patience=0), ValueError, r"patience: expected at least 1, got 0"),
    "fit, batch_size 0": (fit(batch_size=0), ValueError, r"batch_size: expected at least 1"),
    "fit, label": (fit(train=Batch(XS, LABELS + 9)), ValueError, r"targets: .*got 9"),
    "fit, held-out label": (fit(valid=Batch(XS, LABELS + 9)), ValueError, r"targets: .*got 9"),
    "fit, one sequence": (
        fit(train=Batch(XS[:, 0], LABELS[:, 0])), ValueError, r"train: .*\(T, examples.*\(7, 3\)"
    ),
    "fit, no example": (fit(train=Batch(XS[:, :0], LABELS[:, :0])), ValueError, r"train: expected"),
    "fit, no batch": (fit(train=[]), ValueError, r"train: expected at least one batch"),
    "fit, one pass": (fit(train=iter([BATCH])), ValueError, r"train: .*once per epoch.*iterator"),
    "fit, number": (fit(train=3), TypeError, r"train: expected a Batch or an iterable.*got 3"),
    "fit, None": (fit(train=None), TypeError, r"train: expected a Batch or an iterable.*got None"),
    "fit, no step": (
        fit(train=Batch(XS[:0], LABELS[:0])), ValueError, r"train: expected at least one step"
    ),
    "fit, batch_size of batches": (
        fit(train=[BATCH], batch_size=2), ValueError, r"batch_size: expected None.*got 2"
    ),
    "fit, state for examples": (fit(h_0=zeros(B, H)), ValueError, r"h_0: expected None"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG, ids=lambda name: name.replace(" ", "-"))
def test_a_wrong_argument_is_named(name):
    call, exception, message = WRONG[name]
    with pytest.raises(exception, match="^" + message):
        call()


@pytest.mark.parametrize("name", ["W_h not square", "xs of another I", "mask of floats"])
def test_a_wrong_argument_is_named_under_jit(name):
    call, exception, message = WRONG[name]
    with pytest.raises(exception, match="^" + message):
        jax.jit(call)()


def test_numpy_arrays_of_other_widths_are_accepted():
    batch = Batch(np.ones((T, B, I), np.float16), np.zeros((T, B), np.uint8))
    jaxrnn.check_values(PARAMS, batch)
    value, _ = jaxrnn.sequence_loss(PARAMS, batch)
    assert value.dtype == jnp.float32
    (value, _), grads = jaxrnn.bptt(PARAMS, batch)
    assert grads.W_h.dtype == jnp.float32
