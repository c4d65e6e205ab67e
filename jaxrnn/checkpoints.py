"""Checkpoints: named arrays in a file that is whole, or not there, or seen to be damaged.

`checkpoint-<step>.npz` is a zip of .npy members that `numpy.load` reads too:

    checkpoint.json    {"format": 1, "step": ..., "note": ..., "arrays": {name: [dtype, shape]}}
    <name>.npy         one for each array, in that order, not compressed
    comment            sha256:<the SHA-256, in hexadecimal, of every byte of the file before it>

A reader knows from the JSON what each byte of a header has to be, so it compares headers and never
interprets them. The standard library and NumPy are all that is needed to read one.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

INDEX = "checkpoint.json"
INDEX_LIMIT = 1 << 20
"""Bytes that the JSON, and the zip's directory, may take: both are read before they are trusted."""
COMMENT = b"sha256:"
DIGEST_SIZE = 64
DIRECTORY_END = struct.Struct("<4s4H2LH")
"""The record that ends a zip, before its comment; [5] is the size of the directory."""
DTYPE = re.compile(r"\|[biu]1|<[iuf][248]|<c(8|16)")
NAME = re.compile(r"[!-.0-\[\]-~]{1,200}")  # printable ASCII without blank, / and \
FILE_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})\.npz")


class CheckpointError(Exception):
    """A checkpoint that could not be written, or one that must not be used."""


