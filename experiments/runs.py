"""What keeps a run: its folder, its checkpoints, signals, and what the exit status means.

0    done
2    bad usage or input
3    the run's files cannot be written, or are damaged
4    diverged: too many updates in a row were not finite
130  stopped by SIGINT, and saved; a second signal ends at once
143  stopped by SIGTERM, likewise
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import platform
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import jaxlib
import numpy as np
import optax
import tyro

from jaxrnn import CheckpointError, Diverged, TrainState, checkpoints, from_arrays, to_arrays

SAVE_EVERY = 30.0
"""Seconds between checkpoints, where no number of steps is given: what a lost machine costs."""


class InputError(Exception):
    """What the user gave cannot be used; the message is the one line to print."""


class Stopped(Exception):
    """A signal came; what there was to save is saved."""

    def __init__(self, number: signal.Signals, message: str):
        super().__init__(f"{number.name}: {message}")
        self.status = 128 + number


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


class Run:
    """A run in its folder, which a kill at any moment leaves so that `resume` can go on.

    Within `with run:` SIGINT and SIGTERM wait for `keep`.

    Attributes:
      step: the last one in metrics.jsonl.
      rows: what metrics.jsonl holds, a dict a line.
      seconds: how long the run has taken, all its parts together.
      seconds_of_steps: the same without what it did aside.

    Raises:
      InputError: the folder holds a run that is not finished, or, to resume, one made with other
        settings.
      CheckpointError: no checkpoint in it is whole, or metrics.jsonl is not what it was.
    """

    def __init__(self, folder: Path, settings: dict, *, resume: bool, every_steps: int | None):
        self.folder, self.settings, self.every_steps = folder, settings, every_steps
        self.step, self.seconds, self.seconds_of_steps = 0, 0.0, 0.0
        self.rows: list[dict] = []
        self._signal: signal.Signals | None = None
        self._handlers: dict = {}
        self._found = checkpoints.newest(folder) if resume else None
        self._path = folder / "metrics.jsonl"
        if self._found is not None:
            self._continue(self._found)
        elif resume:
            print(f"{folder}: holds no checkpoint; starting at step 0", file=sys.stderr)
        elif checkpoints.steps(folder) and not (folder / "summary.json").exists():
            raise InputError(
                f"{folder}: expected no unfinished run, got one at step "
                f"{checkpoints.steps(folder)[-1]}: --resume continues it, another --out spares it"
            )
        if self._found is None:
            for step in checkpoints.steps(folder):
                checkpoints.file_of(folder, step).unlink()
            self._path.write_bytes(b"")
            (folder / "summary.json").unlink(missing_ok=True)

    def _continue(self, found: checkpoints.Checkpoint) -> None:
        note = found.note if isinstance(found.note, dict) else {}
        before = note.get("settings", {})
        for name in self.settings:
            if before.get(name) != self.settings[name]:
                raise InputError(
                    f"--{name.replace('_', '-')}: expected {before.get(name)!r} as the run in "
                    f"{self.folder} has, got {self.settings[name]!r}"
                )
        for name, now in versions().items():
            if note["versions"].get(name) != now:
                warnings.warn(
                    f"{name}: the run was made with {note['versions'].get(name)!r}, this is "
                    f"{now!r}: its last bits may differ",
                    stacklevel=3,
                )
        size = note["metrics_bytes"]
        data = self._path.read_bytes()[:size] if self._path.exists() else b""
        if hashlib.sha256(data).hexdigest() != note["metrics_sha256"]:
            raise CheckpointError(
                f"{self._path}: expected to begin with the {size} bytes that it had at step "
                f"{found.step}, got others"
            )
        os.truncate(self._path, size)
        self.rows = [json.loads(line) for line in data.splitlines()]
        self.step, (self.seconds, self.seconds_of_steps) = found.step, note["seconds"]

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            # A shell's background job ignores SIGINT, and goes on to.
            if signal.getsignal(number) != signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._on_signal)
        self._metrics = open(self._path, "ab")
        self._sha256 = hashlib.sha256(self._path.read_bytes())
        self._last = self._saved = time.monotonic()
        return self

    def __exit__(self, *_):
        self._clock()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._metrics.close()

    def _on_signal(self, number, _):
        self._signal = signal.Signals(number)
        for each in self._handlers:
            signal.signal(each, signal.SIG_DFL)

    def _clock(self, of_steps: bool = True) -> None:
        now = time.monotonic()
        self.seconds += now - self._last
        self.seconds_of_steps += of_steps * (now - self._last)
        self._last = now

    @contextlib.contextmanager
    def aside(self):
        """What is done within counts as the run's time, but not as that of its steps."""
        self._clock()
        yield
        self._clock(of_steps=False)

    def restore(self, state: TrainState) -> TrainState:
        """The state that the run goes on from: the checkpoint's, or the one given, now saved."""
        found, self._found = self._found, None
        if found is not None:
            return from_arrays(state, found.arrays)
        self._save(state)
        return state

    def log(self, row: dict) -> None:
        """One line of metrics.jsonl, in one write, so that a kill leaves no half of it."""
        line = json.dumps(row).encode() + b"\n"
        self._metrics.write(line)
        self._metrics.flush()
        self._sha256.update(line)
        self.rows.append(row)
        self.step = row["step"]

    def keep(self, state: TrainState, last: bool) -> None:
        """Saves the state where it is time to, the run ends, or a signal asks for it.

        A state whose update was skipped is not saved: what spoilt the update may be in it.

        Raises:
          Stopped: a signal came.
        """
        if self.every_steps is None:
            due = time.monotonic() - self._saved >= SAVE_EVERY
        else:
            due = self.step % self.every_steps == 0
        if (due or last or self._signal) and state.skipped == 0:
            self._save(state)
        if self._signal:
            saved = checkpoints.steps(self.folder)[-1]
            raise Stopped(
                self._signal,
                f"stopped after step {self.step}, saved at step {saved} in {self.folder}; "
                "--resume continues",
            )

    def _save(self, state: TrainState) -> None:
        self._clock()
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


