"""Events that were marked in long recordings: the clips, windows and labels that come of them."""

import json
from pathlib import Path

import pytest
from dataset_files import classes, report, silent
from dataset_trees import audioset, text
from sounds import tone, write

from ssast.engine.cli.main import main
from ssast.pipelines.clips.manifest import read_manifest
from ssast.pipelines.datasets.annotations import Reading
from ssast.pipelines.datasets.manifests import write_dataset
from ssast.pipelines.errors import DataError

HEAD = "Selection\tView\tChannel\tBegin Time (s)\tEnd Time (s)\tLow Freq (Hz)\tHigh Freq (Hz)"


def row(number: int, begin_s: float, end_s: float, *more: str, view: str = "Spectrogram 1") -> str:
    return "\t".join([str(number), view, "1", f"{begin_s}", f"{end_s}", "500", "4000", *more])


def raven(path: Path, *rows: str, columns: str = "Species") -> None:
    text(path, "\n".join(["\t".join(filter(None, [HEAD, columns])), *rows]) + "\n")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Recordings of 10 s at three rates; the last has no table."""
    folder = tmp_path / "in"
    (folder / "night").mkdir(parents=True)
    write(folder / "a.wav", tone(160_000))
    write(folder / "night/b.flac", tone(441_000, rate_hz=44100), 44100)
    write(folder / "c.wav", tone(80_000), 8000)
    return folder


def clips(out: Path, source: Path) -> list[tuple[str, tuple[str, ...]]]:
    found = read_manifest(out / "clips.json")
    names = [str(clip).removeprefix(f"{source}/") for clip in found.paths]
    return list(zip(names, found.labels or (), strict=True))


def test_raven_tables(source: Path, tmp_path: Path) -> None:
    raven(
        source / "a.Table.1.selections.txt",
        row(1, 0.5, 1.25, "Speech, male", view="Waveform 1"),
        row(1, 0.5, 1.25, "Speech, male"),
        row(2, 3.0, 4.5, "wren"),
        row(3, 3.0, 4.5, "robin"),
        row(4, 7.0, 8.0),
        row(5, 9.0, 9.0, "wren"),
    )
    raven(source / "tables/b.selections.txt", row(1, 8.25, 9.0, "wren"))
    raven(source / "gone.selections.txt", row(1, 1.0, 2.0, "wren"))
    text(source / "notes.txt", "no table\n")
    lines: list[str] = []
    write_dataset("raven", source, tmp_path / "out", lines.append)
    assert clips(tmp_path / "out", source) == [
        ("a.wav[0.5-1.25 s]", ("Speech, male",)),
        ("a.wav[3-4.5 s]", ("robin", "wren")),
        ("night/b.flac[8.25-9 s]", ("wren",)),
    ]
    assert [line[1] for line in classes(tmp_path / "out")[1:]] == ["Speech, male", "robin", "wren"]
    assert (tmp_path / "out/missing.txt").read_text() == "clips\tgone.selections.txt: 1 s\n"
    assert "clips: 3 clips; 1 more are not on disk" in lines[0]
    assert lines[1:] == [
        f"{source}/notes.txt: has no rows, or is no table, and no recording has its name",
        "1 labels at a point, without duration, are left out: --window-s makes windows of them",
        "1 events without a label are left out",
        "1 recordings have no table, and no clips",
    ]
    assert report(tmp_path / "out")["data_set"] == "raven"


def test_empty_cells_at_the_begin_of_a_row(source: Path, tmp_path: Path) -> None:
    """As pandas writes a table with its index; and a first column that is empty in a row."""
    head = "Begin Time (s)\tEnd Time (s)\tLow Freq (Hz)\tAnnotation"
    text(source / "a.selections.txt", f"\t{head}\n0\t1.5\t2.25\t500\twren\n1\t3\t4\t25\t\n")
    text(source / "c.selections.txt", "Annotation\tBegin Time (s)\tEnd Time (s)\n\t3.0\t4.0\n")
    write_dataset("raven", source, tmp_path / "out", silent)
    assert clips(tmp_path / "out", source) == [("a.wav[1.5-2.25 s]", ("wren",))]
    text(source / "c.selections.txt", f"{head}\n0\t1.5\t2.25\t500\twren\n")  # as R writes it
    with pytest.raises(DataError, match=r"c.selections.txt: line 2: expected 4 cells, as in the"):
        write_dataset("raven", source, tmp_path / "out2", silent)


def test_a_table_of_raven_is_of_the_recording_of_its_whole_name(
    source: Path, tmp_path: Path
) -> None:
    raven(source / "a.Table.1.selections.txt", row(1, 1.0, 2.0, "wren"))
    raven(source / "a_2.Table.1.selections.txt", row(1, 5.0, 6.0, "frog"))  # it was not copied
    raven(source / "c.wav.Table.1.selections.txt", row(1, 3.0, 4.0, "frog"))
    write_dataset("raven", source, tmp_path / "out", silent)
    expected = [("a.wav[1-2 s]", ("wren",)), ("c.wav[3-4 s]", ("frog",))]
    assert clips(tmp_path / "out", source) == expected
    assert "a_2.Table.1" in (tmp_path / "out/missing.txt").read_text()


def test_one_raven_table_of_several_recordings(source: Path, tmp_path: Path) -> None:
    columns = "Begin File\tFile Offset (s)\tSpecies Code"
    rows = (
        row(1, 1.0, 2.0, "a.wav", "1.0", "wre"),
        row(2, 12.0, 12.5, "D:\\x\\b.flac", "2", "rob"),
    )
    raven(source / "all.txt", *rows, columns=columns)
    write_dataset("raven", source, tmp_path / "out", silent)
    expected = [("a.wav[1-2 s]", ("wre",)), ("night/b.flac[2-2.5 s]", ("rob",))]
    assert clips(tmp_path / "out", source) == expected
    rows = (row(1, 1.0, 2.0, "a.wav", "wre"), row(2, 12.0, 12.5, "b.flac", "rob"))
    raven(source / "all.txt", *rows, columns="Begin File\tSpecies Code")
    with pytest.raises(DataError, match=r"all.txt: line 3: times over several recordings"):
        write_dataset("raven", source, tmp_path / "out", silent)


def test_audacity_tracks(source: Path, tmp_path: Path) -> None:
    track = "0.5\t1.25\twren\n\\\t500.0\t4000.0\n2.0\t2.0\there\n3.0\t4.5\tSpeech, male\n"
    text(source / "a.txt", track)
    text(source / "night/b_labels.txt", "0\t10\train\n")
    lines: list[str] = []
    write_dataset("audacity", source, tmp_path / "out", lines.append)
    assert clips(tmp_path / "out", source) == [
        ("a.wav[0.5-1.25 s]", ("wren",)),
        ("a.wav[3-4.5 s]", ("Speech, male",)),
        ("night/b.flac[0-10 s]", ("rain",)),
    ]
    assert "1 labels at a point" in lines[1]


def test_audioset_segments_of_whole_videos(tmp_path: Path) -> None:
    audioset(tmp_path / "in")
    write_dataset("audioset_segments", tmp_path / "in", tmp_path / "out", silent)
    found = read_manifest(tmp_path / "out/balanced_train.json")
    assert [str(clip).rpartition("[")[2] for clip in found.paths] == ["30-40 s]", "0-10 s]"]
    assert found.labels == (("/m/09x0r", "/t/dd00088"), ("/m/05zppz",))
    assert (tmp_path / "out/train_2m_weight.csv").exists()


def test_windows_have_the_labels_of_points_in_them(source: Path, tmp_path: Path) -> None:
    text(source / "a.txt", "1.0\t1.0\twren\n4.5\t5.5\trobin\n6\t6\trobin\n9.5\t9.5\t\n")
    write_dataset("audacity", source, tmp_path / "out", silent, Reading(None, 2, None, "quiet"))
    assert clips(tmp_path / "out", source) == [
        ("a.wav[0-2 s]", ("wren",)),
        ("a.wav[2-4 s]", ("quiet",)),
        ("a.wav[4-6 s]", ("robin",)),
        ("a.wav[6-8 s]", ("robin",)),  # at its border; in the last window one without a label is
    ]


def test_windows_have_the_labels_of_their_events(source: Path, tmp_path: Path) -> None:
    """Half of an event, or half of the window; what is touched without that is no background."""
    raven(
        source / "a.selections.txt",
        row(1, 0.5, 1.0, "wren"),  # within the first window
        row(2, 3.8, 4.9, "robin"),  # 0.2 s in the second, 0.9 s in the third
        row(3, 5.0, 9.0, ""),  # unlabelled, yet no background
    )
    raven(source / "c.selections.txt")  # looked through, and nothing was there
    arguments = ["data", "manifests", "raven", str(source), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--window-s", "2", "--background", "none"]) == 0
    found = clips(tmp_path / "out", source)
    assert found == [
        ("a.wav[0-2 s]", ("wren",)),
        ("a.wav[4-6 s]", ("robin",)),
        *((f"c.wav[{begin}-{begin + 2} s]", ("none",)) for begin in range(0, 10, 2)),
    ]
    assert [line[1] for line in classes(tmp_path / "out")[1:]] == ["none", "robin", "wren"]
    assert main([*arguments, "--window-s", "4", "--hop-s", "3"]) == 0
    assert clips(tmp_path / "out", source) == [
        ("a.wav[0-4 s]", ("wren",)),
        ("a.wav[3-7 s]", ("robin",)),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("raven", f"{HEAD}\n{row(1, 0, 1)}\n", r"expected a column of labels \(annotation.*"),
        ("raven", f"{HEAD}\t{'x' * 900}\n", r"found [^:]{,200}: --label-column names it"),
        ("raven", f"{HEAD}\tLabel\n{row(1, 2, 1, 'x')}\n", "line 2: .*found 2 s to 1 s"),
        ("raven", f"{HEAD}\tLabel\n1\tx\t1\tsoon\t1\n", "line 2: .*'begin time .s.', found 'soon'"),
        ("raven", "nothing\n", "no labelled event in 1 tables"),
        ("audacity", "0 1 x\n", "a.txt: line 1: expected begin, tab, end"),
        ("audacity", "0\tnan\tx\n", "line 1: expected seconds under 'end', found 'nan'"),
    ],
)
def test_tables_that_are_none(
    source: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    text(source / "a.txt", content)
    with pytest.raises(DataError, match=message):
        write_dataset(name, source, tmp_path / "out", silent)
    assert not (tmp_path / "out").exists()


def test_settings_of_windows(source: Path, tmp_path: Path) -> None:
    raven(source / "a.txt", row(1, 0, 1, "x", "y"), columns="Sp\tLabel")
    for reading, message in (
        (Reading(hop_s=1.0), "--hop-s is for windows"),
        (Reading(background="x"), "--background is for windows"),
        (Reading(window_s=0.0), "--window-s is 0"),
        (Reading(label_column="gone"), "expected a column of labels .gone."),
    ):
        with pytest.raises(DataError, match=message):
            write_dataset("raven", source, tmp_path / "out", silent, reading)
    write_dataset("raven", source, tmp_path / "out", silent, Reading(label_column="sp"))
    assert clips(tmp_path / "out", source) == [("a.wav[0-1 s]", ("x",))]
    with pytest.raises(DataError, match="esc50: windows are for raven"):
        write_dataset("esc50", source, tmp_path / "esc", silent, Reading(window_s=1.0))


def test_a_name_of_two_recordings(source: Path, tmp_path: Path) -> None:
    write(source / "night/a.wav", tone(16_000))
    raven(source / "tables/a.txt", row(1, 0, 1, "x"))
    with pytest.raises(DataError, match=r"a.txt: a may be .*a.wav or .*a.wav: expected one"):
        write_dataset("raven", source, tmp_path / "out", silent)
    raven(source / "a.txt", row(1, 0, 1, "y"))
    (source / "tables/a.txt").unlink()
    write_dataset("raven", source, tmp_path / "out", silent)
    assert json.loads((tmp_path / "out/clips.json").read_text())["data"][0]["labels"] == "y"


def test_a_raven_table_of_old_windows(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raven(source / "a.txt", row(1, 1.0, 2.0, "M\u00e9sange"))
    (source / "a.txt").write_bytes((source / "a.txt").read_text().encode("cp1252"))
    write_dataset("raven", source, tmp_path / "out", print)
    assert clips(tmp_path / "out", source) == [("a.wav[1-2 s]", ("M\u00e9sange",))]
    assert "a.txt: not UTF-8: read as cp1252" in caplog.text


def test_two_columns_of_labels(source: Path, tmp_path: Path) -> None:
    raven(source / "a.txt", row(1, 1.0, 2.0, "x", "y"), columns="Species\tSPECIES")
    with pytest.raises(DataError, match=r"line 1: expected one column 'species', found several"):
        write_dataset("raven", source, tmp_path / "out", print)


def test_events_beyond_the_end(source: Path, tmp_path: Path) -> None:
    raven(source / "a.txt", row(1, 1.0, 2.0, "x"), row(2, 12.0, 13.0, "x"), row(3, 700, 701, "x"))
    lines: list[str] = []
    reading = Reading(window_s=2.0)
    write_dataset("raven", source, tmp_path / "out", lines.append, reading=reading)
    assert "2 events begin beyond the end of their recording" in "\n".join(lines)
    assert "a.wav: 12 s, of 10 s" in "\n".join(lines)
