"""A run that is killed, stopped or given up, and what can be found of it afterwards.

`JAXRNN_THOROUGH=1` kills 25 runs and stops 10; else one of each.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import char_lm, runs
from jaxrnn import CheckpointError, checkpoints

ROOT = Path(__file__).parent.parent
THOROUGH = os.environ.get("JAXRNN_THOROUGH") == "1"
TEXT = "the quick brown fox jumps over the lazy dog.\n" * 40
# Seven windows are an epoch: it ends at step 7, 14, ...
SIZES = ["--hidden-size", "8", "--batch-size", "8", "--window", "28"]
TINY = ["--steps", "20", *SIZES, "--checkpoint-every-steps", "6"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def char_lm_in(text, tmp_path):
    """Runs it in this process, in a folder of the test."""

    def call(*flags, out=tmp_path / "out"):
        return char_lm.run([*TINY, "--text", text, "--out", str(out), *flags])

    return call


@pytest.fixture
def stopped_at(monkeypatch):
    """Has something happen in the middle of the update of a step."""
    make_update = char_lm.jaxrnn.make_update

    def at(step, happens):
        def make(*arguments):
            update = make_update(*arguments)

            def updated(state, batch):
                state, metrics = update(state, batch)
                if state.step == step:
                    return happens(state, metrics) or (state, metrics)
                return state, metrics

            return updated

        monkeypatch.setattr(char_lm.jaxrnn, "make_update", make)

    yield at
    monkeypatch.undo()


def results(out: Path) -> dict:
    """Everything that a run leaves, but for times."""
    summary = json.loads((out / "summary.json").read_text())
    found = checkpoints.newest(out)
    return {
        "metrics": (out / "metrics.jsonl").read_bytes(),
        "sample": (out / "sample.txt").read_bytes(),
        "summary": {name: value for name, value in summary.items() if "seconds" not in name},
        "state": {name: array.tobytes() for name, array in found.arrays.items()},
        "step": found.step,
    }


class Killed(BaseException):
    """What no handler sees."""


def kill(*_):
    raise Killed


def test_a_run_resumes_from_its_last_checkpoint_to_the_same_bytes(
    char_lm_in, tmp_path, stopped_at, monkeypatch, capsys
):
    assert char_lm_in(out=tmp_path / "whole") == 0
    expected = results(tmp_path / "whole")
    assert expected["step"] == 20
    for kills in ((14,), (3, 8, 13)):  # the end of an epoch; before the first checkpoint, and again
        out = tmp_path / f"killed-{len(kills)}"
        for number, step in enumerate(kills):
            flags = ["--resume"] if number else []
            stopped_at(step, kill)
            with pytest.raises(Killed):
                char_lm_in(*flags, out=out)
            monkeypatch.undo()
            assert checkpoints.steps(out)[-1] == step // 6 * 6
        assert char_lm_in("--resume", "--checkpoint-every-steps", "4", out=out) == 0
        assert results(out) == expected
    # A run that is done resumes to where it was; one that never was starts.
    assert char_lm_in("--resume", out=tmp_path / "whole") == 0
    assert char_lm_in("--resume", out=tmp_path / "new") == 0
    assert results(tmp_path / "whole") == results(tmp_path / "new") == expected
    assert "holds no checkpoint; starting at step 0" in capsys.readouterr().err


@pytest.fixture
def usual_signals():
    """Both signals end a process; where the tests run in the background, SIGINT is ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("usual_signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_says_so(name, char_lm_in, tmp_path, stopped_at, monkeypatch, capsys):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    stopped_at(8, lambda *_: signal.raise_signal(number))
    assert char_lm_in() == 128 + number == {"SIGTERM": 143, "SIGINT": 130}[name]
    out = tmp_path / "out"
    message = f"{name}: stopped after step 8, saved at step 8 in {out}; --resume continues\n"
    assert capsys.readouterr().err == message
    assert checkpoints.newest(out).step == 8
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    assert char_lm_in() == 2
    message = f"{out}: expected no unfinished run, got one at step 8: --resume continues it"
    assert capsys.readouterr().err.startswith(message)
    assert checkpoints.newest(out).step == 8


@pytest.mark.usefixtures("usual_signals")
def test_a_signal_that_is_ignored_stays_so(char_lm_in, stopped_at):
    """As that of a shell's background jobs is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stopped_at(8, lambda *_: signal.raise_signal(signal.SIGINT))
    assert char_lm_in() == 0
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.usefixtures("usual_signals")
def test_a_second_signal_ends_at_once(stopped_at, char_lm_in):
    def twice(*_):
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    stopped_at(8, twice)
    assert char_lm_in() == 143


def test_an_interrupt_outside_the_training_is_one_line(monkeypatch, char_lm_in, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(char_lm, "split", interrupted)
    assert char_lm_in() == 130
    assert capsys.readouterr().err == "SIGINT: ended at once\n"


def test_without_a_number_of_steps_it_saves_by_the_clock(stopped_at, text, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "SAVE_EVERY", 0.0)
    stopped_at(5, kill)
    with pytest.raises(Killed):
        char_lm.run(["--steps", "9", *SIZES, "--text", text, "--out", str(tmp_path)])
    assert checkpoints.steps(tmp_path) == [3, 4]


@pytest.fixture
def done(char_lm_in, tmp_path):
    assert char_lm_in() == 0
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "1"], "--seed: expected 0 as the run in {out} has, got 1"),
        (["--steps", "21"], "--steps: expected 20 as the run in {out} has, got 21"),
        (["--hidden-size", "9"], "--hidden-size: expected 8 as"),
        (["--learning-rate", "0.1"], "--learning-rate: expected 0.002 as"),
        (["--text", "{other}"], "--text: expected 'SHA-256 "),
    ],
)
def test_other_settings_are_refused_by_name(flags, message, done, char_lm_in, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text(TEXT.replace("fox", "cat"))
    capsys.readouterr()
    before = results(done)
    assert char_lm_in("--resume", *(flag.format(other=other) for flag in flags)) == 2
    assert capsys.readouterr().err.startswith(message.format(out=done))
    assert results(done) == before


def rewrite(out: Path, **note):
    found = checkpoints.newest(out)
    checkpoints.save(out, found.step, found.arrays, found.note | note)


def test_other_versions_are_said(done, char_lm_in):
    rewrite(done, versions=runs.versions() | {"jax": "0.0.1"})
    with pytest.warns(UserWarning, match=r"^jax: the run was made with '0.0.1', this is '"):
        assert char_lm_in("--resume") == 0


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(done, char_lm_in, capsys):
    expected = results(done)
    (done / "checkpoint-20.npz").write_bytes(b"")
    with pytest.warns(UserWarning, match="going back to step 18"):
        assert char_lm_in("--resume") == 0
    assert results(done) == expected
    capsys.readouterr()
    for path in done.glob("checkpoint-*"):
        path.write_bytes(b"")
    assert char_lm_in("--resume") == 3
    error = capsys.readouterr().err
    assert "checkpoint-20.npz: expected more than" in error
    assert error.count("\n") == 1


def test_metrics_that_are_not_what_they_were_are_refused(done, char_lm_in, capsys):
    path = done / "metrics.jsonl"
    lines = path.read_bytes()
    path.write_bytes(lines + b'{"step": 21, "tra')  # what comes after the checkpoint goes
    assert char_lm_in("--resume") == 0
    assert path.read_bytes() == lines
    capsys.readouterr()
    for damage in (lines[:-1], lines.replace(b"1", b"2", 1), None):
        path.unlink() if damage is None else path.write_bytes(damage)
        assert char_lm_in("--resume") == 3
        assert f"{path}: expected to begin with the" in capsys.readouterr().err


def test_a_checkpoint_of_something_else_is_refused(done, char_lm_in, capsys):
    found = checkpoints.newest(done)
    checkpoints.save(done, 20, found.arrays, "a note")
    assert char_lm_in("--resume") == 2
    assert "--experiment: expected None as the run" in capsys.readouterr().err


def finite(out: Path) -> bool:
    found = [checkpoints.load(checkpoints.file_of(out, step)) for step in checkpoints.steps(out)]
    return all(np.isfinite(array).all() for each in found for array in each.arrays.values())


def test_a_run_that_diverges_stops_and_its_last_good_checkpoint_stands(
    char_lm_in, tmp_path, capsys
):
    assert char_lm_in("--learning-rate", "3e38", "--max-skipped", "7") == 4
    error = capsys.readouterr().err
    assert error.startswith("step 2: skipped, as loss or gradient are not finite\nstep 8: expected")
    assert "Try a smaller learning rate" in error
    assert error.count("\n") == 2
    rows = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row).get("skipped", 0) for row in rows] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert checkpoints.steps(tmp_path / "out") == [0]
    assert finite(tmp_path / "out")


def test_a_nan_in_the_carried_state_never_gets_into_a_checkpoint(
    char_lm_in, tmp_path, stopped_at, capsys
):
    """Its step is skipped until the text begins anew, with a state of zeros; then all is well."""
    stopped_at(10, lambda state, metrics: (state._replace(h=state.h * np.nan), metrics))
    assert char_lm_in("--checkpoint-every-steps", "1", "--max-skipped", "5") == 0
    out = tmp_path / "out"
    assert json.loads((out / "summary.json").read_text())["skipped"] == 4
    assert finite(out)
    assert "step 11: skipped" in capsys.readouterr().err


def test_a_signal_while_updates_are_skipped_keeps_the_checkpoint_from_before(
    char_lm_in, tmp_path, stopped_at, capsys
):
    def spoil(state, metrics):
        signal.raise_signal(signal.SIGTERM)
        return state, metrics._replace(skipped=state.step * 0 + 1)

    stopped_at(8, lambda s, m: spoil(s._replace(skipped=s.step * 0 + 1), m))
    assert char_lm_in() == 143
    assert "stopped after step 8, saved at step 6" in capsys.readouterr().err
    assert checkpoints.steps(tmp_path / "out") == [0, 6]


def test_a_full_disk_is_status_3(char_lm_in, monkeypatch, capsys):
    def full(*_):
        raise CheckpointError("checkpoint-0.npz: expected to write it, got: no space")

    monkeypatch.setattr(checkpoints, "save", full)
    assert char_lm_in() == 3
    assert capsys.readouterr().err == "checkpoint-0.npz: expected to write it, got: no space\n"


# The same with processes and real signals.


def started(text, out, *flags) -> subprocess.Popen:
    sizes = ["--steps", "400", *SIZES, "--checkpoint-every-steps", "20"]
    command = [sys.executable, "-m", "experiments.char_lm", *sizes, "--text", text]
    return subprocess.Popen(
        [*command, "--out", str(out), *flags],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_lines(path: Path, count: int, process) -> None:
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.001)


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    process = started(text, out)
    assert process.wait() == 0, process.communicate()
    process.communicate()
    return results(out)


def complete_lines(path: Path) -> bool:
    data = path.read_bytes()
    steps = [json.loads(line)["step"] for line in data.splitlines()]
    return steps == list(range(1, len(steps) + 1)) and (not data or data.endswith(b"\n"))


@pytest.mark.parametrize("seed", range(25 if THOROUGH else 1))
def test_kill_9_at_any_moment(seed, text, tmp_path, uninterrupted):
    out, draw = tmp_path / "out", random.Random(seed)
    resume, killed = [], 0
    while killed < (2 if seed % 3 == 0 else 1):  # some are killed again after they resumed
        process = started(text, out, *resume)
        wait_for_lines(out / "metrics.jsonl", draw.randrange(0, 390), process)
        time.sleep(draw.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed, resume = killed + 1, ["--resume"]
        if (out / "metrics.jsonl").exists():
            assert complete_lines(out / "metrics.jsonl")
    process = started(text, out, "--resume")
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert results(out) == uninterrupted


@pytest.mark.parametrize("seed", range(10 if THOROUGH else 1))
def test_sigterm_at_any_moment(seed, text, tmp_path, uninterrupted):
    out, draw = tmp_path / "out", random.Random(seed)
    process = started(text, out)
    wait_for_lines(out / "metrics.jsonl", draw.randrange(1, 300), process)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate()
    assert process.returncode == 143, error
    rows = (out / "metrics.jsonl").read_bytes().count(b"\n")
    assert f"SIGTERM: stopped after step {rows}, saved at step {rows} in {out}" in error
    process = started(text, out, "--resume")
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert results(out) == uninterrupted
