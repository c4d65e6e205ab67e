"""The folder of checkpoints: what is kept, what is loaded, and what happens to damaged files.

`JAXRNN_THOROUGH=1` damages 5,000 files instead of 300.
"""

import os
import random

import numpy as np
import pytest

from jaxrnn import checkpoints
from jaxrnn.checkpoints import CheckpointError
from tests.test_checkpoint_format import ARRAYS, NOTE, assert_arrays_equal

THOROUGH = os.environ.get("JAXRNN_THOROUGH") == "1"


def test_load_returns_what_save_wrote(tmp_path):
    path = checkpoints.save(tmp_path, np.int64(7), ARRAYS, NOTE)
    assert path == checkpoints.checkpoint_path(tmp_path, 7)
    assert os.listdir(tmp_path) == ["checkpoint-7.npz"]
    checkpoint = checkpoints.load(path)
    assert (checkpoint.step, checkpoint.note) == (7, NOTE)
    assert_arrays_equal(checkpoint, ARRAYS)


def test_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints.save("", 7, ARRAYS)
    assert checkpoints.saved_steps("") == [7]
    assert checkpoints.newest("").step == 7


def test_a_file_that_a_writer_removes_while_it_is_looked_for_is_not_damaged(tmp_path, monkeypatch):
    checkpoints.save(tmp_path, 1, ARRAYS)
    load = checkpoints.load

    def load_late(path):
        monkeypatch.setattr(checkpoints, "load", load)
        checkpoints.save(tmp_path, 2, ARRAYS, keep=1)
        return load(path)

    monkeypatch.setattr(checkpoints, "load", load_late)
    assert checkpoints.newest(tmp_path).step == 2


def test_save_keeps_the_newest_and_removes_later_steps(tmp_path):
    for step in (0, 10, 9, 100):
        checkpoints.save(tmp_path, step, ARRAYS, keep=3)
    assert checkpoints.saved_steps(tmp_path) == [0, 9, 100]
    checkpoints.save(tmp_path, 120, ARRAYS, keep=1)
    assert checkpoints.saved_steps(tmp_path) == [120]


def test_save_leaves_other_files_alone(tmp_path):
    others = {"checkpoint-07.npz", "checkpoint--1.npz", "checkpoint-1.npz.tmp", "notes"}
    for name in others:
        (tmp_path / name).touch()
    checkpoints.save(tmp_path, 120, ARRAYS)
    checkpoints.save(tmp_path, 50, ARRAYS, keep=1)
    assert set(os.listdir(tmp_path)) == others | {"checkpoint-50.npz"}


def test_damaged_newer_files_raise_a_warning_and_the_previous_one_is_loaded(tmp_path):
    for step in (1, 2, 3):
        checkpoints.save(tmp_path, step, {"W": np.float32(step)}, keep=3)
    (tmp_path / "checkpoint-3.npz").write_bytes(b"")
    os.rename(tmp_path / "checkpoint-1.npz", tmp_path / "checkpoint-4.npz")
    with pytest.warns(UserWarning, match="; going back to step 2") as warned:
        checkpoint = checkpoints.newest(tmp_path)
    assert checkpoint.step == checkpoint.arrays["W"] == 2
    assert len(warned) == 2
    assert "checkpoint-4.npz: expected the step of the file name, got 1" in str(warned[0].message)
    assert "checkpoint-3.npz: expected more than" in str(warned[1].message)
    (tmp_path / "checkpoint-2.npz").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"checkpoint-4.npz: .*; .*checkpoint-2.npz: "):
        checkpoints.newest(tmp_path)


def test_newest_is_none_without_checkpoints(tmp_path):
    assert checkpoints.newest(tmp_path) is None
    assert checkpoints.newest(tmp_path / "missing") is None


def test_errors_name_the_missing_file_or_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"checkpoint-3.npz: expected a file, got none"):
        checkpoints.load(tmp_path / "checkpoint-3.npz")
    with pytest.raises(CheckpointError, match=r"checkpoint-1.npz: cannot be written: .*No such"):
        checkpoints.save(tmp_path / "missing", 1, ARRAYS)


@pytest.mark.parametrize(
    ("step", "keywords", "message"),
    [
        (-1, {}, "step: expected an integer of at least 0, .*got -1"),
        (1.5, {}, "step: expected an integer of at least 0, .*got 1.5"),
        (True, {}, "step: expected an integer of at least 0, .*got True"),
        (10**18, {}, r"step: expected an integer of at least 0, below 10\*\*18"),
        ("5", {}, "step: expected an integer .*got '5'"),
        (0, {"keep": 0}, "keep: expected an integer of at least 1, got 0"),
        (0, {"note": "x" * 2**20}, "note: expected at most 1048576 bytes"),
    ],
)
def test_save_with_an_invalid_argument_writes_nothing(step, keywords, message, tmp_path):
    with pytest.raises(ValueError, match="^" + message):
        checkpoints.save(tmp_path, step, ARRAYS, **keywords)
    assert os.listdir(tmp_path) == []


def test_an_old_checkpoint_that_cannot_be_removed_is_named_and_the_new_one_is_there(tmp_path):
    (tmp_path / "checkpoint-1.npz").mkdir()
    with pytest.raises(CheckpointError, match=r"checkpoint-5.npz: complete, .* '.*checkpoint-1"):
        checkpoints.save(tmp_path, 5, ARRAYS, keep=1)
    assert checkpoints.load(tmp_path / "checkpoint-5.npz").arrays.keys() == ARRAYS.keys()


def damage(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Flips 1 to 8 bits, truncates, inserts, deletes, or splices in a part of another file."""
    kind = draw.randrange(5)
    at, length = draw.randrange(len(data)), draw.randrange(1, 200)
    if kind == 0:
        flipped = bytearray(data)
        for _ in range(draw.randrange(1, 9)):
            flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        return bytes(flipped)
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + draw.randbytes(length) + data[at:]
    if kind == 3:
        return data[:at] + data[at + length :]
    return data[:at] + other[at : at + length] + data[at + length :]


def test_random_damage_is_always_detected(tmp_path):
    draw = random.Random(0)
    checkpoints.save(tmp_path, 1, {"W": np.zeros(99)})
    arrays = {name: np.array(array) for name, array in ARRAYS.items()} | {"W": np.ones(99)}
    path = checkpoints.save(tmp_path, 2, arrays, note={"seed": 0})
    data, count = path.read_bytes(), 0
    other = data.replace(np.ones(3).tobytes(), np.zeros(3).tobytes())
    for _ in range(5000 if THOROUGH else 300):
        damaged = damage(data, other, draw)
        if damaged == data:
            continue
        count += 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            checkpoints.load(path)
        with pytest.warns(UserWarning, match="going back to step 1"):
            assert checkpoints.newest(tmp_path).step == 1
    assert count > 250
    path.write_bytes(data)
    assert_arrays_equal(checkpoints.newest(tmp_path), arrays)


def test_two_checkpoints_are_kept_by_default(tmp_path):
    for step in range(4):
        checkpoints.save(tmp_path, step, {})
    assert checkpoints.saved_steps(tmp_path) == [2, 3]


def test_an_interrupted_save_leaves_no_file(tmp_path, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(tmp_path, 1, {"W": np.zeros(2)})
    assert os.listdir(tmp_path) == []
