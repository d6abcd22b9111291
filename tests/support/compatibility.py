"""The page of compatibility, made of the marks of the tests: docs/compatibility.md.

A test that shows that something works with a framework is marked so:

    @pytest.mark.compatible("transformers", "save_pretrained and from_pretrained")

The version is the one that requirements.txt pins. OTHER_VERSIONS names files of tests that are run
with other versions as well. Run as a program, with ``--write``, this writes the page; without, it
prints it.
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
    "X-ARES": None,
    "MTEB": None,
    "HEAR": None,
    "published SSAST code": None,
}


class OtherVersion(NamedTuple):
    """A version besides the pinned one, and what test files are run with it."""

    framework: str
    version: str
    packages: tuple[str, ...]  # installed beside the environment, without what these require
    files: tuple[str, ...]


_MODEL_FILE = ("tests/engine/formats/test_modeling_ssast.py",)
OTHER_VERSIONS = (
    OtherVersion(  # the oldest that setup.py allows
        "transformers",
        "5.0.0",
        ("transformers==5.0.0", "huggingface_hub==1.3.7", "tokenizers==0.22.1", "httpx==0.28.1",
         "httpcore==1.0.9", "h11==0.16.0", "anyio==4.12.0"),
        _MODEL_FILE,
    ),
    OtherVersion(  # the last 4.x
        "transformers",
        "4.57.6",
        ("transformers==4.57.6", "huggingface_hub==0.36.0", "tokenizers==0.22.1"),
        _MODEL_FILE,
    ),
)  # fmt: skip
BY_CALLS = "its calls"  # heads the column of a framework that is not installed

INTRO = """# Compatibility

What works with other frameworks, in which version. Each cell that says *yes* is a test that runs
with every `make test`, on a CPU, and may not be skipped. The last column says where it is.

The first version is the one that `requirements.txt` pins. Others are installed by the tests
themselves, from the package index, and the same tests are run with them; without an index these
runs alone are skipped. *Its calls* heads the column of a framework that is not installed for the
tests: they make the calls that it makes.

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
        test = str(path.relative_to(ROOT))
        try:
            framework, feature = (ast.literal_eval(argument) for argument in node.args)
            package = FRAMEWORKS[framework]
        except (ValueError, KeyError) as error:
            raise SystemExit(
                f"{test}:{node.lineno}: expected a framework of {', '.join(FRAMEWORKS)} and a "
                f"feature, both written out; found {ast.unparse(node)}"
            ) from error
        yield Cell(framework, feature, BY_CALLS if package is None else known[package], test)
        for other in OTHER_VERSIONS:
            if framework == other.framework and test in other.files:
                yield Cell(framework, feature, other.version, test)


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
    """Fail a marked test that was skipped."""
    report = yield
    if report.skipped and item.get_closest_marker("compatible"):
        report.outcome = "failed"
        report.longrepr = f"{PAGE.name} says that this test runs, but it was skipped"
    return report


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())
