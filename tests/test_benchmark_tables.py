"""Each CPU figure of the benchmark in the READMEs is one of its rows, or their mean."""

import json
import re
from pathlib import Path

import pytest

from experiments.benchmark_report import compare, geometric_mean

ROOT = Path(__file__).parent.parent
EXPERIMENTS = (ROOT / "experiments" / "README.md").read_text()
README = (ROOT / "README.md").read_text()


def rows_of(name: str) -> list[dict]:
    lines = (ROOT / "experiments" / "results" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


ROWS = rows_of("benchmark")
AT = {(row["size"], row["method"]): row for row in ROWS}
(SECTION,) = re.findall(r"^### 2 CPU cores.*?(?=^### )", EXPERIMENTS, re.DOTALL | re.MULTILINE)
NAMES = {"two devices": "bptt x 2"}


def printed(x: float | None) -> str:
    """Three digits; two after the point at most."""
    if x is None:
        return "-"
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def table(text: str, head: str) -> list[list[str]]:
    """The cells of the table whose header begins so, the header first."""
    start = text.index(f"| {head}")
    lines = text[start : text.index("\n\n", start)].splitlines()
    header, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    return [header, *rows]


@pytest.mark.parametrize(
    ("text", "head", "column"),
    [
        (README, "2 CPU cores: T, B, I, H, O", "min_ms"),
        (SECTION, "T, B, I, H, O", "min_ms"),
        (SECTION.split("Temporary memory, MB:")[1], "T, B, I, H, O", "temp_mb"),
    ],
    ids=["README", "milliseconds", "memory"],
)
def test_each_cell_is_one_of_the_rows(text, head, column):
    (_, *methods), *lines = table(text, head)
    assert len(lines) >= 4
    for size, *cells in lines:
        rows = [AT.get((size, NAMES.get(method, method)), {}) for method in methods]
        assert cells == [printed(row.get(column)) for row in rows], size


def test_the_memory_of_every_size_is_there():
    sizes = {row["size"] for row in ROWS if row["group"] != "leak"}
    for text in SECTION.split("Temporary memory, MB:"):
        assert sizes <= {size for size, *_ in table(text, "T, B, I, H, O")}


@pytest.mark.parametrize("name", ["benchmark", "benchmark_epyc"])
def test_the_ratios_are_the_means_and_minima_of_the_rows(name):
    compared, text = compare(rows_of(name)), EXPERIMENTS.split(f"](results/{name}.jsonl)")[1]
    names = {
        "as the plain scan": "bptt / plain scan",
        "as Flax": "bptt / Flax",
        "as torch": "bptt / torch",
        "as Haiku, both with ReLU": "bptt, ReLU / Haiku, ReLU",
        "as the plain scan, on two devices": "bptt x 2 / plain scan",
    }
    (_, *groups), *lines = table(text, "| typical |")
    assert [name for name, *_ in lines] == list(names)
    for name, *cells in lines:
        found = [compared[names[name]].get(group, {}) for group in groups[::2]]
        assert cells[::2] == [printed(x.get("speed")) for x in found], name
        assert cells[1::2] == [printed(x.get("least")) for x in found], name


def test_the_headline_is_that_of_the_typical_sizes():
    _, *lines = table(README, "Value and gradient, geometric mean over 12 sizes (worst size)")
    others = {"`jax.grad`": "plain scan", "Flax": "Flax", "torch": "torch"}
    for name, cell, _ in lines[:3]:
        (other,) = [other for part, other in others.items() if part in name]
        found = compare(ROWS)[f"bptt / {other}"]["typical"]
        assert cell == f"{found['speed']:.2f} ({found['least']:.2f})"
    checkpointed, scan = (AT["768, 64, 1, 100, 10", name] for name in ("bptt, K", "plain scan"))
    assert lines[3][1] == f"{checkpointed['temp_mb'] / scan['temp_mb']:.2f}"


def test_memory_and_compile_time_in_the_text_follow_from_the_rows():
    def ratios(column, leak, method="bptt"):
        return [
            row[column] / AT[row["size"], "plain scan"][column]
            for row in ROWS
            if row["method"] == method and (row["group"] == "leak") in leak
        ]

    text = " ".join(SECTION.split())
    memory = [geometric_mean(ratios("temp_mb", leak)) for leak in ({False}, {True})]
    largest = max(ratios("temp_mb", {False, True}))
    of_autodiff = geometric_mean(ratios("temp_mb", {False, True}, "sequence_loss"))
    assert (
        f"takes {of_autodiff:.2f} times the memory of the scan (geometric mean, CPU)"
        in " ".join(README.split())
    )
    times = ratios("compile_s", {False, True})
    assert f"`bptt` takes {memory[0]:.2f} times the temporary memory of the plain scan" in text
    assert f"and {memory[1]:.2f} times with one; at most {largest:.2f} times" in text
    assert f"Compilation takes {geometric_mean(times):.2f} times as long" in text
    assert f"over all sizes; {min(times):.2g} to {max(times):.2g} times" in text
