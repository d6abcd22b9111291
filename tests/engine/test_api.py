"""The public module: complete, true to its homes, and cheap to import."""

import ast
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys

import pytest
from paths import ROOT

from ssast.engine import api
from ssast.pipelines.cores import CHOSEN_BY

HOMES = api._HOMES
EXAMPLES = [path for path in (ROOT / "examples").rglob("*") if path.suffix not in ("", ".pyc")]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *EXAMPLES]
IMPORT = re.compile(r'^ *"?from (ssast\.engine\S*) import (\w+(?:, \w+)*)', re.M)


@pytest.mark.parametrize("name", HOMES)
def test_each_name_is_what_its_home_has(name):
    found = getattr(api, name)
    assert inspect.getdoc(found)
    assert found.__module__ == HOMES[name] and found.__name__ == name
    assert vars(api)[name] is found  # the next time it is there at once


def test_type_checkers_know_the_same_names():
    tree = ast.parse((ROOT / "engine" / "api.py").read_text())
    (block,) = (n for n in tree.body if isinstance(n, ast.If))
    imported = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == HOMES


def test_all_and_the_version():
    assert set(api.__all__) == {*HOMES, "__version__"} == set(dir(api))
    assert api.__version__ == importlib.metadata.version("ssast-engine")
    with pytest.raises(AttributeError, match=r"'ssast.engine.api' has no attribute 'nothing'"):
        api.nothing  # noqa: B018


def test_everything_that_a_user_may_have_to_catch_is_there():
    """The errors themselves; those derived from them are caught with them."""
    base = re.compile(r"^class (\w+)\((?:Value|Runtime)Error\)", re.M)
    files = [ROOT / folder / "errors.py" for folder in ("engine", "pipelines")]
    errors = {name for path in files for name in base.findall(path.read_text())}
    assert len(errors) >= 5 and errors <= set(api.__all__)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_users_are_told_to_import_nothing_else(path):
    for module, names in IMPORT.findall(path.read_text(encoding="utf-8")):
        assert module in ("ssast.engine", "ssast.engine.api"), f"{path} imports {module}"
        if module == "ssast.engine.api":
            assert set(names.split(", ")) <= set(api.__all__)


def test_the_reference_describes_every_name():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = re.findall(r"^::: (\S+)$", text, re.M)
    assert sorted(shown) == sorted(f"{api.__name__}.{name}" for name in HOMES)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import ssast.engine.api", 0),
        ("from ssast.engine.cli.main import main; main(['--help'])", 0),
        ("from ssast.engine.cli.main import main; main(['predict', '--help'])", 0),
        ("from ssast.engine.cli.main import main; main(['predict'])", 2),
        ("from ssast.engine.cli.main import main; main(['pretrian'])", 2),
        ("from ssast.engine.cli.main import main; main(['env', '--nothing'])", 2),
    ],
)
def test_no_torch_where_nothing_is_computed(code, status):
    """The command also sets how OpenMP's threads wait, which an import never does."""
    show = "import atexit, os, sys; atexit.register(lambda: print({}, {}))\n"
    show = show.format("'torch' in sys.modules", "'GOMP_SPINCOUNT' in os.environ")
    env = {key: value for key, value in os.environ.items() if key not in CHOSEN_BY}
    done = subprocess.run(
        [sys.executable, "-c", show + code], capture_output=True, text=True, timeout=100, env=env
    )
    assert done.returncode == status
    assert done.stdout.splitlines()[-1] == f"False {'main' in code}"
