"""A file that one process writes to."""

from pathlib import Path
from typing import BinaryIO

from experiments.cli import InputError

try:
    import fcntl
except ImportError:  # on Windows no process is kept out
    fcntl = None  # type: ignore[assignment]


def open_alone(path: Path) -> BinaryIO:
    """Opens a file to append to, locked until it is closed or the process ends.

    Raises:
      InputError: another process has it open in this way.
    """
    file = path.open("ab")
    if fcntl is None:
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(
            f"{path.parent}: expected a folder to which no other process writes, got one in use"
        ) from None
    except OSError:  # a file system without locks
        pass
    return file
