"""Recordings handed to the shard preparer: order, names, duplicates, full disks, other formats."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from sounds import tone, write

from ssast.engine.cli.main import main
from ssast.pipelines.audio.convert import Recipe
from ssast.pipelines.audio.decode import Item
from ssast.pipelines.clips.shards import ShardIndex
from ssast.pipelines.errors import DataError
from ssast.pipelines.locks import exclusive
from ssast.pipelines.prepare.pack import Packing, pack_recordings
from ssast.pipelines.prepare.recordings import Recording, file_recording


def packed(recordings: list[Recording], out: Path, jobs: int = 2, **settings: object) -> list[dict]:
    """Pack recordings; the lines of all clips in the index, in its order."""
    out.mkdir(exist_ok=True)
    packing = Packing(Recipe(clip_s=1.0), **{"shard_mib": 0.05, **settings})  # type: ignore[arg-type]
    pack_recordings(recordings, out, packing, out, jobs, False, lambda line: None)
    return [line for _, line in sorted(ShardIndex(out).sidecar_lines())]


def recordings_in(folder: Path, count: int) -> list[Recording]:
    """Recordings of different lengths, in no order of their names."""
    folder.mkdir()
    names = [f"{7 * n % count:02d}.wav" for n in range(count)]
    for n, name in enumerate(names):
        write(folder / name, tone(9000 + 20000 * (n % 3 == 0), seed=n), subtype="PCM_16")
    return [file_recording(name, folder / name) for name in names]


def test_the_order_is_that_of_the_recordings_however_many_threads(tmp_path: Path) -> None:
    recordings = recordings_in(tmp_path / "in", 20)
    one = packed(recordings, tmp_path / "1", jobs=1)
    many = packed(recordings, tmp_path / "8", jobs=8)
    assert one == many
    assert list(dict.fromkeys(line["name"] for line in one)) == [r.item.name for r in recordings]
    for path in (tmp_path / "1").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "8" / path.relative_to(tmp_path / "1")).read_bytes()


def test_of_duplicates_the_first_in_the_given_order_stays(tmp_path: Path) -> None:
    for name, seed in (("b", 0), ("a", 0), ("c", 1)):
        write(tmp_path / f"{name}.wav", tone(9000, seed=seed), subtype="PCM_16")
    recordings = [file_recording(name, tmp_path / f"{name}.wav") for name in "bac"]
    lines = packed(recordings, tmp_path / "out", drop_duplicates=True)
    assert [line["name"] for line in lines] == ["b", "c"]


def test_two_recordings_of_one_name(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{n}.wav", tone(9000, seed=n), subtype="PCM_16") for n in range(2)]
    lines = packed([file_recording("a", path) for path in paths], tmp_path / "out")
    assert [line["name"] for line in lines] == ["a", "a#2"]
    assert len({line["file"] for line in lines}) == 2


def test_what_cannot_be_read_is_reported(tmp_path: Path) -> None:
    write(tmp_path / "good.wav", tone(9000), subtype="PCM_16")
    (tmp_path / "text.wav").write_text("not a sound")
    (tmp_path / "folder.wav").mkdir()
    os.mkfifo(tmp_path / "pipe.wav")
    names = ("good.wav", "text.wav", "folder.wav", "pipe.wav", "missing.wav")
    recordings = [file_recording(name, tmp_path / name) for name in names]
    assert [line["name"] for line in packed(recordings, tmp_path / "out")] == ["good.wav"]
    lines = map(json.loads, (tmp_path / "out/rejected.jsonl").read_text().splitlines())
    assert {line["name"]: line["reason"] for line in lines} == {
        "text.wav": "cannot be decoded: Format not recognised",
        "folder.wav": "cannot be read: not a regular file",
        "pipe.wav": "cannot be read: not a regular file",
        "missing.wav": "cannot be read: No such file or directory",
    }


def test_shards_that_are_wanted_no_more_are_removed(tmp_path: Path) -> None:
    recordings = recordings_in(tmp_path / "in", 12)
    packed(recordings, tmp_path / "out")
    assert len(list((tmp_path / "out/shards").glob("*.tar"))) > 3
    (tmp_path / "out/shards/.tmp-00003.tar").touch()  # of a killed run
    packed(recordings[:1], tmp_path / "out")
    files = {path.name for path in (tmp_path / "out/shards").iterdir()}
    assert files == {"00000.tar", "00000.jsonl"}


def test_recordings_in_memory(tmp_path: Path) -> None:
    data = write(tmp_path / "a.wav", tone(9000), subtype="PCM_16").read_bytes()
    item = Item("a.wav", data)
    [line] = packed([Recording(item, item.signature(), len(data))], tmp_path / "out")
    assert line["name"] == "a.wav"


FULL = """
import sys
from ssast.engine.cli.main import main
sys.exit(main(["data", "prepare", *sys.argv[1:]]))
"""


def test_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    def limit() -> None:  # the largest file, which a shard exceeds: as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))

    (tmp_path / "in").mkdir()
    write(tmp_path / "in/a.wav", tone(80000), subtype="PCM_16")
    run = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "in"), str(tmp_path / "out")],
        preexec_fn=limit,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    last = run.stderr.strip().splitlines()[-1]
    assert "error: preparing the data failed:" in last and "File too large" in last
    assert list((tmp_path / "out/shards").iterdir()) == []


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with exclusive(tmp_path), pytest.raises(DataError, match="another run"), exclusive(tmp_path):
        pass
    with exclusive(tmp_path):  # free again
        pass


def test_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(DataError, match="out: cannot be written to"), exclusive(tmp_path / "out"):
        pass


def test_a_folder_of_m4a_without_ffmpeg_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    (tmp_path / "in").mkdir()
    for name in ("a.m4a", "b.M4A"):
        (tmp_path / "in" / name).write_bytes(b"\0\0\0\x1cftypM4A ")
    assert main(["data", "prepare", str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "none of 2 recordings can be used" in line
    assert "'a.m4a': libsndfile cannot decode it: install ffmpeg to read this format" in line
