"""Checkpoints: whole or not there, and never believed when they are not what was written.

`JAXRNN_THOROUGH=1` damages 5,000 files instead of 300.
"""

import errno
import hashlib
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

from jaxrnn import CheckpointError, checkpoints

THOROUGH = os.environ.get("JAXRNN_THOROUGH") == "1"
ARRAYS = {
    "W": np.arange(6, dtype=np.float32).reshape(2, 3),
    "scalar": np.float64(0.1),
    "empty": np.zeros((3, 0), np.int32),
    "flags": np.array([True, False]),
    "transposed": np.arange(6, dtype=np.int64).reshape(2, 3).T,
    "big_endian": np.arange(3, dtype=">f4"),
    "half": np.float16([1, 2]),
    "complex": np.complex64([1j]),
}


def same(found, arrays):
    assert list(found.arrays) == list(arrays)
    for name, array in arrays.items():
        assert found.arrays[name].dtype == np.asarray(array).dtype.newbyteorder("<")
        assert found.arrays[name].shape == np.shape(array)
        np.testing.assert_array_equal(found.arrays[name], array)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    note = {"seed": 0, "rows": [1.5, None, "x"]}
    path = checkpoints.save(tmp_path, np.int64(7), ARRAYS, note)
    found = checkpoints.load(path)
    assert found.step == 7
    assert found.note == note
    same(found, ARRAYS)
    assert os.listdir(tmp_path) == ["checkpoint-7.npz"]


def test_numpy_reads_the_file_without_pickle(tmp_path):
    path = checkpoints.save(tmp_path, 7, ARRAYS)
    with np.load(path, allow_pickle=False) as file:
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(file[name], array)


def test_the_same_state_is_the_same_bytes(tmp_path):
    first = checkpoints.save(tmp_path, 7, ARRAYS).read_bytes()
    assert checkpoints.save(tmp_path, 7, ARRAYS).read_bytes() == first


def test_the_newest_are_kept_and_what_a_run_went_back_from_is_not(tmp_path):
    for step in (0, 10, 9, 100):
        checkpoints.save(tmp_path, step, ARRAYS, keep=3)
    assert checkpoints.steps(tmp_path) == [0, 9, 100]
    checkpoints.save(tmp_path, 120, ARRAYS, keep=1)
    assert checkpoints.steps(tmp_path) == [120]
    for name in ("checkpoint-07.npz", "checkpoint--1.npz", "checkpoint-1.npz.tmp", "notes"):
        (tmp_path / name).touch()
    checkpoints.save(tmp_path, 50, ARRAYS, keep=1)
    assert checkpoints.steps(tmp_path) == [50]
    assert len(os.listdir(tmp_path)) == 5


def test_a_damaged_newest_file_is_said_and_the_one_before_it_used(tmp_path):
    for step in (1, 2, 3):
        checkpoints.save(tmp_path, step, {"W": np.float32(step)}, keep=3)
    (tmp_path / "checkpoint-3.npz").write_bytes(b"")
    os.rename(tmp_path / "checkpoint-1.npz", tmp_path / "checkpoint-4.npz")
    with pytest.warns(UserWarning, match="; going back to step 2") as said:
        found = checkpoints.newest(tmp_path)
    assert found.step == found.arrays["W"] == 2
    assert len(said) == 2
    assert "expected the file of that step, got 1" in str(said[0].message)
    assert "checkpoint-3.npz: expected more than" in str(said[1].message)
    (tmp_path / "checkpoint-2.npz").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"checkpoint-4.npz: .*; .*checkpoint-2.npz: "):
        checkpoints.newest(tmp_path)


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoints.newest(tmp_path) is None
    assert checkpoints.newest(tmp_path / "nowhere") is None
    with pytest.raises(CheckpointError, match=r"checkpoint-3.npz: expected a file, got none"):
        checkpoints.load(tmp_path / "checkpoint-3.npz")


