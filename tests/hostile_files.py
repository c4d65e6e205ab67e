"""Files that pose as checkpoints to harm the program that loads them."""

import hashlib
import io
import json
import os
import pickle
import struct
import warnings
import zipfile

import numpy as np

from jaxrnn import checkpoint_format

LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
DATA = np.arange(3, dtype="<f4")
INDEX = {"format": 1, "step": 1, "note": None, "arrays": {"W": ["<f4", [3]]}}


def npy(array, **header) -> bytes:
    """A .npy file with fields of its header replaced."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape} | header
    )
    return file.getvalue() + array.tobytes()


def with_checksum(zipped: bytes) -> bytes:
    """The bytes with a valid checksum in place of the last 64."""
    return zipped[:-64] + hashlib.sha256(zipped[:-64]).hexdigest().encode()


def forged(
    index=INDEX, *, name="W", W=None, more=(), first=(), method=zipfile.ZIP_STORED, attr=0o600 << 16
):
    """A checkpoint of step 1 as `save` writes it, except for the arguments given.

    `first` and `more` are members before and after the usual ones; `method` and `attr` are the
    compression and the file mode of W.
    """
    index = index if isinstance(index, bytes) else json.dumps(index).encode()
    W = checkpoint_format._npy_header("<f4", (3,)) + DATA.tobytes() if W is None else W
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.comment = b"sha256:" + bytes(64)
        for member, data in [*first, ("checkpoint.json", index), (f"{name}.npy", W), *more]:
            info = zipfile.ZipInfo(member)
            is_W = data is W
            info.external_attr = attr if is_W else 0o600 << 16
            archive.writestr(info, data, method if is_W else zipfile.ZIP_STORED)
    return with_checksum(file.getvalue())


def with_index(**changes):
    return forged({**INDEX, **changes})


def with_array(dtype="<f4", shape=(3,), name="W"):
    return forged({**INDEX, "arrays": {name: [dtype, shape]}}, name=name)


def patched(signature: bytes, offset: int, layout: str, value: int) -> bytes:
    """Replaces a number in each zip record that begins with the signature."""
    data = bytearray(forged())
    at = data.find(signature)
    while at >= 0:
        struct.pack_into(layout, data, at + offset, value)
        at = data.find(signature, at + 4)
    return with_checksum(bytes(data))


def crowded(count: int) -> bytes:
    """A directory that repeats its first entry: 50 bytes on disk, 700 in memory."""
    data = forged()
    start, end = data.find(CENTRAL), data.find(END)
    first = data[start : data.find(CENTRAL, start + 4)]
    data = bytearray(data[:start] + count * first + data[end:])
    struct.pack_into("<L", data, data.find(END) + 12, count * len(first))
    return with_checksum(bytes(data))


class Bomb:
    """Creates a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


PICKLE = pickle.dumps(Bomb())
DEEP = b"[" * 100_000

