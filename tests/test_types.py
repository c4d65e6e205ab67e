"""NumPy arrays, as users in strict mypy pass them: mypy checks this file, and pytest runs it."""

import jax
import numpy as np
import optax

import jaxrnn
from jaxrnn import Batch

XS = np.ones((7, 4, 3), np.float32)
MASK = np.ones((7, 4), bool)
STATES = np.zeros((4, 5), np.float32)


def test_functions_take_the_arrays_of_numpy() -> None:
    params = jaxrnn.init(jax.random.key(0), 3, 5, 2)
    batch = Batch(XS, np.zeros((7, 4), int), MASK, ~MASK, MASK.astype(float), np.ones((7, 4, 5)))

    @jax.jit
    def results(params: jaxrnn.Params) -> object:
        _, hs = jaxrnn.hidden_states(params, XS, STATES, mask=MASK, reset=~MASK)
        return (
            jaxrnn.bptt(params, batch, STATES),
            jaxrnn.mean_loss(np.ones((7, 4, 2)), batch),
            jaxrnn.step(params, STATES[0], XS[0, 0]),
            jaxrnn.jacobian(params, STATES[0], XS[0, 0]),
            jaxrnn.lyapunov_exponents(params, XS, STATES),
            jaxrnn.readout(params, hs),
            jaxrnn.fixed_points(params, STATES, XS[0, 0]),
        )

    leaves = jax.tree.leaves(results(params))
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert all(leaf.dtype in (np.float32, bool) for leaf in leaves)
    result = jaxrnn.fit(jax.random.key(1), params, batch, optimizer=optax.sgd(0.1), max_epochs=1)
    assert np.isfinite(result.history[0].train_loss)


def test_lengths_are_lists_or_arrays() -> None:
    for lengths in ([2, 0], np.array([2, 0])):
        mask = jaxrnn.mask_from_lengths(lengths, 3)
        assert mask.tolist() == [[True, False], [True, False], [False, False]]
        assert [len(part) for part in jaxrnn.unpad(mask, lengths)] == [2, 0]
        assert [bucket.tolist() for bucket in jaxrnn.buckets(lengths)] == [[0], [1]]
