"""Cuts that lhotse wrote: clips of spans of files, and what is left out."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from dataset_files import classes, silent
from sounds import tone, write

from ssast.engine.cli.main import main
from ssast.pipelines.clips.manifest import read_manifest
from ssast.pipelines.clips.segment import Segment
from ssast.pipelines.datasets.annotations import Reading
from ssast.pipelines.datasets.manifests import write_dataset
from ssast.pipelines.errors import DataError, UnavailableError


@pytest.fixture
def lhotse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)
    for name in ("in", "shar"):
        (tmp_path / name).mkdir()
    return pytest.importorskip("lhotse")


@pytest.fixture
def cuts(lhotse: Any, tmp_path: Path) -> Any:
    """Cuts of a recording of 10 s with two supervisions, and of one of two channels with none."""
    write(tmp_path / "a.wav", tone(160_000))
    write(tmp_path / "b.flac", np.stack([tone(16_000)] * 2, axis=1))
    recordings = [lhotse.Recording.from_file(f"{name}") for name in ("a.wav", "b.flac")]
    spans = (("s1", 0.5, 1, "hello", "wren"), ("s2", 3, 2.25, "bye", ["robin", "Speech, male", 7]))
    supervisions = [
        lhotse.SupervisionSegment(
            id=name, recording_id="a", start=begin, duration=duration, text=text, speaker="bo",
            custom={"label": label, "n": label},
        )
        for name, begin, duration, text, label in spans
    ]  # fmt: skip
    return lhotse.CutSet.from_manifests(
        lhotse.RecordingSet.from_recordings(recordings),
        lhotse.SupervisionSet.from_segments(supervisions),
    )


def clips(out: Path, split: str = "cuts") -> list[tuple[str, tuple[str, ...] | None]]:
    found = read_manifest(out / f"{split}.json")
    names = [str(clip).rpartition("/")[2] for clip in found.paths]
    return list(zip(names, found.labels or [None] * len(names), strict=True))


def test_a_cut_is_a_span_of_its_file(
    lhotse: Any, cuts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = cuts[0].truncate(duration=4)
    lhotse.CutSet.from_cuts([*cuts, first]).to_file("in/train.jsonl.gz")
    cuts.trim_to_supervisions().to_file("in/cuts.jsonl")
    arguments = ["data", "manifests", "lhotse", "in", "--out", "out"]
    assert main(arguments) == 0
    robin = ("robin", "Speech, male", "7")
    assert clips(tmp_path / "out", "train") == [
        ("a.wav", ("wren", *robin)),
        ("b.flac", ()),
        ("a.wav[0-4 s]", ("wren", *robin)),
    ]
    assert clips(tmp_path / "out") == [("a.wav[0.5-1.5 s]", ("wren",)), ("a.wav[3-5.25 s]", robin)]
    assert [row[1] for row in classes(tmp_path / "out")[1:]] == sorted(("wren", *robin))
    printed = capsys.readouterr().out
    assert "labels: custom.label\n" in printed
    assert "train.jsonl.gz: 1 cuts have no label" in printed
    assert "train.jsonl.gz: 2 cuts are longer than one of their supervisions" in printed
    assert "cuts.jsonl: " not in printed
    assert main([*arguments, "--label-column", "speaker"]) == 0
    assert clips(tmp_path / "out")[0] == ("a.wav[0.5-1.5 s]", ("bo",))
    assert main([*arguments, "--label-column", "custom.n"]) == 0
    assert clips(tmp_path / "out")[1] == ("a.wav[3-5.25 s]", robin)


def test_a_cut_is_what_lhotse_loads(cuts: Any, tmp_path: Path) -> None:
    cuts.trim_to_supervisions().to_file("in/cuts.jsonl.gz")  # beside it there is no a.wav
    write_dataset("lhotse", tmp_path / "in/cuts.jsonl.gz", tmp_path / "out", silent)
    segment = read_manifest(tmp_path / "out/cuts.json").paths[1]
    _, cut = cuts.trim_to_supervisions()
    expected = cut.load_audio()[0]
    assert isinstance(segment, Segment)
    start, frames = (round(16000 * time_s) for time_s in (segment.begin_s, segment.duration_s))
    samples, _ = soundfile.read(segment.path, frames, start, dtype="float32")
    np.testing.assert_array_equal(samples, expected)


def test_cuts_that_are_no_span_of_a_file_are_counted(
    lhotse: Any, cuts: Any, tmp_path: Path
) -> None:
    one, two = cuts
    two.channel = 1  # of two
    url = one.with_id("url").map_supervisions(lambda supervision: supervision)
    url.recording = lhotse.Recording(
        "u", [lhotse.AudioSource("url", [0], "https://host/u.wav")], 16000, 160000, 10.0
    )
    odd = [
        one.pad(20), one.append(one), one.perturb_speed(1.1), one.perturb_volume(2.0), two, url,
        lhotse.MonoCut("bare", 0, 1, 0),
    ]  # fmt: skip
    lhotse.CutSet.from_cuts([one.resample(8000), *odd]).to_file("odd.jsonl")
    lines: list[str] = []
    write_dataset("lhotse", tmp_path / "odd.jsonl", tmp_path / "out", lines.append)
    assert [name for name, _ in clips(tmp_path / "out", "odd")] == ["a.wav"]
    (line,) = [line for line in lines if "left out" in line]
    assert "odd.jsonl: left out are 7 cuts: 2 of several tracks, or padding, the first" in line
    for what in (
        "1 transformed (Speed), the first a-0_sp1.1", "1 transformed (Volume)",
        "1 of some channels of a file", "1 behind a URL, the first url", "1 without a recording",
    ):  # fmt: skip
        assert what in line
    lhotse.CutSet.from_cuts(odd).to_file("odd.jsonl")
    with pytest.raises(DataError, match=r"none of its 7 cuts is a span of a file: 2 of several"):
        write_dataset("lhotse", tmp_path / "odd.jsonl", tmp_path / "out", silent)


def test_shar_folders(lhotse: Any, cuts: Any, tmp_path: Path) -> None:
    """Their archives open as plain ones; with labels, their sound becomes files."""
    cuts.trim_to_supervisions().to_shar("shar", fields={"recording": "flac"}, shard_size=1)
    found = read_manifest(tmp_path / "shar/recording.{000000..000001}.tar")
    assert [getattr(clip, "name", None) for clip in found.paths] == ["s1.flac", "s2.flac"]
    assert found.labels is None
    with pytest.raises(DataError, match=r"1 in a Shar folder, the first s1: .*CutSet.save_audios"):
        write_dataset("lhotse", tmp_path / "shar", tmp_path / "out", silent)
    saved = lhotse.CutSet.from_shar(in_dir="shar").save_audios("sounds")
    saved.map(lambda cut: cut.drop_custom("shard_origin")).to_file("saved.jsonl.gz")
    write_dataset("lhotse", tmp_path / "saved.jsonl.gz", tmp_path / "out", silent)
    assert [names for _, names in clips(tmp_path / "out", "saved")] == [
        ("wren",), ("robin", "Speech, male", "7"),
    ]  # fmt: skip


def test_text_is_the_label_where_there_is_no_other(lhotse: Any, cuts: Any, tmp_path: Path) -> None:
    for cut in cuts:
        for supervision in cut.supervisions:
            supervision.custom = None
    cuts.trim_to_supervisions().to_file("in/cuts.jsonl")
    cuts = lhotse.CutSet.from_file("in/cuts.jsonl").to_eager()
    next(iter(cuts)).recording.sources[0].source = "gone.wav"
    cuts.to_file("in/cuts.jsonl")
    lines: list[str] = []
    write_dataset("lhotse", tmp_path / "in", tmp_path / "out", lines.append)
    assert clips(tmp_path / "out")[-1] == ("a.wav[3-5.25 s]", ("bye",))
    assert lines[-1] == "labels: text"
    assert "cuts\ts1: gone.wav\n" in (tmp_path / "out/missing.txt").read_text()
    cuts.map(lambda cut: cut.drop_supervisions()).to_file("in/cuts.jsonl")
    write_dataset("lhotse", tmp_path / "in", tmp_path / "out", lines.append)
    assert clips(tmp_path / "out")[-1][1] is None
    assert lines[-1].startswith("no labels: ")


@pytest.mark.parametrize(
    ("content", "reading", "message"),
    [
        ("", Reading(), "expected cuts, found nothing"),
        ("{\n", Reading(), "lhotse cannot read it after 0 cuts: "),
        ('{"id": "x", "start": 0, "duration": 1, "channel": 0, "type": "MonoCut", "supervisions": '
         '[]}\n{"a": 1, "type": "MonoCut"}\n', Reading(), "lhotse cannot read it after 1 cuts: "),
        ('{"id": "s", "recording_id": "a", "start": 0, "duration": 1}\n', Reading(),
         "expected cuts, found a SupervisionSet"),
        ("", Reading(label_column="custom."), "--label-column is 'custom.', expected one of text"),
        ("", Reading(window_s=1.0), "lhotse: windows are for raven and audacity"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_cuts(
    lhotse: Any, tmp_path: Path, content: str, reading: Reading, message: str
) -> None:
    (tmp_path / "cuts.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        write_dataset("lhotse", tmp_path / "cuts.jsonl", tmp_path / "out", silent, reading)
    assert not (tmp_path / "out").exists()


def test_labels_and_times_that_are_none(cuts: Any, tmp_path: Path) -> None:
    one = cuts[0]
    one.supervisions[0].custom = {"label": {"a": 1}}
    cuts.to_eager().to_file("cuts.jsonl")
    with pytest.raises(DataError, match=r"cuts.jsonl: cut a-0: expected labels of text"):
        write_dataset("lhotse", tmp_path / "cuts.jsonl", tmp_path / "out", silent)
    with pytest.raises(DataError, match="no supervision has a language"):
        reading = Reading(label_column="language")
        write_dataset("lhotse", tmp_path / "cuts.jsonl", tmp_path / "out", silent, reading)
    one.start = "soon"
    cuts.to_file("cuts.jsonl")
    with pytest.raises(DataError, match="cut a-0: malformed: "):
        reading = Reading("speaker")
        write_dataset("lhotse", tmp_path / "cuts.jsonl", tmp_path / "out", silent, reading)
    one.start = -1.0
    cuts.to_file("cuts.jsonl")
    with pytest.raises(DataError, match=r"cuts.jsonl: cut a-0: expected a begin of 0 s or later"):
        write_dataset("lhotse", tmp_path / "cuts.jsonl", tmp_path / "out", silent, reading)


def test_lhotse_is_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lhotse", None)
    (tmp_path / "cuts.jsonl").write_text("{}\n")
    with pytest.raises(UnavailableError, match=r"cuts need lhotse: pip install 'ssast-engine"):
        write_dataset("lhotse", tmp_path / "cuts.jsonl", tmp_path / "out", silent)
    for place in ("gone.jsonl", "cuts.txt"):
        (tmp_path / "cuts.txt").touch()
        with pytest.raises(DataError, match=r"expected"):
            write_dataset("lhotse", tmp_path / place, tmp_path / "out", silent)
