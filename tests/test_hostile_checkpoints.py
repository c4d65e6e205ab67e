"""Hostile checkpoints are rejected without executing them or allocating what they declare."""

import contextlib
import os
import re
import sys
import tracemalloc
from typing import ClassVar

import pytest

from jaxrnn import checkpoints
from jaxrnn.checkpoints import CheckpointError
from tests.hostile_files import DATA, HOSTILE, LARGE, forged, npy
from tests.test_checkpoint_format import ARRAYS, assert_arrays_equal

HARMFUL = ("exec", "compile", "import", "ctypes", "pickle", "os", "subprocess", "shutil", "socket")
HARMLESS = {"os.listdir", "os.fspath"}


class Auditor:
    """Records the harmful events that Python reports to its audit hook while it is active."""

    active = False
    events: ClassVar[list] = []

    @classmethod
    def hook(cls, event, arguments):
        if not cls.active:
            return
        if event == "open":
            harmful = arguments[1] is not None and set(str(arguments[1])) & set("wax+")
        else:
            harmful = event.split(".")[0] in HARMFUL and event not in HARMLESS
        if harmful:
            cls.events.append((event, str(arguments)))


sys.addaudithook(Auditor.hook)


def test_a_forged_file_without_a_change_loads(tmp_path):
    path = tmp_path / "checkpoint-1.npz"
    for data in (forged(), forged(W=npy(DATA))):
        path.write_bytes(data)
        assert_arrays_equal(checkpoints.load(path), {"W": DATA})


def test_the_auditor_records_harm(tmp_path):
    Auditor.events.clear()
    Auditor.active = True
    try:
        (tmp_path / "file").write_bytes(b"")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(tmp_path / "missing")
    finally:
        Auditor.active = False
    assert [event for event, _ in Auditor.events] == ["open", "os.remove"]


@pytest.mark.parametrize("name", [*HOSTILE, *LARGE], ids=lambda name: name.replace(" ", "-"))
def test_a_hostile_file_is_rejected_without_harm(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint-1.npz"
    data = HOSTILE[name] if name in HOSTILE else LARGE[name]()
    path.write_bytes(data)
    with pytest.raises(CheckpointError):  # a first call, so that lazy imports are done
        checkpoints.load(path)
    Auditor.events.clear()
    tracemalloc.start()
    Auditor.active = True
    try:
        with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: "):
            checkpoints.load(path)
    finally:
        Auditor.active = False
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert Auditor.events == []
    assert peak < 2 * len(data) + 64e6
    assert os.listdir(tmp_path) == ["checkpoint-1.npz"]


REASONS = {
    "one byte": "expected more than 93 bytes, got 1",
    "pickle with checksum": "File is not a zip file",
    "directory of 4 GB": "expected a directory of at most 1048576 bytes, got 4294967280",
    "deflated array": "expected 'W.npy' to be uncompressed, got method 8",
    "symbolic link": "expected 'W.npy' to be a regular file, got 0xa1ff0000",
    "both sizes 4 GB": r"expected members of at most \d+ bytes, got",
    "index of 2 MB": "expected checkpoint.json of at most 1048576 bytes, got 2097152",
    "another format": "expected format 1, got 2",
    "step as text": "expected an integer step, got '1'",
    "step of another file": "expected the step of the file name, got 2",
    "additional member": r"expected members \['checkpoint.json', 'W.npy'\], got \[.*'b.npy'\]",
    "name with a control character": r"expected valid names of arrays, got \['a\\x1b",
    "object dtype": "expected a dtype of numbers or bool for W, got '|O'",
    "negative length": r"expected lengths as the shape of W, got \[-3\]",
    "header of another shape": r"expected a header of <f4 \[3\] for W, got",
}


@pytest.mark.parametrize("name", REASONS, ids=lambda name: name.replace(" ", "-"))
def test_each_check_rejects_with_its_own_message(name, tmp_path):
    path = tmp_path / "checkpoint-1.npz"
    path.write_bytes(HOSTILE[name] if name in HOSTILE else LARGE[name]())
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: {REASONS[name]}"):
        checkpoints.load(path)


def test_load_opens_only_regular_files(tmp_path):
    path = tmp_path / "checkpoint-1.npz"
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="expected a file"):
        checkpoints.newest(tmp_path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="expected a file"):
        checkpoints.newest(tmp_path)


def test_save_does_not_write_through_symbolic_links(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    outside = tmp_path / "outside"
    outside.write_text("precious")
    (folder / "checkpoint.tmp").symlink_to(outside)
    (folder / "checkpoint-1.npz").symlink_to(outside)
    checkpoints.save(folder, 1, ARRAYS)
    assert outside.read_text() == "precious"
    assert_arrays_equal(checkpoints.newest(folder), ARRAYS)
