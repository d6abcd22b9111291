"""The rules that keep the parts of the project apart."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("engine", "kernels", "pipelines", "benchmarks")
MAY_IMPORT = {
    "kernels": {"kernels"},
    "pipelines": {"pipelines", "kernels"},
    "engine": {"engine", "pipelines", "kernels"},
    "benchmarks": {"benchmarks", "engine", "pipelines", "kernels"},
}
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: line {node.lineno} imports relatively"
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_imports_only_go_down_and_use_the_full_name(path):
    for module in imports(path):
        first, *rest = module.split(".")
        assert first not in FOLDERS, f"{path} imports {module} without ssast."
        if first == "ssast":
            assert rest[0] in MAY_IMPORT[path.parent.name], f"{path} imports {module}"
        if path.parent.name == "pipelines" and first == "ssast" and rest[0] == "kernels":
            assert rest[1] == "fbank", f"{path} imports {module}"


def test_no_folder_shadows_an_installed_package():
    for folder in (*FOLDERS, "configs"):
        assert not (ROOT / folder / "__init__.py").exists()
        assert not [p for p in (ROOT / folder).iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert not (ROOT / "conftest.py").exists()


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_files_are_small_and_say_what_they_hold(path):
    text = path.read_text(encoding="ascii")
    assert len(text.splitlines()) <= 450
    assert ast.get_docstring(ast.parse(text))
