"""Tiny runs of the character model, which several test files share."""

import json
from pathlib import Path

from experiments import char_lm
from jaxrnn import checkpoints

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 40
# Seven windows are a pass through the text: one ends at step 7, 14, ...
SIZES = ["--hidden-size", "8", "--batch-size", "8", "--window", "28", "--evaluate-every", "10"]
TINY = ["--steps", "20", *SIZES, "--checkpoint-every-steps", "6"]


def train(text: Path, out: Path, *flags: str) -> int:
    """Runs char_lm in this process; returns the exit status."""
    return char_lm.run([*TINY, "--text", str(text), "--out", str(out), *flags])


def results(out: Path) -> dict:
    """Everything in the folder of a run, except durations."""
    summary = json.loads((out / "summary.json").read_text())
    found = checkpoints.newest(out)
    return {
        "metrics": (out / "metrics.jsonl").read_bytes(),
        "sample": (out / "sample.txt").read_bytes(),
        "vocabulary": (out / "vocabulary.json").read_bytes(),
        "summary": {name: value for name, value in summary.items() if "seconds" not in name},
        "state": {name: array.tobytes() for name, array in found.arrays.items()},
        "step": found.step,
    }
