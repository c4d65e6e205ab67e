"""The script that checks and times the kernels on a GPU, on a machine that may have none."""

import json

import jax
import pytest

from experiments import kernel_check
from jaxrnn import kernels
from jaxrnn.recurrence import scan


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_without_a_gpu_it_ends_with_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernel_check, "has_gpu", lambda: False)
    assert kernel_check.run(["--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("kernel_check: expected an NVIDIA GPU, got a ")
    assert not (tmp_path / "out").exists()


@pytest.mark.thorough
def test_the_interpreter_checks_the_values(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_check, "SMOKE_CLASSES", kernel_check.SMOKE_CLASSES[1:])
    assert kernel_check.run(["--smoke", "--interpret", "--out", str(tmp_path)]) == 0
    (row,) = rows(tmp_path)
    assert 0 < row["error"] <= 4 * row["scan_error"] + 1e-6
    assert "1 classes agree" in json.loads((tmp_path / "summary.json").read_text())["ours"]


@pytest.mark.thorough
def test_all_of_it_runs(tmp_path, capsys, monkeypatch):
    """On a CPU, where the scan takes the place of the kernel."""
    monkeypatch.setattr(kernel_check, "has_gpu", lambda: True)
    monkeypatch.setattr(
        kernel_check.peers, "versions", lambda: dict.fromkeys(kernel_check.peers.PACKAGES)
    )
    assert kernel_check.run(["--smoke", "--out", str(tmp_path)]) == 0
    kinds = [row["kind"] for row in rows(tmp_path)]
    assert kinds == ["check"] * 2 + ["forward"] * 3 + ["size"] * 2
    assert "| 9, 2, 3, 4, 5 | " in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {
        "metrics.jsonl", "figure.png", "summary.json"
    }  # fmt: skip


@pytest.mark.thorough
def test_a_kernel_that_is_wrong_is_refused(monkeypatch):
    def wrong(step, *arguments, interpret=False, **keywords):
        carry, outputs = scan(step, *arguments, **keywords)
        return carry, jax.tree.map(lambda x: 1.01 * x, outputs)

    monkeypatch.setattr(kernels, "loop", wrong)
    config = kernel_check.Config(interpret=True, T=20)
    with pytest.raises(AssertionError, match=r"^Class\(dtype='float32', H=5.*: the kernel's error"):
        kernel_check.check(kernel_check.SMOKE_CLASSES[0], config)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--T", "15"], "--T: expected at least 16, got 15"),
        (["--rows", "narrow"], "--rows: expected typical"),
    ],
)
def test_a_bad_setting_is_named(flags, message, tmp_path, capsys):
    assert kernel_check.run(["--smoke", *flags, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(message)
