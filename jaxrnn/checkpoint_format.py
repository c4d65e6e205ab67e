"""The file format of a checkpoint: named arrays and a JSON note, with a checksum.

A checkpoint is an uncompressed zip of .npy members, which `numpy.load` reads too:

    checkpoint.json    {"format": 1, "step": ..., "note": ..., "arrays": {name: [dtype, shape]}}
    <name>.npy         one member per array, in the order of the JSON
    zip comment        sha256:<hexadecimal SHA-256 of all bytes of the file before the digest>

The JSON determines every byte of each .npy header. A reader therefore compares headers and never
parses them. The module needs only the standard library and NumPy.
"""

import hashlib
import io
import json
import os
import re
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

INDEX_NAME = "checkpoint.json"
INDEX_LIMIT = 1 << 20
"""Bytes that the JSON and the zip's directory may take: both are read before they are checked."""
COMMENT_PREFIX = b"sha256:"
DIGEST_SIZE = 64
END_RECORD = struct.Struct("<4s4H2LH")
"""The record at the end of a zip, before the comment; field 5 is the size of the directory."""
DTYPE = re.compile(r"\|[biu]1|<[iuf][248]|<c(8|16)")
ARRAY_NAME = re.compile(r"[!-.0-\[\]-~]{1,200}")  # printable ASCII without space, / and \


class CheckpointError(Exception):
    """A checkpoint cannot be written, or a file is not an intact checkpoint."""


class Checkpoint(NamedTuple):
    """A loaded checkpoint.

    Attributes:
      step: the step in the file name.
      arrays: name -> array, read-only.
      note: the JSON data given to `save`.
    """

    step: int
    arrays: dict[str, NDArray[Any]]
    note: Any


def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The header of a .npy file, version 1.0."""
    fields = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    fields += " " * (-(10 + len(fields) + 1) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(fields)) + fields.encode("ascii")


def _validate_arrays(arrays: Mapping[str, ArrayLike]) -> dict[str, NDArray[Any]]:
    """The arrays as the file stores them: little-endian, in C order."""
    valid = {}
    for name, leaf in arrays.items():
        if not ARRAY_NAME.fullmatch(name):
            raise ValueError(
                "arrays: expected names of 1 to 200 printable ASCII characters without space, / "
                f"and \\, got {name!r}"
            )
        array = np.asarray(leaf)
        array = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
        if not DTYPE.fullmatch(array.dtype.str):
            raise TypeError(f"arrays: expected numbers or bool in {name}, got {array.dtype}")
        valid[name] = array
    return valid


def _encode_index(step: int, arrays: dict[str, NDArray[Any]], note: Any) -> bytes:
    """The JSON that describes the file."""
    specs = {name: [array.dtype.str, array.shape] for name, array in arrays.items()}
    try:
        text = json.dumps({"format": 1, "step": int(step), "note": note, "arrays": specs})
    except (TypeError, ValueError) as error:
        raise TypeError(f"note: expected JSON data, got: {error}") from error
    index = text.encode()
    size = len(index) + sum(80 + len(name) for name in arrays)  # 80: an entry of the directory
    if size > INDEX_LIMIT:
        raise ValueError(
            f"note: expected at most {INDEX_LIMIT} bytes including the names of the arrays, "
            f"got {size}"
        )
    return index


def encode(step: int, arrays: Mapping[str, ArrayLike], note: Any = None) -> memoryview:
    """The bytes of a checkpoint file; the same arguments give the same bytes.

    Args:
      step: an integer of at least 0.
      arrays: name -> array of numbers or bool.
      note: JSON data, at most 1 MiB including the names of the arrays.

    Returns:
      The bytes.

    Raises:
      TypeError, ValueError: an argument that a checkpoint cannot store.

    >>> data = encode(20, {"W": np.eye(2)}, note={"seed": 0})
    >>> decode(io.BytesIO(data)).note
    {'seed': 0}
    """
    arrays = _validate_arrays(arrays)
    file = io.BytesIO()  # not on disk: zipfile goes on writing after a failed write
    with zipfile.ZipFile(file, "w") as archive:
        archive.comment = COMMENT_PREFIX + bytes(DIGEST_SIZE)
        archive.writestr(zipfile.ZipInfo(INDEX_NAME), _encode_index(step, arrays, note))
        for name, array in arrays.items():
            header = _npy_header(array.dtype.str, array.shape)
            info = zipfile.ZipInfo(name + ".npy")
            info.file_size = len(header) + array.nbytes  # zipfile chooses zip64 by this size
            with archive.open(info, "w") as member:
                member.write(header)
                member.write(array.reshape(-1).data)
    data = file.getbuffer()
    data[-DIGEST_SIZE:] = hashlib.sha256(data[:-DIGEST_SIZE]).hexdigest().encode("ascii")
    return data


def _require(condition: object, expected: str, got: object) -> None:
    if not condition:
        raise CheckpointError(f"expected {expected}, got {got}")


def _hash_start(file: BinaryIO, size: int) -> bytes:
    """The hexadecimal SHA-256 of the first `size` bytes of the file."""
    sha256 = hashlib.sha256()
    file.seek(0)
    while size > 0 and (chunk := file.read(min(size, 1 << 20))):
        sha256.update(chunk)
        size -= len(chunk)
    return sha256.hexdigest().encode("ascii")


def _check_trailer(file: BinaryIO) -> int:
    """Checks the checksum and the size of the zip's directory; returns the size of the file."""
    trailer_size = END_RECORD.size + len(COMMENT_PREFIX) + DIGEST_SIZE
    size = file.seek(0, os.SEEK_END)
    _require(size > trailer_size, f"more than {trailer_size} bytes", size)
    digest = _hash_start(file, size - DIGEST_SIZE)
    file.seek(-trailer_size, os.SEEK_END)
    trailer = file.read(trailer_size)
    stored = trailer[-DIGEST_SIZE:]
    _require(stored == digest, f"the SHA-256 {digest!r} at the end", stored)
    directory = END_RECORD.unpack_from(trailer)[5]
    _require(directory <= INDEX_LIMIT, f"a directory of at most {INDEX_LIMIT} bytes", directory)
    return size