@pytest.mark.parametrize(
    ("step", "arrays", "keywords", "exception", "message"),
    [
        (-1, {}, {}, ValueError, "step: expected an integer of at least 0, got -1"),
        (1.5, {}, {}, ValueError, "step: expected an integer of at least 0, got 1.5"),
        (True, {}, {}, ValueError, "step: expected an integer of at least 0, got True"),
        (10**18, {}, {}, ValueError, "step: expected an integer"),
        (0, {}, {"keep": 0}, ValueError, "keep: expected at least 1, got 0"),
        (0, {"../W": 1}, {}, ValueError, r"arrays: expected names .*, got '../W'"),
        (0, {"": 1}, {}, ValueError, r"arrays: expected names .*, got ''"),
        (0, {"W": [None]}, {}, TypeError, "arrays: expected numbers or bool in W, got object"),
        (0, {"W": "text"}, {}, TypeError, "arrays: expected numbers or bool in W, got <U4"),
        (0, {}, {"note": "x" * 2**20}, ValueError, "note: expected at most 1048576 bytes with"),
        (0, {}, {"note": {1j}}, TypeError, "Object of type set is not JSON serializable"),
    ],
)
def test_what_no_checkpoint_can_hold_is_refused(
    step, arrays, keywords, exception, message, tmp_path
):
    with pytest.raises(exception, match="^" + message):
        checkpoints.save(tmp_path, step, arrays, **keywords)
    assert os.listdir(tmp_path) == []


def test_what_is_saved_can_be_loaded_however_large(tmp_path, monkeypatch):
    """Thousands of arrays; and zip64, which takes over from 2 GB on, here from 100 bytes on."""
    many = {f"{i}": np.int8(i % 100) for i in range(9000)}
    same(checkpoints.load(checkpoints.save(tmp_path, 1, many)), many)
    with pytest.raises(ValueError, match=r"^note: expected at most 1048576 bytes with"):
        checkpoints.save(tmp_path, 1, {f"{i}": np.int8(0) for i in range(12_000)})
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    path = checkpoints.save(tmp_path, 2, ARRAYS)
    assert b"PK\x06\x06" in path.read_bytes()
    same(checkpoints.load(path), ARRAYS)


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(CheckpointError, match=r"checkpoint-1.npz: expected to write it, got: "):
        checkpoints.save(tmp_path / "nowhere", 1, ARRAYS)


def test_reading_and_writing_need_only_numpy(tmp_path):
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('c', {checkpoints.__file__!r})\n"
        "c = importlib.util.module_from_spec(spec); sys.modules['c'] = c\n"
        "spec.loader.exec_module(c)\n"
        f"c.save({str(tmp_path)!r}, 3, {{'W': 1.5}})\n"
        f"assert c.newest({str(tmp_path)!r}).arrays['W'] == 1.5\n"
        "names = {name.split('.')[0] for name in sys.modules} - sys.stdlib_module_names\n"
        "print(sorted(names & {'numpy', 'jax', 'jaxlib', 'optax', 'ml_dtypes', 'jaxrnn'}))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "['numpy']", done.stdout + done.stderr


# Damage: what a disk, a copy or a crash makes of a file.


def damaged(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """A flip of 1 to 8 bits, a truncation, an insertion, or a splice of two checkpoints."""
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


def test_damage_is_always_seen_and_the_run_falls_back(tmp_path):
    draw = random.Random(0)
    checkpoints.save(tmp_path, 1, {"W": np.zeros(99)})
    newer = {name: np.array(value) for name, value in ARRAYS.items()} | {"W": np.ones(99)}
    path = checkpoints.save(tmp_path, 2, newer, note={"seed": 0})
    data, count = path.read_bytes(), 0
    other = data.replace(np.ones(3).tobytes(), np.zeros(3).tobytes())
    for _ in range(5000 if THOROUGH else 300):
        changed = damaged(data, other, draw)
        if changed == data:
            continue
        count += 1
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            checkpoints.load(path)
        with pytest.warns(UserWarning, match="going back to step 1"):
            assert checkpoints.newest(tmp_path).step == 1
    assert count > 250
    path.write_bytes(data)
    same(checkpoints.newest(tmp_path), newer)


# Hostility: files with a right checksum, made to harm whoever reads them.

LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
DATA = np.arange(3, dtype="<f4")
INDEX = {"format": 1, "step": 1, "note": None, "arrays": {"W": ["<f4", [3]]}}


def npy(array, **header) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape} | header
    )
    return file.getvalue() + array.tobytes()


def sealed(zipped: bytes) -> bytes:
    """The checksum that a checkpoint ends with, made right."""
    return zipped[:-64] + hashlib.sha256(zipped[:-64]).hexdigest().encode()


def forged(
    index=INDEX, *, name="W", W=None, more=(), first=(), method=zipfile.ZIP_STORED, attr=0o600 << 16
):
    """A checkpoint of step 1 as `save` writes it, but for what is given."""
    index = index if isinstance(index, bytes) else json.dumps(index).encode()
    W = checkpoints._npy_header("<f4", (3,)) + DATA.tobytes() if W is None else W
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.comment = b"sha256:" + bytes(64)
        for member, data in [*first, ("checkpoint.json", index), (f"{name}.npy", W), *more]:
            info = zipfile.ZipInfo(member)
            is_W = data is W
            info.external_attr = attr if is_W else 0o600 << 16
            archive.writestr(info, data, method if is_W else zipfile.ZIP_STORED)
    return sealed(file.getvalue())


