"""What the README prints, run as printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_quick_start_runs_and_prints_what_the_readme_says(capsys):
    (quick_start,) = blocks("python")
    exec(compile(quick_start, "README, quick start", "exec"), {})
    promised = re.findall(r"# prints (.*)", quick_start)
    assert promised
    assert capsys.readouterr().out.splitlines() == promised


def test_the_main_command_runs(tmp_path):
    """The README's first command as printed, only smaller: what comes last on a line wins."""
    command = next(line for line in "".join(blocks("sh")).splitlines() if "char_lm" in line)
    _, arguments = command.split("python -m ")
    smaller = ["--steps", "3", "--hidden-size", "8", "--out", str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments.split(), *smaller],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
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


def test_import_jaxrnn_imports_the_core_alone():
    """Nothing but jax, jaxlib, optax and what these import themselves."""
    code = (
        "import sys, jax, jaxlib, optax; before = set(sys.modules); import jaxrnn; "
        "print({name.split('.')[0] for name in set(sys.modules) - before} - {'jaxrnn'} "
        "- set(sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr
