"""A run that is killed, stopped or given up resumes bit-identically, all in one process."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from experiments import char_lm, run_state
from jaxrnn import checkpoints
from tests.char_lm_runs import SIZES, TEXT, results, train


@pytest.fixture
def during_update(monkeypatch):
    """Calls a function in the middle of the update of a step."""
    make_update = char_lm.jaxrnn.make_update

    def install(step, call):
        def make(*arguments):
            update = make_update(*arguments)

            def updated(state, batch):
                state, metrics = update(state, batch)
                if state.step == step:
                    return call(state, metrics) or (state, metrics)
                return state, metrics

            return updated

        monkeypatch.setattr(char_lm.jaxrnn, "make_update", make)

    yield install
    monkeypatch.undo()


class Killed(BaseException):
    """An exception that no handler catches."""


def kill(*_):
    raise Killed


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """The folder of a run that nothing interrupted; to read only."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert train(text, out) == 0
    return out


@pytest.fixture(scope="module")
def uninterrupted(finished):
    return results(finished)


@pytest.fixture
def done(finished, tmp_path):
    """A copy of the folder of a finished run."""
    return shutil.copytree(finished, tmp_path / "out")


# The end of a pass; before the first checkpoint, and after the run has resumed.
@pytest.mark.parametrize("kills", [(14,), (3, 8, 13)])
def test_resume_is_bit_identical(kills, text, tmp_path, uninterrupted, during_update, monkeypatch):
    out = tmp_path / "killed"
    for number, step in enumerate(kills):
        during_update(step, kill)
        with pytest.raises(Killed):
            train(text, out, *(["--resume"] if number else []))
        monkeypatch.undo()
        assert checkpoints.saved_steps(out)[-1] == step // 6 * 6
    assert train(text, out, "--resume", "--checkpoint-every-steps", "4") == 0
    assert results(out) == uninterrupted
    assert uninterrupted["step"] == 20


def test_a_finished_run_resumes_to_itself(text, done, uninterrupted):
    assert train(text, done, "--resume") == 0
    assert results(done) == uninterrupted


def test_resume_starts_a_run_that_never_was(text, tmp_path, uninterrupted, capsys):
    assert train(text, tmp_path / "new", "--resume") == 0
    assert results(tmp_path / "new") == uninterrupted
    assert "no checkpoint found; starting at step 0" in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["13", "10"])  # between evaluations, and at one
def test_a_longer_run_equals_one_that_was_extended(steps, text, tmp_path, uninterrupted):
    out = tmp_path / "extended"
    assert train(text, out, "--steps", steps) == 0
    assert train(text, out, "--resume") == 0
    assert results(out) == uninterrupted


def test_a_run_cannot_shrink(text, done, capsys):
    before = results(done)
    capsys.readouterr()
    assert train(text, done, "--resume", "--steps", "19") == 2
    message = f"--steps: expected at least the 20 that the run in {done} has done, got 19\n"
    assert capsys.readouterr().err == message
    assert results(done) == before


def test_a_finished_run_is_not_discarded(text, done, uninterrupted, capsys):
    capsys.readouterr()
    assert train(text, done, "--seed", "1") == 2
    assert capsys.readouterr().err == (
        f"{done}: expected a folder without a run, got a finished one: --resume continues it, "
        "--overwrite discards it, another --out leaves it as it is\n"
    )
    assert results(done) == uninterrupted
    assert train(text, done, "--seed", "1", "--overwrite") == 0
    assert results(done) != uninterrupted
    assert train(text, done, "--overwrite") == 0
    assert results(done) == uninterrupted


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_metrics_without_a_checkpoint_are_not_discarded(flags, text, tmp_path, capsys):
    """Those of another experiment, for example."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"T": 5}\n')
    assert train(text, tmp_path, *flags) == 2
    message = f"{tmp_path}: expected a folder without a run, got an unfinished one: --overwrite"
    assert capsys.readouterr().err.startswith(message)
    assert path.read_text() == '{"T": 5}\n'


@pytest.mark.usefixtures("usual_signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_stops_the_run_and_saves_it(
    name, text, tmp_path, during_update, monkeypatch, capsys
):
    number, out = getattr(signal, name), tmp_path / "out"
    before = signal.getsignal(number)
    during_update(8, lambda *_: signal.raise_signal(number))
    assert train(text, out) == 128 + number == {"SIGTERM": 143, "SIGINT": 130}[name]
    message = f"{name}: stopped after step 8, saved at step 8 in {out}; --resume continues\n"
    assert capsys.readouterr().err == message
    assert checkpoints.newest(out).step == 8
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    assert train(text, out) == 2
    message = f"{out}: expected a folder without a run, got an unfinished one: --resume continues"
    assert capsys.readouterr().err.startswith(message)
    assert checkpoints.newest(out).step == 8


@pytest.mark.usefixtures("usual_signals")
def test_a_signal_after_the_last_step_stops_the_run_too(done, text, monkeypatch, capsys):
    def signalled(*_, **__):
        signal.raise_signal(signal.SIGTERM)
        return iter(())

    monkeypatch.setattr(char_lm, "endless_windows", signalled)
    assert train(text, done, "--resume") == 143
    assert "stopped after step 20, saved at step 20" in capsys.readouterr().err


@pytest.mark.usefixtures("usual_signals")
def test_an_ignored_signal_stays_ignored(text, tmp_path, during_update):
    """A background job of a shell ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    during_update(8, lambda *_: signal.raise_signal(signal.SIGINT))
    assert train(text, tmp_path) == 0
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.usefixtures("usual_signals")
def test_a_second_signal_ends_the_process_at_once(text, tmp_path, during_update):
    def first_of_two(*_):
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    during_update(8, first_of_two)
    assert train(text, tmp_path) == 143