class Checkpoint(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      step: the number in its file's name.
      arrays: by name; they are read-only.
      note: plain data, as JSON holds it.
    """

    step: int
    arrays: dict[str, np.ndarray]
    note: Any


def saved_steps(folder: str | os.PathLike) -> list[int]:
    """The steps that the folder holds a checkpoint of, ascending; [] where there is no folder.

    >>> saved_steps("no such folder")
    []
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        names = map(FILE_NAME.fullmatch, os.listdir(folder))
        return sorted(int(name[1]) for name in names if name)
    return []


def checkpoint_path(folder: str | os.PathLike, step: int) -> Path:
    """Where the checkpoint of that step is, or would be.

    >>> checkpoint_path("run", 20).name
    'checkpoint-20.npz'
    """
    return Path(folder) / f"checkpoint-{step}.npz"


def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The bytes before an array's own in a .npy file, version 1.0."""
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    text += " " * (-(10 + len(text) + 1) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode("ascii")


def _digest(file: BinaryIO, size: int) -> bytes:
    """The SHA-256 of the file's first `size` bytes, in hexadecimal."""
    sha256 = hashlib.sha256()
    file.seek(0)
    while size > 0 and (chunk := file.read(min(size, 1 << 20))):
        sha256.update(chunk)
        size -= len(chunk)
    return sha256.hexdigest().encode("ascii")


def _packed(index: bytes, arrays: dict[str, np.ndarray]) -> memoryview:
    """The file's bytes. In memory: zipfile would go on in another way if a disk failed it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.comment = COMMENT + bytes(DIGEST_SIZE)
        archive.writestr(zipfile.ZipInfo(INDEX), index)
        for name, array in arrays.items():
            header = _npy_header(array.dtype.str, array.shape)
            info = zipfile.ZipInfo(name + ".npy")
            info.file_size = len(header) + array.nbytes  # so that zip64 is used where it must be
            with archive.open(info, "w") as member:
                member.write(header)
                member.write(array.reshape(-1).data)
    data = file.getbuffer()
    data[-DIGEST_SIZE:] = hashlib.sha256(data[:-DIGEST_SIZE]).hexdigest().encode("ascii")
    return data


def _checked(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays as the file holds them: little-endian, row by row."""
    checked = {}
    for name, array in arrays.items():
        if not NAME.fullmatch(name):
            raise ValueError(f"arrays: expected names of 1 to 200 letters or signs, got {name!r}")
        array = np.asarray(array)
        array = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
        if not DTYPE.fullmatch(array.dtype.str):
            raise TypeError(f"arrays: expected numbers or bool in {name}, got {array.dtype}")
        checked[name] = array
    return checked


def save(
    folder: str | os.PathLike, step: int, arrays: Mapping[str, Any], note=None, *, keep: int = 2
) -> Path:
    """Writes `checkpoint-<step>.npz`, and removes those that it makes superfluous.

    When it returns, the file is whole and on the disk. If it raises, or the machine stops, there is
    what was there before, or the new file, whole. One process at a time may save to a folder; its
    system must be able to sync a folder (POSIX).

    Args:
      folder: where; it must exist.
      step: at least 0. Checkpoints of later steps are removed: a run that went back to `step` will
        write them anew.
      arrays: numbers or bool, by name.
      note: plain data for JSON, at most 1 MiB with the names of the arrays.
      keep: how many of the newest checkpoints stay, this one included.

    Returns:
      The file's path.

    Raises:
      CheckpointError: it could not be written.
      TypeError, ValueError: arguments that no checkpoint can hold.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> save(folder, 20, {"W": np.eye(2)}, note={"seed": 0}).name
    'checkpoint-20.npz'
    >>> newest(folder).arrays["W"].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    path = checkpoint_path(folder, step)
    if not FILE_NAME.fullmatch(path.name):
        raise ValueError(f"step: expected an integer of at least 0, got {step!r}")
    if keep < 1:
        raise ValueError(f"keep: expected at least 1, got {keep}")
    arrays = _checked(arrays)
    described = {name: [array.dtype.str, array.shape] for name, array in arrays.items()}
    index = json.dumps({"format": 1, "step": int(step), "note": note, "arrays": described}).encode()
    size = len(index) + sum(80 + len(name) for name in arrays)  # with the zip's own directory
    if size > INDEX_LIMIT:
        raise ValueError(f"note: expected at most {INDEX_LIMIT} bytes with all names, got {size}")

    data = _packed(index, arrays)

    temporary = Path(folder) / "checkpoint.tmp"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)  # of a process that was killed
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _sync_folder(folder)
        kept = [other for other in saved_steps(folder) if other <= step][-keep:]
        for other in saved_steps(folder):
            if other not in kept:
                os.unlink(checkpoint_path(folder, other))
    except OSError as error:
        raise CheckpointError(f"{path}: expected to write it, got: {error}") from error
    return path


def _sync_folder(folder) -> None:
    """A file's name is on the disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _expect(condition: object, what: str, got) -> None:
    if not condition:
        raise CheckpointError(f"expected {what}, got {got}")


def _check_members(archive: zipfile.ZipFile, size: int) -> None:
    """What a zip may say of its members and `save` never does."""
    members = archive.infolist()
    for info in members:
        plain = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        _expect(plain, f"{info.filename!r} not compressed", f"method {info.compress_type}")
        regular = info.flag_bits == 0 and info.external_attr == 0o600 << 16
        _expect(regular, f"{info.filename!r} to be a plain file", f"{info.external_attr:#x}")
    total = sum(info.file_size for info in members)
    _expect(total <= size, f"members of at most {size} bytes", total)


def _read_array(archive: zipfile.ZipFile, name: str, dtype: str, shape: list[int]) -> np.ndarray:
    _expect(DTYPE.fullmatch(dtype), f"a dtype of numbers or bool for {name}", repr(dtype))
    proper = all(type(length) is int and length >= 0 for length in shape)
    _expect(proper, f"the shape of {name} to be lengths", shape)
    header = _npy_header(dtype, tuple(shape))
    data = archive.read(name + ".npy")
    _expect(data.startswith(header), f"{name} to begin as {dtype} {shape}", data[: len(header)])
    return np.frombuffer(data, dtype, offset=len(header)).reshape(shape)


def _read(file: BinaryIO) -> Checkpoint:
    end = DIRECTORY_END.size + len(COMMENT) + DIGEST_SIZE
    size = file.seek(0, os.SEEK_END)
    _expect(size > end, f"more than {end} bytes", size)
    digest = _digest(file, size - DIGEST_SIZE)
    file.seek(-end, os.SEEK_END)
    trailer = file.read(end)
    ending = trailer[-DIGEST_SIZE:]
    _expect(ending == digest, f"the file to end with its SHA-256 {digest!r}", ending)
    directory_size = DIRECTORY_END.unpack_from(trailer)[5]
    _expect(directory_size <= INDEX_LIMIT, f"a directory of {INDEX_LIMIT} bytes", directory_size)

    with zipfile.ZipFile(file) as archive:
        _check_members(archive, size)
        index_size = archive.getinfo(INDEX).file_size
        _expect(index_size <= INDEX_LIMIT, f"{INDEX} of {INDEX_LIMIT} bytes", index_size)
        index = json.loads(archive.read(INDEX))
        _expect(index["format"] == 1, "format 1", repr(index["format"]))
        described = index["arrays"]
        expected = [INDEX, *(name + ".npy" for name in described)]
        _expect(archive.namelist() == expected, f"members {expected}", archive.namelist())
        _expect(all(map(NAME.fullmatch, described)), "plain names", list(described))
        arrays = {name: _read_array(archive, name, *described[name]) for name in described}
    return Checkpoint(index["step"], arrays, index["note"])


def load(path: str | os.PathLike) -> Checkpoint:
    """Reads one checkpoint, and nothing but one that `save` wrote, unchanged since.

    No memory is taken, beyond the file's own size, before it is known to be needed, and nothing in
    the file is ever executed or written anywhere.

    Args:
      path: of the file.

    Returns:
      Checkpoint.

    Raises:
      CheckpointError: a file that is missing, damaged, forged or of another step than it is named.
    """
    path = Path(path)
    try:
        _expect(path.is_file(), "a file", "none")
        with open(path, "rb") as file:
            found = _read(file)
        _expect(
            path.name == checkpoint_path("", found.step).name, "the file of that step", found.step
        )
        return found
    # NumPy, zipfile and json raise a dozen kinds of exception at what they cannot read.
    except Exception as error:
        raise CheckpointError(f"{path}: {str(error) or type(error).__name__}") from error


def newest(folder: str | os.PathLike) -> Checkpoint | None:
    """The newest checkpoint that can be used; each newer one that cannot is warned of.

    Args:
      folder: what `save` was given.

    Returns:
      Checkpoint, or None where the folder holds none.

    Raises:
      CheckpointError: there are checkpoints, and all are damaged.
    """
    damaged = []
    for step in reversed(saved_steps(folder)):
        try:
            found = load(checkpoint_path(folder, step))
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        for message in damaged:
            warnings.warn(f"{message}; going back to step {step}", stacklevel=2)
        return found
    if damaged:
        raise CheckpointError("; ".join(damaged))
    return None
