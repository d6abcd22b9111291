import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from paths import ROOT


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
