"""The shapes that a kernel takes: with a scan in the kernel's place, all equal the scan."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxrnn
from jaxrnn import tiles
from jaxrnn.recurrence import recur, reverse_scan, scan
from tests.conftest import default_and_thorough
from tests.reference import relative_errors


def run_by_scan(step, reverse, seen, network, carry, inputs):
    """What a kernel does with N networks of B sequences, and the shapes that it got."""
    seen.append((*carry.shape, len(inputs[0])))
    inputs = jax.tree.map(lambda x: x != 0 if x.dtype == jnp.int32 else x, inputs)
    body = jax.vmap(step, in_axes=(0, 0, 0))
    return lax.scan(partial(body, network), carry, inputs, reverse=reverse)


def loop(step, network, carry, inputs, *, reverse=False, seen):
    run = tiles.in_pieces(partial(run_by_scan, step, reverse, seen), reverse=reverse)
    return tiles.with_flat_batch(tiles.with_whole_tiles(run))(network, carry, inputs)


def arguments(T, batch_shape, H, rng):
    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape))

    flags = jnp.asarray(rng.random((T, *batch_shape)) < 0.5)
    leak = jnp.asarray(rng.uniform(size=[(), (H,)][rng.integers(2)]))
    return draw(H, H) / H, draw(T, *batch_shape, H), draw(*batch_shape, H), leak, flags


def both_loops(loop, W_h, zs, h, leak, flags):
    forward = recur(jaxrnn.sigmoid, W_h, zs, h, leak, flags, ~flags, loop)
    return forward, reverse_scan(W_h, h, zs, forward[0], leak, flags, ~flags, loop)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("seed", default_and_thorough(range(2), range(6)))
def test_every_shape_equals_the_scan(seed, monkeypatch):
    """Any T in pieces, H and B in whole tiles, any batch axes."""
    rng, seen = np.random.default_rng(seed), []
    monkeypatch.setattr(tiles, "MOST_STEPS", 4)
    T, H = int(rng.integers(1, 30)), int(rng.integers(1, 20))
    drawn = arguments(T, [(), (17,), (2, 3)][seed % 3], H, rng)
    by_tiles = jax.jit(partial(both_loops, partial(loop, seen=seen)))(*drawn)
    assert max(relative_errors(by_tiles, jax.jit(partial(both_loops, scan))(*drawn))) <= 1e-12
    for networks, sequences, units, steps in seen:
        assert (networks, sequences % 16) == (1, 0)
        assert units in (16, 32)
        assert steps < 8


MAPPED = [
    ([(0, None, None, None, None)], 2),
    ([(None, None, None, 0, None)], 2),
    ([(None, 1, None, None, 1)], 1),
    ([(0, None, 0, None, None), (None, 1, 0, 0, 1)], 4),
    ([(None, None, 0, None, None), (0, 0, 0, None, None)], 2),
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("mapped", "networks"), default_and_thorough(MAPPED[2:4], MAPPED, unpack=True)
)
def test_vmap_adds_networks_only_over_weights(mapped, networks):
    """The axes of W_h, zs, h, leak and flags that each of the vmaps maps, the outermost last."""
    seen = []
    drawn = list(arguments(5, (3,), 4, np.random.default_rng(0)))
    by_tiles, by_scan = (partial(both_loops, f) for f in (partial(loop, seen=seen), scan))
    for axes in mapped:
        by_tiles, by_scan = (jax.vmap(fn, in_axes=axes) for fn in (by_tiles, by_scan))
        for n, axis in enumerate(axes):
            if axis is not None:
                drawn[n] = jnp.stack([drawn[n], drawn[n][::-1]], axis=axis)
    assert max(relative_errors(jax.jit(by_tiles)(*drawn), jax.jit(by_scan)(*drawn))) <= 1e-12
    assert max(shape[0] for shape in seen) == networks


def test_a_launch_holds_at_most_two_to_the_31_numbers(monkeypatch):
    """Of shapes alone: (T, N, B, H) in pieces of 2**30 numbers at most, and one of the rest."""
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    seen: list[int] = []

    def run(network, carry, inputs):
        seen.append(inputs[0].size)
        return carry, inputs[0]

    cases = [(10_000, 2**17), (100, 2**29), (8191, 16)]
    for T, B in cases:
        jax.eval_shape(
            tiles.in_pieces(run, reverse=True), None, shape((1, B, 1)), (shape((T, 1, B, 1)),)
        )
    assert max(seen) < 2**31
    assert len(seen) == 5


@pytest.mark.parametrize("H", [1, 15, 16, 17, 32, 64, 128])
def test_a_tile_is_as_wide_as_the_next_power_of_two(H):
    seen = []

    def run(network, carry, inputs):
        seen.append(carry.shape[-1])
        return carry, inputs[0]

    network = jnp.ones((1, H, H)), (None, None)
    tiles.with_whole_tiles(run)(network, jnp.ones((1, 3, H)), (jnp.ones((5, 1, 3, H)),))
    assert seen == [max(16, 2 ** (H - 1).bit_length())]
