"""Conversion to and from torch, Flax and .safetensors.

The results are compared with the libraries where they are installed, and always with results of the
libraries that are stored here.
"""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from jaxrnn import interop
from tests.reference import relative_errors

T, B, I, H, O = 6, 3, 2, 4, 3
AGREEMENT = 1e-12


def draw(seed):
    rng = np.random.default_rng(seed)
    return lambda *shape: 0.5 * rng.standard_normal(shape)


def torch_weights():
    normal = draw(0)
    rnn = {
        "weight_ih_l0": normal(H, I),
        "weight_hh_l0": normal(H, H),
        "bias_ih_l0": normal(H),
        "bias_hh_l0": normal(H),
    }
    return rnn, {"weight": normal(O, H), "bias": normal(O)}


def flax_weights():
    normal = draw(1)
    cell = {"i": {"kernel": normal(I, H), "bias": normal(H)}, "h": {"kernel": normal(H, H)}}
    return cell, {"kernel": normal(H, O), "bias": normal(O)}


XS, DYS = draw(2)(T, B, I), draw(3)(T, B, O)
"""The inputs, and the derivative of a scalar with respect to the outputs."""


def run(params):
    """ys, and the gradient of sum(DYS * ys) with respect to the parameters and the inputs."""

    def value(params, xs):
        ys = jaxrnn.unroll(params, xs)[1]
        return (DYS * ys).sum(), ys

    (dparams, dxs), ys = jax.grad(value, (0, 1), has_aux=True)(params, jnp.asarray(XS))
    return ys, dparams, dxs


def fingerprint(*arrays):
    """One number per array, which depends on every element."""
    return [float((np.cos(np.arange(a.size)) * np.ravel(a)).sum()) for a in arrays]


STORED = {
    "torch": [
        -1.0656804687454628,
        -1.0796389763290724,
        -3.6918264325489543,
        1.8481845747108716,
        -1.731679851747971,
        -1.3254621112959208,
        0.4427427254349454,
    ],
    "flax": [
        0.9874377805468337,
        2.2216494440970904,
        -5.024993985784917,
        -1.1453314488800626,
        3.9525454402906224,
        -1.3254621112959213,
        -1.3568592407950828,
    ],
}
"""Fingerprints of ys, dW_x, dW_h, dW_y, db_h, db_y, dxs by torch 2.13 and Flax 0.12.8, float64."""


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("library", STORED)
def test_equals_the_stored_results(library):
    params = {
        "torch": lambda: interop.from_torch(*torch_weights()),
        "flax": lambda: interop.from_flax(*flax_weights()),
    }
    ys, grads, dxs = jax.jit(run)(params[library]())
    np.testing.assert_allclose(fingerprint(ys, *grads, dxs), STORED[library], rtol=AGREEMENT)


@pytest.mark.usefixtures("x64")
def test_equals_the_outputs_and_gradients_of_torch():
    torch = pytest.importorskip("torch")
    rnn, linear = torch.nn.RNN(I, H).double(), torch.nn.Linear(H, O).double()
    for module, weights in zip((rnn, linear), torch_weights(), strict=True):
        module.load_state_dict({name: torch.tensor(leaf) for name, leaf in weights.items()})
    xs = torch.tensor(XS, requires_grad=True)
    ys = linear(rnn(xs)[0])
    (torch.tensor(DYS) * ys).sum().backward()
    grads = rnn.weight_ih_l0, rnn.weight_hh_l0, linear.weight, rnn.bias_ih_l0, linear.bias
    expected = [ys.detach().numpy(), *(leaf.grad.numpy() for leaf in grads), xs.grad.numpy()]
    params = interop.from_torch(rnn.state_dict(), linear.state_dict())
    got, got_grads, dxs = jax.jit(run)(params)
    assert max(relative_errors([got, *got_grads, dxs], expected)) <= AGREEMENT
    np.testing.assert_allclose(fingerprint(*expected), STORED["torch"], rtol=AGREEMENT)

    again, again_linear = torch.nn.RNN(I, H).double(), torch.nn.Linear(H, O).double()
    for module, weights in zip((again, again_linear), interop.to_torch(params), strict=True):
        module.load_state_dict({name: torch.from_numpy(leaf) for name, leaf in weights.items()})
    ys_again = again_linear(again(xs)[0]).detach().numpy()
    assert max(relative_errors(ys_again, expected[0])) <= AGREEMENT


@pytest.mark.usefixtures("x64")
def test_equals_the_outputs_and_gradients_of_flax():
    nn = pytest.importorskip("flax.linen")
    cell, dense = flax_weights()
    rnn = nn.RNN(nn.SimpleCell(H, param_dtype=jnp.float64), time_major=True)
    readout = nn.Dense(O, param_dtype=jnp.float64)

    def value(cell, dense, xs):
        hs = rnn.apply({"params": {"cell": cell}}, xs)
        ys = readout.apply({"params": dense}, hs)
        return (DYS * ys).sum(), ys

    flax_run = jax.jit(jax.grad(value, (0, 1, 2), has_aux=True))
    (dcell, ddense, dxs), ys = flax_run(cell, dense, XS)
    expected = ys, interop.from_flax(dcell, ddense), dxs
    params = interop.from_flax(cell, dense)
    assert max(relative_errors(jax.jit(run)(params), expected)) <= AGREEMENT
    numbers = fingerprint(ys, *expected[1], dxs)
    np.testing.assert_allclose(numbers, STORED["flax"], rtol=AGREEMENT)
    _, again = flax_run(*interop.to_flax(params), XS)
    assert max(relative_errors(again, ys)) <= AGREEMENT


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_tensors_keep_their_dtype(dtype, requires_grad):
    torch = pytest.importorskip("torch")
    options = {"dtype": getattr(torch, dtype), "requires_grad": requires_grad}
    rnn, linear = (
        {name: torch.tensor(leaf, **options) for name, leaf in weights.items()}
        for weights in torch_weights()
    )
    params = interop.from_torch(rnn, linear)
    assert {leaf.dtype for leaf in params} == {jnp.dtype(dtype)}
    expected = rnn["weight_hh_l0"].detach().float().numpy()
    np.testing.assert_array_equal(np.asarray(params.W_h, np.float32), expected)


