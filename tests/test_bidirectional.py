"""The bidirectional network with masks, compared with torch.nn.RNN on packed sequences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from experiments.recipes.bidirectional import unroll_bidirectional
from jaxrnn import interop
from tests.reference import relative_errors
from tests.test_interop import draw, fingerprint

T, I, H, O = 5, 3, 4, 2
AGREEMENT = 1e-12
LENGTHS = np.array([5, 3, 1, 4])
KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def torch_weights():
    """The weights of two layers in both directions and of the readout, with torch's names."""
    normal, rnn = draw(0), {}
    for layer, inputs in [("l0", I), ("l1", 2 * H)]:
        for suffix in (layer, f"{layer}_reverse"):
            for kind, shape in zip(KINDS, [(H, inputs), (H, H), (H,), (H,)], strict=True):
                rnn[f"{kind}_{suffix}"] = normal(*shape)
    return rnn, {"weight": normal(O, 2 * H), "bias": normal(O)}


def layers_from_torch(rnn, linear):
    """Pairs of Params. The readout is the sum of one per direction, with the bias in the first."""
    no_readout = {"weight": np.zeros((0, H)), "bias": np.zeros(0)}
    forward = {"weight": linear["weight"][:, :H], "bias": linear["bias"]}
    backward = {"weight": linear["weight"][:, H:], "bias": np.zeros(O)}

    def one(suffix, readout):
        layer = {f"{kind}_l0": rnn[f"{kind}_{suffix}"] for kind in KINDS}
        return interop.from_torch(layer, readout)

    return [
        (one("l0", no_readout), one("l0_reverse", no_readout)),
        (one("l1", forward), one("l1_reverse", backward)),
    ]


XS, DYS = draw(1)(T, len(LENGTHS), I), draw(2)(T, len(LENGTHS), O)


def run():
    """ys, and the gradient of sum(DYS * ys) with respect to layers and xs; the padding is NaN."""
    mask = jaxrnn.mask_from_lengths(LENGTHS, T)

    def value(layers, xs):
        ys = unroll_bidirectional(layers, xs, mask)
        return (DYS * ys).sum(), ys

    xs = jnp.where(mask[..., None], XS, jnp.nan)
    gradient = jax.jit(jax.grad(value, (0, 1), has_aux=True))
    (dlayers, dxs), ys = gradient(layers_from_torch(*torch_weights()), xs)
    forward, backward = dlayers[1]
    np.testing.assert_allclose(forward.b_y, backward.b_y, rtol=AGREEMENT)
    dlayers[1] = forward, backward._replace(b_y=jnp.zeros(O))
    return [ys, *jax.tree.leaves(dlayers), dxs]


STORED = (
    -0.6091590290288832,
    1.515812898572662,
    -0.05009177113943808,
    0.0,
    -0.37880171263473134,
    0.0,
    -0.3568130425963494,
    -0.5249283670226794,
    0.0,
    0.5719247396346582,
    0.0,
    -1.7115500026106942,
    -0.5644711195620004,
    0.6930054777894689,
    -0.9736357599863052,
    2.042248375825176,
    0.07837409499407302,
    0.3493224065949785,
    2.0401878951402845,
    0.9603160173620033,
    0.0,
    2.251289076493479,
)
"""Fingerprints of ys and of the gradients of the layers and of xs, by torch 2.13 in float64."""


@pytest.mark.usefixtures("x64")
def test_equals_the_stored_results_of_torch():
    np.testing.assert_allclose(fingerprint(*run()), STORED, rtol=0, atol=AGREEMENT)


@pytest.mark.usefixtures("x64")
def test_equals_torch_on_packed_sequences():
    torch = pytest.importorskip("torch")
    rnn = torch.nn.RNN(I, H, num_layers=2, bidirectional=True).double()
    linear = torch.nn.Linear(2 * H, O).double()
    for module, weights in zip((rnn, linear), torch_weights(), strict=True):
        module.load_state_dict({name: torch.tensor(leaf) for name, leaf in weights.items()})
    xs, lengths = torch.tensor(XS, requires_grad=True), torch.tensor(LENGTHS)
    pack = partial(torch.nn.utils.rnn.pack_padded_sequence, enforce_sorted=False)
    hs, _ = torch.nn.utils.rnn.pad_packed_sequence(rnn(pack(xs, lengths))[0])
    ys = linear(hs) * (torch.arange(T)[:, None] < lengths)[..., None]
    (torch.tensor(DYS) * ys).sum().backward()

    def gradients(module):
        return {name: leaf.grad.numpy() for name, leaf in module.named_parameters()}

    # b_ih and b_hh each have the gradient of their sum b_h: keep one of them.
    drnn = {n: leaf * ("bias_hh" not in n) for n, leaf in gradients(rnn).items()}
    dlayers = jax.tree.leaves(layers_from_torch(drnn, gradients(linear)))
    expected = [ys.detach().numpy(), *dlayers, xs.grad.numpy()]
    assert max(relative_errors(run(), expected)) <= AGREEMENT
    np.testing.assert_allclose(fingerprint(*expected), STORED, rtol=0, atol=AGREEMENT)
