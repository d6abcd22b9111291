"""The page of compatibility says what the tests are marked with, and such tests are run."""

import subprocess
import sys

import compatibility
from paths import ROOT, SUPPORT

MARKED = """
import pytest

@pytest.mark.compatible("PyTorch", "a feature")
def test_skipped():
    pytest.importorskip("no_such_package")

@pytest.mark.compatible("PyTorch", "a feature", versions=["1.0"])
def test_skipped_of_another_version():
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
