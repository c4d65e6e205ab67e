"""The file format of checkpoints: every array and note that is written is read back."""

import base64
import importlib.util
import io
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from jaxrnn.checkpoint_format import decode, encode

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
NOTE = {"seed": 0, "rows": [1.5, None, "α"]}


def decode_bytes(data):
    return decode(io.BytesIO(data))


def assert_arrays_equal(checkpoint, arrays):
    assert list(checkpoint.arrays) == list(arrays)
    for name, array in arrays.items():
        loaded = checkpoint.arrays[name]
        assert loaded.dtype == np.asarray(array).dtype.newbyteorder("<")
        assert loaded.shape == np.shape(array)
        np.testing.assert_array_equal(loaded, array)


def test_decode_inverts_encode():
    checkpoint = decode_bytes(encode(np.int64(7), ARRAYS, NOTE))
    assert checkpoint.step == 7
    assert type(checkpoint.step) is int
    assert checkpoint.note == NOTE
    assert_arrays_equal(checkpoint, ARRAYS)
    assert not checkpoint.arrays["W"].flags.writeable


def test_equal_arguments_give_equal_bytes():
    assert encode(7, ARRAYS, NOTE) == encode(7, ARRAYS, NOTE)


def test_numpy_loads_the_file_without_pickle():
    with np.load(io.BytesIO(encode(7, ARRAYS)), allow_pickle=False) as file:
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(file[name], array)


VERSION_0_1 = zlib.decompress(base64.b64decode(
    "eNqlU79P20AUtoHSig7twB9w9YBL5Ub+keRMhICpHQLUS4eWWtXlfEcoqR3ZDihKI6WduleqOnaDf6N/A2Jlb1cWxn6H"
    "qdIYRUJw9md/9+493/feOwfN2blFrRhPtF9Hu0vHYAqPAN4WfL+b7MV55UOWxANDJulHlhsN4ljEyHLRBXVt8DjJBfjA"
    "yISIQJQtTQ4z0B2nUrNI3Ot0YHvXs72WY4RDcJamrJ8VUTnLRaWtvI1VWTUssuNaxAtDuO2LfgNYlWl/rXDoFQ6Xq7LD"
    "di+tn/BZWMNwOAwmknr1W3v2A0zhIXC1VyXu9r9tv94K3ujagTYwI5Hx1GwQE/ubFjGRap6y+H2SRkLZX7BOJmDP2qwr"
    "MH+qBC5bZEhuPRYKiaN1PDZwAyPg58ZkAtrbs7WvYAqPgf8LMj2L3k2zuFsOV1ncByZVf3l+cfIZTOEBoBo1VS2adyO1"
    "d9UKtXrQ1GcWZ6cf+n9jpGvXf4FycPlwjYNPJ49aObDc1HHgd/16i8vR5eKOozdnxqUOmvfmlXUO1x+8z7H2UkMx3Vq9"
    "4VPPs1nVc/wVEVUp4z6vS84Fd6nPqpFNXTviLPL8Fq3XVqRwpBSUspZT86lPpf0XsLnlbg=="
))  # fmt: skip
"""A file that jaxrnn 0.1.0 wrote, compressed."""


def test_a_file_of_version_0_1_loads():
    checkpoint = decode_bytes(VERSION_0_1)
    assert checkpoint.step == 20
    assert checkpoint.note == NOTE
    expected = {
        "state.h": np.arange(6, dtype=np.float32).reshape(2, 3),
        "key:key<fry>": np.uint32([0, 7]),
        "flag": np.bool_(True),
    }
    assert_arrays_equal(checkpoint, expected)


def test_many_arrays_up_to_the_limit():
    many = {f"{i}": np.int8(i % 100) for i in range(9000)}
    assert_arrays_equal(decode_bytes(encode(1, many)), many)
    with pytest.raises(ValueError, match=r"^note: expected at most 1048576 bytes including"):
        encode(1, {f"{i}": np.int8(0) for i in range(12_000)})


def test_zip64_for_large_files(monkeypatch):
    """zip64 takes over above 2 GB; here above 100 bytes."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    data = bytes(encode(2, ARRAYS))
    assert b"PK\x06\x06" in data
    assert_arrays_equal(decode_bytes(data), ARRAYS)


@pytest.mark.parametrize(
    ("arrays", "note", "exception", "message"),
    [
        ({"../W": 1}, None, ValueError, r"arrays: expected names .*, got '../W'"),
        ({"": 1}, None, ValueError, r"arrays: expected names .*, got ''"),
        ({"W": [None]}, None, TypeError, "arrays: expected numbers or bool in W, got object"),
        ({"W": "text"}, None, TypeError, "arrays: expected numbers or bool in W, got <U4"),
        ({}, "x" * 2**20, ValueError, "note: expected at most 1048576 bytes including the names"),
        ({}, {1j}, TypeError, "note: expected JSON data, got: Object of type set is not"),
    ],
)
def test_encode_rejects_what_the_format_cannot_store(arrays, note, exception, message):
    with pytest.raises(exception, match="^" + message):
        encode(0, arrays, note)


def test_saving_and_loading_need_only_numpy(tmp_path):
    """The two modules, imported without the package around them."""
    package = Path(importlib.util.find_spec("jaxrnn").origin).parent
    code = (
        "import sys, types\n"
        "package = sys.modules['jaxrnn'] = types.ModuleType('jaxrnn')\n"
        f"package.__path__ = [{str(package)!r}]\n"
        "from jaxrnn import checkpoints\n"
        f"checkpoints.save({str(tmp_path)!r}, 3, {{'W': 1.5}})\n"
        f"assert checkpoints.newest({str(tmp_path)!r}).arrays['W'] == 1.5\n"
        "names = {name.split('.')[0] for name in sys.modules} - sys.stdlib_module_names\n"
        "print(sorted(names & {'numpy', 'jax', 'jaxlib', 'optax', 'ml_dtypes'}))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "['numpy']", done.stdout + done.stderr


@pytest.mark.parametrize("dtype", list("?bhiqBHIQefdFD"))
def test_every_dtype_of_numpy_is_read_back(dtype):
    array = np.arange(3).astype(dtype)
    assert_arrays_equal(decode_bytes(encode(0, {"a": array})), {"a": array})


@pytest.mark.parametrize("note", [None, 0, False, "", [], {}, 0.0])
def test_a_note_that_is_empty_is_read_back(note):
    got = decode_bytes(encode(0, {}, note)).note
    assert (got, type(got)) == (note, type(note))
