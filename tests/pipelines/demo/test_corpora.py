"""The demo from packages of our own making, a fake apt-get, and folders as users have them."""

import itertools
import json
import os
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ssast.pipelines.clips.manifest import read_manifest, write_manifest
from ssast.pipelines.demo import packages
from ssast.pipelines.demo.corpora import fetch_demo, fetch_sounds, prepare_folder
from ssast.pipelines.demo.packages import licences, package_version
from ssast.pipelines.demo.tasks import DEMO_TASKS
from ssast.pipelines.errors import DataError

# What apt-get does and says, in the ways it goes well and wrong
FAKE_APT = """#!/bin/sh
fail() {{ echo "$1" >&2; exit "$2"; }}
echo "$@" >> {repo}/calls
for last; do :; done
case "$*" in update*)
  [ -e {repo}/offline ] && fail "W: Failed to fetch http://deb/x  Could not resolve 'deb'" 0
  touch {repo}/updated
  exit 0;;
esac
if [ -e {repo}/needs-update ] && ! [ -e {repo}/updated ]; then
  fail "E: Unable to locate package $last" 100
fi
[ -e {repo}/offline ] && fail "E: Failed to fetch http://deb/$last.deb  Could not resolve 'deb'" 100
cp {repo}/"$last"_*.deb . 2>/dev/null || fail "E: Unable to locate package $last" 100
"""
DEP5 = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: *
Copyright: 2001 Someone
License: GPL-2+

