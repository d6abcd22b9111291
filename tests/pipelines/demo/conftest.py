import os
import shutil
from pathlib import Path

import pytest
from debs import FAKE_APT, build, fill_fillets, fill_klettres


@pytest.fixture(scope="session")
def debs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two packages."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg-deb")
    folder = tmp_path_factory.mktemp("debs")
    build(folder, "klettres-data", fill_klettres)
    build(folder, "fillets-ng-data-nl", fill_fillets)
    return list(folder.glob("*.deb"))


@pytest.fixture
def repo(debs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package repository behind a fake apt-get."""
    repo = tmp_path / "repo"
    repo.mkdir()
    for deb in debs:
        shutil.copy(deb, repo)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/apt-get").write_text(FAKE_APT.format(repo=repo))
    (tmp_path / "bin/apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return repo
