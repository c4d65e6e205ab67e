"""Every experiment, run small: its files, its figures, its errors."""

import dataclasses
import json
import re

import numpy as np
import pytest

from experiments import benchmark, char_lm

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 40
TINY = ["--steps", "12", "--hidden-size", "8", "--batch-size", "2", "--window", "8"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_char_lm_leaves_its_files_and_learns(text, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--steps", "150", *TINY[2:], "--learning-rate", "0.02"]
    assert char_lm.run([*flags, "--text", str(text), "--out", str(out)]) == 0
    names = {"config.json", "metrics.jsonl", "summary.json", "curve.png", "sample.txt"}
    names |= {"checkpoint-0.npz", "checkpoint-150.npz"}
    assert {path.name for path in out.iterdir()} == names
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 151))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 150
    assert rows[0]["train_bpc"] == pytest.approx(np.log2(len(set(TEXT))), rel=0.2)
    assert summary["valid_bpc"] == rows[-1]["valid_bpc"] < 0.7 * rows[0]["train_bpc"]
    assert {"train_bpc", "test_bpc", "seconds"} < summary.keys()
    assert json.loads((out / "config.json").read_text())["learning_rate"] == 0.02
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    sample = (out / "sample.txt").read_text()
    assert len(sample) == 601
    assert set(sample) <= set(TEXT)
    assert f"{summary['valid_bpc']:.3f}" in capsys.readouterr().out


def test_char_lm_is_decided_by_its_seed(text, tmp_path):
    rows = []
    for name, seed in [("a", "3"), ("b", "3"), ("c", "4")]:
        out = tmp_path / name
        flags = [*TINY, "--seed", seed, "--text", str(text), "--out", str(out)]
        assert char_lm.run(flags) == 0
        rows.append((out / "metrics.jsonl").read_text())
    assert rows[0] == rows[1] != rows[2]


