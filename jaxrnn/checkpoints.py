"""Checkpoints of a training run: saved atomically, verified when loaded.

The folder of a run holds `checkpoint-<step>.npz` for the newest steps, each in the format of
`jaxrnn.checkpoint_format`. The module itself imports only the standard library and NumPy.
"""

import contextlib
import os
import re
import warnings
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from jaxrnn.checkpoint_format import Checkpoint, CheckpointError, decode, encode

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "checkpoint_path",
    "load",
    "newest",
    "save",
    "saved_steps",
]

FILE_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})\.npz")


def checkpoint_path(folder: str | os.PathLike[str], step: int) -> Path:
    """The path of the checkpoint of a step, whether it exists or not.

    >>> checkpoint_path("run", 20).name
    'checkpoint-20.npz'
    """
    return Path(folder) / f"checkpoint-{step}.npz"


def saved_steps(folder: str | os.PathLike[str]) -> list[int]:
    """The steps of the checkpoints in a folder, ascending; [] if the folder does not exist.

    >>> saved_steps("no such folder")
    []
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        matches = map(FILE_NAME.fullmatch, os.listdir(Path(folder)))
        return sorted(int(match[1]) for match in matches if match)
    return []


def save(
    folder: str | os.PathLike[str],
    step: int,
    arrays: Mapping[str, ArrayLike],
    note: Any = None,
    *,
    keep: int = 2,
) -> Path:
    """Writes `checkpoint-<step>.npz` atomically and removes checkpoints that are superseded.

    When `save` returns, the file is complete and synced to disk. After an exception or a crash, the
    folder holds earlier checkpoints, the new one, or both, each of them complete. Only one process
    at a time may save to a folder. The operating system must support syncing a folder (POSIX).

    Args:
      folder: an existing folder.
      step: at least 0, below 10**18. Checkpoints of later steps are removed: a run that resumes
        from `step` writes them again.
      arrays: name -> array of numbers or bool.
      note: JSON data, at most 1 MiB including the names of the arrays. JSON has lists for tuples,
        and strings for keys.
      keep: the number of newest checkpoints to keep, including this one.

    Returns:
      The path of the file.

    Raises:
      CheckpointError: the file cannot be written, or others cannot be removed.
      TypeError, ValueError: an argument that a checkpoint cannot store.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print(save(folder, 20, {"losses": [1.5, 0.5]}, note={"seed": 0}).name)
    ...     print(newest(folder).arrays["losses"].tolist())
    checkpoint-20.npz
    [1.5, 0.5]
    """
    path = checkpoint_path(folder, step)
    if not isinstance(step, Integral) or not FILE_NAME.fullmatch(path.name):
        raise ValueError(f"step: expected an integer of at least 0, below 10**18, got {step!r}")
    if not isinstance(keep, Integral) or keep < 1:
        raise ValueError(f"keep: expected an integer of at least 1, got {keep!r}")
    data = encode(step, arrays, note)
    try:
        _write_atomically(path, data)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from error
    try:
        steps = saved_steps(folder)
        kept = [saved for saved in steps if saved <= step][-keep:]
        for saved in steps:
            if saved not in kept:
                os.unlink(checkpoint_path(folder, saved))
    except OSError as error:
        raise CheckpointError(f"{path}: complete, but others cannot be removed: {error}") from error
    return path


def _write_atomically(path: Path, data: memoryview) -> None:
    temporary = path.parent / "checkpoint.tmp"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)  # left by a process that was killed
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
    descriptor = os.open(path.parent, os.O_RDONLY)  # the new name is durable once its folder is
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads a checkpoint, and verifies that it is exactly what `save` wrote.

    Args:
      path: the path of the file.

    Returns:
      Checkpoint.

    Raises:
      CheckpointError: the file is missing, damaged, forged, or named after another step.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     load(save(folder, 20, {"losses": [1.5, 0.5]})).step
    20
    """
    path = Path(path)
    try:
        if not path.is_file():  # a pipe would block, and a device would never end
            raise CheckpointError("expected a file, got none")
        with open(path, "rb") as file:
            checkpoint = decode(file)
        if path.name != checkpoint_path("", checkpoint.step).name:
            raise CheckpointError(f"expected the step of the file name, got {checkpoint.step}")
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return checkpoint


def newest(folder: str | os.PathLike[str]) -> Checkpoint | None:
    """The newest intact checkpoint, with a warning for each newer file that is damaged.

    Args:
      folder: the folder given to `save`.

    Returns:
      Checkpoint, or None if the folder holds no checkpoint.

    Raises:
      CheckpointError: every checkpoint in the folder is damaged.

    >>> print(newest("no such folder"))
    None
    """
    failures = []
    for step in reversed(saved_steps(folder)):
        path = checkpoint_path(folder, step)
        try:
            checkpoint = load(path)
        except CheckpointError as error:
            if step not in saved_steps(folder):
                return newest(folder)  # another process has removed it since
            failures.append(str(error))
            continue
        for failure in failures:
            warnings.warn(f"{failure}; going back to step {step}", stacklevel=2)
        return checkpoint
    if failures:
        raise CheckpointError("; ".join(failures))
    return None
