"""The state of a run on disk: its folder, metrics, checkpoints, and what a signal does to it."""

import contextlib
import hashlib
import json
import math
import os
import platform
import signal
import sys
import time
import warnings
from pathlib import Path

import jax
import jaxlib
import numpy as np
import optax

from experiments.cli import InputError, Stopped, flag
from experiments.locks import open_alone
from jaxrnn import TrainState, checkpoints
from jaxrnn.serialization import from_arrays, to_arrays

SAVE_EVERY = 30.0  # seconds between checkpoints if no number of steps is given


def versions() -> dict:
    """What decides the bits of a run besides its settings."""
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "optax": optax.__version__,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
    }


def make_folder(folder: Path) -> None:
    """Creates the folder of a run, if it does not exist.

    Raises:
      InputError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: expected a folder to write to: {error.strerror}") from None


def holds_run(folder: Path) -> bool:
    """Whether the folder holds a run, finished or not."""
    metrics = folder / "metrics.jsonl"
    written = metrics.exists() and metrics.stat().st_size > 0
    return written or (folder / "summary.json").exists() or bool(checkpoints.saved_steps(folder))


def check_no_run(folder: Path, ways_out: str) -> None:
    """Raises InputError if the folder holds a run. The message ends with `ways_out`."""
    if holds_run(folder):
        finished = "a finished" if (folder / "summary.json").exists() else "an unfinished"
        raise InputError(f"{folder}: expected a folder without a run, got {finished} one{ways_out}")


def discard_checkpoints(folder: Path) -> None:
    for step in checkpoints.saved_steps(folder):
        checkpoints.checkpoint_path(folder, step).unlink()


def discard_run(folder: Path) -> None:
    """Removes the run that the folder holds, if any; an empty metrics.jsonl stays."""
    if holds_run(folder):
        written = "summary.json", "figure.png", "curve.png", "sample.txt"
        for name in (*written, "config.json", "vocabulary.json"):
            (folder / name).unlink(missing_ok=True)
    discard_checkpoints(folder)
    (folder / "metrics.jsonl").write_bytes(b"")


def write_atomically(path: Path, text: str) -> None:
    """Writes the file completely or not at all."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value) -> None:
    """Writes the value as indented JSON, completely or not at all."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


class Run:
    """A crash-safe run: a kill at any moment leaves a folder that `resume` continues from.

    Creating a Run only reads the folder. `with run:` opens it for writing: a new run removes what
    an old one left, a resumed run truncates metrics.jsonl to its checkpoint. Within the block
    SIGINT and SIGTERM wait for `save_if_due`.

    Args:
      folder: an existing folder.
      settings: plain data that decides the result; a resumed run must have the same.
      resume: continue from the newest checkpoint in the folder, if it holds one.
      overwrite: discard the run that the folder holds.
      every_steps: steps between checkpoints; None is a checkpoint every `SAVE_EVERY` seconds.

    Attributes:
      step: the last step in metrics.jsonl.
      rows: the lines of metrics.jsonl, a dict each, with NaN for null.
      seconds: duration of the run, over all processes that worked on it.
      seconds_of_steps: the same without the time spent in `pause_step_clock`.

    Raises:
      InputError: the folder holds a run and neither `resume` nor `overwrite` is given, the run to
        resume has other settings, or, on entering the block, another process writes to the folder.
      CheckpointError: every checkpoint is damaged, or metrics.jsonl has changed.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict,
        *,
        resume: bool = False,
        overwrite: bool = False,
        every_steps: int | None = None,
    ):
        self.folder, self.settings, self.every_steps = folder, settings, every_steps
        self.step, self.seconds, self.seconds_of_steps = 0, 0.0, 0.0
        self.rows: list[dict] = []
        self._signal: signal.Signals | None = None
        self._handlers: dict = {}
        self._metrics_path = folder / "metrics.jsonl"
        self._saved_steps = checkpoints.saved_steps(folder)
        self._found = checkpoints.newest(folder) if resume else None
        if self._found is not None:
            self._check_versions(self._check_settings(self._found))
            self._read_metrics(self._found)
        elif not overwrite:
            # Without a checkpoint, --resume has nothing to continue: metrics alone stay protected.
            resumes = "--resume continues it, " if checkpoints.saved_steps(folder) else ""
            check_no_run(
                folder, f": {resumes}--overwrite discards it, another --out leaves it as it is"
            )
        if resume and self._found is None:
            print(f"{folder}: no checkpoint found; starting at step 0", file=sys.stderr)

    def _check_settings(self, found: checkpoints.Checkpoint) -> dict:
        """The checkpoint's note, once its settings are known to equal those of this run."""
        note = found.note if isinstance(found.note, dict) else {}
        stored = note.get("settings")
        if not isinstance(stored, dict):
            raise InputError(
                f"{self.folder}: expected checkpoints of an experiment, got one without settings"
            )
        for name, value in self.settings.items():
            if stored.get(name) != value:
                raise InputError(
                    f"{flag(name)}: expected {stored.get(name)!r} as in the run in {self.folder}, "
                    f"got {value!r}"
                )
        return note

    def _check_versions(self, note: dict) -> None:
        for name, current in versions().items():
            if note["versions"].get(name) != current:
                warnings.warn(
                    f"{name}: the run was made with {note['versions'].get(name)!r}, this is "
                    f"{current!r}; the last bits of the result may differ",
                    stacklevel=4,
                )

    def _read_metrics(self, found: checkpoints.Checkpoint) -> None:
        """The rows up to the checkpoint; later ones belong to steps that will be repeated."""
        size = found.note["metrics_bytes"]
        data = self._metrics_path.read_bytes()[:size] if self._metrics_path.exists() else b""
        if hashlib.sha256(data).hexdigest() != found.note["metrics_sha256"]:
            raise checkpoints.CheckpointError(
                f"{self._metrics_path}: expected the first {size} bytes to be those at step "
                f"{found.step}, got others"
            )
        rows = map(json.loads, data.splitlines())
        self.rows = [{k: math.nan if x is None else x for k, x in row.items()} for row in rows]
        self.step = found.step
        self.seconds, self.seconds_of_steps = found.note["seconds"]

    def __enter__(self):
        self._open()
        for number in (signal.SIGINT, signal.SIGTERM):
            # A background job of a shell ignores SIGINT, and continues to.
            if signal.getsignal(number) != signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._on_signal)
        self._last = self._saved = time.monotonic()
        return self

    def _open(self) -> None:
        self._metrics = open_alone(self._metrics_path)
        if checkpoints.saved_steps(self.folder) != self._saved_steps:
            self._metrics.close()
            raise InputError(f"{self.folder}: expected the run as it was, got a later one")
        if self._found is not None:
            os.truncate(self._metrics_path, self._found.note["metrics_bytes"])
        else:
            discard_run(self.folder)
        self._sha256 = hashlib.sha256(self._metrics_path.read_bytes())

    def __exit__(self, error_type, *_):
        self._read_clock()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._metrics.close()
        if error_type is None:
            self._stop_if(self._signal)

    def _on_signal(self, number, _):
        self._signal = signal.Signals(number)
        for each in self._handlers:
            signal.signal(each, signal.SIG_DFL)

    def _read_clock(self, of_steps: bool = True) -> None:
        now = time.monotonic()
        self.seconds += now - self._last
        self.seconds_of_steps += of_steps * (now - self._last)
        self._last = now

    @contextlib.contextmanager
    def pause_step_clock(self):
        """Time within the block counts towards `seconds`, but not `seconds_of_steps`."""
        self._read_clock()
        yield
        self._read_clock(of_steps=False)

    def restore(self, state: TrainState) -> TrainState:
        """The checkpoint's state, or the initial state given, which is saved."""
        found, self._found = self._found, None
        if found is not None:
            return from_arrays(state, found.arrays)
        self._save(state)
        return state

    def log(self, row: dict) -> None:
        """Appends a line to metrics.jsonl in one write, so that a kill leaves no partial line."""
        lacks = [k for k, x in row.items() if isinstance(x, float) and not math.isfinite(x)]
        line = json.dumps(row | dict.fromkeys(lacks)).encode() + b"\n"  # JSON has no NaN
        self._metrics.write(line)
        self._metrics.flush()
        self._sha256.update(line)
        self.rows.append(row)
        self.step = row["step"]

    def save_if_due(self, state: TrainState, last: bool) -> None:
        """Saves the state if a checkpoint is due, the run ends, or a signal came.

        A state whose update was skipped is not saved: it may hold what spoilt the update.

        Raises:
          Stopped: a signal came.
        """
        if self.every_steps is None:
            due = time.monotonic() - self._saved >= SAVE_EVERY
        else:
            due = self.step % self.every_steps == 0
        # A signal that comes from here on waits for the next step.
        due, number = self._agree(due, self._signal)
        if (due or last or number) and state.skipped == 0:
            self._save(state)
        self._stop_if(number)

    def _agree(
        self, due: bool, number: signal.Signals | None
    ) -> tuple[bool, signal.Signals | None]:
        """Whether a checkpoint is due, and the signal: the same in all processes of a run."""
        return due, number

    def _stop_if(self, number: signal.Signals | None) -> None:
        if number:
            saved = checkpoints.saved_steps(self.folder)[-1]
            where = f"saved at step {saved} in {self.folder}; --resume continues"
            raise Stopped(number, f"stopped after step {self.step}, {where}")

    def _save(self, state: TrainState) -> None:
        self._read_clock()
        os.fsync(self._metrics.fileno())
        note = {
            "settings": self.settings,
            "versions": versions(),
            "metrics_bytes": self._metrics.tell(),
            "metrics_sha256": self._sha256.hexdigest(),
            "seconds": [self.seconds, self.seconds_of_steps],
        }
        checkpoints.save(self.folder, self.step, to_arrays(state), note)
        self._saved = time.monotonic()
