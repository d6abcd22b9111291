"""Execute the example notebooks; as a program, execute them and store what comes out."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from paths import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def execute(path: Path, cwd: Path, **parameters: object) -> NotebookNode:
    """Execute a notebook in a folder, with other values of its parameters."""
    notebook = nbformat.read(path, as_version=4)
    (number,) = (n for n, cell in enumerate(notebook.cells) if is_parameters(cell))
    if parameters:
        text = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
        notebook.cells.insert(number + 1, nbformat.v4.new_code_cell(text))
    client = NotebookClient(notebook, kernel_name="python3", timeout=600)
    client.execute(cwd=str(cwd))
    return notebook


def is_parameters(cell: NotebookNode) -> bool:
    return "parameters" in cell.metadata.get("tags", [])


def pictures(notebook: NotebookNode) -> list[str]:
    """The PNG pictures that its cells show, in base64."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def tidy(notebook: NotebookNode, cwd: Path) -> None:
    """Leave out progress bars, and what is of this machine."""
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        printed = "".join(o.text for o in cell.outputs if o.get("name") == "stdout")
        cell.outputs = [o for o in cell.outputs if o.output_type != "stream"]
        if printed:
            text = printed.replace(str(ROOT), "..").replace(str(cwd), ".")
            cell.outputs.insert(0, nbformat.v4.new_output("stream", name="stdout", text=text))


def main() -> None:
    import tempfile

    for path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, Path(folder))
            tidy(notebook, Path(folder))
        nbformat.write(notebook, path)
        print(path)


if __name__ == "__main__":
    sys.exit(main())
