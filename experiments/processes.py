"""A run over several processes, by `jax.distributed`: what they agree on, and how they end.

Each process of the command line starts a worker, which trains, and waits for it. A process that
loses another one is ended by JAX without an error of Python, so its parent reports it.
"""

import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.cli import Ended, InputError, Stopped
from experiments.run_state import Run
from jaxrnn import TrainState
from jaxrnn.serialization import to_arrays

LOST = 5
"""The exit status where another process of the run has ended."""

_LOST_CONNECTION = "UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED"
_LOG = "JAXRNN_WORKER_LOG"


def is_worker() -> bool:
    """Whether this process was started by `supervise`."""
    return _LOG in os.environ


def supervise(module: str, arguments: list[str]) -> None:
    """Runs the command again as a worker, and waits for it; passes SIGINT and SIGTERM on.

    Raises:
      Ended: the worker failed. Its status is that of the worker, or LOST if a signal ended it.
    """
    with tempfile.NamedTemporaryFile(prefix="processes-", suffix=".log", delete=False) as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=os.environ | {_LOG: log.name},
            stdin=subprocess.PIPE,  # closed if this process ends: the worker then ends, too
            start_new_session=True,
        )
    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            handlers[number] = signal.signal(number, lambda got, _: worker.send_signal(got))
    status = worker.wait()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if -status in (signal.SIGINT, signal.SIGTERM):
        status = 128 - status
    if 0 <= status != LOST:
        Path(log.name).unlink()
    if status == LOST or status < 0:
        raise Ended(
            LOST,
            "another process of the run has ended, or this one was killed: --resume continues the "
            f"run; what the libraries wrote is in {log.name}",
        )
    if status:
        raise Ended(status, "")


@contextlib.contextmanager
def worker_streams() -> Iterator[None]:
    """Sends what libraries print to the log; ends the worker when its parent ends."""
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    with open(os.environ[_LOG], "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)

    def end_with_parent() -> None:
        os.read(0, 1)
        os._exit(LOST)

    threading.Thread(target=end_with_parent, daemon=True).start()
    yield


def wait_for(coordinator: str, seconds: float = 300) -> None:
    """Waits until process 0 listens: JAX would abort this process if it did not.

    Raises:
      InputError: it does not listen in time, or the coordinator is not HOST:PORT.
    """
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and int(port) < 2**16):
        raise InputError(f"--coordinator: expected HOST:PORT, got {coordinator}")
    until = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            if time.monotonic() > until:
                raise InputError(
                    f"--coordinator: expected process 0 at {coordinator}, got: {error}"
                ) from None
        time.sleep(0.2)


def connect(coordinator: str | None, processes: int, process: int, devices: int) -> None:
    """Joins the processes of a run. Without a coordinator, JAX finds them from the cluster.

    Raises:
      InputError: no cluster is found, or the coordinator cannot be reached.
    """
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    given = coordinator is not None
    if coordinator and process:
        wait_for(coordinator)
    try:
        jax.distributed.initialize(
            coordinator,
            processes if given else None,
            process if given else None,
            shutdown_timeout_seconds=3600,  # until process 0 has written its report
        )
    except (ValueError, RuntimeError) as error:
        where = f"at {coordinator}" if coordinator else "in a cluster that JAX detects"
        first = str(error).splitlines()[0]
        raise InputError(f"--distributed: expected the processes {where}: {first}") from None


@contextlib.contextmanager
def lost_if_another_ends() -> Iterator[None]:
    """An error of a collective operation ends this process with the status LOST."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # JAX raises either of them with the status of the library that lost the connection.
        if not re.match(_LOST_CONNECTION, str(error)):
            raise
        os.write(2, f"{error}\n".encode())
        raise Ended(LOST, "") from None


def leave(status: int) -> int:
    """Ends a worker that failed at once: JAX would wait for the other processes."""
    if is_worker() and status:
        sys.stdout.flush()
        os._exit(status)
    return status


def check_equal(settings: dict) -> None:
    """Checks that every process has the settings of process 0.

    Raises:
      InputError: this one has others.
    """
    own = np.frombuffer(repr(sorted(settings.items())).encode(), np.uint8)
    padded = np.zeros(2**14, np.uint8)
    padded[: len(own)] = own[: len(padded)]
    first = np.asarray(multihost_utils.broadcast_one_to_all(padded))
    same = multihost_utils.process_allgather(np.array_equal(first, padded))
    if not np.all(same):
        others = np.flatnonzero(~np.asarray(same)).tolist()
        raise InputError(f"expected the settings and the text of process 0, got others in {others}")


class Leader(Run):
    """The Run of process 0, which writes; the other processes do what it does."""

    def restore(self, state: TrainState) -> TrainState:
        restored = super().restore(state)
        self.step, state = multihost_utils.broadcast_one_to_all(
            (np.int32(self.step), jax.tree.map(np.asarray, restored))
        )
        self.step = int(self.step)
        return state

    def _agree(
        self, due: bool, number: signal.Signals | None
    ) -> tuple[bool, signal.Signals | None]:
        flags = np.array([due, number or 0], np.int32)
        flags = np.asarray(multihost_utils.process_allgather(flags))
        number = signal.Signals(flags[:, 1].max()) if flags[:, 1].any() else None
        return bool(flags[0, 0]), number


class Follower(Leader):
    """The Run of the other processes, which writes nothing."""

    def __init__(self, settings: dict):
        super().__init__(Path(os.devnull), settings, overwrite=True)

    def _open(self) -> None:
        self._metrics = io.BufferedWriter(io.BytesIO())

    def log(self, row: dict) -> None:
        self.rows.append(row)
        self.step = row["step"]

    def _save(self, state: TrainState) -> None:
        to_arrays(state)  # the leader reads the shares of all processes

    def _stop_if(self, number: signal.Signals | None) -> None:
        if number:
            raise Stopped(number, f"stopped after step {self.step} with process 0")
