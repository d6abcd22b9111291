"""The demo from packages of our own making: what is in it, and that a killed run goes on."""

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest
from debs import DEP5, PACKAGES, build, calls, demo, manifests, save

from ssast.pipelines.clips.manifest import read_manifest
from ssast.pipelines.clips.shards import ShardIndex
from ssast.pipelines.demo.corpora import fetch_sounds
from ssast.pipelines.demo.publish import clips_of
from ssast.pipelines.demo.tasks import DEMO_TASKS, Label, is_held
from ssast.pipelines.errors import DataError
from ssast.pipelines.prepare import pack


def names_of(manifest: Path) -> list[tuple[str, int]]:
    """The recording and the part of each clip."""
    index = read_manifest(manifest).paths
    assert isinstance(index, ShardIndex)
    return [(clip.name, clip.part) for clip in clips_of(index)]


def shards(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "shards").iterdir()}


def test_demo(tmp_path: Path, repo: Path) -> None:
    said = demo(tmp_path)
    out = tmp_path / "out"
    lists = manifests(out)
    assert set(lists) == {
        *("train.json", "voice_train.json", "voice_eval.json"),
        *("language_train.json", "language_eval.json"),
    }
    assert all(lists.values())
    held = lists["voice_eval.json"] | lists["language_eval.json"]
    assert not held & lists["train.json"]
    assert not lists["voice_train.json"] & lists["voice_eval.json"]
    # 120 sounds, 1 copy, 1 broken; 5 sounds, 1 synthetic voice
    assert len(held | lists["train.json"]) == 125 == len(read_manifest(out))
    labels = read_manifest(out / "tasks/voice_eval.json").labels
    assert labels is not None
    assert {label for (label,) in labels} == {"klettres-de", "klettres-fr"}
    for (name, _), (label,) in zip(names_of(out / "tasks/voice_eval.json"), labels, strict=True):
        assert f"/{label.removeprefix('klettres-')}/alpha/" in name
    [rejected] = (out / "rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected)["name"].endswith("broken.ogg")
    made = json.loads((out / "demo.json").read_text())
    assert made["packages"] == {name: "4:1.2-3" for name in PACKAGES}
    report = json.loads((out / "report.json").read_text())
    assert (report["duplicates"], report["num_rejected"]) == (1, 1)
    assert said[0].startswith("klettres-data 4:1.2-3: ")
    assert said[0].endswith("122 recordings, licence GPL-2+, CC-BY-3")
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


@pytest.mark.parametrize("lost", ["shards/00000.tar", "shards/00000.jsonl", "index.npy"])
def test_a_lost_file_is_made_again(tmp_path: Path, repo: Path, lost: str) -> None:
    demo(tmp_path)
    before = (tmp_path / "out" / lost).read_bytes()
    (tmp_path / "out" / lost).unlink()
    demo(tmp_path)
    assert (tmp_path / "out" / lost).read_bytes() == before
    assert calls(repo) == len(PACKAGES)  # nothing downloaded again


def test_the_folder_can_be_moved(tmp_path: Path, repo: Path) -> None:
    demo(tmp_path)
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    for manifest in ("train.json", "tasks/voice_eval.json"):
        clips = read_manifest(tmp_path / "elsewhere" / manifest).paths
        assert all(clip.read() for clip in clips)  # type: ignore[union-attr]


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
    assert not lists["train.json"] & held
    events = lists["events_train.json"] | lists["events_eval.json"]
    assert len(events) == 2 * 32 + 1  # the first clip of the long one
    made = json.loads((tmp_path / "out/demo.json").read_text())
    assert made["num_held_for_tasks"] == len(held) + 2  # and its other two
    assert not any("barrel" in name for name in lists["train.json"])
    pak = "ufoai-sound/usr/share/games/ufoai/base/0snd.pk3"
    long = [clip for clip in names_of(tmp_path / "out") if clip[0] == f"{pak}/{LONG}.ogg"]
    assert [part for _, part in long] == [0, 1, 2]


def fill_ktuberling(share: Path) -> None:
    for code in ("de", "fr"):
        for n in range(45):
            long = n == EVALUATED and code == "de"
            save(
                share / f"ktuberling/sounds/{code}/{n}.ogg",
                ord(code[0]) * 100 + n,
                25.0 if long else 0.5,
            )


EVALUATED = next(n for n in range(45) if is_held(Label("", str(n))))


def test_no_part_of_an_evaluated_recording_is_pretrained_on(tmp_path: Path, repo: Path) -> None:
    build(repo, "ktuberling-data", fill_ktuberling)
    demo(tmp_path, names=("ktuberling-data",))
    name = f"ktuberling-data/usr/share/ktuberling/sounds/de/{EVALUATED}.ogg"
    of_it = {(name, part) for part in range(3)}
    assert of_it <= set(names_of(tmp_path / "out"))
    assert of_it & set(names_of(tmp_path / "out/tasks/voice_eval.json"))
    assert not of_it & set(names_of(tmp_path / "out/train.json"))


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
    evaluated = manifests(tmp_path / "demo")["language_eval.json"]
    more = manifests(tmp_path / "more")
    assert evaluated - more["language_eval.json"]  # others were drawn
    assert not evaluated & more["train.json"]


@pytest.mark.parametrize("name", ["train.json", "tasks/mine.json", "demo.json", "shards/0.tar"])
def test_a_folder_of_the_user_is_left_alone(name: str, tmp_path: Path, repo: Path) -> None:
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    found = mine.parent if name.startswith("tasks") else mine
    with pytest.raises(DataError, match=f"{found}: (exists|not of)"):
        demo(tmp_path)
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [mine]
    assert mine.read_text() == "mine"


def test_an_interrupted_demo_ends_the_same(
    tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo(tmp_path, "whole")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ssast.pipelines.demo.publish.divide", fail)
        with pytest.raises(KeyboardInterrupt):
            demo(tmp_path, "killed")
    assert not (tmp_path / "killed/demo.json").exists()
    demo(tmp_path, "killed")
    for name in ("train.json", "tasks/voice_eval.json", "index.npy"):
        whole = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "killed" / name).read_bytes() == whole
    assert shards(tmp_path / "killed") == shards(tmp_path / "whole")


def test_an_interrupted_repair_is_not_taken_for_finished(
    tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo(tmp_path)
    whole = manifests(tmp_path / "out")
    (tmp_path / "out/shards/00000.tar").unlink()

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ssast.pipelines.demo.publish.divide", fail)
        with pytest.raises(KeyboardInterrupt):
            demo(tmp_path)
    assert not (tmp_path / "out/demo.json").exists()
    demo(tmp_path)
    assert manifests(tmp_path / "out") == whole


PROGRAM = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from ssast.pipelines.demo import corpora

    corpora.SHARD_MIB = 0.1
    out, cache, *packages = sys.argv[1:]
    corpora.fetch_demo(Path(out), Path(cache), packages=packages, jobs=1, progress=False)
    """
)


@pytest.mark.slow
def test_a_killed_demo_goes_on(tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was finished is kept, though the packages are unpacked once more."""
    build(repo, "ufoai-sound", fill_ufoai)
    packages = (*PACKAGES, "ufoai-sound")
    monkeypatch.setattr("ssast.pipelines.demo.corpora.SHARD_MIB", 0.1)
    demo(tmp_path, "whole", packages)
    out = tmp_path / "killed"
    command = [sys.executable, "-c", PROGRAM, str(out), str(tmp_path / "cache"), *packages]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while len(list(out.glob("shards/[0-9]*.jsonl"))) < 2:  # not what is half written, .tmp-*
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = {path.name: path.stat().st_mtime_ns for path in out.glob("shards/[0-9]*.jsonl")}
    assert not (out / "demo.json").exists() and (out / ".unpacked").exists()
    numbers: list[int] = []
    real = pack.make_shard
    monkeypatch.setattr(pack, "make_shard", lambda n, *rest: (numbers.append(n), real(n, *rest))[1])
    demo(tmp_path, "killed", packages)
    assert not {f"{n:05d}.jsonl" for n in numbers} & made.keys()
    assert all((out / "shards" / name).stat().st_mtime_ns == made[name] for name in made)
    assert shards(out) == shards(tmp_path / "whole")
    assert manifests(out) == manifests(tmp_path / "whole")
    assert not (out / ".unpacked").exists()
    assert os.listdir(out).count("demo.json") == 1
