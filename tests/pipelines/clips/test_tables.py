"""Tables of clips in the formats that people have: columns, delimiters, encodings, paths."""

import csv
import io
import json
import logging
import os
import string
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssast.pipelines.clips.columns import TableFormat
from ssast.pipelines.clips.manifest import read_clips, read_manifest
from ssast.pipelines.clips.paths import resolve
from ssast.pipelines.errors import DataError

NEMO = '{"audio_filepath": "a.wav", "text": "", "label": "x"}\n{"audio_filepath": "b.wav", '
NEMO += '"text": "", "label": "y"}\n'
COMMON_VOICE = 'client_id\tpath\tsentence\n1\ta.wav\t"Well," he said\n2\tb.wav\tIt\'s "x"\n'
XY = (("x",), ("y",))
AB = ("a.wav", "b.wav")
# Name, text, labels, what is said: None for nothing, as all of it is read.
TABLES: dict[str, tuple[str, str, Any, str | None]] = {
    "NeMo": ("m.json", NEMO, XY, "clips in 'audio_filepath', labels in 'label'; not used: 'text'"),
    "JSON Lines": ("m.jsonl", NEMO, XY, "JSON Lines: clips in 'audio_filepath'"),
    "Common Voice": ("m.tsv", COMMON_VOICE, None, "not used: 'client_id', 'sentence'"),
    "quoted TSV": ("m.tsv", 'path\tlabel\n"a.wav"\t"x"\nb.wav\ty\n', XY, None),
    "fairseq": ("m.tsv", "{folder}\na.wav\t16000\nb.wav\t3\n", None, "not used: '2'"),
    "list": ("m.txt", "a.wav\nb.wav\n", None, None),
    "list of files to come": ("m.lst", "a.wav\r\n\r\nb.wav", None, None),
    "Kaldi": ("wav.scp", "utt1 a.wav\nutt2\t b.wav\n", None, None),
    "names": ("m.csv", "filename,label\na.wav,x\nb.wav,y\n", XY, "'filename', labels in 'label'"),
    "category": ("m.csv", "file,category\na.wav,x\nb.wav,y\n", XY, "labels in 'category'"),
    "semicolons": ("m.csv", "wav;labels\na.wav;x\nb.wav;y\n", XY, None),
    "semicolons and commas": (
        "m.csv",
        "wav;label\na.wav;x, z\nb.wav;y\n",
        (("x, z",), ("y",)),
        None,
    ),
    "bars": ("m.csv", "wav|labels\na.wav|x\nb.wav|y\n", XY, None),
    "tabs in a .csv": ("m.csv", "wav\tlabels\na.wav\tx\nb.wav\ty\n", XY, None),
    "Excel": ("m.csv", "sep=;\nwav;labels\na.wav;x\nb.wav;y\n", XY, None),
    "no header": ("m.csv", "x;a.wav\ny;b.wav\n", XY, "without header: clips in '2', labels in '1'"),
    "two labels": (
        *("m.csv", "path,category,target\na.wav,x,0\nb.wav,y,1\n", XY),
        "not used: 'target' ('target' may be labels: data.columns={labels: NAME}",
    ),
    "a split": ("m.csv", "fname,labels,split\na.wav,x,train\nb.wav,y,val\n", XY, "used: 'split'"),
    "JSON list": ("m.json", '["a.wav", "b.wav"]', None, None),
    "JSON of objects": (
        *("m.json", '[{"file": "a.wav", "label": ["x", "z"]}, {"file": "b.wav", "label": 3}]'),
        *((("x", "z"), ("3",)), "JSON list: clips in 'file'"),
    ),
    "UrbanSound8K": (
        *("m.csv", "slice_file_name,start,end,fold,class\na.wav,1,2,1,x\nb.wav,3,4,1,y\n", XY),
        "not used: 'start', 'end', 'fold'",
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in AB:
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize("kind", TABLES)
def test_tables(kind: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    name, text, labels, said = TABLES[kind]
    if kind == "list of files to come":
        (folder / "a.wav").unlink()
    path = folder / name
    path.write_bytes(text.replace("{folder}", str(folder)).encode())
    with caplog.at_level(logging.WARNING):
        found = read_manifest(path)
    assert found.paths == [str(folder / name) for name in AB] == list(read_clips(path))
    assert found.labels == labels
    assert len(caplog.records) == (said is not None)
    assert said is None or (said in caplog.text and str(path) in caplog.text)


@pytest.mark.parametrize(
    ("encoding", "said"),
    [("utf-8-sig", None), ("utf-16", None), ("cp1252", "cp1252"), ("latin-1", "latin-1")],
)
@pytest.mark.parametrize("name", ["m.csv", "m.txt"])
def test_encodings(
    name: str, encoding: str, said: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clip = "caf\u00e9.wav" if encoding != "latin-1" else "caf\u00e9\x81.wav"
    (tmp_path / clip).touch()
    text = f"wav;label\n{clip};S\u00e4ge\n" if name == "m.csv" else f"{clip}\n"
    (tmp_path / name).write_text(text, encoding)
    with caplog.at_level(logging.WARNING):
        found = read_manifest(tmp_path / name)
    assert found.paths == [str(tmp_path / clip)]
    assert found.labels == ((("S\u00e4ge",),) if name == "m.csv" else None)
    assert len(caplog.records) == (said is not None)
    assert said is None or f"not UTF-8: read as {said}; data.encoding" in caplog.text


def test_a_late_byte_that_is_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssast.pipelines.text.SCANNED_BYTES", 1000)
    rows = [f"{row}.wav,x" for row in range(8000)]
    text = "\n".join(["wav,label", *rows, "caf\u00e9.wav,x"])
    (tmp_path / "m.csv").write_text(text, "cp1252")
    assert read_clips(tmp_path / "m.csv")[-1] == str(tmp_path / "caf\u00e9.wav")


PARTS = {
    ("m.jsonl", '{"audio_filepath": "a.wav", "offset": 1.5, "duration": 2}'): "[1.5-3.5 s]",
    ("m.jsonl", '{"audio_filepath": "a.wav", "duration": 2}'): "",
    ("m.csv", "file;begin;end\na.wav;1;4\n"): "[1-4 s]",
    ("m.tsv", "filename\tonset\toffset\tevent_label\na.wav\t1.5\t4\tx\n"): "[1.5-4 s]",
    ("m.tsv", "filename\tstart\tduration\na.wav\t1.5\t4\n"): "[1.5-5.5 s]",
    ("m.csv", "slice_file_name,start,end\na.wav,1,4\n"): "",
    ("m.csv", "path,start,duration,offset\na.wav,0.1,0.2,0.4\n"): "[0.1-0.3 s]",
}


@pytest.mark.parametrize("case", PARTS)
def test_parts_of_recordings(case: tuple[str, str], folder: Path) -> None:
    path = folder / case[0]
    path.write_text(case[1])
    (found,) = read_clips(path)
    assert str(found) == f"{folder / 'a.wav'}{PARTS[case]}"
    table = TableFormat({"begin": "", "end": "", "duration": ""})
    assert read_clips(path, table) == [str(folder / "a.wav")]


def test_parts_in_columns_set_by_hand(folder: Path) -> None:
    (folder / "m.csv").write_text("wav,t0,t1,start\na.wav,1,2,7\nb.wav,3,,8\n")
    table = TableFormat({"begin": "t0", "end": "t1"})
    names = [f"{folder}/a.wav[1-2 s]", f"{folder}/b.wav[3 s to end]"]
    assert list(map(str, read_clips(folder / "m.csv", table))) == names
    entries = {"path": ["a.wav", "b.wav"], "offset": [1.0, 2.0], "duration": [None, 1.0]}
    pq.write_table(pa.table(entries), folder / "m.parquet")
    names = [f"{folder}/a.wav[1 s to end]", f"{folder}/b.wav[2-3 s]"]
    assert list(map(str, read_clips(folder / "m.parquet"))) == names


def test_what_is_set_by_hand(folder: Path) -> None:
    path = folder / "m.csv"
    path.write_text("no;clip;species;label\n1;a.wav;x+y;0\n2;b.wav;z;1\n", "utf-16-le")
    table = TableFormat(
        {"wav": "clip", "labels": "species"}, "+", delimiter=";", encoding="utf-16-le"
    )
    assert read_manifest(path, table=table).labels == (("x", "y"), ("z",))
    assert read_manifest(path, {"x+y", "z"}, table).labels == (("x+y",), ("z",))
    none = TableFormat({"wav": "clip", "labels": ""}, encoding="utf-16-le")
    assert read_manifest(path, table=none).labels is None
    path = folder / "n.csv"
    path.write_text("1,a.wav,x,0\n2,b.wav,y,0\n")
    assert read_manifest(path).labels is None
    assert read_manifest(path, table=TableFormat({"labels": "3"})).labels == XY
    path.write_text("1;none.wav;x\n")
    numbers = TableFormat({"wav": "2"}, delimiter=";")
    assert read_manifest(path, table=numbers).paths == [str(folder / "none.wav")]


BAD = {
    ("m.csv", "clip,species\na.wav,x\n"): "data.columns={wav: NAME} names the column of the clips",
    ("m.jsonl", '{"wav": "a.wav"}\n{"wav": \n'): "m.jsonl: line 2: not JSON: Expecting value",
    ("m.jsonl", '{"wav": "a.wav"}\n\n["b.wav"]\n'): 'line 3: expected {"wav": ...}, found [',
    ("m.jsonl", '{"wav": "a.wav"}\n{"wav": 3}\n'): "line 2: expected the path of a clip under",
    ("m.json", '{"wav": "a.wav"}\n{"file": "b"}\n'): "line 2: expected the path of a clip under",
    ("wav.scp", "utt1 sph2pipe a.sph |\n"): "line 1: a command, which is not run",
    ("wav.scp", "utt1\n"): "line 1: expected an utterance and a path",
    ("wav.scp", "utt1 raw.ark:1234\n"): "line 1: a place in a Kaldi archive",
    ("m.txt", "s3://bucket/a.wav\nb.wav\n"): "line 1: expected a file: of what is behind URLs",
    ("m.txt", "$NO_SUCH_THING/a.wav\n"): "the environment variable NO_SUCH_THING is set",
    ("m.txt", "a.wav\n./a.wav\n"): "line 2: ./a.wav is listed already at line 1",
    ("m.tsv", 'path\tlabel\na.wav\tx\t"y"\n'): "line 2: expected 2 columns, found 3; a cell that",
    ("m.csv", "filename;offset\na.wav;1,5\n"): "line 2: expected seconds under 'offset', found",
    ("m.parquet", "PAR1"): "m.parquet: not a Parquet file: ",
    ("m.jsonl", '{"recording": {}, "supervisions": []}\n'): "; ssast data manifests lhotse",
    ("m.jsonl.gz", ""): "found this file; ssast data manifests lhotse makes a manifest of cuts",
    ("m.wav", "RIFF"): "m.wav: expected a folder or a manifest (.json .jsonl",
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case: tuple[str, str], folder: Path) -> None:
    path = folder / case[0]
    path.write_text(case[1])
    with pytest.raises(DataError) as caught:
        read_manifest(path)
    assert BAD[case] in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 + len(str(path))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"columns": {"clip": "a"}}, "expected some of wav, labels, begin, end, duration, found"),
        ({"delimiter": ";;"}, "data.delimiter: expected one character, or tab, found ';;'"),
        ({"encoding": "klingon"}, "data.encoding: expected utf-8, utf-16, cp1252, ..., found"),
        ({"encoding": "base64"}, "data.encoding: expected"),
        ({"label_separator": ""}, "data.label_separator: expected one or more characters"),
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        TableFormat(**wrong)
    assert message in str(caught.value)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_quotes_that_are_text_swallow_no_rows(end: str, folder: Path) -> None:
    """Two sentences of one quotation; the row between them would be lost."""
    rows = ["path\ttext\tlabel", 'a.wav\t"I never saw\tx', "c.wav\tno\ty", 'b.wav\tAgain."\tz']
    (folder / "m.tsv").write_bytes("".join(row + end for row in rows).encode())
    assert read_manifest(folder / "m.tsv").labels == (("x",), ("y",), ("z",))
    table = "".join(row.replace("\t", ",") + end for row in rows)
    (folder / "m.csv").write_bytes(table.encode())
    with pytest.raises(DataError, match=r"m.csv: line 2: a quote that begins here ends in a later"):
        read_manifest(folder / "m.csv")
    for suffix, mark in (("tsv", "\t"), ("csv", ",")):  # cells that hold line breaks
        cells = ['"I, who saw\nit, again"', '"I\nnever"']
        text = "".join(f"{n}.wav{mark}{c}{mark}x\n" for n, c in zip("ab", cells, strict=True))
        (folder / f"n.{suffix}").write_text(f"path{mark}text{mark}label\n{text}")
        assert read_manifest(folder / f"n.{suffix}").labels == (("x",), ("x",))
        (folder / f"o.{suffix}").write_text(f'path{mark}label\na.wav{mark}"x\n"\nb.wav{mark}y\n')
        assert read_manifest(folder / f"o.{suffix}").labels == (("x",), ("y",))  # one ends with it


def test_a_column_that_is_not_there(folder: Path) -> None:
    (folder / "m.csv").write_text("wav,label\na.wav,x\n")
    with pytest.raises(DataError, match=r"\{labels: species\}: expected such a column, found \['w"):
        read_manifest(folder / "m.csv", table=TableFormat({"labels": "species"}))


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.delenv("OTHER", raising=False)
    given_paths = {
        "file:///x/a%20b.wav": "/x/a b.wav",
        "file://localhost/x/c.wav": "/x/c.wav",
        "~/d.wav": "/home/me/d.wav",
        "$DATA/e.wav": "/data/e.wav",
        "${DATA}/f.wav": "/data/f.wav",
        "../g.wav": str(tmp_path.parent / "g.wav"),
        "./~/h.wav": str(tmp_path / "~/h.wav"),
        "./$OTHER": str(tmp_path / "$OTHER"),
        "x$DATA/i.wav": str(tmp_path / "x$DATA/i.wav"),
        "$DATA.wav": str(tmp_path / "$DATA.wav"),
        "file.wav": str(tmp_path / "file.wav"),
    }
    (tmp_path / "m.json").write_text(json.dumps(list(given_paths)))
    assert list(read_clips(tmp_path / "m.json")) == list(given_paths.values())


def test_the_folder_above_a_link_is_that_of_its_target(tmp_path: Path) -> None:
    (tmp_path / "disk/sets/tables").mkdir(parents=True)
    (tmp_path / "project").mkdir()
    (tmp_path / "project/tables").symlink_to(tmp_path / "disk/sets/tables")
    (tmp_path / "disk/sets/tables/m.csv").write_text("wav,label\n../a.wav,x\nb.wav,y\n")
    found = read_manifest(tmp_path / "project/tables/m.csv").paths
    assert list(found) == [
        str(tmp_path / "disk/sets/a.wav"),
        str(tmp_path / "project/tables/b.wav"),
    ]
    (tmp_path / "disk/sets/n.csv").write_text("wav,label\na.wav,x\n")
    found = read_manifest(tmp_path / "project/tables/../n.csv").paths
    assert list(found) == [str(tmp_path / "disk/sets/a.wav")]
    (tmp_path / "data").symlink_to(tmp_path / "disk")  # no other folder: the name stays
    assert resolve("../a.wav", str(tmp_path / "data/sets/tables")) == str(
        tmp_path / "data/sets/a.wav"
    )


def test_a_list_that_is_kept_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ssast.pipelines.clips.manifest.LARGE_BYTES", 0)
    (tmp_path / "m.csv").write_text("wav,file\n$DATA/a.wav,b.wav\n")
    os.utime(tmp_path / "m.csv", (1, 1))
    for value in ("/one", "/two", "/two"):
        monkeypatch.setenv("DATA", value)
        assert read_clips(tmp_path / "m.csv") == [f"{value}/a.wav"]
    with monkeypatch.context() as patch:
        patch.setattr("ssast.pipelines.clips.manifest.write_files", lambda *a: pytest.fail("again"))
        assert read_clips(tmp_path / "m.csv") == ["/two/a.wav"]
    other = TableFormat({"wav": "file"})
    assert read_clips(tmp_path / "m.csv", other) == [str(tmp_path / "b.wav")]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pa.array(["x", None]), (("x",), ())),
        (pa.array([3, 4]), (("3",), ("4",))),
        (pa.array([["x", "y, z"], []]), (("x", "y, z"), ())),
        (pa.array(["x", "x"]).dictionary_encode(), (("x",), ("x",))),
    ],
)
def test_parquet(labels: pa.Array, expected: Any, folder: Path) -> None:
    path = folder / "m.parquet"
    pq.write_table(pa.table({"path": list(AB), "label": labels}), path)
    found = read_manifest(path)
    assert found.paths == [str(folder / name) for name in AB] and found.labels == expected
    other = pa.table({"audio": [{"bytes": b"RIFF", "path": "a.wav"}]})
    pq.write_table(other, path)
    with pytest.raises(DataError, match="holds the sounds themselves, in the column 'audio'"):
        read_manifest(path)
    path.write_bytes(path.read_bytes()[:-20] + bytes(12) + b"PAR1")
    with pytest.raises(DataError, match=r"m\.parquet: not a Parquet file"):
        read_manifest(path)


