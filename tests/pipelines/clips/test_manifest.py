"""Manifests: what is read, what is refused and how it is said, and what is written."""

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from names import CLASSES, FILES

from ssast.pipelines.clips.folders import audio_files
from ssast.pipelines.clips.manifest import read_manifest, write_manifest
from ssast.pipelines.errors import DataError, StorageError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_published_json(tmp_path: Path) -> None:
    data = {
        "data": [{"wav": "a b.flac", "labels": "/m/1, /m/2"}, {"wav": "/x/c.wav", "labels": "z"}]
    }
    manifest = read_manifest(write(tmp_path / "m.json", json.dumps(data)))
    assert manifest.paths == (str(tmp_path / "a b.flac"), "/x/c.wav")
    assert manifest.labels == (("/m/1", "/m/2"), ("z",))
    assert len(manifest) == 2


def test_json_without_labels_in_a_sibling_folder(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    manifest = read_manifest(write(tmp_path / "tasks/m.json", '{"data": [{"wav": "../x.flac"}]}'))
    assert manifest.paths == (str(tmp_path / "x.flac"),)
    assert manifest.labels is None


@pytest.mark.parametrize("header", ["wav,labels", "path,labels", "Path , LABELS"])
def test_csv(tmp_path: Path, header: str) -> None:
    manifest = read_manifest(write(tmp_path / "m.csv", f'{header}\na.wav,dog\nb.wav,"cat,dog"\n'))
    assert manifest.paths == (str(tmp_path / "a.wav"), str(tmp_path / "b.wav"))
    assert manifest.labels == (("dog",), ("cat,dog",))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks(tmp_path: Path, encoding: str) -> None:
    """As Notepad, PowerShell and spreadsheets write them."""
    (tmp_path / "m.csv").write_text("wav,label\r\ncaf\u00e9.wav,\u732b\r\n", encoding)
    (tmp_path / "m.json").write_text(
        '{"data": [{"wav": "caf\u00e9.wav", "labels": "\u732b"}]}', encoding
    )
    for name in ("m.csv", "m.json"):
        found = read_manifest(tmp_path / name)
        assert found.paths == (str(tmp_path / "caf\u00e9.wav"),)
        assert found.labels == (("\u732b",),)


def test_csv_of_paths_alone(tmp_path: Path) -> None:
    assert read_manifest(write(tmp_path / "m.csv", "wav\na.wav\n")).labels is None


BAD_JSON = {
    "": "m.json: not JSON: Expecting value in line 1",
    '{"data": [\n{"wav": ': "not JSON: Expecting value in line 2",
    "[]": "m.json: lists no clips",
    "3": 'm.json: expected {"data"',
    '[{"wav": "a"}, 3]': 'm.json: entry 1: expected {"wav": ...}, found 3',
    '[{"clip": "a"}]': "m.json: expected a column 'wav', 'path', 'file', ... of the clips, found",
    '{"data": {}}': 'm.json: expected {"data"',
    '{"data": []}': "m.json: lists no clips",
    '{"data": ["a.wav"]}': "m.json: entry 0: expected {\"wav\": ...}, found 'a.wav'",
    '{"data": [{"wav": "a"}, {"file": "b"}]}': "entry 1: expected the path of a clip under 'wav'",
    '{"data": [{"wav": 3}]}': "entry 0: expected the path of a clip under 'wav', found 3",
    '{"data": [{"wav": " "}]}': "entry 0: expected the path of a clip",
    '{"data": [{"wav": "a\\u0000b"}]}': "entry 0: expected the path of a clip",
    '{"data": [{"wav": "a"}, {"wav": "./a"}]}': "entry 1: ./a is listed already at entry 0",
    '{"data": [{"wav": "a", "labels": "x"}, {"wav": "b"}]}': "entry 1: expected all entries",
    '{"data": [{"wav": "a"}, {"wav": "b", "labels": "x"}]}': "entry 1: expected all entries",
    '{"data": [{"wav": "a", "labels": null}]}': "entry 0: expected labels: text, a whole number,",
    '{"data": [{"wav": "a", "labels": 7.5}]}': "number, or a list of them, found 7.5",
    '{"data": [{"wav": "a", "labels": true}]}': "number, or a list of them, found True",
    '{"data": [{"wav": "a", "labels": ["b", ""]}]}': "or a list of them, found ['b', '']",
    '{"data": [{"wav": "\\ud800.wav"}]}': "entry 0: expected the path of a clip under 'wav'",
    '{"data": ' + "[" * 100_000: "m.json: not JSON of a manifest: ",
}


@pytest.mark.parametrize("text", BAD_JSON)
def test_bad_json(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "m.json", text)
    with pytest.raises(DataError) as caught:
        read_manifest(path)
    assert BAD_JSON[text] in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_CSV = {
    "": "expected a header with 'wav', 'path', 'file', 'filename', 'file_name', ... or",
    "a.wav,dog\n": "files that exist, found ['a.wav', 'dog']; data.columns={wav: NAME}",
    "wav,label\n": "lists no clips",
    "wav,label\na.wav,dog\nb.wav\n": "line 3: expected 2 columns, found 1",
    "wav,label\na.wav,dog,cat\n": "line 2: expected 2 columns, found 3; a cell that holds",
    'wav,label\n"a\nb.wav",dog\nc.wav\n': "line 4: expected 2 columns",
    "wav,label,label\na.wav,x,y\n": "expected one column 'label', found 2",
    "wav,label\rb.wav,dog\r\nc.wav\n": "line 3: expected 2 columns",
    'wav,label\na.wav,dog\n"b.wav,dog\nc.wav,dog\n': "line 3: not CSV: a quote that begins here",
    'wav,label\n"a.wav,dog\n' + "b.wav,dog\n" * 20_000: "line 2: not CSV: a quote that begins here",
    "wav,label\na.wav,d\0g\n": "line 2: a NUL character",
    "wav,label\na.wav,x\na.wav,y\n": "line 3: a.wav is listed already at line 2",
    "wav,label\n,x\n": "line 2: expected the path of a clip",
}


@pytest.mark.parametrize("text", BAD_CSV)
def test_bad_csv(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError) as caught:
        read_manifest(write(tmp_path / "m.csv", text))
    assert BAD_CSV[text] in str(caught.value)


@pytest.mark.parametrize("name", ["no.json", "no.csv", "no.txt", "nothing"])
def test_missing(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=name):
        read_manifest(tmp_path / name)


@pytest.mark.parametrize("name", ["m.json", "m.csv"])
def test_not_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"RIFF\xff\xfe\x00WAVE")
    with pytest.raises(DataError, match=f"{name}: not UTF-8 text: byte 4"):
        read_manifest(tmp_path / name)


