"""Lists of segments of recordings: what they are read from, and what recordings they are of."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from names import FILES

from ssast.pipelines.clips import overlap
from ssast.pipelines.clips.holdout import hold_out_clips, recordings_of, split_clips
from ssast.pipelines.clips.listed import FileList
from ssast.pipelines.clips.manifest import read_clips, read_manifest, write_manifest
from ssast.pipelines.clips.mix import fingerprint, select
from ssast.pipelines.clips.overlap import Contents, shared_recordings
from ssast.pipelines.clips.segment import Files, Segment
from ssast.pipelines.errors import DataError, TooFewRecordings

TIMES = st.floats(1e-3, 1e6)
CLIPS = st.one_of(FILES, st.builds(Segment, FILES, TIMES, st.floats(1e-3, 1e3) | st.just(math.inf)))


def cut(path: str, *begins: float, duration_s: float = 1.0) -> list[Segment]:
    return [Segment(path, begin_s, duration_s) for begin_s in begins]


@settings(max_examples=60, deadline=None)
@given(st.lists(CLIPS, min_size=1, max_size=20, unique=True), st.randoms(use_true_random=False))
def test_a_list_holds_files_and_segments(clips: list[Any], random: Any) -> None:
    files = FileList.of(clips)
    rows = np.array(random.sample(range(len(clips)), random.randint(1, len(clips))))
    for found, expected in (
        (files, clips),
        (select(files, rows), [clips[row] for row in rows]),
        (files[1:], clips[1:]),
    ):
        assert found == expected and [found[row] for row in range(len(found))] == expected
        assert isinstance(found, FileList)
        paths = [clip if isinstance(clip, str) else clip.path for clip in expected]
        assert list(found.files()) == paths
        order = {path: number for number, path in enumerate(sorted(set(paths)))}
        assert found.numbers().tolist() == [order[path] for path in paths]
        if any(isinstance(clip, Segment) for clip in clips):
            assert sorted(found.recordings()) == sorted(set(paths))
    assert (fingerprint(files) == fingerprint(FileList.of(clips[::-1]))) == (len(clips) == 1)


def test_a_fingerprint_changes_with_the_segments_alone() -> None:
    found = {
        fingerprint(FileList.of(clips))
        for clips in (["a"], cut("a", 0), cut("a", 1), cut("a", 0, duration_s=2), ["a", "a"])
    }
    assert len(found) == 5
    assert fingerprint(FileList.of(cut("/x/a", 1))) == fingerprint(FileList.of(cut("/y/a", 1)))


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ({"begin": 12.5, "end": 17.5}, "[12.5-17.5 s]"),
        ({"start": "0", "end": 0.25}, "[0-0.25 s]"),
        ({"offset": 86400.125, "duration": "2"}, "[86400.125-86402.125 s]"),
        ({"offset": 3}, "[3 s to end]"),
        ({"begin": 1, "end": None, "duration": 2.5}, "[1-3.5 s]"),
        ({"end": 4}, "[0-4 s]"),
        ({"duration": 9.5}, ""),  # of the file, as in manifests of whole files
        ({"begin": "", "end": " "}, ""),
    ],
)
def test_columns_of_manifests(tmp_path: Path, entry: dict[str, Any], name: str) -> None:
    (tmp_path / "m.json").write_text(json.dumps({"data": [{"wav": "a.wav", **entry}]}))
    (clip,) = read_clips(tmp_path / "m.json")
    assert str(clip) == f"{tmp_path}/a.wav{name}"
    given = {key: "" if value is None else value for key, value in entry.items()}
    head, row = ",".join(["wav", *given]), ",".join(map(str, ["a.wav", *given.values()]))
    (tmp_path / "m.csv").write_text(f"{head}\n{row}\n")
    assert list(read_clips(tmp_path / "m.csv")) == [clip]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"begin": -1, "end": 2}, "found -1 s to 2 s"),
        ({"begin": 2, "end": 2}, "found 2 s to 2 s"),
        ({"begin": 2, "duration": 0}, "found 2 s to 2 s"),
        ({"begin": "soon"}, "expected seconds under 'begin', found 'soon'"),
        ({"offset": "nan"}, "expected seconds under 'offset', found 'nan'"),
        ({"start": 0, "end": [1]}, r"expected seconds under 'end', found \[1\]"),
        ({"start": True}, "expected seconds under 'start', found True"),
    ],
)
def test_times_that_are_none(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    entries = [{"wav": "a.wav"}, {"wav": "a.wav", **entry}]
    (tmp_path / "m.json").write_text(json.dumps({"data": entries}))
    with pytest.raises(DataError, match=f"m.json: entry 1: .*{message}"):
        read_clips(tmp_path / "m.json")


def test_manifests_are_read_as_they_were_written(tmp_path: Path) -> None:
    clips = [*cut("/a.wav", 0, 1.1, 2.7), "/a.wav", Segment("/b.wav", 3.3, math.inf), "/c.wav"]
    labels = [["x"], ["y"], ["x", "y"], [], ["x"], ["y"]]
    write_manifest(tmp_path / "m.json", clips, labels)
    found = read_manifest(tmp_path / "m.json")
    assert list(found.paths) == clips and list(map(list, found.labels or ())) == labels


def test_one_segment_is_listed_once(tmp_path: Path) -> None:
    entries = [{"wav": "a.wav", "begin": begin, "duration": 1} for begin in (0, 1.5, 3, 1.5)]
    (tmp_path / "m.json").write_text(json.dumps({"data": entries}))
    message = r"entry 3: a.wav\[1.5-2.5 s\] is listed already at entry 1"
    with pytest.raises(DataError, match=message):
        read_clips(tmp_path / "m.json")


@given(st.lists(st.builds(Segment, FILES, TIMES, TIMES), min_size=1, max_size=5))
def test_keys_have_the_hashes_of_clips(clips: list[Segment]) -> None:
    for some in (clips, [*clips, "whole.wav"]):
        files = Files.of(some)
        assert list(map(hash, files.keys())) == list(map(hash, files.clips()))


def test_whole_recordings_are_held_out() -> None:
    clips = FileList.of(clip for k in range(20) for clip in cut(f"/{k % 10}.wav", k, k + 100.0))
    train, held = split_clips(clips, 0.2)
    ours, theirs = ({clips[int(row)].path for row in rows} for rows in (train, held))
    assert theirs and not ours & theirs and len(ours | theirs) == 10
    assert recordings_of(list(clips)).tolist() == recordings_of(clips).tolist()


def test_of_one_recording_segments_are_held_out_unless_they_overlap(
    caplog: pytest.LogCaptureFixture,
) -> None:
    apart = FileList.of(cut("/a.wav", 0.1, 2.3, 1.1, 5))
    assert hold_out_clips(apart, 0.3).sum() == 1
    assert "/a.wav[0.1-1.1 s]: one recording alone" in caplog.text
    with pytest.raises(TooFewRecordings, match="clips of one recording that overlap"):
        hold_out_clips(FileList.of(cut("/a.wav", 0, 2, 1.5, 5)), 0.3)
    assert not FileList.of([*cut("/a.wav", 0, 2), *cut("/b.wav", 0.5)]).overlapping()


@pytest.mark.parametrize("kind", [list, FileList.of])
def test_segments_of_one_recording_leak(kind: Any) -> None:
    one = kind([*cut("/a.wav", 0, 1), *cut("/b.wav", 2)])
    other = kind([*cut("/c.wav", 0), *cut("/b.wav", 7, 9)])
    pairs = [(str(ours), str(theirs)) for ours, theirs in shared_recordings(one, other)]
    assert pairs == [("/b.wav[2-3 s]", "/b.wav[7-8 s]")]
    assert shared_recordings(other, kind(["/a.wav"])) == []
    assert shared_recordings(one, kind(["/a.wav", "/d.wav"])) == [(one[0], "/a.wav")]


def test_copied_recordings_of_segments_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSAST_CACHE", str(tmp_path / "cache"))
    for name, content in (("a", b"x" * 9000), ("b", b"x" * 9000), ("c", b"y" * 9000)):
        (tmp_path / name).write_bytes(content)
    read: list[str] = []
    real = overlap._digest
    monkeypatch.setattr(
        overlap, "_digest", lambda clip, kind: (read.append(Path(clip).name), real(clip, kind))[1]
    )
    one = FileList.of(cut(f"{tmp_path}/a", *range(50)))
    other = FileList.of([*cut(f"{tmp_path}/b", *range(50)), *cut(f"{tmp_path}/c", *range(50))])
    contents = Contents()
    assert contents.copies(one, other) == [(f"{tmp_path}/a", f"{tmp_path}/b")]
    assert sorted(read) == ["a", "a", "b", "b", "c"]
    assert contents.sizes(other).tolist() == [9000] * 100