Files: sounds/*
Copyright: 2002 Someone
License: CC-BY-3

Files: debian/*
Copyright: 2003 A packager
License: GPL-3

License: GPL-3
 On Debian systems, see /usr/share/common-licenses/GPL-3
"""


def sound(seed: int, seconds: float = 1.0, rate_hz: int = 22050) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.4, 0.4, int(seconds * rate_hz))


def save(path: Path, seed: int, seconds: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sound(seed, seconds), 22050)


def build(repo: Path, name: str, fill: Callable[[Path], None]) -> None:
    root = repo / f"root-{name}"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: 4:1.2-3\nArchitecture: all\n"
        "Maintainer: T <t@t.org>\nDescription: test\n"
    )
    (root / f"usr/share/doc/{name}").mkdir(parents=True)
    (root / f"usr/share/doc/{name}/copyright").write_text(DEP5)
    fill(root / "usr/share")
    deb = repo / f"{name}_4%3a1.2-3_all.deb"
    subprocess.run(
        ["dpkg-deb", "-Zgzip", "-b", str(root), str(deb)], check=True, capture_output=True
    )


def fill_klettres(share: Path) -> None:
    for n in range(60):
        for code in ("de", "fr"):
            save(share / f"klettres/{code}/alpha/{n}.ogg", n + 1000 * (code == "fr"), 0.5)
    save(share / "klettres/it/alpha/same-as-de.ogg", 0, 0.5)
    (share / "klettres/it/alpha/broken.ogg").write_bytes(b"OggS")
    (share / "klettres/it/alpha/link.ogg").symlink_to("same-as-de.ogg")


def fill_fillets(share: Path) -> None:
    for n in range(5):
        save(share / f"games/fillets-ng/sound/city/nl/a-m-{n}.ogg", 5000 + n)
    save(share / "games/fillets-ng/sound/elk/nl/robot.ogg", 6000)


PACKAGES = ("klettres-data", "fillets-ng-data-nl")


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


def demo(tmp_path: Path, out: str = "out", names: tuple[str, ...] = PACKAGES) -> list[str]:
    said: list[str] = []
    fetch_demo(tmp_path / out, tmp_path / "cache", progress=False, packages=names, log=said.append)
    return said


def calls(repo: Path) -> int:
    return len((repo / "calls").read_text().splitlines())


def manifests(out: Path) -> dict[str, set[str]]:
    files = [out / "train.json", out / "valid.json", *sorted((out / "tasks").glob("*.json"))]
    return {file.name: set(read_manifest(file).paths) for file in files}


def test_demo(tmp_path: Path, repo: Path) -> None:
    said = demo(tmp_path)
    out = tmp_path / "out"
    lists = manifests(out)
    assert set(lists) == {
        *("train.json", "valid.json", "voice_train.json", "voice_eval.json"),
        *("language_train.json", "language_eval.json"),
    }
    assert all(os.path.isfile(path) for paths in lists.values() for path in paths)
    assert all(lists.values())
    held = lists["voice_eval.json"] | lists["language_eval.json"]
    assert not lists["train.json"] & lists["valid.json"]
    assert not held & (lists["train.json"] | lists["valid.json"])
    assert not lists["voice_train.json"] & lists["voice_eval.json"]
    # 120 sounds, 1 copy, 1 broken; 5 sounds, 1 synthetic voice
    assert len(held | lists["train.json"] | lists["valid.json"]) == 125
    labels = read_manifest(out / "tasks/voice_eval.json").labels
    assert labels is not None
    assert {label for (label,) in labels} == {"klettres-de", "klettres-fr"}
    [rejected] = (out / "rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected)["name"].endswith("broken.ogg")
    report = json.loads((out / "report.json").read_text())
    assert report["packages"] == {name: "4:1.2-3" for name in PACKAGES}
    assert (report["num_duplicates"], report["num_rejected"]) == (1, 1)
    assert said[0].startswith("klettres-data 4:1.2-3: ")
    assert said[0].endswith("licence GPL-2+, CC-BY-3")
    assert (out / "licences/klettres-data.txt").read_text() == DEP5
    assert not (out / ".unpacked").exists()
    assert sorted(p.name for p in (tmp_path / "cache").glob("*.deb")) == sorted(
        f"{name}_4%3a1.2-3_all.deb" for name in PACKAGES
    )


def test_a_second_run_does_nothing(tmp_path: Path, repo: Path) -> None:
    demo(tmp_path)
    before = calls(repo)
    (tmp_path / "bin/apt-get").unlink()
    assert "are there already" in demo(tmp_path)[0]
    assert calls(repo) == before


def test_a_lost_clip_is_made_again(tmp_path: Path, repo: Path) -> None:
    demo(tmp_path)
    before = manifests(tmp_path / "out")
    lost = Path(sorted(before["train.json"])[0])
    lost.unlink()
    demo(tmp_path)
    assert lost.exists()
    assert manifests(tmp_path / "out") == before
    assert calls(repo) == len(PACKAGES)  # nothing downloaded again


def test_the_folder_can_be_moved(tmp_path: Path, repo: Path) -> None:
    demo(tmp_path)
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert all(
        os.path.isfile(p) for paths in manifests(tmp_path / "elsewhere").values() for p in paths
    )


LONG = "sound/explosion-barrel"  # one of those that are drawn for evaluation


def fill_ufoai(share: Path) -> None:
    save(share / "long.ogg", 8000, 25.0)
    (share / "games/ufoai/base").mkdir(parents=True)
    with zipfile.ZipFile(share / "games/ufoai/base/0snd.pk3", "w") as archive:
        archive.write(share / "long.ogg", f"{LONG}.ogg")
        for n, letters in enumerate(itertools.product("abcdefgh", repeat=2)):
            save(share / "short.ogg", 7000 + n, 0.3)
            kind = "explosion" if n % 2 else "creak"
            archive.write(share / "short.ogg", f"sound/{kind}-{''.join(letters)}.ogg")
    for path in share.glob("*.ogg"):
        path.unlink()


def test_sounds(tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(repo, "ufoai-sound", fill_ufoai)
    monkeypatch.setattr("ssast.pipelines.demo.corpora.SOUND_PACKAGES", (*PACKAGES, "ufoai-sound"))
    fetch_sounds(tmp_path / "out", tmp_path / "cache", progress=False, log=[].append)
    lists = manifests(tmp_path / "out")
    tasks = {name.rpartition("_")[0] for name in lists if "_" in name}
    assert tasks == {"voice", "language", "events"}
    held = set().union(*(lists[f"{name}_eval.json"] for name in tasks))
    training = lists["train.json"] | lists["valid.json"]
    assert not training & held
    events = lists["events_train.json"] | lists["events_eval.json"]
    assert len(events) == 2 * 32 + 1  # the first clip of the long one
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["num_held_for_tasks"] == len(held) + 2  # and its other two
    assert not any("barrel" in path for path in training)


def fill_tuxpaint(share: Path) -> None:
    for n in range(140):  # more clips in French than a task takes
        save(share / f"tuxpaint/stamps/animals/{n}_desc_fr.ogg", 9000 + n, 0.5)


def test_what_the_demo_evaluates_on_is_not_heard_with_more_recordings(
    tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(repo, "tuxpaint-stamps-default", fill_tuxpaint)
    packages = (*PACKAGES, "tuxpaint-stamps-default")
    monkeypatch.setattr("ssast.pipelines.demo.corpora.SOUND_PACKAGES", packages)
    language = [task for task in DEMO_TASKS if task.name == "language"]  # no other holds them back
    monkeypatch.setattr("ssast.pipelines.demo.corpora.STUDY_TASKS", language)
    demo(tmp_path, "demo")
    fetch_sounds(tmp_path / "more", tmp_path / "cache", progress=False, log=[].append)

    def names(out: str, *files: str) -> set[str]:
        lists = manifests(tmp_path / out)
        return {os.path.relpath(p, tmp_path / out) for file in files for p in lists[file]}

    evaluated = names("demo", "language_eval.json")
    assert evaluated - names("more", "language_eval.json")  # others were drawn
    assert not evaluated & names("more", "train.json", "valid.json")


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
    assert "clips to train on" in demo(tmp_path)[-1]
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


def test_an_interrupted_demo_ends_the_same(
    tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo(tmp_path, "whole")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ssast.pipelines.demo.publish.split", fail)
        with pytest.raises(KeyboardInterrupt):
            demo(tmp_path, "killed")
    assert not (tmp_path / "killed/report.json").exists()
    demo(tmp_path, "killed")
    for name in ("train.json", "valid.json", "tasks/voice_eval.json", "index.jsonl"):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_an_interrupted_repair_is_not_taken_for_finished(
    tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo(tmp_path)
    whole = manifests(tmp_path / "out")
    Path(sorted(whole["train.json"])[0]).unlink()

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ssast.pipelines.demo.publish.divide", fail)
        with pytest.raises(KeyboardInterrupt):
            demo(tmp_path)
    assert not (tmp_path / "out/report.json").exists()
    demo(tmp_path)
    assert manifests(tmp_path / "out") == whole


def test_licences() -> None:
    assert licences(DEP5) == ["GPL-2+", "CC-BY-3"]
    assert licences("Free, see /usr/share/common-licenses/GPL-2'.") == ["GPL-2"]
    assert licences("Do as you like.") == ["see its copyright file"]
    assert package_version(Path("/c/klettres-data_4%3a22.12.3-1_all.deb")) == "4:22.12.3-1"


def folder(path: Path, count: int = 12) -> Path:
    for n in range(count):
        save(path / f"sub {n % 3}/sound {n}.wav", n)
    return path


def own(source: Path, out: Path, **options: float) -> list[str]:
    said: list[str] = []
    prepare_folder(source, out, progress=False, log=said.append, **options)  # type: ignore[arg-type]
    return said


def test_a_folder(tmp_path: Path) -> None:
    source = folder(tmp_path / "in")
    save(source / "long.wav", 99, 25.0)
    (source / "broken.wav").write_bytes(b"RIFF")
    os.close(os.open(os.fsencode(source) + b"/\xff.wav", os.O_CREAT))
    said = own(source, tmp_path / "out")
    lists = manifests(tmp_path / "out")
    assert set(lists) == {"train.json", "valid.json"}
    assert len(lists["train.json"] | lists["valid.json"]) == 12 + 3
    assert not lists["train.json"] & lists["valid.json"]
    assert all(os.path.isfile(path) for paths in lists.values() for path in paths)
    assert said[0].startswith("2 of 15 recordings cannot be used")
    rejected = [json.loads(x) for x in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert [r["name"] for r in rejected] == ["broken.wav", "\udcff.wav"]
    assert all(r["reason"] for r in rejected)
    before = {path: os.stat(path).st_mtime_ns for paths in lists.values() for path in paths}
    own(source, tmp_path / "out")
    assert {path: os.stat(path).st_mtime_ns for path in before} == before


def test_the_output_may_be_inside_the_folder(tmp_path: Path) -> None:
    source = folder(tmp_path / "in")
    own(source, source / "prepared")
    first = manifests(source / "prepared")
    own(source, source / "prepared")
    assert manifests(source / "prepared") == first
    assert len(first["train.json"] | first["valid.json"]) == 12


def test_the_output_may_not_be_the_folder(tmp_path: Path) -> None:
    source = folder(tmp_path / "in")
    with pytest.raises(DataError, match="the clips need a folder of their own"):
        own(source, source)
    assert not (source / "flac").exists()


def test_a_labelled_manifest_is_a_task_too(tmp_path: Path) -> None:
    folder(tmp_path / "in", 60)
    paths = read_manifest(tmp_path / "in").paths
    write_manifest(tmp_path / "m.json", paths, [["dog" if n % 2 else "cat"] for n in range(60)])
    own(tmp_path / "m.json", tmp_path / "out")
    lists = manifests(tmp_path / "out")
    assert len(set().union(*lists.values())) == 60
    assert not lists["labels_eval.json"] & (lists["train.json"] | lists["valid.json"])
    labels = read_manifest(tmp_path / "out/tasks/labels_eval.json").labels
    assert labels is not None and set(labels) == {("dog",), ("cat",)}
    own(tmp_path / "in", tmp_path / "out")  # the same without labels: no task is left behind
    assert set(manifests(tmp_path / "out")) == {"train.json", "valid.json"}


def test_nothing_left(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.wav", "b.flac"):
        (tmp_path / "in" / name).write_bytes(b"no sound")
    with pytest.raises(DataError) as caught:
        own(tmp_path / "in", tmp_path / "out")
    assert "only 0 usable clip" in str(caught.value)
    assert "rejected.jsonl" in str(caught.value)
    assert len((tmp_path / "out/rejected.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_no_such_folder_or_an_empty_one(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=name):
        own(tmp_path / name, tmp_path / "out")


def test_unpack_into_a_folder_that_cannot_be_written(tmp_path: Path, repo: Path) -> None:
    deb = next(repo.glob("*.deb"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        packages.unpack(deb, tmp_path / "file/x")
