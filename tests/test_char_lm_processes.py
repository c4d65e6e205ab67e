"""The character model over real processes on one host: values, resuming, and a process that dies.

Tests that start processes run with `JAXRNN_THOROUGH=1`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import char_lm, processes, run_state
from experiments.cli import InputError
from tests.char_lm_runs import SIZES, train
from tests.conftest import FAST_COMPILATION

ROOT = Path(__file__).parent.parent


def start(count: int, text, out: Path, *flags: str) -> list[subprocess.Popen]:
    """A run over `count` processes, each with a text of its own if `text` is a list; one is the
    usual command."""
    texts = text if isinstance(text, list) else [text] * count
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "experiments.char_lm", *SIZES, "--out", str(out)]
    command += ["--checkpoint-every-steps", "6", *flags, "--text"]
    place = ["--coordinator", coordinator, "--processes", str(count), "--process"]
    environment = os.environ | {"XLA_FLAGS": FAST_COMPILATION}
    return [
        subprocess.Popen(
            [*command, str(texts[number]), *([*place, str(number)] if count > 1 else [])],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(count)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """The status and what was printed of each."""
    printed = [process.communicate(timeout=240) for process in processes]
    return [(p.returncode, *texts) for p, texts in zip(processes, printed, strict=True)]


def metrics(out: Path) -> np.ndarray:
    """The loss and the gradient norm of each step."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return np.array([[row["train_bpc"], row["gradient_norm"]] for row in rows])


def test_a_process_that_does_not_write_needs_no_folder():
    assert processes.Follower({}).rows == []


def test_a_coordinator_that_does_not_listen_is_named():
    with socket.socket() as free:  # bound, but it does not listen
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(
            InputError, match=f"--coordinator: expected process 0 at {place}, got: "
        ):
            processes.wait_for(place, seconds=0)
        free.listen()
        processes.wait_for(place)


@pytest.mark.parametrize("place", ["localhost", ":1234", "localhost:http", "localhost:65536"])
def test_a_coordinator_without_host_or_port_is_named(place):
    with pytest.raises(InputError, match=f"--coordinator: expected HOST:PORT, got {place}"):
        processes.wait_for(place)


@pytest.fixture(scope="module")
def of_one_process(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "one"
    flags = ["--steps", "20", *SIZES, "--text", str(text), "--out", str(out)]
    assert char_lm.run(flags) == 0
    return metrics(out)


@pytest.mark.thorough
@pytest.mark.parametrize("count", [2, 4])
def test_processes_have_the_losses_and_gradients_of_one_which_they_continue(
    count, text, tmp_path, of_one_process
):
    ((status, _, _),) = finish(start(1, text, tmp_path, "--steps", "6"))
    assert status == 0
    first, *others = finish(start(count, text, tmp_path, "--steps", "20", "--resume"))
    assert first[0] == 0, first
    assert "validation" in first[2]
    assert f"results are in {tmp_path}" in first[1]
    assert [other[:2] for other in others] == [(0, "")] * (count - 1)
    np.testing.assert_allclose(metrics(tmp_path), of_one_process, rtol=1e-5)
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 20


@pytest.mark.thorough
@pytest.mark.parametrize(("count", "victim"), [(2, 0), (2, 1), (4, 0), (4, 1)])
def test_a_process_that_dies_ends_the_others_and_the_run_resumes(
    count, victim, text, tmp_path, of_one_process
):
    processes = start(count, text, tmp_path, "--steps", "100000")
    path = tmp_path / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < 8:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    processes[victim].kill()
    ended = finish(processes)
    assert ended.pop(victim)[0] == -signal.SIGKILL
    for status, _, error in ended:
        assert status == 5
        last = error.splitlines()[-1]
        assert last.startswith("another process of the run has ended")
        Path(last.rsplit(" ", 1)[-1]).unlink()
        assert "Traceback" not in error
    saved = max(int(path.stem.split("-")[1]) for path in tmp_path.glob("checkpoint-*.npz"))
    ((status, _, error),) = finish(start(1, text, tmp_path, "--steps", str(saved + 3), "--resume"))
    assert status == 0, error
    shared = min(len(of_one_process), saved + 3)
    np.testing.assert_allclose(metrics(tmp_path)[:shared], of_one_process[:shared], rtol=1e-4)
    assert len(metrics(tmp_path)) == saved + 3


@pytest.mark.usefixtures("usual_signals")
def test_a_signal_after_the_processes_have_agreed_waits_for_the_next_step(
    text, tmp_path, monkeypatch, capsys
):
    """Else one process would save, or stop, while the others wait for it in the next update."""
    agree = run_state.Run._agree

    def agree_before_the_signal(run, *arguments):
        agreed = agree(run, *arguments)
        if run.step == 8:
            signal.raise_signal(signal.SIGTERM)
        return agreed

    monkeypatch.setattr(run_state.Run, "_agree", agree_before_the_signal)
    assert train(text, tmp_path / "out") == 143
    assert "SIGTERM: stopped after step 9, saved at step 9" in capsys.readouterr().err


@pytest.mark.thorough
def test_a_signal_to_one_process_stops_all_after_saving(text, tmp_path, of_one_process):
    processes = start(2, text, tmp_path, "--steps", "100000")
    path = tmp_path / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < 8:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    for status, _, error in finish(processes):
        assert status == 143
        assert error.splitlines()[-1].startswith("SIGTERM: stopped after step ")
    done = len(metrics(tmp_path))
    assert (tmp_path / f"checkpoint-{done}.npz").exists()


@pytest.mark.thorough
def test_processes_with_other_settings_are_refused(text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    out = tmp_path / "out"
    for status, _, error in finish(start(2, [text, other], out, "--steps", "3")):
        assert status in (2, 5)  # 5 if the other process was faster
        assert status == 5 or "expected the settings and the text of process 0" in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes", "2"], "--processes: expected together with --coordinator"),
        (["--coordinator", "127.0.0.1:1"], "--processes: expected together with --coordinator"),
        (["--process", "1"], "--process: expected below 1, got 1"),
        (["--processes", "0"], "--processes: expected at least 1, got 0"),
        (
            ["--processes", "3", "--coordinator", "127.0.0.1:1"],
            "--devices: expected a divisor of batch_size 8 / 3 processes, got 1",
        ),
    ],
)
def test_flags_that_do_not_fit_are_one_line(flags, message, text, tmp_path, capsys):
    assert char_lm.run([*SIZES, "--text", str(text), "--out", str(tmp_path), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
