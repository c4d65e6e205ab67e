"""The character model: what it reads, learns and writes, and the text that is sampled from it."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from experiments import char_data, char_lm, char_sample
from tests.char_lm_runs import TEXT

ROOT = Path(__file__).parent.parent
TINY = ["--steps", "12", "--hidden-size", "8", "--batch-size", "2", "--window", "8"]


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """The folder of a run that has learned something, and what it printed to stdout."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    flags = ["--steps", "150", *TINY[2:], "--learning-rate", "0.02"]
    assert char_lm.run([*flags, "--text", str(text), "--out", str(out)]) == 0
    return out


def test_a_run_writes_its_files_and_learns(trained):
    names = {"config.json", "metrics.jsonl", "summary.json", "curve.png", "sample.txt"}
    names |= {"vocabulary.json", "checkpoint-0.npz", "checkpoint-150.npz"}
    assert {path.name for path in trained.iterdir()} == names
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 151))
    assert [row["step"] for row in rows if "valid_bpc" in row] == [100]
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["steps"] == 150
    assert rows[0]["train_bpc"] == pytest.approx(np.log2(len(set(TEXT))), rel=0.2)
    assert summary["valid_bpc"] < rows[99]["valid_bpc"] < 0.7 * rows[0]["train_bpc"]
    assert {"train_bpc", "test_bpc", "seconds"} < summary.keys()
    assert json.loads((trained / "config.json").read_text())["learning_rate"] == 0.02
    assert json.loads((trained / "vocabulary.json").read_text()) == "".join(sorted(set(TEXT)))
    assert (trained / "curve.png").read_bytes().startswith(b"\x89PNG")
    sample = (trained / "sample.txt").read_text()
    assert len(sample) == 601
    assert set(sample) <= set(TEXT)


@pytest.mark.thorough
def test_the_seed_decides_the_run(text, tmp_path):
    rows = []
    for name, seed in [("a", "3"), ("b", "3"), ("c", "4")]:
        out = tmp_path / name
        flags = [*TINY, "--seed", seed, "--text", str(text), "--out", str(out)]
        assert char_lm.run(flags) == 0
        rows.append((out / "metrics.jsonl").read_text())
    assert rows[0] == rows[1] != rows[2]


