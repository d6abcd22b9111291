"""Hostile and strange manifests and prepared folders."""

import json
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from prepared import prepared
from sounds import tone, write

from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.audio.encoded import read_clip
from ssast.pipelines.clips.labels import parse_labels
from ssast.pipelines.clips.manifest import read_manifest, write_manifest
from ssast.pipelines.clips.shards import INDEX, LABELS, REPORT, ShardIndex
from ssast.pipelines.errors import DataError
from ssast.pipelines.prepare.check import check_data
from ssast.pipelines.text import parse_json, shown

SPEC = FbankSpec(num_frames=48)
DEEP = "[" * 100_000
JSON = {
    "deep": ('{"data": ' + DEEP, "nested too deeply"),
    "deep value": ('{"data": [{"wav": ' + "[" * 300 + "]" * 300 + "}]}", r"expected the path .*\["),
    "deep labels": (json.dumps({"data": [{"wav": "a", "labels": DEEP}]}), None),
    "NaN": ('{"data": [{"wav": NaN}]}', "found nan"),
    "infinite label": ('{"data": [{"wav": "a", "label": Infinity}]}', "found inf"),
    "long number": ('{"data": [{"wav": ' + "9" * 5000 + "}]}", "Exceeds the limit"),
    "wide": (json.dumps({"data": [[0] * 10**6]}), r"found \[0, 0"),
    "long": (json.dumps({"data": ["x" * 10**6]}), "found 'xxx"),
    "surrogate": ('{"data": [{"wav": "a\\ud800.wav"}]}', "expected the path"),
    "NUL": ('{"data": [{"wav": "a\\u0000.wav"}]}', "expected the path"),
    "no list": ('{"data": {"0": {"wav": "a"}}}', "expected"),
    "prepared elsewhere": ('{"prepared": "/etc", "data": [{"clip": "a"}]}', "not prepared"),
}


@pytest.mark.parametrize("kind", JSON)
def test_manifests(kind: str, tmp_path: Path) -> None:
    """One short line each, however much a value holds."""
    text, message = JSON[kind]
    path = tmp_path / "m.json"
    path.write_text(text)
    if message is None:
        assert read_manifest(path).labels == ((DEEP,),)
        return
    with pytest.raises(DataError, match=message) as caught:
        read_manifest(path)
    assert len(str(caught.value)) < 400 + len(str(path)) and "\n" not in str(caught.value)


