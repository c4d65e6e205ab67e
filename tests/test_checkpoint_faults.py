"""Faults while saving: every system call of `save` fails once, and the process ends at each."""

import errno
import io
import os
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest

from jaxrnn import checkpoints
from jaxrnn.checkpoints import CheckpointError
from tests.test_checkpoint_format import assert_arrays_equal

OLD, NEW = {"W": np.zeros(50)}, {"W": np.ones(50), "b": np.ones(())}


class InterceptedFile(io.FileIO):
    """An unbuffered file that accepts at most 100 bytes per write; each write is intercepted."""

    def __init__(self, path, mode, intercept):
        super().__init__(path, mode)
        self.intercept = intercept

    def write(self, data):
        return self.intercept("write", super().write, memoryview(data)[:100])


def intercept_calls(monkeypatch, intercept):
    """Makes `save` call `intercept(name, function, *arguments)` instead of each system call."""

    def open_intercepted(path, mode):
        raw_mode = mode.replace("b", "")
        return io.BufferedWriter(intercept("open", InterceptedFile, path, raw_mode, intercept))

    names = ["open", "fsync", "close", "replace", "unlink", "listdir"]
    calls = {name: (lambda *a, n=name: intercept(n, getattr(os, n), *a)) for name in names}
    intercepted = SimpleNamespace(**calls, O_RDONLY=os.O_RDONLY)
    monkeypatch.setattr(checkpoints, "os", intercepted)
    monkeypatch.setattr(checkpoints, "open", open_intercepted, raising=False)


def calls_of_save(folder) -> list[str]:
    calls = []

    def record(name, function, *arguments):
        calls.append(name)
        return function(*arguments)

    with pytest.MonkeyPatch.context() as monkeypatch:
        intercept_calls(monkeypatch, record)
        checkpoints.save(folder, 2, NEW, keep=1)
    return calls


def restart(folder):
    """A folder that holds the old checkpoint alone."""
    for path in folder.iterdir():
        path.unlink()
    checkpoints.save(folder, 1, OLD)


def test_the_file_is_synced_before_its_rename_and_the_folder_before_old_files_go(tmp_path):
    restart(tmp_path)
    calls = calls_of_save(tmp_path)
    order = [name for name in calls if name in ("fsync", "replace", "unlink")]
    assert order == ["unlink", "fsync", "replace", "fsync", "unlink"]
    last_write = max(i for i, name in enumerate(calls) if name == "write")
    assert last_write < calls.index("fsync")


def fail(at: int, error: int):
    """Call number `at` and all later writes fail, as on a full or dying disk.

    With `error` 0, a write at `at` writes a part only, which is not an error.
    """
    numbers = count()

    def intercept(name, function, *arguments):
        number = next(numbers)
        if number == at or (number > at and name == "write"):
            if name == "write" and error == 0:
                return function(arguments[0][: max(1, len(arguments[0]) // 2)])
            if name == "close":
                function(*arguments)
            raise OSError(error or errno.EIO, os.strerror(error or errno.EIO))
        return function(*arguments)

    return intercept


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, 0], ids=["ENOSPC", "EIO", "short"])
def test_after_a_fault_the_old_or_the_new_checkpoint_is_intact(error, tmp_path):
    restart(tmp_path)
    calls = calls_of_save(tmp_path)
    assert calls.count("write") > 10
    for at in range(len(calls)):
        restart(tmp_path)
        raised = False
        with pytest.MonkeyPatch.context() as monkeypatch:
            intercept_calls(monkeypatch, fail(at, error))
            try:
                checkpoints.save(tmp_path, 2, NEW, keep=1)
            except CheckpointError:
                raised = True
        checkpoint = checkpoints.newest(tmp_path)
        assert_arrays_equal(checkpoint, NEW if checkpoint.step == 2 else OLD)
        assert checkpoint.step == 2 or raised
        assert raised or (error == 0 and calls[at] == "write")
        checkpoints.save(tmp_path, 3, NEW)


def crash(at: int, moment: str):
    """The process ends before, in the middle of, or after call number `at`."""
    numbers = count()

    def intercept(name, function, *arguments):
        if next(numbers) != at:
            return function(*arguments)
        if moment == "half" and name == "write":
            function(arguments[0][: len(arguments[0]) // 2])
        try:
            if moment == "after":
                function(*arguments)
        finally:
            os._exit(9)

    return intercept


# The child process uses neither JAX nor anything else that holds a lock.
@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning", "ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_after_a_crash_the_old_or_the_new_checkpoint_is_intact(moment, tmp_path):
    restart(tmp_path)
    calls = calls_of_save(tmp_path)
    for at in range(len(calls)):
        restart(tmp_path)
        child = os.fork()
        if child == 0:
            try:
                intercept_calls(pytest.MonkeyPatch(), crash(at, moment))
                checkpoints.save(tmp_path, 2, NEW, keep=1)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        checkpoint = checkpoints.newest(tmp_path)
        assert_arrays_equal(checkpoint, NEW if checkpoint.step == 2 else OLD)
        checkpoints.save(tmp_path, 3, NEW, keep=1)
        assert os.listdir(tmp_path) == ["checkpoint-3.npz"]
