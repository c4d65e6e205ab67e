"""The stored outputs of the tutorial notebook. pytest runs the notebook itself by nbmake."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "experiments" / "tutorial.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
OUTPUTS = [output for cell in CODE for output in cell["outputs"]]


def test_the_cells_were_run_in_order_and_have_outputs():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert all(cell["outputs"] for cell in CODE[1:])  # the first installs the package if needed


def test_the_figures_are_stored():
    assert sum("image/png" in output.get("data", {}) for output in OUTPUTS) == 3


def test_no_output_is_an_error_a_warning_or_a_path():
    for output in OUTPUTS:
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr"
        text = json.dumps({**output, "data": {**output.get("data", {}), "image/png": ""}})
        assert "Warning" not in text
        assert "/home/" not in text
        assert "/root/" not in text


@pytest.mark.parametrize("name", ["bptt", "fit", "gradient_flow", "Loss", "data_parallel"])
def test_the_tutorial_uses(name):
    assert any(name in "".join(cell["source"]) for cell in CODE)