def with_index(**changes):
    return forged({**INDEX, **changes})


def with_array(dtype="<f4", shape=(3,), name="W"):
    return forged({**INDEX, "arrays": {name: [dtype, shape]}}, name=name)


def patched(signature: bytes, offset: int, layout: str, value: int) -> bytes:
    """A number in every zip record that begins with the signature replaced."""
    data = bytearray(forged())
    at = data.find(signature)
    while at >= 0:
        struct.pack_into(layout, data, at + offset, value)
        at = data.find(signature, at + 4)
    return sealed(bytes(data))


def crowded(count: int) -> bytes:
    """A directory that names its first member over and over: 50 bytes on disk, 700 in memory."""
    data = forged()
    start, end = data.find(CENTRAL), data.find(END)
    first = data[start : data.find(CENTRAL, start + 4)]
    data = bytearray(data[:start] + count * first + data[end:])
    struct.pack_into("<L", data, data.find(END) + 12, count * len(first))
    return sealed(bytes(data))


class Bomb:
    """Unpickled, it would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


PICKLE = pickle.dumps(Bomb())
DEEP = b"[" * 100_000

HOSTILE = {
    "empty": b"",
    "one byte": b"P",
    "only a comment": sealed(b"sha256:" + bytes(64)),
    "zeros": sealed(bytes(10_000)),
    "text": sealed(b"checkpoint" * 100),
    "a pickle": PICKLE,
    "a pickle, sealed": sealed(PICKLE + bytes(200)),
    "pickle as array": forged(W=PICKLE),
    "object array": forged(W=npy(DATA, descr="|O")[:-12] + PICKLE),
    "object dtype": with_array(dtype="|O"),
    "pickle as member": forged(more=[("data.pkl", PICKLE)]),
    "pickle before": forged(first=[("data.pkl", PICKLE)]),
    "void dtype": with_array(dtype="|V1000000000"),
    "text dtype": with_array(dtype="<U1000000000"),
    "record dtype": with_array(dtype="f4,f4"),
    "dtype of number": with_array(dtype=4),
    "dtype of list": with_array(dtype=["<f4"]),
    "dtype None": with_array(dtype=None),
    "terabytes": with_array(shape=[1 << 40]),
    "overflowing": with_array(shape=[1 << 62, 1 << 62]),
    "overflowing to nothing": forged(
        {**INDEX, "arrays": {"W": ["<f4", [0, 10**30]]}},
        W=checkpoints._npy_header("<f4", (0, 10**30)),
    ),
    "negative shape": with_array(shape=[-3]),
    "two negatives": with_array(shape=[-3, -1]),
    "shape of floats": with_array(shape=[3.0]),
    "shape of bool": with_array(shape=[True, 3]),
    "shape of text": with_array(shape="3"),
    "shape None": with_array(shape=None),
    "a thousand axes": with_array(shape=[1] * 1000),
    "header of terabytes": forged(W=npy(DATA, shape=(1 << 40,))),
    "header of another shape": forged(W=npy(DATA, shape=(1, 3))),
    "header of another dtype": forged(W=npy(DATA.view("<i4"))),
    "header in columns": forged(W=npy(DATA, fortran_order=True)),
    "header of 4 GB": forged(W=b"\x93NUMPY\x03\x00\xff\xff\xff\xff" + bytes(130)),
    "header with code": forged(W=b"\x93NUMPY\x01\x00v\x00" + b"__import__('os').mkdir('exploded')"),
    "array too short": forged(W=npy(DATA)[:-1]),
    "array too long": forged(W=npy(DATA) + b"\0"),
    "up and out": with_array(name="../../exploded"),
    "absolute": with_array(name="/tmp/exploded"),
    "backslash": with_array(name="..\\exploded"),
    "folder": with_array(name="a/b"),
    "no name": with_array(name=""),
    "control character": with_array(name="a\x1b[2J"),
    "300 letters": with_array(name="a" * 300),
    "a member up and out": forged(more=[("../exploded", b"x")]),
    "a member that is absolute": forged(first=[("/tmp/exploded", b"x")]),
    "a symlink": forged(attr=0o120777 << 16, W=b"/etc/passwd"),
    "a folder as array": forged(attr=0o040755 << 16),
    "zip bomb": forged(W=npy(np.zeros(10_000_000)), method=zipfile.ZIP_DEFLATED),
    "bzip2 bomb": forged(W=npy(np.zeros(3_000_000)), method=zipfile.ZIP_BZIP2),
    "lzma bomb": forged(W=npy(np.zeros(3_000_000)), method=zipfile.ZIP_LZMA),
    "encrypted": patched(CENTRAL, 8, "<H", 1),
    "compressed by name": patched(CENTRAL, 10, "<H", 8),
    "member of 4 GB": patched(CENTRAL, 24, "<L", 0xFFFFFFF0),
    "both sizes 4 GB": patched(CENTRAL, 20, "<Q", 0xFFFFFFF0_FFFFFFF0),
    "members overlap": patched(CENTRAL, 42, "<L", 0),
    "members far away": patched(CENTRAL, 42, "<L", 0x7FFFFFFF),
    "other local name": patched(LOCAL, 30, "<B", 0),
    "other checksum": patched(CENTRAL, 16, "<L", 0),
    "directory of 4 GB": patched(END, 12, "<L", 0xFFFFFFF0),
    "directory far away": patched(END, 16, "<L", 0x7FFFFFFF),
    "no directory": patched(END, 0, "<L", 0),
    "20,000 members": forged(more=[(f"{i}.npy", b"") for i in range(20_000)]),
    "a crowded directory": crowded(300_000),
    "a member more": forged(more=[("b.npy", npy(DATA))]),
    "a member twice": pytest.param,
    "index missing": forged({}),
    "index of list": forged([]),
    "index of number": forged(b"1"),
    "index of nothing": forged(b""),
    "index not UTF-8": forged(b"\xff\xfe\x00"),
    "index deep": forged(DEEP),
    "index of 2 MB": forged(b" " * (1 << 21)),
    "index of lists": forged(b'{"format": 1, "note": [' + b"[]," * 349_000 + b"1]}"),
    "number of 10,000 digits": forged(b'{"format": 1, "step": ' + b"9" * 10_000 + b"}"),
    "another format": with_index(format=2),
    "step of another": with_index(step=2),
    "step of text": with_index(step="1/../../exploded"),
    "step None": with_index(step=None),
    "arrays of list": with_index(arrays=["W"]),
    "arrays None": with_index(arrays=None),
    "array of one": with_index(arrays={"W": ["<f4"]}),
    "array of another name": with_index(arrays={"V": ["<f4", [3]]}),
}
with pytest.warns(UserWarning, match="Duplicate name"):
    HOSTILE["a member twice"] = forged(more=[("W.npy", npy(DATA))])

WATCHED, EVENTS = [False], []
HARM = (
    "exec",
    "compile",
    "import",
    "pickle.",
    "os.",
    "subprocess.",
    "shutil.",
    "socket.",
    "ctypes",
)
HARMLESS = {"os.listdir", "os.fspath"}


def watch(event, arguments):
    if not WATCHED[0]:
        return
    if event == "open":
        writes = arguments[1] is not None and set(str(arguments[1])) & set("wax+")
        if not writes:
            return
    elif not event.startswith(HARM) or event in HARMLESS:
        return
    EVENTS.append((event, str(arguments)))


sys.addaudithook(watch)


def test_the_forger_can_forge(tmp_path):
    path = tmp_path / "checkpoint-1.npz"
    path.write_bytes(forged())
    same(checkpoints.load(path), {"W": DATA})


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: name.replace(" ", "-"))
def test_a_hostile_file_does_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint-1.npz"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(CheckpointError):  # what is imported late is imported now
        checkpoints.load(path)
    EVENTS.clear()
    tracemalloc.start()
    WATCHED[0] = True
    try:
        checkpoints.load(path)
        refused = False
    except CheckpointError as error:
        refused = str(error).startswith(f"{path}: ")
    finally:
        WATCHED[0] = False
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert refused
    assert EVENTS == []
    assert peak < 2 * len(HOSTILE[name]) + 64e6
    assert os.listdir(tmp_path) == ["checkpoint-1.npz"]


def test_what_is_no_file_is_not_opened(tmp_path):
    path = tmp_path / "checkpoint-1.npz"
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="expected a file"):
        checkpoints.newest(tmp_path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="expected a file"):
        checkpoints.newest(tmp_path)


def test_a_planted_link_is_not_written_through(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    outside = tmp_path / "outside"
    outside.write_text("precious")
    (folder / "checkpoint.tmp").symlink_to(outside)
    (folder / "checkpoint-1.npz").symlink_to(outside)
    checkpoints.save(folder, 1, ARRAYS)
    assert outside.read_text() == "precious"
    same(checkpoints.newest(folder), ARRAYS)


# Faults: every call to the system that a save makes, failing.


class FaultyFile(io.FileIO):
    """An unbuffered file that takes 100 bytes at a time, each time a call that may fail."""

    def __init__(self, path, mode, call):
        super().__init__(path, mode)
        self.call = call

    def write(self, data):
        return self.call("write", super().write, memoryview(data)[:100])


def with_calls(monkeypatch, call):
    """Sends what checkpoints.save asks of the system through call(name, function, *arguments)."""

    def opened(path, mode):
        return io.BufferedWriter(call("open", FaultyFile, path, mode.replace("b", ""), call))

    names = ["open", "fsync", "close", "replace", "unlink", "listdir"]
    faulty = {name: (lambda *a, n=name: call(n, getattr(os, n), *a)) for name in names}
    monkeypatch.setattr(checkpoints, "os", SimpleNamespace(**faulty, O_RDONLY=os.O_RDONLY))
    monkeypatch.setattr(checkpoints, "open", opened, raising=False)


OLD, NEW = {"W": np.zeros(50)}, {"W": np.ones(50), "b": np.ones(())}


def calls_of_a_save(folder) -> list[str]:
    calls = []

    def call(name, function, *arguments):
        calls.append(name)
        return function(*arguments)

    with pytest.MonkeyPatch.context() as monkeypatch:
        with_calls(monkeypatch, call)
        checkpoints.save(folder, 2, NEW, keep=1)
    return calls


def test_the_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_old_goes(tmp_path):
    checkpoints.save(tmp_path, 1, OLD)
    calls = calls_of_a_save(tmp_path)
    order = [name for name in calls if name in ("fsync", "replace", "unlink")]
    assert order == ["unlink", "fsync", "replace", "fsync", "unlink"]
    last_write = max(i for i, name in enumerate(calls) if name == "write")
    assert last_write < calls.index("fsync")


def failing(at: int, error: int):
    """The call of number `at`, and every write after it, fails: a full or dying disk."""
    count = iter(range(10**6))

    def call(name, function, *arguments):
        number = next(count)
        if number == at or (number > at and name == "write"):
            if name == "write" and error == 0:  # a short write, which is no error yet
                return function(arguments[0][: max(1, len(arguments[0]) // 2)])
            if name == "close":
                function(*arguments)
            raise OSError(error or errno.EIO, os.strerror(error or errno.EIO))
        return function(*arguments)

    return call


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, 0], ids=["ENOSPC", "EIO", "short"])
def test_after_a_fault_there_is_the_old_or_the_new(error, tmp_path):
    checkpoints.save(tmp_path, 1, OLD)
    calls = calls_of_a_save(tmp_path)
    assert calls.count("write") > 10
    for at in range(len(calls)):
        for path in tmp_path.iterdir():
            path.unlink()
        checkpoints.save(tmp_path, 1, OLD)
        raised = False
        with pytest.MonkeyPatch.context() as monkeypatch:
            with_calls(monkeypatch, failing(at, error))
            try:
                checkpoints.save(tmp_path, 2, NEW, keep=1)
            except CheckpointError:
                raised = True
        found = checkpoints.newest(tmp_path)
        same(found, NEW if found.step == 2 else OLD)
        assert found.step == 2 or raised
        assert raised or (error == 0 and calls[at] == "write")
        checkpoints.save(tmp_path, 3, NEW)


def crashing(at: int, moment: str):
    """The process ends at once before, in the middle of, or after the call of number `at`."""
    count = iter(range(10**6))

    def call(name, function, *arguments):
        if next(count) != at:
            return function(*arguments)
        if moment == "half" and name == "write":
            function(arguments[0][: len(arguments[0]) // 2])
        try:
            if moment == "after":
                function(*arguments)
        finally:
            os._exit(9)

    return call


# The child never touches JAX, nor anything else that holds a lock.
@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning", "ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_after_a_crash_there_is_the_old_or_the_new(moment, tmp_path):
    checkpoints.save(tmp_path, 1, OLD)
    calls = calls_of_a_save(tmp_path)
    for at in range(len(calls)):
        for path in tmp_path.iterdir():
            path.unlink()
        checkpoints.save(tmp_path, 1, OLD)
        child = os.fork()
        if child == 0:
            try:
                with_calls(pytest.MonkeyPatch(), crashing(at, moment))
                checkpoints.save(tmp_path, 2, NEW, keep=1)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        found = checkpoints.newest(tmp_path)
        same(found, NEW if found.step == 2 else OLD)
        checkpoints.save(tmp_path, 3, NEW, keep=1)
        assert os.listdir(tmp_path) == ["checkpoint-3.npz"]