def test_help_shows_every_default(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        char_lm.run(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(char_lm.Config):
        flag = "--" + field.name.replace("_", "-")
        default = re.escape(str(field.default)) if field.default != "" else ".."
        assert re.search(rf"{flag}[ ,].*?\(default: {default}\)", shown), flag


def test_progress_is_a_line_for_each_evaluation_without_a_terminal(text, tmp_path, capsys):
    flags = [*TINY, "--evaluate-every", "6", "--text", str(text), "--out", str(tmp_path)]
    assert char_lm.run(flags) == 0
    printed = capsys.readouterr()
    bits = r"\d+\.\d{3} bpc"
    lines = [rf"step {step} of 12: {bits}, validation {bits}\n" for step in (6, 12)]
    assert re.fullmatch("".join(lines), printed.err)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert f"validation {summary['valid_bpc']:.3f} bpc" in printed.err
    assert f"{summary['valid_bpc']:.3f}" in printed.out


def test_the_default_text_is_cpythons_documentation():
    text = char_data.read_text(None)
    assert len(text) > 400_000
    assert "The Python" in text


def test_a_byte_order_mark_is_not_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abc", encoding="utf-8-sig")
    assert char_data.read_text(path) == "abc"


@pytest.mark.parametrize(("batch_size", "window"), [(2, 8), (64, 1), (3, 7), (1, 100)])
def test_the_shortest_text_is_enough_and_a_shorter_one_is_refused(batch_size, window):
    with pytest.raises(char_data.InputError) as refused:
        char_data.split("", None, batch_size, window)
    needed = int(re.search(r"at least (\d+) ", str(refused.value))[1])
    with pytest.raises(char_data.InputError, match=f"got {needed - 1}$"):
        char_data.split("a" * (needed - 1), None, batch_size, window)
    _, parts = char_data.split("a" * needed, None, batch_size, window)
    lengths = [char_data.streams(part, batch_size).xs.shape[0] for part in parts]
    assert lengths[0] >= window
    assert min(lengths) >= 1


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
        (b"a" * 99, ["--hidden-size", "1000000"], "--hidden-size: expected a network for .* GB"),
        (b"a" * 99, ["--seed", "-1"], "--seed: expected at least 0 and below 4294967295, got -1"),
        (b"a" * 99, ["--seed", "1099511627781"], "--seed: expected .*, got 1099511627781"),
        (b"a" * 99, ["--window", "0"], "--window: expected at least 1, got 0"),
        (b"a" * 99, ["--evaluate-every", "0"], "--evaluate-every: expected at least 1, got 0"),
        (b"a" * 99, ["--max-skipped", "0"], "--max-skipped: expected at least 1, got 0"),
        (b"a" * 99, ["--checkpoint-every-steps", "0"], "--checkpoint-every-steps: .* 1, got 0"),
        (b"a" * 99, ["--devices", "0"], "--devices: expected at least 1, got 0"),
        (b"a" * 99, ["--devices", "3"], "--devices: expected a divisor of batch_size 2, got 3"),
        (b"a" * 99, ["--devices", "64", "--batch-size", "64"], "--devices: expected at most"),
        (b"a" * 99, ["--resume", "--overwrite"], "--overwrite: expected without --resume"),
        (b"a" * 99, ["--prompt", "a"], "--prompt: expected together with --sample"),
        (b"a" * 99, ["--sample", "9", "--resume"], "--sample: expected without --resume"),
        (b"a" * 99, ["--text", "{path}/.."], "{path}/..: expected a readable text file, got: Not"),
        (b"a" * 99, ["--text", "/"], "/: expected a readable text file, got: Is a directory"),
        (b"a" * 99, ["--out", "{path}/run"], "{path}/run: expected a folder to write to: Not a"),
        (b"a" * 99, ["--out", "{path}"], "{path}: expected a folder to write to: File exists"),
    ],
)
def test_bad_input_is_one_line(content, flags, message, tmp_path, capsys):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    flags = ["--out", str(tmp_path / "out"), *(flag.format(path=path) for flag in flags)]
    assert char_lm.run([*TINY, "--text", str(path), *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.match(message.format(path=re.escape(str(path))), error)
    assert not (tmp_path / "out").exists()


@pytest.mark.thorough
def test_training_on_two_devices_learns_the_same(text, tmp_path):
    losses = []
    for devices in ("1", "2"):
        out = tmp_path / devices
        flags = [*TINY, "--text", str(text), "--out", str(out), "--devices", devices]
        assert char_lm.run(flags) == 0
        losses.append(json.loads((out / "summary.json").read_text())["valid_bpc"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def sample(out: Path, *flags: str) -> int:
    return char_lm.run(["--out", str(out), "--sample", *flags])


def test_a_run_writes_text_without_training(trained, capsys):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    assert sample(trained, "600") == 0
    assert capsys.readouterr().out == (trained / "sample.txt").read_text()
    assert sample(trained, "300") == 0
    assert capsys.readouterr().out == (trained / "sample.txt").read_text()[:300] + "\n"
    assert sample(trained, "300", "--seed", "1") == 0
    assert capsys.readouterr().out != (trained / "sample.txt").read_text()[:300] + "\n"
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before


def test_a_low_temperature_draws_the_most_likely_characters(trained, capsys):
    """The prompt read character by character with `step`, then the largest output each time."""
    params, vocabulary = char_sample.load(trained)
    prompt, h, written = "the qui", jnp.zeros(8), ""
    for character in prompt:
        h, y = jaxrnn.step(params, h, jnp.asarray(vocabulary.index(character)))
    for _ in range(300):
        written += vocabulary[int(y.argmax())]
        h, y = jaxrnn.step(params, h, jnp.asarray(vocabulary.index(written[-1])))
    assert sample(trained, "300", "--prompt", prompt, "--temperature", "1e-6") == 0
    assert capsys.readouterr().out == written + "\n"


def test_the_sample_follows_the_softmax_at_its_temperature():
    """An output that depends on nothing but its bias; 40,000 draws."""
    params = jaxrnn.init(jax.random.key(0), 3, 2, 3)
    params = jax.tree.map(jnp.zeros_like, params)._replace(b_y=jnp.array([0.0, 1.0, 2.0]))
    for temperature in (0.5, 1.0, 4.0):
        pieces = char_sample.sample(
            jax.random.key(1), params, "abc", 40_000, temperature=temperature
        )
        written = "".join(pieces)
        shares = [written.count(character) / len(written) for character in "abc"]
        np.testing.assert_allclose(shares, jax.nn.softmax(params.b_y / temperature), atol=0.01)


def test_a_low_temperature_does_not_overflow():
    params = jaxrnn.init(jax.random.key(0), 3, 2, 3)
    params = jax.tree.map(jnp.zeros_like, params)._replace(b_y=jnp.array([80.0, 90.0, 85.0]))
    pieces = char_sample.sample(jax.random.key(1), params, "abc", 10, temperature=1e-37)
    assert "".join(pieces) == "b" * 10


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["5", "--prompt", "the €uro"], "--prompt: expected characters of the training text, got "),
        (["5", "--temperature", "0"], "--temperature: expected above 0 in float32, got 0.0\n"),
        (["5", "--temperature", "-1"], "--temperature: expected above 0 in float32, got -1.0\n"),
        (["5", "--temperature", "nan"], "--temperature: expected above 0 in float32, got nan\n"),
        (["0"], "--sample: expected at least 1, got 0\n"),
    ],
)
def test_bad_flags_of_a_sample_are_one_line(flags, message, trained, capsys):
    capsys.readouterr()
    assert sample(trained, *flags) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(message)
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_a_folder_without_a_checkpoint_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        assert sample(folder, "5") == 2
        message = f"{folder}: expected a run of char_lm with a checkpoint, got none\n"
        assert capsys.readouterr().err == message


@pytest.mark.parametrize("content", [None, b"", b"[1]", b'"abc"'])
def test_a_damaged_vocabulary_has_status_3(content, trained, tmp_path, capsys):
    (tmp_path / "checkpoint-150.npz").write_bytes((trained / "checkpoint-150.npz").read_bytes())
    if content is not None:
        (tmp_path / "vocabulary.json").write_bytes(content)
    capsys.readouterr()
    assert sample(tmp_path, "5") == 3
    error = capsys.readouterr().err
    assert "vocabulary.json" in error
    assert error.count("\n") == 1


def test_control_characters_are_escaped_on_a_terminal_only(monkeypatch, capsys):
    text = "a\x1b[2J\x9b\r\n\t🙂"
    char_sample.print_text([text])
    assert capsys.readouterr().out == text + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    char_sample.print_text([text])
    assert capsys.readouterr().out == "a\\x1b[2J\\x9b\\r\n\t🙂\n"


@pytest.mark.thorough
def test_a_sample_survives_an_ascii_terminal(text, tmp_path):
    """Emoji in the text, and a process whose output is ASCII."""
    emoji = tmp_path / "emoji.txt"
    emoji.write_text("🙂" * 200, encoding="utf-8")
    flags = [*TINY, "--steps", "1", "--text", str(emoji), "--out", str(tmp_path / "out")]
    assert char_lm.run(flags) == 0
    command = [sys.executable, "-m", "experiments.char_lm", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--sample", "3", "--prompt", "🙂"],
        cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == (b"\\U0001f642" * 3 + b"\n", b"")
