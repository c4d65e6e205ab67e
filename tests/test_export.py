"""`jax.export` with symbolic sizes: one exported function takes any T and B."""

import itertools
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest
from jax import export

import jaxrnn
from experiments.recipes import serving
from jaxrnn import Activation, Batch
from tests.conftest import default_and_thorough
from tests.reference import relative_errors

PARAMS = jaxrnn.init(jax.random.key(0), 3, 5, 2)
SIZES = [(1, 1), (7, 4), (100, 3)]


def arguments(T, B, *, tokens=False, options=True):
    """A batch with every field, or the least of them, and a state or None."""
    rng = np.random.default_rng([T, B])
    xs = rng.standard_normal((T, B, 3)).astype(np.float32)
    xs = rng.integers(0, 3, (T, B), np.int32) if tokens else xs
    batch = Batch(xs, rng.integers(0, 2, (T, B), np.int32))
    if not options:
        return batch, None
    numbers = rng.uniform(size=(T, B)).astype(np.float32)
    drive = rng.standard_normal((T, B, 5)).astype(np.float32)
    batch = batch._replace(mask=numbers < 0.9, reset=numbers < 0.2, weights=numbers, drive=drive)
    return batch, rng.standard_normal((B, 5)).astype(np.float32)


def exported(function, batch, h_0):
    """The function of (batch, h_0), exported with symbols for T and B."""
    T, B = export.symbolic_shape("T, B")
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((T, B, *x.shape[2:]), x.dtype), batch)
    state = None if h_0 is None else jax.ShapeDtypeStruct((B, 5), h_0.dtype)
    return export.export(jax.jit(function))(batch, state)


def states(batch, h_0, **keywords):
    """The recurrence alone."""
    keywords |= {"mask": batch.mask, "reset": batch.reset, "drive": batch.drive}
    return jaxrnn.hidden_states(PARAMS, batch.xs, h_0, **keywords)


def outputs(batch, h_0, **keywords):
    """States, and the readout."""
    keywords |= {"mask": batch.mask, "reset": batch.reset, "drive": batch.drive}
    return jaxrnn.unroll(PARAMS, batch.xs, h_0, **keywords)


FUNCTIONS = {
    "hidden_states": states,
    "unroll": outputs,
    "sequence_loss": partial(jaxrnn.sequence_loss, PARAMS),
    "autodiff": partial(jax.value_and_grad(jaxrnn.sequence_loss, has_aux=True), PARAMS),
    "bptt": partial(jaxrnn.bptt, PARAMS),
    "bptt, recomputed": partial(jaxrnn.bptt, PARAMS, checkpoint_every=3),
    "gradient_flow": partial(jaxrnn.gradient_flow, PARAMS),
}


CASES = {"all fields": {}, "tokens": {"tokens": True}, "fewest fields": {"options": False}}
PAIRS = list(itertools.product(FUNCTIONS, CASES))


@pytest.mark.parametrize(
    ("name", "fields"),
    default_and_thorough(
        [("bptt", "all fields")],
        PAIRS,
        unpack=True,
    ),
)
def test_an_exported_function_takes_any_number_of_steps_and_sequences(name, fields):
    function, options = FUNCTIONS[name], CASES[fields]
    call = exported(function, *arguments(2, 2, **options)).call
    for T, B in SIZES:
        case = arguments(T, B, **options)
        assert max(relative_errors(call(*case), jax.jit(function)(*case))) <= 1e-5


GELU = Activation(jax.nn.gelu)
KEYWORDS = [(jaxrnn.relu, None), (jaxrnn.relu, 0.5), (GELU, None), (GELU, 0.5)]


@pytest.mark.parametrize(
    ("activation", "leak"), default_and_thorough(KEYWORDS[3:], KEYWORDS, unpack=True)
)
def test_activations_and_leaks_are_exported(activation, leak):
    function = partial(outputs, activation=activation, leak=leak)
    call = exported(function, *arguments(2, 2)).call
    for T, B in SIZES:
        case = arguments(T, B)
        assert max(relative_errors(call(*case), jax.jit(function)(*case))) <= 1e-5


SERVER = """
import sys
import jax
import numpy as np
from jax import export

predict = export.deserialize(bytearray(open(sys.argv[1], "rb").read())).call
xs, h = np.load(sys.argv[2]), np.zeros((2, 5), np.float32)
h, first = predict(xs[:3], h)
h, second = predict(xs[3:], h)
np.save(sys.argv[3], np.concatenate([first, second]))
assert "jaxrnn" not in sys.modules
"""


@pytest.mark.thorough
def test_exported_bytes_are_served_without_the_package(tmp_path):
    """In two pieces of unequal length."""
    paths = [tmp_path / name for name in ("network.bin", "xs.npy", "probabilities.npy")]
    paths[0].write_bytes(serving.to_bytes(PARAMS))
    xs = arguments(9, 2)[0].xs
    np.save(paths[1], xs)
    subprocess.run([sys.executable, "-c", SERVER, *paths], check=True, cwd=tmp_path)
    _, ys = jaxrnn.unroll(PARAMS, xs)
    np.testing.assert_allclose(np.load(paths[2]), jax.nn.softmax(ys), atol=1e-6)


def test_a_mask_from_lengths_with_symbolic_sizes():
    T, B = export.symbolic_shape("T, B")
    arguments = jax.ShapeDtypeStruct((B,), np.int32), jax.ShapeDtypeStruct((T, B, 3), np.float32)
    fn = jax.jit(lambda lengths, xs: jaxrnn.mask_from_lengths(lengths, xs.shape[0]))
    mask = export.export(fn)(*arguments).call(np.array([2, 0], np.int32), np.zeros((3, 2, 3), "f4"))
    assert mask.astype(int).tolist() == [[1, 0], [1, 0], [0, 0]]