CELLS = st.text(string.ascii_letters + " ,;|'\"\u00e9\u00df#&-", min_size=1, max_size=9)
LABELS = CELLS.map(str.strip).filter(bool)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.tuples(CELLS, LABELS, CELLS), min_size=1, max_size=6, unique_by=lambda row: row[0]),
    st.permutations(["audio", "category", "comment"]),
    st.sampled_from([",", ";", "\t", "|"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "cp1252"]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_written_rows_are_read(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str, str]],
    header: list[str],
    delimiter: str,
    encoding: str,
    end: str,
) -> None:
    folder = tmp_path_factory.mktemp("m")
    text = io.StringIO()
    writer = csv.DictWriter(text, header, delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    for clip, label, comment in rows:
        cells = (f"{clip}.wav", label, comment)
        writer.writerow(dict(zip(("audio", "category", "comment"), cells, strict=True)))
    (folder / "m.csv").write_bytes(text.getvalue().encode(encoding))
    found = read_manifest(folder / "m.csv")
    assert found.paths == [str(folder / f"{clip}.wav") for clip, _, _ in rows]
    assert found.labels == tuple((label,) for _, label, _ in rows)


def test_an_offset_is_an_end_beside_an_onset_alone(folder: Path) -> None:
    """Also in entries whose first has no times."""
    later = [
        {"wav": "a.wav"},
        {"wav": "b.wav", "onset": 1.0, "offset": 2.5},
        {"wav": "b.wav", "start": 3.0, "offset": 9.0, "duration": 0.5},
        {"wav": "b.wav", "offset": 4.0},
    ]
    names = ["a.wav", "b.wav[1-2.5 s]", "b.wav[3-3.5 s]", "b.wav[4 s to end]"]
    (folder / "m.json").write_text(json.dumps(later))
    assert list(map(str, read_clips(folder / "m.json"))) == [f"{folder}/{name}" for name in names]


def test_quotes_behind_a_blank(folder: Path) -> None:
    """As in the tables of AudioSet."""
    (folder / "m.csv").write_text('path, label\na.wav, "dog"\nb.wav, dog\nc.wav, "dog, big"\n')
    assert read_manifest(folder / "m.csv").labels == (("dog",), ("dog",), ("dog, big",))


@pytest.mark.parametrize("lines", [False, True])
def test_json_of_another_encoding(folder: Path, lines: bool) -> None:
    entries = [json.dumps({"wav": "a.wav", "label": "M\u00e9sange"}, ensure_ascii=False)] * 2
    text = "\n".join(entries) if lines else f"[{', '.join(entries)}]"
    (folder / "m.json").write_text(text.replace("a.wav", "b.wav", 1), "cp1252")
    found = read_manifest(folder / "m.json", table=TableFormat(encoding="cp1252"))
    assert found.labels == (("M\u00e9sange",),) * 2


def test_a_format_of_what_is_no_table(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(read_clips(folder, TableFormat(label_separator=";"))) == len(read_clips(folder))
    assert f"{folder}: is no table: data.columns, data.label_separator" in caplog.text
