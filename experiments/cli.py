"""The command line of an experiment: settings, checks of them, and exit statuses.

Exit statuses:
    0    success
    2    bad usage or input
    3    files of the run are damaged or cannot be written
    4    diverged: too many consecutive updates were not finite
    5    another process of the run has ended, or a signal killed this one
    130  stopped by SIGINT after saving; a second signal ends the process at once
    141  the reader of the output went away, as `head` does
    143  stopped by SIGTERM, likewise
"""

import contextlib
import io
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
import numpy as np
import tyro

import experiments
from jaxrnn import Diverged
from jaxrnn.checkpoints import CheckpointError


class InputError(Exception):
    """Bad usage or input; the message is the one line to print."""


class Ended(Exception):
    """The command ends with this status; the message is the one line to print, if any."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Stopped(Ended):
    """A signal stopped the run, which is saved."""

    def __init__(self, number: signal.Signals, message: str):
        super().__init__(128 + number, f"{number.name}: {message}")


def flag(name: str) -> str:
    """The flag of a setting.

    >>> flag("hidden_size")
    '--hidden-size'
    """
    return f"--{name.replace('_', '-')}"


def expect(config, name: str, expected: str, holds: Callable[[Any], bool]) -> None:
    """Checks a setting, or each of its values if it is a tuple; None always passes.

    Raises:
      InputError: a value for which `holds` is false.
    """
    value = getattr(config, name)
    for each in value if isinstance(value, tuple) else (value,):
        if each is not None and not holds(each):
            raise InputError(f"{flag(name)}: expected {expected}, got {each}")


def expect_at_least(least: int, config, *names: str) -> None:
    for name in names:
        expect(config, name, f"at least {least}", lambda value: least <= value < math.inf)


def expect_positive(config, *names: str) -> None:
    """Positive, finite and neither 0 nor infinite once rounded to float32."""
    float32 = np.finfo(np.float32)
    low, high = float(float32.tiny), float(float32.max)
    for name in names:
        expect(config, name, "above 0 in float32", lambda value: low <= value <= high)


def expect_share(config, *names: str) -> None:
    for name in names:
        expect(config, name, "at least 0 and below 1", lambda value: 0 <= value < 1)


def expect_values(config, *names: str) -> None:
    """Tuples with at least one value, each once."""
    for name in names:
        values = getattr(config, name)
        if not values:
            raise InputError(f"{flag(name)}: expected at least one value, got none")
        if len(set(values)) < len(values):
            got = " ".join(map(str, values))
            raise InputError(f"{flag(name)}: expected different values, got {got}")


def expect_multiple(config, name: str, of: str) -> None:
    factor = getattr(config, of)
    expect(config, name, f"a multiple of {factor}", lambda value: value % factor == 0)


def expect_seed(config) -> None:
    """A seed has 32 bits; the next one is a seed too."""
    limit = 2**32 - 1
    expect(config, "seed", f"at least 0 and below {limit}", lambda seed: 0 <= seed < limit)


def use_devices(count: int) -> None:
    """Makes `count` CPU devices; if JAX has started already, they must exist.

    Raises:
      InputError: fewer devices exist.
    """
    if count > 1:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)
    if len(jax.devices()) < count:
        raise InputError(f"--devices: expected at most {len(jax.devices())}, got {count}")


def parse(config: type, arguments: list[str] | None, smoke: dict | None = None):
    """Parses the command line; tyro reports unknown flags and bad values, and exits with 2.

    Args:
      config: a dataclass that checks its values in `__post_init__`.
      arguments: those after the command's name; None takes them from `sys.argv`.
      smoke: the defaults if `--smoke` is given.

    Returns:
      A `config`.

    Raises:
      InputError: a value that `config` refuses.
    """
    given = sys.argv[1:] if arguments is None else arguments
    default = config(smoke=True, **smoke) if smoke and "--smoke" in given else config()
    module = sys.modules[config.__module__].__spec__  # its name is right for `python -m` too
    prog = f"python -m {module.name}" if module else None
    return tyro.cli(config, args=given, default=default, prog=prog)


def own_process(
    set_up: Callable[..., object] | None = None, *arguments: Any
) -> ProcessPoolExecutor:
    """One new process, which calls set_up(*arguments) first, and ignores Ctrl-C."""
    process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), set_up, arguments)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by the new process
    started = process.submit(int)
    signal.signal(signal.SIGINT, handler)
    started.result()
    return process


def open_closed_streams() -> None:
    """Discards what is written to a stream that is closed, as by `>&-`."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", errors="backslashreplace"))  # noqa: SIM115


def exit_status(main: Callable[[], object]) -> int:
    """Runs `main`, prints an expected error in one line, and returns the exit status."""
    if signal.getsignal(signal.SIGINT) is experiments.end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # any text prints in any encoding
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        status, message = 2, str(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
        return 128 + signal.SIGPIPE
    except (CheckpointError, OSError) as error:
        status, message = 3, str(error)
    except Diverged as error:
        status, message = 4, str(error)
    except Ended as ended:
        status, message = ended.status, str(ended)
    except KeyboardInterrupt:
        status, message = 130, "SIGINT: ended at once"
    else:
        return 0
    if message:
        print(message, file=sys.stderr)
    return status
