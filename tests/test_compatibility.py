"""The page of compatibility says what the tests are marked with, and such tests are run."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import compatibility
import pytest
from compatibility import OTHER_VERSIONS, OtherVersion
from paths import ROOT, SUPPORT

MARKED = """
import pytest

@pytest.mark.compatible("PyTorch", "a feature")
def test_skipped():
    pytest.importorskip("no_such_package")

def test_without_a_mark():
    pytest.skip("no package index")

@pytest.mark.compatible("PyTorch", "another feature")
def test_passed():
    pass
"""


def test_the_page_is_what_the_marks_say():
    written = compatibility.PAGE.read_text(encoding="utf-8")
    assert written == compatibility.page(), (
        "docs/compatibility.md: run python tests/support/compatibility.py --write"
    )


def test_a_marked_test_may_not_be_skipped(tmp_path):
    (tmp_path / "test_it.py").write_text(MARKED)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "compatibility", tmp_path,
         "-c", ROOT / "pyproject.toml", f"--rootdir={tmp_path}"],
        env={"PYTHONPATH": str(SUPPORT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "1 failed, 1 passed, 1 skipped" in done.stdout, done.stdout
    assert "compatibility.md says that this test runs, but it was skipped" in done.stdout


def installed(other: OtherVersion) -> Path:
    """The folder of another version, installed beside this environment."""
    folder = ROOT / "build" / "versions" / f"{other.framework}-{other.version}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = folder.with_name(f".{folder.name}.{os.getpid()}")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pip += ["--retries", "1", "--no-compile", "--no-deps", "--target", part, *other.packages]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"pip cannot install {other.packages[0]}: {done.stderr.strip()[-200:]}")
        part.rename(folder)
    (found,) = importlib.metadata.distributions(name=other.framework, path=[str(folder)])
    assert found.version == other.version
    return folder


@pytest.mark.parametrize("other", OTHER_VERSIONS, ids=lambda other: other.packages[0])
def test_other_versions(other):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *other.files],
        env=os.environ | {"PYTHONPATH": str(installed(other))},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"\n=+ \d+ passed(, \d+ warnings?)? in ", done.stdout), done.stdout[-400:]
