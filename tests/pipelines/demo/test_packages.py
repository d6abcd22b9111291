"""Packages: downloaded, kept, unpacked, and what is said when one of these fails."""

import shutil
from pathlib import Path

import pytest
from debs import DEP5, PACKAGES, calls, demo, manifests

from ssast.pipelines.demo.packages import licences, package_version, unpack
from ssast.pipelines.errors import DataError


def test_a_damaged_package_is_downloaded_again(tmp_path: Path, repo: Path) -> None:
    demo(tmp_path)
    expected = manifests(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    deb = next((tmp_path / "cache").glob("klettres*.deb"))
    deb.write_bytes(deb.read_bytes()[:3000])
    demo(tmp_path)
    assert manifests(tmp_path / "out") == expected
    assert calls(repo) == len(PACKAGES) + 1


def test_left_overs_of_a_killed_download(tmp_path: Path, repo: Path) -> None:
    (tmp_path / "cache/downloading").mkdir(parents=True)
    (tmp_path / "cache/downloading/klettres-data_0_all.deb").write_bytes(b"half")
    demo(tmp_path)
    assert not (tmp_path / "cache/downloading").exists()


def test_an_empty_index_is_updated_without_root(tmp_path: Path, repo: Path) -> None:
    (repo / "needs-update").touch()
    assert "clips for pretraining" in demo(tmp_path)[-1]
    update = next(line for line in (repo / "calls").read_text().splitlines() if "update" in line)
    assert f"-oDir::State={tmp_path}/cache/apt/state" in update


def test_a_package_that_is_not_there_is_left_out(tmp_path: Path, repo: Path) -> None:
    said = demo(tmp_path, names=(*PACKAGES, "nowhere-data"))
    assert "left out: nowhere-data: this distribution has no such package" in said


def test_no_package_at_all(tmp_path: Path, repo: Path) -> None:
    with pytest.raises(DataError, match=r"none of the demo's packages .* make demo DATA="):
        demo(tmp_path, names=("nowhere-data",))


def test_no_network(tmp_path: Path, repo: Path) -> None:
    (repo / "offline").touch()
    with pytest.raises(DataError) as caught:
        demo(tmp_path)
    assert "klettres-data cannot be downloaded (no network?)" in str(caught.value)
    assert "Could not resolve" in str(caught.value)
    assert "make demo DATA=/folder/of/audio" in str(caught.value)
    assert "\n" not in str(caught.value)
    (repo / "offline").unlink()
    demo(tmp_path)  # the network is back


def test_no_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"apt-get and dpkg-deb not found.*make demo DATA="):
        demo(tmp_path)


def test_licences() -> None:
    assert licences(DEP5) == ["GPL-2+", "CC-BY-3"]
    assert licences("Free, see /usr/share/common-licenses/GPL-2'.") == ["GPL-2"]
    assert licences("Do as you like.") == ["see its copyright file"]
    assert package_version(Path("/c/klettres-data_4%3a22.12.3-1_all.deb")) == "4:22.12.3-1"


def test_unpack_into_a_folder_that_cannot_be_written(tmp_path: Path, repo: Path) -> None:
    deb = next(repo.glob("*.deb"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        unpack(deb, tmp_path / "file/x")
