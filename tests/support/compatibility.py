"""The page of compatibility, made of the marks of the tests: docs/compatibility.md.

A test that shows that something works with a framework is marked so:

    @pytest.mark.compatible("transformers", "save_pretrained and from_pretrained")

``versions=["4.57.6"]`` names other versions than the pinned one. Run as a program, with
``--write``, this writes the page; without, it prints it.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from paths import ROOT

PAGE = ROOT / "docs" / "compatibility.md"

# Frameworks in the order of the page, and the pinned package that is installed for their tests;
# None of those whose calls are made as they make them, without a package.
FRAMEWORKS: dict[str, str | None] = {
    "PyTorch": "torch",
    "transformers": "transformers",
    "Lightning": "lightning",
    "Accelerate": "accelerate",
    "ONNX Runtime": "onnxruntime",
    "timm": None,
    "s3prl": None,
    "published SSAST code": None,
}
BY_CALLS = "its calls"  # heads the column of a framework that is not installed

INTRO = """# Compatibility

What works with other frameworks, in which version. Each cell that says *yes* is a test that runs
with every `make test`, on a CPU, and may not be skipped. The last column says where it is.

A version is the one that `requirements.txt` pins. Other versions are installed by the tests
themselves, from the package index; without one, these alone are skipped. *Its calls* heads the
column of a framework that is not installed for the tests: they make the calls that it makes.

This page is generated from the marks of the tests: `python tests/support/compatibility.py --write`.
"""


class Cell(NamedTuple):
    """A feature of a framework that a test shows to work."""

    framework: str
    feature: str
    version: str
    test: str


def pins() -> dict[str, str]:
    """Return the versions in requirements.txt by package."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {item.name: next(iter(item.specifier)).version for item in found}


def cells() -> list[Cell]:
    """Return what all tests are marked with, in the order of their files."""
    known = pins()
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "mark.compatible(" in text:
            found += list(_cells_of(path, ast.parse(text), known))
    return found


def _cells_of(path: Path, tree: ast.Module, known: dict[str, str]) -> Iterator[Cell]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not _is_mark(node.func):
            continue
        where = f"{path.relative_to(ROOT)}:{node.lineno}"
        try:
            framework, feature = (ast.literal_eval(argument) for argument in node.args)
            given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
            package = FRAMEWORKS[framework]
            own = BY_CALLS if package is None else known[package]
            versions = given.pop("versions", [own])
            assert not given
        except (ValueError, KeyError, AssertionError) as error:
            raise SystemExit(
                f"{where}: expected a framework of {', '.join(FRAMEWORKS)}, a feature and "
                f"perhaps versions=[...], all written out; found {ast.unparse(node)}"
            ) from error
        for version in versions:
            yield Cell(framework, feature, version, str(path.relative_to(ROOT)))


def _is_mark(function: ast.expr) -> bool:
    return ast.unparse(function) == "pytest.mark.compatible"


def page() -> str:
    """Return the text of the page."""
    found = cells()
    parts = [INTRO]
    for framework in FRAMEWORKS:
        own = [cell for cell in found if cell.framework == framework]
        if own:
            parts.append(f"## {framework}\n\n{_table(own)}")
    return "\n".join(parts)


def _table(found: list[Cell]) -> str:
    versions = sorted({cell.version for cell in found}, key=_newest_first)
    tests: dict[str, set[str]] = defaultdict(set)
    works = set()
    for cell in found:
        tests[cell.feature].add(f"`{cell.test}`")
        works.add((cell.feature, cell.version))
    rows = [["Feature", *versions, "Tests"], [":--"] * (len(versions) + 2)]
    for feature in sorted(tests):
        yes = ["yes" if (feature, version) in works else "-" for version in versions]
        rows.append([feature, *yes, ", ".join(sorted(tests[feature]))])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _newest_first(version: str) -> list[int]:
    return [-int(part) for part in version.split(".") if part.isdecimal()]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Fail a marked test that was skipped, but for those that need a package index."""
    report = yield
    marks = list(item.iter_markers("compatible"))
    if report.skipped and any("versions" not in mark.kwargs for mark in marks):
        report.outcome = "failed"
        report.longrepr = f"{PAGE.name} says that this test runs, but it was skipped"
    return report


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())
