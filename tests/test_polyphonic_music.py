"""Polyphonic music: what is read, how it is laid out, which figure counts."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.io

import jaxrnn
from experiments import music_data, polyphonic_music
from experiments.cli import InputError
from jaxrnn import Batch


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "a readable .mat file: No such file"), (b"no piano rolls", "piano rolls as .mat, got")],
)
def test_an_unreadable_music_file_is_named(content, why, tmp_path, capsys):
    path = tmp_path / "music.mat"
    if content:
        path.write_bytes(content)
    flags = ["--smoke", "--out", str(tmp_path / "out"), "--data", str(path)]
    assert polyphonic_music.run(flags) == 2
    assert capsys.readouterr().err.startswith(f"{path}: expected {why}")


@pytest.mark.parametrize(
    ("pieces", "why"),
    [
        ([(1, 0)], "valid pieces of two steps or more, got none"),
        ([(3, 2)], "zeros and ones in the valid pieces, got others"),
    ],
)
def test_pieces_that_cannot_be_predicted_are_named(pieces, why, tmp_path):
    """Pieces of one step have no target; others beside them are kept."""
    parts = {}
    for part in ("train", "valid", "test"):
        cells = np.empty((1, 2), object)
        cells[0, 0], cells[0, 1] = np.ones((4, 88)), np.ones((1, 88))
        parts[f"{part}data"] = cells
    path = tmp_path / "music.mat"
    scipy.io.savemat(path, parts)
    assert [len(piece) for piece in music_data.read(path)["valid"]] == [4]
    parts["validdata"] = np.empty((1, len(pieces)), object)
    for n, (steps, value) in enumerate(pieces):
        parts["validdata"][0, n] = np.full((steps, 88), value)
    scipy.io.savemat(path, parts)
    with pytest.raises(InputError, match=why):
        music_data.read(path)


def test_the_test_nll_is_that_of_the_best_epoch_or_nan():
    rows = [
        {"valid": [3.0, 2.0, np.nan], "test": [3.1, 2.1, np.nan]},
        {"valid": [1.0, np.nan, np.nan], "test": [1.5, np.nan, np.nan]},
    ]
    np.testing.assert_equal(polyphonic_music.best_test_nll(rows), [1.5, 2.1, np.nan])


@pytest.mark.thorough
def test_results_of_diverged_networks_are_valid_json(music, tmp_path):
    rates = ["--optimizer", "sgd", "--learning-rates", "1e30", "1e30", "1e30"]
    out = tmp_path / "out"
    assert polyphonic_music.run(["--smoke", "--data", str(music), "--out", str(out), *rates]) == 0
    for line in (out / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["valid"] == [None, None]
    summary = json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["figures"]["test"]["alone"] == [None, None]
    assert "alone nan" in summary["ours"]


def test_pieces_are_laid_out_whole(music):
    """Each piece once, next to its own next steps; a mean over windows is that over pieces."""
    rolls = music_data.read(music)["train"]
    rng = np.random.default_rng(1)
    batches = music_data.lay_out(rng, rolls, 2, 4)
    flat = [np.asarray(leaf).reshape(-1, *leaf.shape[2:]) for leaf in batches[:4]]
    xs, targets, mask, reset = flat
    found = []
    for b in range(2):
        starts = [*np.flatnonzero(reset[:, b]), mask[:, b].sum()]
        for at, end in itertools.pairwise(starts):
            assert mask[at:end, b].all()
            assert (xs[at + 1 : end, b] == targets[at : end - 1, b]).all()
            found.append(np.concatenate([xs[at : at + 1, b], targets[at:end, b]]).tobytes())
    assert sorted(found) == sorted(roll.tobytes() for roll in rolls)
    assert batches.mask.any(axis=(1, 2)).all()
    for _ in range(20):
        assert len(music_data.lay_out(rng, rolls, 2, 4).xs) == len(batches.xs)

    params = jaxrnn.init(jax.random.key(0), 88, 5, 88)
    sums, steps = 0.0, 0
    for roll in rolls:
        roll = jnp.asarray(roll, jnp.float32)
        alone = Batch(roll[:-1], roll[1:])
        value, _ = jaxrnn.sequence_loss(
            params, alone, activation=jaxrnn.relu, loss=jaxrnn.binary_cross_entropy
        )
        sums, steps = sums + value * (len(roll) - 1), steps + len(roll) - 1
    stacked = jax.tree.map(lambda leaf: leaf[None], params)
    assert polyphonic_music.mean_nll(stacked, batches, activation=jaxrnn.relu)[0] == pytest.approx(
        float(sums) / steps, rel=1e-5
    )


@pytest.mark.parametrize(("pieces", "steps"), [(3, 50), (230, 61), (700, 250)])
def test_by_default_an_epoch_has_about_as_many_updates_for_any_file(pieces, steps):
    rolls = [np.zeros((steps, 88), np.uint8)] * pieces
    B = polyphonic_music.batch_size(polyphonic_music.Config(), rolls)
    windows = len(music_data.lay_out(np.random.default_rng(0), rolls, B, 16).xs)
    assert windows <= 10 if pieces == 3 else 0.8 * 220 < windows < 1.2 * 220
    assert polyphonic_music.batch_size(polyphonic_music.Config(batch_size=5), rolls) == 5
