"""Every recipe runs as printed and fits on a screen."""

import importlib
import sys
from pathlib import Path

import pytest

from tests.conftest import default_and_thorough

RECIPES = Path(__file__).parent.parent / "experiments" / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("[a-z]*.py"))


@pytest.mark.parametrize("name", default_and_thorough(["learned_h0", "progress"], NAMES))
def test_a_recipe_runs(name, capsys):
    """Other tests run the functions of every recipe."""
    if name.endswith("_module"):
        pytest.importorskip(name.removesuffix("_module"))
    importlib.import_module(f"experiments.recipes.{name}").main()
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_fits_on_a_screen(name):
    text = (RECIPES / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 70
    assert f"\nRun: python -m experiments.recipes.{name}" in text


@pytest.mark.parametrize("name", NAMES)
def test_the_index_has_the_first_line_of_a_recipe(name):
    first, *_ = (RECIPES / f"{name}.py").read_text().removeprefix('"""').splitlines()
    row = f"| [{name}](recipes/{name}.py) | {first} |"
    assert row in (RECIPES.parent / "README.md").read_text().splitlines()


@pytest.mark.parametrize("library", ["equinox", "flax"])
def test_a_recipe_names_the_library_that_is_not_installed(library, monkeypatch):
    name = f"experiments.recipes.{library}_module"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, library, None)  # an import then raises ImportError
    with pytest.raises(
        SystemExit, match=rf"^{library}: not installed; pip install -e '\.\[peers\]"
    ):
        importlib.import_module(name)


@pytest.mark.parametrize("name", NAMES)
def test_no_recipe_writes_the_update_again(name):
    assert "optimizer.update(" not in (RECIPES / f"{name}.py").read_text()
