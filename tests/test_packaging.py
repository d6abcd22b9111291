import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import architecture
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from paths import ROOT

# What a distribution is called whose module has another name.
DISTRIBUTIONS = {
    "flash_attn_interface": "flash-attn",
    "nvidia": "nvidia-dali-cuda130",
    "sklearn": "scikit-learn",
    "upath": "universal-pathlib",
    "yaml": "pyyaml",
}
# Extras that need a GPU, another torch, or other versions of what is pinned; or much else.
NOT_PINNED = {"flash", "bench", "trackio", "mteb", "xares", "s3prl"}


def declared():
    """The requirements in setup.py: those of every install under "", those of extras by name."""
    calls = [n for n in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if hasattr(n, "func")]
    (call,) = (call for call in calls if getattr(call.func, "id", None) == "setup")
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    texts = {"": ast.literal_eval(given["install_requires"])}
    texts |= ast.literal_eval(given["extras_require"])
    return {extra: [Requirement(text) for text in found] for extra, found in texts.items()}


def names_of(requirements):
    return {canonicalize_name(requirement.name) for requirement in requirements}


def test_every_import_is_declared():
    known = set().union(*map(names_of, declared().values()))
    for folder in architecture.FLOORS:
        for path in architecture.files(folder):
            for line, module in architecture.imports(path):
                first = module.partition(".")[0]
                if first != "ssast" and first not in sys.stdlib_module_names:
                    name = canonicalize_name(DISTRIBUTIONS.get(first, first))
                    assert name in known, f"{path}:{line} imports {module}: not in setup.py"


def test_what_every_file_needs_is_no_extra():
    """Imports outside functions, but for a file that transformers alone loads."""
    always = names_of(declared()[""])
    for folder in architecture.FLOORS:
        for path in architecture.files(folder):
            if path.name == "modeling_ssast.py":
                continue
            for node in ast.parse(path.read_text()).body:
                found = [alias.name for alias in node.names] if type(node) is ast.Import else []
                found += [node.module] if isinstance(node, ast.ImportFrom) else []
                for first in {module.partition(".")[0] for module in found}:
                    if first != "ssast" and first not in sys.stdlib_module_names:
                        name = canonicalize_name(DISTRIBUTIONS.get(first, first))
                        assert name in always, f"{path} imports {first}"


def test_the_pinned_versions_are_in_the_declared_ranges():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {}
    for requirement in pinned:
        (exact,) = requirement.specifier
        assert exact.operator == "==", f"{requirement} is no exact version"
        versions[canonicalize_name(requirement.name)] = exact.version
    ranges = [r for extra, found in declared().items() if extra not in NOT_PINNED for r in found]
    assert names_of(ranges) <= set(versions)
    for requirement in ranges:
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} is pinned to {version}"


def run(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_a_wheel_works_from_any_folder(tmp_path):
    built = run("-m", "pip", "wheel", "--no-deps", "-q", "-w", tmp_path, ROOT, cwd=tmp_path)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("ssast_engine-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "ssast/configs/base_patch.yaml" in names
    assert {name.split("/")[0] for name in names if not name.endswith("/")} == {
        "ssast",
        f"{wheel.name.rsplit('-', 3)[0]}.dist-info",
    }
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    # -S -E: neither the editable install nor the repository may help out.
    code = (
        "import sys, site; site.addsitedir(sys.argv[1]);"
        f"sys.path.append({str(Path(pytest.__file__).parents[1])!r});"
        "import ssast.engine.cli.main as cli;"
        "assert cli.__file__.startswith(sys.argv[1]), cli.__file__;"
        "sys.exit(cli.main(['pretrain', 'base_patch']))"
    )
    done = run("-S", "-E", "-c", code, site, cwd=tmp_path)
    assert done.returncode == 2
    assert "data.train is not set" in done.stderr
