"""What the README prints, run as printed, and the map of its claims in CONTRIBUTING."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

from tests.conftest import FAST_COMPILATION

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / ".github" / "CONTRIBUTING.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_quick_start_prints_what_its_comments_say(capsys):
    (quick_start,) = blocks("python")
    exec(compile(quick_start, "README, quick start", "exec"), {})
    promised = re.findall(r"# prints (.*)", quick_start)
    assert promised
    assert capsys.readouterr().out.splitlines() == promised


def test_the_main_command_runs(tmp_path):
    """The README's first command with flags for a small run; the last value of a flag counts."""
    command = next(line for line in "".join(blocks("sh")).splitlines() if "char_lm" in line)
    _, arguments = command.split("python -m ")
    smaller = ["--steps", "3", "--hidden-size", "8", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", *arguments.split(), *smaller],
        cwd=ROOT, env=os.environ | {"XLA_FLAGS": FAST_COMPILATION},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "valid_bpc" in done.stdout
    assert (tmp_path / "summary.json").exists()


def test_links_and_figures_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    for target in targets:
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_import_jaxrnn_imports_the_core_alone_and_configures_nothing():
    """Nothing but jax, jaxlib, optax and what these import themselves."""
    code = (
        "import sys, jax, jaxlib, optax\n"
        "def packages(): return {name.split('.')[0] for name in sys.modules}\n"
        "before, settings = packages(), dict(jax.config.values)\n"
        "import jaxrnn\n"
        "assert settings == jax.config.values\n"
        "print(packages() - before - {'jaxrnn'} - set(sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def defined_tests(path: Path) -> set[str]:
    nodes = ast.parse(path.read_text()).body
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    return {f"tests/{path.name}::{name}" for name in names if name.startswith("test_")}


def test_every_test_that_contributing_names_exists():
    named = set(re.findall(r"tests/\w+\.py::\w+", CONTRIBUTING))
    existing = set().union(*map(defined_tests, ROOT.glob("tests/test_*.py")))
    assert named
    missing = named - existing
    assert not missing, "\n".join(sorted(missing))


def test_contributing_says_what_each_file_of_tests_proves():
    patterns = re.findall(r"`tests/(test_[\w*]+\.py)`", CONTRIBUTING)
    files = [path.name for path in ROOT.glob("tests/test_*.py")]
    assert [name for name in files if not any(fnmatch(name, of) for of in patterns)] == []


def test_every_claim_of_the_map_names_a_test():
    _, section = CONTRIBUTING.split("\n## Claims and tests\n")
    claims = section.split("\n## ")[0].split("\n- ")[1:]
    assert claims
    assert [claim for claim in claims if "\n  - `tests/" not in claim] == []


def test_every_file_that_contributing_names_exists():
    paths = set(re.findall(r"`((?:tests|jaxrnn|experiments)/[\w./]*)`", CONTRIBUTING))
    assert paths
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_pre_commit_has_the_ruff_of_pyproject():
    (pinned,) = re.findall(r'"ruff==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert f"rev: v{pinned} " in (ROOT / ".pre-commit-config.yaml").read_text()


def test_every_line_of_an_explained_mutant_exists():
    settings = tomllib.loads((ROOT / "tests" / "mutation.toml").read_text())
    for survivor in settings["survivors"]:
        source = (ROOT / survivor["module"]).read_text()
        assert survivor["line"] in map(str.strip, source.splitlines()), survivor["line"]
