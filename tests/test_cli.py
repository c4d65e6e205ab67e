"""The command line of the experiments: settings, their errors, exit statuses, output."""

import dataclasses
import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import adding, cli, copy_memory, long_lag_tasks, temporal_order
from experiments.cli import InputError
from jaxrnn import Diverged
from jaxrnn.checkpoints import CheckpointError
from tests import test_reproductions

ROOT = Path(__file__).parent.parent
NAMES = [*test_reproductions.NAMES, "benchmark", "kernel_check", "char_lm"]


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_the_command_and_every_setting(name, capsys):
    module = importlib.import_module(f"experiments.{name}")
    with pytest.raises(SystemExit, match=r"^0$"):
        module.run(["--help"])
    shown = capsys.readouterr().out
    assert f"usage: python -m experiments.{name} [-h]" in shown
    for field in dataclasses.fields(module.Config):
        assert f"--{field.name.replace('_', '-')}" in shown


def test_flags_override_the_smoke_sizes():
    smoke = long_lag_tasks.SMOKE
    config = cli.parse(adding.Config, ["--smoke", "--seeds", "3"], smoke)
    assert (config.seeds, config.batch_size) == (3, smoke["batch_size"])
    assert cli.parse(adding.Config, [], smoke) == adding.Config()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--updates", "many"], "Error parsing --updates: .*'many'"),
        (["--learning-rate", "fast"], "Error parsing --learning-rate: .*'fast'"),
        (["--seed", "1.5"], "Error parsing --seed: .*'1.5'"),
        (["--updates"], "Missing value for argument '--updates'"),
        (["--updatez", "3"], "Unrecognized options: --updatez"),
        (["more"], "Unrecognized options: more"),
    ],
)
def test_tyro_reports_what_it_cannot_parse(flags, message, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        temporal_order.run(flags)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--seed", "-1"], "--seed: expected at least 0 and below 4294967295, got -1"),
        (["--lengths", "5", "5"], "--lengths: expected different values, got 5 5"),
        (["--lengths"], "--lengths: expected at least one value, got none"),
        (["--check-every", "5"], "--updates: expected a multiple of 5, got 4"),
        (["--check-every", "0"], "--check-every: expected at least 1, got 0"),
        (["--clip", "nan"], "--clip: expected above 0 in float32, got nan"),
    ],
)
@pytest.mark.parametrize("module", [temporal_order, copy_memory])
def test_a_value_out_of_range_is_one_line_before_anything_else(
    module, flags, message, tmp_path, capsys
):
    out = tmp_path / "out"
    assert module.run(["--smoke", "--out", str(out), *flags]) == 2
    assert capsys.readouterr().err == message + "\n"
    assert not out.exists()


@pytest.mark.parametrize(("module", "least"), [(temporal_order, 2), (copy_memory, 1)])
def test_a_length_at_which_a_task_does_not_exist_is_one_line(module, least, tmp_path, capsys):
    flags = ["--smoke", "--out", str(tmp_path / "out"), "--lengths", "5", str(least - 1)]
    assert module.run(flags) == 2
    message = f"--lengths: expected at least {least}, got {least - 1}\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gradient_flow", {"updates": 3}, "--updates: expected a multiple of 125, got 3"),
        ("gradient_flow", {"clips": (1.0, None, 0.0)}, "--clips: expected above 0 .*, got 0.0"),
        ("gradient_flow", {"radii": ()}, "--radii: expected at least one value, got none"),
        ("japanese_vowels", {"folds": -1}, "--folds: expected at least 0, got -1"),
        ("japanese_vowels", {"epochs": 0}, "--epochs: expected at least 1, got 0"),
        ("mnist_1d", {"dropout": 1.0}, "--dropout: expected at least 0 and below 1, got 1.0"),
        ("mnist_1d", {"methods": ()}, "--methods: expected at least one value, got none"),
        ("polyphonic_music", {"learning_rates": (1.0, 1.0, -1.0)}, "--learning-rates: .* -1.0"),
        ("polyphonic_music", {"regularizer": -0.1}, "--regularizer: expected at least 0, got -0.1"),
        ("polyphonic_music", {"seed": 2**32}, "--seed: expected .*, got 4294967296"),
        ("char_sweep", {"hidden_sizes": (4, 0)}, "--hidden-sizes: expected at least 1, got 0"),
        ("adding", {"regularizer": -1.0}, "--regularizer: expected at least 0, got -1.0"),
        ("adding", {"regularizer": float("nan")}, "--regularizer: expected at least 0, got nan"),
        ("flip_flop", {"hidden_size": 2}, "--hidden-size: expected at least 3, got 2"),
        ("benchmark", {"repeats": 0}, "--repeats: expected at least 1, got 0"),
    ],
)
def test_each_config_checks_itself(name, settings, message):
    module = importlib.import_module(f"experiments.{name}")
    with pytest.raises(InputError, match=f"^{message}$"):
        module.Config(**settings)


