"""The example notebooks: executed with tiny sizes, and stored as they came out."""

import base64

import nbformat
import pytest
from notebooks import NOTEBOOKS, execute, pictures

SIZES = {
    "pretrain": {"steps": 2, "num_clips": 8},
    "finetune": {"epochs": 1, "num_clips": 4},
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    notebook = execute(path, tmp_path, **SIZES[path.stem])
    (picture,) = pictures(notebook)
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    text = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "finished step" in text and "100%" in text  # the bar
    assert "/ld:" not in text  # of compilers that DeepSpeed tries out


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_as_it_came_out(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    assert len(pictures(notebook)) == 1