def find_devices(count: int) -> None:
    """Asks for so many CPU devices; where JAX is in use already, they must be there.

    Raises:
      InputError: there are fewer.
    """
    if count > 1:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)
    if len(jax.devices()) < count:
        raise InputError(f"--devices: expected at most {len(jax.devices())}, got {count}")


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def parse(config: type, arguments: list[str] | None, smoke: dict | None = None):
    """The command line as a `config`; what is wrong with it in one line.

    With `smoke`, a flag `--smoke` makes these the defaults.
    """
    given = sys.argv[1:] if arguments is None else arguments
    default = config(smoke=True, **smoke) if smoke and "--smoke" in given else config()
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            parsed = tyro.cli(config, args=arguments, default=default)
    except SystemExit as stop:
        if not stop.code:
            raise
        # A title, and then, between rules, what is wrong, the flag's help and where there is more.
        lines = [line.strip("│╭╮╰╯ ") for line in told.getvalue().splitlines()][1:]
        parts = re.split("^[─-]+$", "\n".join(lines), flags=re.MULTILINE)
        raise InputError(" ".join(next(filter(str.strip, parts)).split())) from None
    check_counts(parsed)
    return parsed


def check_counts(config) -> None:
    """Whole numbers count something: 0 is one only where it is the default. Seeds have 32 bits."""
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), f"--{field.name.replace('_', '-')}"
        if field.name == "seed":
            if not 0 <= value < 2**32 - 1:
                raise InputError(f"{flag}: expected at least 0, below {2**32 - 1}, got {value}")
            continue
        if value == () != field.default:
            raise InputError(f"{flag}: expected at least one, got none")
        least = 0 if field.default == 0 else 1
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) is int and number < least:
                raise InputError(f"{flag}: expected at least {least}, got {number}")
    every = getattr(config, "check_every", 1)
    if hasattr(config, "updates") and config.updates % every:
        raise InputError(f"--updates: expected a multiple of {every}, got {config.updates}")


def exit_status(main: Callable[[], object]) -> int:
    """Runs main; prints what stopped it in one line, and returns the exit status."""
    try:
        main()
    except InputError as error:
        status, message = 2, str(error)
    except (CheckpointError, OSError) as error:
        status, message = 3, str(error)
    except Diverged as error:
        status, message = 4, str(error)
    except Stopped as stopped:
        status, message = stopped.status, str(stopped)
    except KeyboardInterrupt:
        status, message = 130, "SIGINT: ended at once"
    else:
        return 0
    print(message, file=sys.stderr)
    return status
