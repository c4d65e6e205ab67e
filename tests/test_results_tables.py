"""The tables of experiments/README.md and its commands are those of the stored summaries."""

import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from experiments import cli
from tests.test_reproductions import NAMES

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
README = (EXPERIMENTS / "README.md").read_text()
SUMMARIES = sorted(path.stem for path in (EXPERIMENTS / "results").glob("*.json"))


def documented(name):
    """The command before the link to a summary, and the cells of the table after it."""
    before, after = README.split(f"(results/{name}.json)")
    command = re.findall(r"^```sh\n(python -m experiments\..*)\n```", before, re.MULTILINE)[-1]
    table = re.search(r"(?:^\|.*\n)+", after, re.MULTILINE)[0].splitlines()
    return command, [line.strip("|").split("|") for line in table[2:]]


def test_every_experiment_is_documented():
    found = {documented(name)[0].split()[2].removeprefix("experiments.") for name in SUMMARIES}
    assert found == set(NAMES)
    index = re.findall(r"^\| \[(\w+)\]\(#\1\) \|", README, re.MULTILINE)
    assert set(index) == set(NAMES)
    assert all((EXPERIMENTS / "figures" / f"{name}.png").exists() for name in SUMMARIES)
    assert all(f"(figures/{name}.png)" in README for name in SUMMARIES)


@pytest.mark.parametrize("name", [name for name in NAMES if name in SUMMARIES])
def test_the_documented_time_is_the_summarys(name):
    seconds = json.loads((EXPERIMENTS / "results" / f"{name}.json").read_text())["seconds"]
    documented_time = re.search(rf"^\| \[{name}\].*\| (.*) \|$", README, re.MULTILINE)[1]
    assert documented_time in (f"{seconds:.0f} s", f"{seconds / 60:.0f} min")


ALL = slice(None)
BY_COLUMN = [(ALL, [0]), (ALL, [1]), (ALL, slice(2, None))]
BLOCKS = {
    "adding": BY_COLUMN,
    "char_sweep": [(ALL, [2, 3]), (ALL, [4, 5])],
    "copy_memory": BY_COLUMN,
    "copy_memory_1000": [(ALL, [1])],
    "gradient_flow": [(ALL, [0, 1]), (ALL, [2, 3])],
    "mnist_1d": [(ALL, [0]), (ALL, [1, 2])],
    "parallel_in_time": [(ALL, [0, 5, 1, 2, 6, 3, 4, 7])],
    "reservoir": [
        (slice(5), ALL),
        *((rows, [column]) for rows in (slice(5, 8), slice(8, 11)) for column in (0, 1)),
    ],
    "temporal_order": BY_COLUMN,
}
"""The rows and columns of a table in the order of its summary, where that is not row by row."""
LABELS = (
    r"(?<=\d) of \d+|\d+ diverge|\d+ steps|"
    r"(?:T|H|ρ|gain|t1 =|clipped at|window|Adam,) \d+(?:\.\d+)?"
)
NUMBER = r"\d+(?:\.\d+)?(?: ± \d+(?:\.\d+)?)?"


@pytest.mark.parametrize("name", SUMMARIES)
def test_the_cells_are_the_results_of_the_summary_that_its_command_wrote(name):
    command, rows = documented(name)
    summary = json.loads((EXPERIMENTS / "results" / f"{name}.json").read_text())
    table = np.char.strip(np.array([row if len(rows) == 1 else row[1:] for row in rows]))
    assert {*table.ravel()} <= {*re.findall(NUMBER, summary["ours"]), "carried", "zeros"}
    results = iter(re.findall(NUMBER, re.sub(LABELS, "", summary["ours"])))
    for block in BLOCKS.get(name, [(ALL, ALL)]):
        for cell in table[block].ravel():
            assert cell in results, cell  # after that of the cell before
    _, _, module, *flags = shlex.split(command)
    config = cli.parse(importlib.import_module(module).Config, flags)
    wanted = {
        name: value.name if isinstance(value, Path) else value
        for name, value in vars(config).items()
        if name not in ("out", "overwrite", "resume")
    }
    assert json.loads(json.dumps(wanted)) == summary["settings"]


def test_figures_in_words_are_those_of_the_summaries():
    def figures(name):
        return json.loads((EXPERIMENTS / "results" / f"{name}.json").read_text())["figures"]

    found, prose = figures("small_loops"), " ".join(README.split())
    most, beside = found["at_most"], found["beside_scan"]
    single, double = beside["float32"], beside["float64"]
    speeds = figures("parallel_in_time")["speeds"]
    for claim in (
        f"`bptt` is {single['geometric_mean']:.2f} times as fast as the plain scan in float32",
        f"(least {single['least']:.2f}), and {double['geometric_mean']:.2f} times in float64 "
        f"({double['least']:.2f})",
        f"up to {most['plain scan']} times as fast and `bptt` up to {most['bptt']} times",
        f"{speeds['full']:.3f} times as fast as `hidden_states` with the full Jacobian, "
        f"{speeds['diagonal']:.3f} times with the diagonal",
    ):
        assert claim in prose
