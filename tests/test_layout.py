"""The rules that keep the parts of the project apart."""

import ast
import importlib

import architecture
import pytest
from architecture import FLOORS
from paths import ROOT

FILES = [path for folder in FLOORS for path in architecture.files(folder)]
every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


def test_imports_only_go_down():
    up = [f"{a.file}:{a.line} imports {a.module}" for a in architecture.arrows() if a.runs_up]
    assert not up


@pytest.mark.parametrize("folder", [folder for folder, floors in FLOORS.items() if len(floors) > 1])
def test_the_documentation_has_the_same_floors(folder):
    order = " < ".join(", ".join(names) for names in FLOORS[folder])
    assert f"| `{folder}` | {order} |" in (ROOT / "docs/architecture.md").read_text()


def test_prediction_needs_no_training_code():
    rooms, barred = ("checkpoints", "formats", "evaluation"), ("parallel", "train")
    wrong = [
        f"{arrow.file}:{arrow.line} imports {arrow.module}"
        for arrow in architecture.arrows()
        if arrow.source[0] == arrow.target[0] == "engine"
        and arrow.source[1] in rooms
        and arrow.target[1] in barred
    ]
    assert not wrong


def test_imports_form_no_circle():
    assert not architecture.module_circles()
    assert not architecture.room_circles()


def test_circles_are_found():
    assert architecture.circles({"a": {"b"}, "b": {"c", "d"}, "c": {"a"}}) == [["a", "b", "c", "a"]]
    assert architecture.circles({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []


@every_file
def test_imports_use_the_full_name(path):
    for _, module in architecture.imports(path):
        first, *rest = module.split(".")
        assert first not in (*FLOORS, "configs"), f"{path} imports {module} without ssast."
        if first == "ssast" and path.is_relative_to(ROOT / "pipelines") and rest[0] == "kernels":
            assert rest[1] in ("fbank", "channel"), f"{path} imports {module}"


def test_no_folder_shadows_an_installed_package():
    for folder in (*FLOORS, "configs"):
        assert not list((ROOT / folder).rglob("__init__.py"))
    assert not (ROOT / "conftest.py").exists()


@every_file
def test_files_are_small_and_say_what_they_hold(path):
    text = path.read_text(encoding="ascii")
    assert len(text.splitlines()) <= 450
    if path.name != "__main__.py":
        assert ast.get_docstring(ast.parse(text))


ERRORS = {
    name: module
    for module in ("ssast.engine.errors", "ssast.pipelines.errors")
    for name, found in vars(importlib.import_module(module)).items()
    if isinstance(found, type)
}


@every_file
def test_errors_are_in_one_place(path):
    """Those of engine and pipelines are in errors.py, and are imported from nowhere else."""
    folder, *rest = path.relative_to(ROOT).parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and folder in ("engine", "pipelines"):
            bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
            is_error = any(name.endswith(("Error", "Exception")) for name in bases)
            assert rest == ["errors.py"] or not is_error, f"{path} defines {node.name}"
        if isinstance(node, ast.ImportFrom):
            for name in {alias.name for alias in node.names}.intersection(ERRORS):
                assert node.module == ERRORS[name], f"{path} imports {name} from {node.module}"


NOT_FIRST = {"of", "in", "on", "for", "from", "with", "after", "before", "by", "at", "as", "to"}
NOT_FIRST |= {"it", "none"}


@every_file
def test_docstrings_begin_with_a_verb_or_a_noun(path):
    """A first line such as "Of the run." says nothing where it is shown alone."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        if text:
            first = text.split()[0].rstrip(".,:").lower()
            assert first not in NOT_FIRST, f"{path}: {text.splitlines()[0]}"


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda p: p.name)
def test_test_files_are_small(path):
    assert len(path.read_text(encoding="ascii").splitlines()) <= 400
