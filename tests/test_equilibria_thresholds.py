"""Where a search has converged, and where an eigenvalue is on the unit circle."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from tests.recipe_cases import draw, network


@pytest.mark.usefixtures("x64")
def test_a_small_leak_converges_no_search():
    """Convergence is that of q, the speed without a leak."""
    params = network(0, 2, 6)._replace(W_h=3 * draw(2, 6, 6))
    search = partial(jaxrnn.fixed_points, params, draw(1, 30, 6), jnp.zeros(2), steps=2)
    plain, leaky = (search(leak=leak, tolerance=0.02).converged for leak in (None, 0.1))
    np.testing.assert_array_equal(plain, leaky)
    assert not plain.all()


def test_stability_within_and_beyond_the_margin():
    Js = np.array([[[1 + 1e-9]], [[1 - 1e-9]], [[1.005]], [[0.995]]])
    found = jaxrnn.stability(Js)
    assert found.unstable_dim.tolist() == [0, 0, 1, 0]
    assert found.stable.tolist() == [False, False, False, True]
    assert found.marginal.tolist() == [True, True, False, False]
    wide = jaxrnn.stability(Js, margin=0.01)
    assert wide.marginal.all()
    assert not wide.unstable_dim.any()
    assert not wide.stable.any()
    exact = jaxrnn.stability(np.array([[[1.0]], [[0.5]]]), margin=0)
    assert exact.marginal.tolist() == [True, False]