def test_a_folder_that_cannot_be_created_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert copy_memory.run(["--smoke", "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith(f"{tmp_path}/file: expected a folder to write to")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InputError("--seed: expected 0, got 1"), 2, "--seed: expected 0, got 1"),
        (CheckpointError("file: expected 3 bytes"), 3, "file: expected 3 bytes"),
        (OSError(28, "No space left on device"), 3, "[Errno 28] No space left on device"),
        (Diverged(8, 7, [1.0]), 4, "step 8: expected finite loss, gradient, "),
        (cli.Stopped(signal.SIGTERM, "saved"), 143, "SIGTERM: saved"),
        (cli.Stopped(signal.SIGINT, "saved"), 130, "SIGINT: saved"),
        (KeyboardInterrupt(), 130, "SIGINT: ended at once"),
    ],
)
def test_an_expected_error_is_one_line_and_a_status(error, status, message, capsys):
    def fail():
        raise error

    assert cli.exit_status(fail) == status
    printed = capsys.readouterr().err
    assert printed.startswith(message)
    assert printed.count("\n") == 1


def test_an_unexpected_error_is_not_hidden():
    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.exit_status(fail)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=os.environ | environment, capture_output=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(("error", "status"), [(None, 0), (InputError("no file \udcff"), 2)])
def test_streams_that_are_closed_are_no_error(error, status, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)

    def speak():
        print(sys.stdout.isatty(), file=sys.stderr)
        if error:
            raise error

    assert cli.exit_status(speak) == status
    sys.stdout.close()
    sys.stderr.close()


def test_output_survives_any_encoding():
    code = "from experiments import cli; cli.exit_status(lambda: print('1 ± 2 🙂'))"
    done = run_python(code, PYTHONIOENCODING="ascii")
    assert (done.stdout, done.stderr) == (b"1 \\xb1 2 \\U0001f642\n", b"")


def test_a_reader_that_goes_away_is_no_error():
    code = (
        "import os, sys; from experiments import cli; read, write = os.pipe(); os.dup2(write, 1); "
        "os.close(read); os.close(write); sys.exit(cli.exit_status(lambda: print('text')))"
    )
    done = run_python(code)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.usefixtures("usual_signals")
def test_an_interrupt_during_imports_prints_one_line(tmp_path):
    """JAX's own import is where a command spends its first seconds."""
    (tmp_path / "jax.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, "-m", "experiments.char_lm"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"SIGINT: ended at once\n")


def test_importing_the_experiments_leaves_the_signals_alone():
    code = "import signal; signal.signal(2, signal.default_int_handler); import experiments; " + (
        "assert signal.getsignal(2) is signal.default_int_handler"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("usual_signals")
def test_an_own_process_leaves_an_interrupt_to_the_command(tmp_path):
    with cli.own_process(os.chdir, tmp_path) as process:
        assert process.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN
        assert process.submit(os.getcwd).result() == str(tmp_path.resolve())
        assert process.submit(os.getpid).result() != os.getpid()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("usual_signals")
def test_a_command_gets_the_usual_interrupt_back_after_its_imports(monkeypatch):
    import experiments

    monkeypatch.setattr(sys, "argv", ["-m"])
    importlib.reload(experiments)
    assert signal.getsignal(signal.SIGINT) is experiments.end_at_once

    def check_handler():
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    assert cli.exit_status(check_handler) == 0