def test_checkpoints_are_timed_by_default(during_update, text, tmp_path, monkeypatch):
    monkeypatch.setattr(run_state, "SAVE_EVERY", 0.0)
    during_update(5, kill)
    with pytest.raises(Killed):
        char_lm.run(["--steps", "9", *SIZES, "--text", str(text), "--out", str(tmp_path)])
    assert checkpoints.saved_steps(tmp_path) == [3, 4]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "1"], "--seed: expected 0 as in the run in {out}, got 1"),
        (["--hidden-size", "9"], "--hidden-size: expected 8 as"),
        (["--evaluate-every", "5"], "--evaluate-every: expected 10 as"),
        (["--learning-rate", "0.1"], "--learning-rate: expected 0.002 as"),
        (["--text", "{other}"], "--text: expected 'SHA-256 "),
    ],
)
def test_a_run_resumes_with_its_own_settings_only(flags, message, done, text, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text(TEXT.replace("fox", "cat"))
    capsys.readouterr()
    before = results(done)
    assert train(text, done, "--resume", *(flag.format(other=other) for flag in flags)) == 2
    assert capsys.readouterr().err.startswith(message.format(out=done))
    assert results(done) == before


def test_other_versions_raise_a_warning(done, text):
    found = checkpoints.newest(done)
    note = found.note | {"versions": run_state.versions() | {"jax": "0.0.1"}}
    checkpoints.save(done, found.step, found.arrays, note)
    with pytest.warns(UserWarning, match=r"^jax: the run was made with '0.0.1', this is '"):
        assert train(text, done, "--resume") == 0


def test_a_damaged_checkpoint_falls_back_to_the_previous_one(done, text, uninterrupted, capsys):
    (done / "checkpoint-20.npz").write_bytes(b"")
    with pytest.warns(UserWarning, match="checkpoint-20.npz.* step 18"):
        assert train(text, done, "--resume") == 0
    assert results(done) == uninterrupted
    capsys.readouterr()
    for path in done.glob("checkpoint-*"):
        path.write_bytes(b"")
    assert train(text, done, "--resume") == 3
    error = capsys.readouterr().err
    assert "checkpoint-20.npz: expected more than" in error
    assert error.count("\n") == 1


def test_changed_metrics_are_refused(done, text, capsys):
    path = done / "metrics.jsonl"
    lines = path.read_bytes()
    path.write_bytes(lines + b'{"step": 21, "tra')  # lines after the checkpoint are removed
    assert train(text, done, "--resume") == 0
    assert path.read_bytes() == lines
    capsys.readouterr()
    for damage in (lines[:-1], lines.replace(b"1", b"2", 1), None):
        path.unlink() if damage is None else path.write_bytes(damage)
        assert train(text, done, "--resume") == 3
        assert f"{path}: expected the first" in capsys.readouterr().err


def test_a_checkpoint_of_something_else_is_refused(done, text, capsys):
    capsys.readouterr()
    checkpoints.save(done, 20, checkpoints.newest(done).arrays, "a note")
    assert train(text, done, "--resume") == 2
    assert capsys.readouterr().err == (
        f"{done}: expected checkpoints of an experiment, got one without settings\n"
    )


def finite(out: Path) -> bool:
    paths = [checkpoints.checkpoint_path(out, step) for step in checkpoints.saved_steps(out)]
    found = [checkpoints.load(path) for path in paths]
    return all(np.isfinite(array).all() for each in found for array in each.arrays.values())


def test_a_diverged_run_stops_and_keeps_its_last_good_checkpoint(text, tmp_path, capsys):
    assert train(text, tmp_path, "--learning-rate", "3e38", "--max-skipped", "7") == 4
    skipped, diverged, *others = capsys.readouterr().err.splitlines()
    assert skipped == "step 2: update skipped, loss or gradient is not finite"
    assert diverged.startswith("step 8: expected")
    assert "learning rate" in diverged
    assert not others
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]  # without NaN
    assert [row.get("skipped", 0) for row in rows] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert checkpoints.saved_steps(tmp_path) == [0]
    assert finite(tmp_path)


def test_a_nan_in_the_carried_state_is_never_saved(text, tmp_path, during_update, capsys):
    """Updates are skipped until a pass begins with a state of zeros; then training continues."""
    during_update(10, lambda state, metrics: (state._replace(h=state.h * np.nan), metrics))
    assert train(text, tmp_path, "--checkpoint-every-steps", "1", "--max-skipped", "5") == 0
    assert json.loads((tmp_path / "summary.json").read_text())["skipped"] == 4
    assert finite(tmp_path)
    assert "step 11: update skipped" in capsys.readouterr().err


@pytest.mark.usefixtures("usual_signals")
def test_a_signal_while_updates_are_skipped_keeps_the_previous_checkpoint(
    text, tmp_path, during_update, capsys
):
    def skip_and_stop(state, metrics):
        signal.raise_signal(signal.SIGTERM)
        one = state.step * 0 + 1
        return state._replace(skipped=one), metrics._replace(skipped=one)

    during_update(8, skip_and_stop)
    assert train(text, tmp_path) == 143
    assert "stopped after step 8, saved at step 6" in capsys.readouterr().err
    assert checkpoints.saved_steps(tmp_path) == [0, 6]