def _check_members(archive: zipfile.ZipFile, size: int) -> None:
    """Rejects members that `encode` never writes: compressed, encrypted, links, or too large."""
    members = archive.infolist()
    for info in members:
        stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        _require(stored, f"{info.filename!r} to be uncompressed", f"method {info.compress_type}")
        regular = info.flag_bits == 0 and info.external_attr == 0o600 << 16
        _require(regular, f"{info.filename!r} to be a regular file", f"{info.external_attr:#x}")
    total = sum(info.file_size for info in members)
    _require(total <= size, f"members of at most {size} bytes", total)


def _decode_index(archive: zipfile.ZipFile) -> dict[str, Any]:
    size = archive.getinfo(INDEX_NAME).file_size
    _require(size <= INDEX_LIMIT, f"{INDEX_NAME} of at most {INDEX_LIMIT} bytes", size)
    index: dict[str, Any] = json.loads(archive.read(INDEX_NAME))
    _require(index["format"] == 1, "format 1", repr(index["format"]))
    _require(type(index["step"]) is int, "an integer step", repr(index["step"]))
    names = list(index["arrays"])
    members = [INDEX_NAME, *(name + ".npy" for name in names)]
    _require(archive.namelist() == members, f"members {members}", archive.namelist())
    _require(all(map(ARRAY_NAME.fullmatch, names)), "valid names of arrays", names)
    return index


def _decode_array(
    archive: zipfile.ZipFile, name: str, dtype: str, shape: list[int]
) -> NDArray[Any]:
    _require(DTYPE.fullmatch(dtype), f"a dtype of numbers or bool for {name}", repr(dtype))
    lengths = all(type(length) is int and length >= 0 for length in shape)
    _require(lengths, f"lengths as the shape of {name}", shape)
    header = _npy_header(dtype, tuple(shape))
    data = archive.read(name + ".npy")
    found = data[: len(header)]
    _require(found == header, f"a header of {dtype} {shape} for {name}", found)
    return np.frombuffer(data, dtype, offset=len(header)).reshape(shape)


def decode(file: BinaryIO) -> Checkpoint:
    """Reads a checkpoint file, and verifies that it is exactly what `encode` wrote.

    Sizes that the file declares are compared with its own size before memory is allocated for them.
    Nothing in the file is executed, and nothing is written.

    Args:
      file: open for reading and seekable.

    Returns:
      Checkpoint.

    Raises:
      CheckpointError: the file is damaged or forged.

    >>> decode(io.BytesIO(b"text"))
    Traceback (most recent call last):
    ...
    jaxrnn.checkpoint_format.CheckpointError: expected more than 93 bytes, got 4
    """
    try:
        size = _check_trailer(file)
        with zipfile.ZipFile(file) as archive:
            _check_members(archive, size)
            index = _decode_index(archive)
            specs = index["arrays"]
            arrays = {name: _decode_array(archive, name, *specs[name]) for name in specs}
        return Checkpoint(index["step"], arrays, index["note"])
    except CheckpointError:
        raise
    # NumPy, zipfile and json raise exceptions of many types for data that they cannot read.
    except Exception as error:
        raise CheckpointError(str(error) or type(error).__name__) from error