def test_values_are_shown_short() -> None:
    deep: object = "x"
    for _ in range(100):
        deep = (deep, deep)  # 2**100 of them
    for value in (deep, {1: deep}, "x" * 10**6, 16**10_000, [[[[[1]]]]], {"a": 1}):
        assert len(shown(value)) < 700
    assert shown({"a": [1, None]}) == "{'a': [1, None]}"
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(DEEP)
    assert parse_labels(DEEP) == (DEEP,)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A prepared folder of two clips with labels."""
    for number in range(2):
        write(tmp_path / f"{number}.wav", tone(16000, seed=number), subtype="PCM_16")
    paths = [tmp_path / f"{number}.wav" for number in range(2)]
    write_manifest(tmp_path / "m.json", paths, [["dog"], ["cat", "dog"]])
    prepared(tmp_path / "m.json", tmp_path / "out")
    return tmp_path / "out"


LABELS_ODD = (
    *('{"names": "ab", "clips": [[0], [1]]}', '{"names": ["a"], "clips": [[-1], [0]]}'),
    *('{"names": ["a"], "clips": [[0], [1]]}', '{"names": [["a"]], "clips": [[0], [0]]}'),
    *('{"names": [""], "clips": [[0], [0]]}', '{"names": ["a"], "clips": [[0], "0"]}'),
    *('{"names": ["a"], "clips": [[0], [NaN]]}', '{"names": ["a"], "clips": [[0], 0]}'),
    *('{"names": ["a"], "clips": [[0], [[0]]]}', '{"names": {"0": "a"}, "clips": [[0], [0]]}'),
    *('["names", "clips"]', DEEP, "null", "", '{"names": ["a"], "clips": [[0]]}'),
)


@pytest.mark.parametrize("text", LABELS_ODD)
def test_labels_of_a_wrong_shape(text: str, folder: Path) -> None:
    (folder / LABELS).write_text(text)
    with pytest.raises(DataError, match=r"labels\.json: (damaged|expected labels of 2 clips)"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "row", [(0, 2**62, 10), (0, -512, 10), (0, 512, -1), (0, 512, 2**62), (-1, 512, 10), (9, 0, 0)]
)
def test_an_index_that_points_elsewhere(row: tuple[int, ...], folder: Path) -> None:
    index = np.load(folder / INDEX)
    index[1] = row
    np.save(folder / INDEX, index)
    read = read_manifest(folder).paths
    assert len(read_clip(read[0], SPEC))
    with pytest.raises(DataError):
        read_clip(read[1], SPEC)
    assert check_data(folder, jobs=1, progress=False).problems
    assert isinstance(str(read[1]), str)


def header(text: str, version: bytes = b"\x01\0") -> bytes:
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text.encode()


PLAIN = "{'descr': '<i8', 'fortran_order': False, 'shape': %s, }\n"
ARRAYS = {
    "a claim of terabytes": header(PLAIN % "(1099511627776, 3)") + bytes(48),
    "a claim beyond numbers": header(PLAIN % "(9223372036854775807, 3)") + bytes(48),
    "a shape below 0": header(PLAIN % "(-1, 3)") + bytes(48),
    "objects": header("{'descr': '|O', 'fortran_order': False, 'shape': (2, 3), }\n") + bytes(48),
    "brackets": header("(" * 5000),
    "half a header": header(PLAIN[:30]),
    "Python 2": header("{'descr': '<i8', 'fortran_order': False, 'shape': (2L, 3L),\n"),
    "nothing": b"",
    "text": b"text" * 100,
    "another shape": header(PLAIN % "(2, 4)") + bytes(64),
}


@pytest.mark.parametrize("kind", [*ARRAYS, "ZIP archive", "pickle"])
def test_what_is_no_index(kind: str, folder: Path) -> None:
    if kind == "ZIP archive":
        with zipfile.ZipFile(folder / "a.zip", "w") as archive:
            archive.writestr("index.npy", b"")
        shutil.move(folder / "a.zip", folder / INDEX)
    elif kind == "pickle":
        (folder / INDEX).write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    else:
        (folder / INDEX).write_bytes(ARRAYS[kind])
    with pytest.raises(DataError, match=r"index\.npy: (cannot be read|expected)"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"offset": "512"},
        {"size": None},
        {"file": ["a"]},
        {"digest": 5},
        {"labels": "dog"},
        {"labels": [["dog"]]},
        {"duration_s": []},
        {"offset": 1e300},
    ],
)
def test_sidecars_of_a_wrong_shape(change: dict[str, object], folder: Path) -> None:
    (sidecar,) = folder.glob("shards/*.jsonl")
    first, line, *rest = sidecar.read_text().splitlines()
    sidecar.write_text("\n".join([first, json.dumps(json.loads(line) | change), *rest]))
    problems = check_data(folder, jobs=1, progress=False).problems
    assert any("damaged: prepare the data again" in problem.problem for problem in problems)
    with pytest.raises(DataError, match="damaged"):
        read_manifest(folder).paths.names()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text", [DEEP, "[]", "5", '{"settings": 5}', '{"settings": {"recipe": [1]}}']
)
def test_reports_of_a_wrong_shape(text: str, folder: Path) -> None:
    (folder / REPORT).write_text(text)
    index = ShardIndex(folder)
    for ask in (index.overlapping, index.without_duplicates):
        with pytest.raises(DataError, match=r"report\.json: damaged"):
            ask()
    assert check_data(folder, jobs=1, progress=False).problems
