"""Real processes, killed or stopped at any moment, resume bit-identically.

`JAXRNN_THOROUGH=1` kills 25 runs and stops 10; the default kills one.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import char_lm
from tests.char_lm_runs import SIZES, results

ROOT = Path(__file__).parent.parent
THOROUGH = os.environ.get("JAXRNN_THOROUGH") == "1"


def arguments(text, out, *flags) -> list[str]:
    sizes = ["--steps", "400", *SIZES, "--checkpoint-every-steps", "20"]
    return [*sizes, "--text", str(text), "--out", str(out), *flags]


def start_process(*arguments_of_run) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.char_lm", *arguments(*arguments_of_run)],
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
    assert char_lm.run(arguments(text, out)) == 0
    return results(out)


def has_complete_lines(path: Path) -> bool:
    data = path.read_bytes()
    steps = [json.loads(line)["step"] for line in data.splitlines()]
    return steps == list(range(1, len(steps) + 1)) and (not data or data.endswith(b"\n"))


@pytest.mark.parametrize("seed", range(25 if THOROUGH else 1))
def test_kill_9_at_any_moment(seed, text, tmp_path, uninterrupted):
    out, draw = tmp_path / "out", random.Random(seed)
    flags: list[str] = []
    for _ in range(2 if seed % 3 == 1 else 1):  # some are killed again after they resumed
        process = start_process(text, out, *flags)
        wait_for_lines(out / "metrics.jsonl", draw.randrange(0, 390), process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        flags = ["--resume"]
        if (out / "metrics.jsonl").exists():
            assert has_complete_lines(out / "metrics.jsonl")
    assert char_lm.run(arguments(text, out, "--resume")) == 0
    assert results(out) == uninterrupted


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(10))
def test_sigterm_at_any_moment(seed, text, tmp_path, uninterrupted):
    out, draw = tmp_path / "out", random.Random(seed)
    process = start_process(text, out)
    wait_for_lines(out / "metrics.jsonl", draw.randrange(1, 300), process)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate()
    assert process.returncode == 143, error
    rows = (out / "metrics.jsonl").read_bytes().count(b"\n")
    assert f"SIGTERM: stopped after step {rows}, saved at step {rows} in {out}" in error
    assert char_lm.run(arguments(text, out, "--resume")) == 0
    assert results(out) == uninterrupted