HOSTILE = {
    "empty": b"",
    "one byte": b"P",
    "comment only": with_checksum(b"sha256:" + bytes(64)),
    "zeros": with_checksum(bytes(10_000)),
    "text": with_checksum(b"checkpoint" * 100),
    "pickle": PICKLE,
    "pickle with checksum": with_checksum(PICKLE + bytes(200)),
    "pickle as array": forged(W=PICKLE),
    "object array": forged(W=npy(DATA, descr="|O")[:-12] + PICKLE),
    "object dtype": with_array(dtype="|O"),
    "pickle as member": forged(more=[("data.pkl", PICKLE)]),
    "pickle as first member": forged(first=[("data.pkl", PICKLE)]),
    "void dtype": with_array(dtype="|V1000000000"),
    "text dtype": with_array(dtype="<U1000000000"),
    "record dtype": with_array(dtype="f4,f4"),
    "dtype as number": with_array(dtype=4),
    "dtype as list": with_array(dtype=["<f4"]),
    "dtype null": with_array(dtype=None),
    "shape of terabytes": with_array(shape=[1 << 40]),
    "overflowing size": with_array(shape=[1 << 62, 1 << 62]),
    "overflowing empty shape": forged(
        {**INDEX, "arrays": {"W": ["<f4", [0, 10**30]]}},
        W=checkpoint_format._npy_header("<f4", (0, 10**30)),
    ),
    "negative length": with_array(shape=[-3]),
    "two negative lengths": with_array(shape=[-3, -1]),
    "shape of floats": with_array(shape=[3.0]),
    "shape of bool": with_array(shape=[True, 3]),
    "shape as text": with_array(shape="3"),
    "shape null": with_array(shape=None),
    "a thousand axes": with_array(shape=[1] * 1000),
    "header of terabytes": forged(W=npy(DATA, shape=(1 << 40,))),
    "header of another shape": forged(W=npy(DATA, shape=(1, 3))),
    "header of another dtype": forged(W=npy(DATA.view("<i4"))),
    "header in Fortran order": forged(W=npy(DATA, fortran_order=True)),
    "header of 4 GB": forged(W=b"\x93NUMPY\x03\x00\xff\xff\xff\xff" + bytes(130)),
    "header with code": forged(W=b"\x93NUMPY\x01\x00v\x00" + b"__import__('os').mkdir('exploded')"),
    "array too short": forged(W=npy(DATA)[:-1]),
    "array too long": forged(W=npy(DATA) + b"\0"),
    "name in a parent folder": with_array(name="../../exploded"),
    "absolute name": with_array(name="/tmp/exploded"),
    "name with backslashes": with_array(name="..\\exploded"),
    "name in a folder": with_array(name="a/b"),
    "empty name": with_array(name=""),
    "name with a control character": with_array(name="a\x1b[2J"),
    "name of 300 letters": with_array(name="a" * 300),
    "member in a parent folder": forged(more=[("../exploded", b"x")]),
    "member with an absolute name": forged(first=[("/tmp/exploded", b"x")]),
    "symbolic link": forged(attr=0o120777 << 16, W=b"/etc/passwd"),
    "folder as array": forged(attr=0o040755 << 16),
    "deflated array": forged(method=zipfile.ZIP_DEFLATED),
    "encrypted": patched(CENTRAL, 8, "<H", 1),
    "declared compressed": patched(CENTRAL, 10, "<H", 8),
    "member of 4 GB": patched(CENTRAL, 24, "<L", 0xFFFFFFF0),
    "both sizes 4 GB": patched(CENTRAL, 20, "<Q", 0xFFFFFFF0_FFFFFFF0),
    "overlapping members": patched(CENTRAL, 42, "<L", 0),
    "members beyond the end": patched(CENTRAL, 42, "<L", 0x7FFFFFFF),
    "different local name": patched(LOCAL, 30, "<B", 0),
    "wrong CRC": patched(CENTRAL, 16, "<L", 0),
    "directory of 4 GB": patched(END, 12, "<L", 0xFFFFFFF0),
    "directory beyond the end": patched(END, 16, "<L", 0x7FFFFFFF),
    "no directory": patched(END, 0, "<L", 0),
    "additional member": forged(more=[("b.npy", npy(DATA))]),
    "empty index": forged({}),
    "index as list": forged([]),
    "index as number": forged(b"1"),
    "index of no bytes": forged(b""),
    "index not UTF-8": forged(b"\xff\xfe\x00"),
    "deeply nested index": forged(DEEP),
    "number of 10,000 digits": forged(b'{"format": 1, "step": ' + b"9" * 10_000 + b"}"),
    "another format": with_index(format=2),
    "step of another file": with_index(step=2),
    "step with a path": with_index(step="1/../../exploded"),
    "step as text": with_index(step="1"),
    "step null": with_index(step=None),
    "arrays as list": with_index(arrays=["W"]),
    "arrays null": with_index(arrays=None),
    "array without shape": with_index(arrays={"W": ["<f4"]}),
    "array of another name": with_index(arrays={"V": ["<f4", [3]]}),
}


def duplicate_member() -> bytes:
    with warnings.catch_warnings(action="ignore"):  # zipfile warns of the name
        return forged(more=[("W.npy", npy(DATA))])


LARGE = {
    "zip bomb": lambda: forged(W=npy(np.zeros(10_000_000)), method=zipfile.ZIP_DEFLATED),
    "bzip2 bomb": lambda: forged(W=npy(np.zeros(3_000_000)), method=zipfile.ZIP_BZIP2),
    "lzma bomb": lambda: forged(W=npy(np.zeros(3_000_000)), method=zipfile.ZIP_LZMA),
    "20,000 members": lambda: forged(more=[(f"{i}.npy", b"") for i in range(20_000)]),
    "directory of 300,000 entries": lambda: crowded(300_000),
    "index of 2 MB": lambda: forged(b" " * (1 << 21)),
    "index of 349,000 lists": lambda: forged(
        b'{"format": 1, "note": [' + b"[]," * 349_000 + b"1]}"
    ),
    "duplicate member": duplicate_member,
}
"""Built by the test that uses them, because they take time or memory."""
