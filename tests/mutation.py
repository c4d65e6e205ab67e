"""Mutation testing by Cosmic Ray: faults in a module that its tests do not notice.

    pip install -e '.[dev,mutation]'
    python -m tests.mutation jaxrnn/update.py

Each mutant changes one operator, number or condition of a copy of the repository and runs the
module's tests. mutation.toml names the tests of each module, the operators that are left out, and
each mutant that survives, with the reason. Without arguments, every module is tested.

Exit status: 0 all is as explained; 1 a survivor is not explained, or too few mutants are killed.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEAST_KILLED = 0.95

COSMIC_RAY = """\
[cosmic-ray]
module-path = ["{module}"]
timeout = {seconds}
excluded-modules = []
test-command = "{python} -m pytest -x -q -n 0 -p no:cacheprovider {tests}"

[cosmic-ray.distributor]
name = "local"

[cosmic-ray.filters.operators-filter]
exclude-operators = {left_out}
"""


def run_mutants(module: str, settings: dict, scratch: Path) -> list[dict]:
    """Runs the tests on every mutant of a module; returns a dict for each mutant that was run."""
    copy = scratch / "copy"
    ignored = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "runs")
    shutil.copytree(ROOT, copy, ignore=ignored)
    names = {"config": str(scratch / "mutation.toml"), "session": str(scratch / "session.sqlite")}
    Path(names["config"]).write_text(
        COSMIC_RAY.format(
            module=module,
            seconds=settings["seconds"],
            python=sys.executable,
            tests=settings["tests"][module],
            left_out=json.dumps(list(settings["operators-left-out"])),
        )
    )
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(copy)}
    environment["JAXRNN_THOROUGH"] = "first"  # each test, at least one case
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(scratch / "compiled"))
    commands = (
        "cosmic_ray.cli baseline {config}",  # fails unless the tests pass without a mutation
        "cosmic_ray.cli init {config} {session}",
        "cosmic_ray.tools.filters.operators_filter {session} {config}",
        "cosmic_ray.cli exec {config} {session}",
        "cosmic_ray.cli dump {session}",
    )
    for command in commands:
        arguments = [sys.executable, "-m", *command.format(**names).split()]
        done = subprocess.run(
            arguments, cwd=copy, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
    mutants = []
    for line in done.stdout.splitlines():
        item, result = json.loads(line)
        if result is None or result["worker_outcome"] == "skipped":
            continue
        (mutation,) = item["mutations"]
        mutants.append(
            {
                "line": changed_lines("-", result["diff"]),
                "becomes": changed_lines("+", result["diff"]),
                "at": mutation["start_pos"][0],
                "survived": result["test_outcome"] == "survived",
            }
        )
    return mutants


def changed_lines(sign: str, diff: str | None) -> str:
    """The lines that a diff removes ("-") or adds ("+"), joined."""
    lines = re.findall(rf"^[{sign}](?![-+]{{2}} )(.*)$", diff or "", re.MULTILINE)
    return " ".join(line.strip() for line in lines).strip()


def report(module: str, mutants: list[dict], explained: list[dict]) -> bool:
    """Prints the survivors and the share killed; returns whether all is as explained.

    A mutant that is an equivalent program cannot be killed, and is not counted.
    """
    counts = {"killed": 0, "equivalent": 0, "explained": 0, "not explained": 0}
    for mutant in mutants:
        if not mutant["survived"]:
            counts["killed"] += 1
            continue
        entry = next((entry for entry in explained if matches(entry, mutant)), None)
        equivalent = entry is not None and entry.get("equivalent", False)
        kind = "equivalent" if equivalent else "explained" if entry else "not explained"
        counts[kind] += 1
        print(f"{module}:{mutant['at']}: {entry['why'] if entry else 'NOT EXPLAINED'}")
        print(f"  - {mutant['line']}\n  + {mutant['becomes']}")
    killed = counts["killed"] / (len(mutants) - counts["equivalent"])
    print(f"{module}: {killed:.1%} killed; {counts}")
    return killed >= LEAST_KILLED and not counts["not explained"]


def matches(entry: dict, mutant: dict) -> bool:
    """Whether an explanation is that of the mutant."""
    becomes = entry.get("becomes", ".*")
    return entry["line"] == mutant["line"] and bool(re.fullmatch(becomes, mutant["becomes"]))


def main(modules: list[str]) -> int:
    settings = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    passed = []
    for module in modules or settings["tests"]:
        with tempfile.TemporaryDirectory() as scratch:
            mutants = run_mutants(module, settings, Path(scratch))
        explained = [entry for entry in settings.get("survivors", []) if entry["module"] == module]
        passed.append(report(module, mutants, explained))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
