"""The tutorial notebook runs, and its stored outputs are those of its code."""

import base64
import re
from pathlib import Path

import nbformat
import pytest
from nbmake.nb_run import NotebookRun

from tests.conftest import FAST_COMPILATION

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "experiments" / "tutorial.ipynb"
REPOSITORY = "https://github.com/jaxrnn/jaxrnn/blob/main/"
COLAB = "https://colab.research.google.com/github/jaxrnn/jaxrnn/blob/main/"


@pytest.fixture
def stored():
    return nbformat.read(NOTEBOOK, as_version=4)


def execute(monkeypatch):
    """The notebook as a new kernel runs it, with this checkout on the path."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", FAST_COMPILATION)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # a kernel draws inline
    result = NotebookRun(NOTEBOOK, default_timeout=300).execute()
    assert result.error is None, result.error.trace
    return result.nb


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell) -> str:
    """All text outputs of a cell."""
    return "".join(
        output.text if output.output_type == "stream" else output.data.get("text/plain", "")
        for output in cell.outputs
        if output.output_type != "error"
    )


def figures(notebook) -> dict[str, list[bytes]]:
    """The PNG images of each cell that has any."""
    images = {
        cell.id: [
            base64.b64decode(output.data["image/png"])
            for output in cell.outputs
            if "image/png" in output.get("data", {})
        ]
        for cell in code_cells(notebook)
    }
    return {name: found for name, found in images.items() if found}


def without_numbers(text: str) -> str:
    return " ".join(re.sub(r"-?\d+(\.\d*)?(e[+-]?\d+)?", " # ", text).split())


def labelled_values(notebook, name: str) -> list[float]:
    """The numbers after a colon at the end of a line that the cell prints."""
    (cell,) = (cell for cell in notebook.cells if cell.id == name)
    return [float(value) for value in re.findall(r": +(\S+)$", printed(cell), re.MULTILINE)]


def check_claims(notebook) -> None:
    """What the text of the notebook says about its numbers."""
    assert len(labelled_values(notebook, "bptt")) == 5
    assert max(labelled_values(notebook, "bptt") + labelled_values(notebook, "loop")) < 1e-12

    difference, largest = labelled_values(notebook, "textbook")
    assert difference > 0.1 * largest

    held_out, ten_times_as_long, before = labelled_values(notebook, "accuracy")
    assert min(held_out, ten_times_as_long) > 0.99
    assert before < 0.7

    constant, network, true = labelled_values(notebook, "stack-fit")
    assert 0 < network - true < 0.1 * (constant - true)

    one_device, two_devices = labelled_values(notebook, "parallel")
    assert one_device == pytest.approx(two_devices, rel=1e-5)
    one_device, two_devices = labelled_values(notebook, "update")
    assert one_device == pytest.approx(two_devices, rel=1e-3)


@pytest.mark.thorough
def test_runs_and_prints_what_is_stored(stored, monkeypatch):
    executed = execute(monkeypatch)
    check_claims(executed)
    for fresh, cell in zip(code_cells(executed), code_cells(stored), strict=True):
        assert all(output.get("name") != "stderr" for output in fresh.outputs), printed(fresh)
        assert without_numbers(printed(fresh)) == without_numbers(printed(cell)), cell.id
    assert figures(executed).keys() == figures(stored).keys()


def test_stored_outputs(stored):
    check_claims(stored)
    assert [cell.execution_count for cell in code_cells(stored)] == [
        *range(1, len(code_cells(stored)) + 1)
    ]
    assert {cell.id for cell in code_cells(stored) if not cell.outputs} == {"install"}
    for cell in code_cells(stored):
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
        assert not re.search(r"Warning|Traceback|(?<![\w.])/\w+/", printed(cell)), printed(cell)


def test_stored_figures(stored):
    images = figures(stored)
    assert images.keys() == {"fit", "flow", "rates"}
    for name, (image,) in images.items():
        assert image.startswith(b"\x89PNG"), name
        width, height = (int.from_bytes(image[at : at + 4], "big") for at in (16, 20))
        assert 400 <= width <= 800, name
        assert 200 <= height <= 600, name
    assert NOTEBOOK.stat().st_size < 300_000


def test_metadata_names_a_kernel_and_no_machine(stored):
    assert stored.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(cell.metadata == {} for cell in stored.cells)
    ids = [cell.id for cell in stored.cells]
    assert len(set(ids)) == len(ids)


def test_links_exist(stored):
    text = "\n".join(cell.source for cell in stored.cells if cell.cell_type == "markdown")
    assert f"{COLAB}{NOTEBOOK.relative_to(ROOT)}" in stored.cells[0].source
    paths = re.findall(rf"\({REPOSITORY}([^)#]+)\)", text)
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), path
