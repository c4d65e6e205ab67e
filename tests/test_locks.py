"""Of two processes, or two runs, that want to write to one folder, the second is refused."""

import dataclasses
import re

import pytest

from experiments import copy_memory, locks, run_state
from experiments.cli import InputError
from experiments.reports import Report
from jaxrnn import checkpoints
from tests.char_lm_runs import train
from tests.test_cli import run_python

IN_USE = "expected a folder to which no other process writes, got one in use"


def test_a_run_whose_folder_is_in_use_is_refused_and_changes_nothing(text, tmp_path, capsys):
    assert train(text, tmp_path) == 0
    capsys.readouterr()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with locks.open_alone(tmp_path / "metrics.jsonl"):
        for flags in (["--resume"], ["--overwrite"]):
            assert train(text, tmp_path, *flags) == 2
            assert capsys.readouterr().err == f"{tmp_path}: {IN_USE}\n"
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert train(text, tmp_path, "--resume") == 0


def test_an_experiment_whose_folder_is_in_use_is_refused(tmp_path):
    config = copy_memory.Config(out=tmp_path)
    first = Report(config)  # it has not written a line yet
    for overwrite in (False, True):
        with pytest.raises(InputError, match=IN_USE):
            Report(dataclasses.replace(config, overwrite=overwrite))
    first.log(updates=1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"updates": 1}\n'


def test_another_process_holds_the_lock_until_it_ends(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with locks.open_alone(path):
        code = f"import pathlib as p, experiments.locks as l; l.open_alone(p.Path({str(path)!r}))"
        done = run_python(code)
        assert done.returncode == 1
        assert re.search(f"InputError: .*{IN_USE}", done.stderr.decode())
    assert run_python(code).returncode == 0  # and ends without closing the file
    locks.open_alone(path).close()


def test_a_run_that_another_process_has_continued_since_is_refused(tmp_path):
    run = run_state.Run(tmp_path, {})
    checkpoints.save(tmp_path, 5, {}, {})
    with pytest.raises(InputError, match="expected the run as it was, got a later one"), run:
        pass
    assert checkpoints.saved_steps(tmp_path) == [5]