def test_folder(tmp_path: Path) -> None:
    wanted = ["b/2.FLAC", "a.wav", "b/c/3.mp3", "b.ogg"]
    for name in [*wanted, "notes.txt", ".hidden.wav", ".git/x.wav", "wav"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b/c/loop").symlink_to(tmp_path)
    (tmp_path / "b/c/again").symlink_to(tmp_path / "b")
    (tmp_path / "linked.wav").symlink_to(tmp_path / "a.wav")
    manifest = read_manifest(tmp_path)
    assert manifest.paths == tuple(sorted(str(tmp_path / n) for n in [*wanted, "linked.wav"]))
    assert manifest.labels is None


def test_folder_follows_links_and_leaves_out(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/x.wav").touch()
    (tmp_path / "mine/out").mkdir(parents=True)
    (tmp_path / "mine/out/made.flac").touch()
    (tmp_path / "mine/link").symlink_to(tmp_path / "elsewhere")
    found = audio_files(tmp_path / "mine", leave_out=tmp_path / "mine/out")
    assert found == [str(tmp_path / "mine/link/x.wav")]


@pytest.mark.parametrize(("number", "kind"), [(errno.EACCES, DataError), (errno.EIO, StorageError)])
def test_folders_that_cannot_be_read_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type
) -> None:
    """Half of the clips is no data set; what may pass by itself keeps its own status."""
    for name in ("a/1.wav", "b/2.wav"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    real = os.scandir

    def scandir(path: str) -> object:
        if path == str(tmp_path / "b"):
            raise OSError(number, os.strerror(number), path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError) as caught:
        read_manifest(tmp_path)
    assert type(caught.value) is kind
    assert str(caught.value) == f"{tmp_path}/b: cannot be read: {os.strerror(number)}"
    skipped: list[OSError] = []
    assert audio_files(tmp_path, on_error=skipped.append) == [str(tmp_path / "a/1.wav")]
    assert [error.filename for error in skipped] == [str(tmp_path / "b")]


def test_folder_without_audio(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no audio files in this folder"):
        read_manifest(tmp_path)


def test_relative_path_of_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_manifest(tmp_path / "m.json", ["a.wav"])
    monkeypatch.chdir(tmp_path)
    assert read_manifest("m.json").paths == (str(tmp_path / "a.wav"),)


@settings(deadline=None)
@given(
    st.lists(FILES, min_size=1, max_size=9, unique=True),
    st.lists(CLASSES, max_size=4),
    st.booleans(),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    names: list[str],
    given_labels: list[str],
    labelled: bool,
) -> None:
    path = tmp_path_factory.mktemp("m") / "new" / "m.json"
    labels = [given_labels for _ in names] if labelled else None
    write_manifest(path, names, labels)
    manifest = read_manifest(path)
    assert manifest.paths == tuple(os.path.join(path.parent, name) for name in names)
    assert manifest.labels == (tuple(tuple(given_labels) for _ in names) if labelled else None)
    assert os.listdir(path.parent) == ["m.json"]


@pytest.mark.parametrize("labels", [[[""]], [["a", "\ud800"]], [[" "]]])
def test_labels_that_cannot_be_read_back(tmp_path: Path, labels: list[list[str]]) -> None:
    with pytest.raises(DataError, match=r"x\.wav: expected labels that are text, found"):
        write_manifest(tmp_path / "m.json", ["x.wav"], labels)
    assert os.listdir(tmp_path) == []