def test_weights_of_another_byte_order_are_converted():
    weights = torch_weights()
    swapped = [{name: np.asarray(x).astype(">f8") for name, x in part.items()} for part in weights]
    with jax.enable_x64(True):
        params = interop.from_torch(*swapped)
        assert (params.W_h == weights[0]["weight_hh_l0"]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_conversion_and_back_changes_no_bit(dtype):
    params = jaxrnn.init(jax.random.key(0), I, H, O, dtype=dtype)
    params = params._replace(b_h=jnp.arange(H, dtype=dtype))
    copies = [
        interop.from_torch(*interop.to_torch(params)),
        interop.from_flax(*interop.to_flax(params)),
    ]
    for copy in copies:
        assert all(isinstance(leaf, jax.Array) and leaf.dtype == dtype for leaf in copy)
        assert all((a == b).all() for a, b in zip(copy, params, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_safetensors_file_stores_the_params_by_name(dtype, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    params = jaxrnn.init(jax.random.key(0), I, H, O, dtype=dtype)
    path = tmp_path / "params.safetensors"
    interop.save_safetensors(params, path)
    assert set(safetensors.load_file(path)) == {"W_x", "W_h", "W_y", "b_h", "b_y"}
    again = interop.load_safetensors(path)
    assert all(a.dtype == dtype and (a == b).all() for a, b in zip(again, params, strict=True))
    transposed = jax.tree.map(lambda leaf: np.array(leaf).T.copy().T, params)
    interop.save_safetensors(transposed, path)
    again = interop.load_safetensors(path)
    assert all((a == b).all() for a, b in zip(again, params, strict=True))
    cell, dense = interop.to_flax(params)
    assert cell["h"]["kernel"].flags.c_contiguous
    assert dense["kernel"].flags.c_contiguous
    safetensors.save_file({"W_x": np.ones(1)}, path)
    with pytest.raises(
        ValueError, match=r"\.safetensors: expected names \['W_h', .* got \['W_x'\]"
    ):
        interop.load_safetensors(path)


def test_the_error_without_safetensors_names_the_package_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ModuleNotFoundError, match="pip install safetensors"):
        interop.load_safetensors(tmp_path / "params.safetensors")


def replaced(weights, which, **changes):
    return [part | changes if n == which else part for n, part in enumerate(weights)]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (
            interop.from_torch,
            replaced(torch_weights(), 0, weight_ih_l1=np.ones((H, H))),
            r"rnn: expected names \['bias_hh_l0', .* 'weight_ih_l1'\]",
        ),
        (
            interop.from_torch,
            replaced(torch_weights(), 1, bias=np.ones(O + 1)),
            r"params.b_y: expected shape \(3,\) .* got \(4,\)",
        ),
        (
            interop.from_torch,
            replaced(torch_weights(), 1, bias=np.ones(O, int)),
            r"params.b_y: expected a floating-point dtype, got int64",
        ),
        (
            interop.from_flax,
            replaced(flax_weights(), 0, j={}),
            r"cell: expected names \['h', 'i'\], got \['h', 'i', 'j'\]",
        ),
        (
            interop.from_flax,
            replaced(flax_weights(), 0, h={"kernel": np.ones((H, H)), "bias": np.ones(H)}),
            r"cell\['h'\]: expected names \['kernel'\]",
        ),
        (
            interop.from_torch,
            [torch_weights()[0], {"weight": np.ones((O, H))}],
            r"linear: expected names \['bias', 'weight'\], got \['weight'\]",
        ),
        (
            interop.from_flax,
            replaced(flax_weights(), 0, i={"kernel": np.ones((I, H))}),
            r"cell\['i'\]: expected names \['bias', 'kernel'\], got \['kernel'\]",
        ),
        (
            interop.from_flax,
            [flax_weights()[0], {"kernel": np.ones((H, O))}],
            r"dense: expected names \['bias', 'kernel'\], got \['kernel'\]",
        ),
        (interop.to_torch, [(1, 2, 3, 4, 5)], "params: expected Params, got tuple"),
    ],
)
def test_errors_name_the_invalid_argument(function, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        function(*arguments)


def test_float64_is_not_truncated_silently():
    with pytest.raises(
        TypeError, match="W_x: expected a dtype that JAX does not truncate, got float"
    ):
        interop.from_torch(*torch_weights())


def test_no_other_library_is_imported():
    code = (
        "import sys, jaxrnn.interop; "
        "print({'torch', 'flax', 'safetensors'} & {name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_what_is_no_state_dict_is_named():
    with pytest.raises(
        TypeError, match=r"^rnn: expected a mapping from names to arrays, got NoneT"
    ):
        interop.from_torch(None, {})