def test_char_lm_says_every_default(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        char_lm.run(["--help"])
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(char_lm.Config):
        flag = "--resume, --no-resume" if field.name == "resume" else field.name.replace("_", "-")
        assert re.search(rf"{flag} .*?\(default: {re.escape(str(field.default))}\)", told), flag


def test_the_progress_bar_is_for_terminals(text, tmp_path, capsys):
    assert char_lm.run([*TINY, "--text", str(text), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == ""


def test_char_lm_reads_cpythons_documentation_by_default():
    text = char_lm.read_text(None)
    assert len(text) > 400_000
    assert "The Python" in text


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, [], "{path}: expected a readable text file, got: No such file or directory"),
        (b"", [], "{path}: expected at least 60 characters for batch_size 2 and window 8, got 0"),
        (b"too short", [], "{path}: expected at least 60 characters .* got 9"),
        (b"\xff\xfe" * 99, [], "{path}: expected UTF-8 text, got a bad byte at 0"),
        (b"a" * 99, ["--batch-size", "64"], "{path}: expected at least 1300 .* got 99"),
        (b"a" * 99, ["--steps", "0"], "--steps: expected at least 1, got 0"),
        (b"a" * 99, ["--hidden-size", "-1"], "--hidden-size: expected at least 1, got -1"),
        (b"a" * 99, ["--learning-rate", "nan"], "--learning-rate: expected above 0 .*, got nan"),
        (b"a" * 99, ["--learning-rate", "1e39"], "--learning-rate: expected above 0 .*, got 1e"),
        (b"a" * 99, ["--learning-rate", "1e-50"], "--learning-rate: expected above 0 .*, got 1e"),
        (b"a" * 99, ["--learning-rate", "-1"], "--learning-rate: expected above 0 .*, got -1.0"),
        (b"a" * 99, ["--learning-rate", "fast"], "Error parsing --learning-rate: .* 'fast'"),
        (b"a" * 99, ["--hidden-size", "1000000"], "--hidden-size: expected what .* GB"),
        (b"a" * 99, ["--seed", "-1"], "--seed: expected at least 0, below 4294967295, got -1"),
        (b"a" * 99, ["--seed", "1099511627781"], "--seed: expected .*, got 1099511627781"),
        (b"a" * 99, ["--seed", "1.5"], "Error parsing --seed: .*'1.5'"),
        (b"a" * 99, ["--steps", "many"], "Error parsing --steps: .*'many'"),
        (b"a" * 99, ["--steps"], "Missing value for argument '--steps'"),
        (b"a" * 99, ["--stepz", "3"], "Unrecognized options: --stepz"),
        (b"a" * 99, ["more"], "Unrecognized options: more"),
        (b"a" * 99, ["--window", "0"], "--window: expected at least 1, got 0"),
        (b"a" * 99, ["--max-skipped", "0"], "--max-skipped: expected at least 1, got 0"),
        (b"a" * 99, ["--checkpoint-every-steps", "0"], "--checkpoint-every-steps: .* 1, got 0"),
        (b"a" * 99, ["--text", "{path}/.."], "{path}/..: expected a readable text file, got: Not"),
        (b"a" * 99, ["--text", "/"], "/: expected a readable text file, got: Is a directory"),
        (b"a" * 99, ["--out", "{path}/run"], "{path}/run: expected a folder to write to: Not a"),
        (b"a" * 99, ["--out", "{path}"], "{path}: expected a folder to write to: File exists"),
    ],
)
def test_char_lm_names_what_it_cannot_use(content, flags, message, tmp_path, capsys):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    flags = ["--out", str(tmp_path / "out"), *(flag.format(path=path) for flag in flags)]
    assert char_lm.run([*TINY, "--text", str(path), *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1

    assert re.match(message.format(path=re.escape(str(path))), error)


def test_benchmark_compares_and_leaves_its_files(tmp_path, capsys):
    """Where a peer is not installed it says so; all that are there must agree before it times."""
    rows = benchmark.main(benchmark.Config(sizes="small", repeats=3, devices=2, out=tmp_path))
    written = [json.loads(line) for line in (tmp_path / "benchmark.jsonl").read_text().splitlines()]
    assert len(written) == len(rows) >= 3 * 8
    assert all(row["min_ms"] <= row["median_ms"] for row in written)
    assert {"bptt", "bptt x 2", "plain scan", "floor"} <= {row["method"] for row in rows}
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    told = capsys.readouterr()
    assert "floor x" in told.out
    for module, name in [("flax", "Flax"), ("haiku", "Haiku"), ("torch", "torch")]:
        there = any(name in row["method"] for row in rows)
        assert there != (f"{name} is not installed" in told.err), module


def test_benchmark_refuses_a_method_with_another_gradient(tmp_path, monkeypatch):
    def wrong(params, batch):
        return 1.001 * benchmark.hoisted_scan(params, batch)

    monkeypatch.setattr(benchmark, "plain_scan", wrong)
    config = benchmark.Config(sizes="small", out=tmp_path)
    size = benchmark.SIZES["small"][0]
    with pytest.raises(AssertionError, match="differs from the plain scan"):
        benchmark.methods(
            config,
            size,
            *benchmark.data(size, "float32"),
            dict.fromkeys(("flax", "haiku", "torch")),
        )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--devices", "3"], "--devices: expected a divisor of batch_size 2, got 3"),
        (["--devices", "64", "--batch-size", "64"], "--devices: expected at most"),
    ],
)
def test_char_lm_names_devices_that_it_cannot_use(flags, message, text, tmp_path, capsys):
    arguments = [*TINY, "--text", str(text), "--out", str(tmp_path / "out"), *flags]
    assert char_lm.run(arguments) == 2
    assert capsys.readouterr().err.startswith(message)


def test_char_lm_split_over_devices_learns_the_same(text, tmp_path):
    losses = []
    for devices in ("1", "2"):
        out = tmp_path / devices
        flags = [*TINY, "--text", str(text), "--out", str(out), "--devices", devices]
        assert char_lm.run(flags) == 0
        losses.append(json.loads((out / "summary.json").read_text())["valid_bpc"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
