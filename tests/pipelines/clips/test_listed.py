"""Lists of many files: the same paths, order, fingerprints and messages as lists of objects."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from names import FILES

from ssast.engine.config import Config
from ssast.engine.data.clips import find_clips
from ssast.engine.settings import Data
from ssast.pipelines.clips import entries
from ssast.pipelines.clips.holdout import hold_out
from ssast.pipelines.clips.listed import FileList
from ssast.pipelines.clips.manifest import read_clips, read_manifest, write_manifest
from ssast.pipelines.clips.mix import fingerprint, select
from ssast.pipelines.errors import DataError

NAMES = FILES | st.text("ab/\u00e9\u732b\udce9\udcff\U0001f415", min_size=1, max_size=40)
TEXTS = st.text('ab{}[],:"\\ \n\u00e9', max_size=12)
VALUES = st.recursive(TEXTS | st.integers() | st.none(), lambda v: st.lists(v, max_size=3))


@settings(max_examples=60, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=30, unique=True), st.randoms(use_true_random=False))
def test_it_is_a_sequence_of_the_paths(names: list[str], random: Any) -> None:
    files = FileList.of(names)
    rows = np.array(random.sample(range(len(names)), random.randint(1, len(names))))
    for found, expected in (
        (files, names),
        (select(files, rows), [names[row] for row in rows]),
        (files[1:], names[1:]),
        (select(files, rows)[::2], [names[row] for row in rows[::2]]),
    ):
        assert found == expected and list(found) == expected and len(found) == len(expected)
        assert [found[row] for row in range(-len(found), len(found))] == 2 * expected
        assert isinstance(found, FileList)
        order = sorted(range(len(expected)), key=expected.__getitem__)
        assert found.numbers()[order].tolist() == list(range(len(expected)))
        text = "\n".join(map(os.path.basename, expected))
        digest = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
        assert fingerprint(found) == fingerprint(expected) == digest
    assert files != names[1:] and files != [*names[:-1], "other"]


def test_names_that_begin_with_others() -> None:
    """What follows a name in memory does not count."""
    names = [f"{'ab' * length}{end}" for length in range(20) for end in ("", "a", "zz")]
    names = [names[row] for row in np.random.default_rng(0).permutation(len(names))]
    names = list(dict.fromkeys(filter(None, names)))
    assert sorted(names) == [names[row] for row in np.argsort(FileList.of(names).numbers())]


def test_more_than_are_made_at_once() -> None:
    names = [
        f"/data/{row * 7919 % 100_003:x}/{'long name ' * (row % 3)}{row}" for row in range(70_000)
    ]
    files = FileList.of(names)
    assert fingerprint(files) == fingerprint(names) and files == names
    places = np.empty(len(names), np.int64)
    places[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
    assert (files.numbers() == places).all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.dictionaries(TEXTS, VALUES, max_size=3), min_size=1, max_size=12),
    st.sampled_from([None, 1, "\t"]),
    st.sampled_from([{}, {"more": [1]}, {"prepared": "x,}]"}]),
    st.booleans(),
)
def test_json_is_read_in_blocks(
    tmp_path_factory: pytest.TempPathFactory,
    data: list[dict[str, Any]],
    indent: Any,
    besides: dict[str, Any],
    first: bool,
) -> None:
    """Whatever the entries and the layout are, and wherever a block ends."""
    path = tmp_path_factory.mktemp("m") / "m.json"
    content = {"data": data, **besides} if first else {**besides, "data": data}
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entries, "BLOCK_ROWS", 2)
        for size in (8, 60, 2**20):
            patch.setattr(entries, "BLOCK_BYTES", size)
            found, parts = entries.json_entries(path)
            read = [part for part in parts if part.columns]
            assert found == besides and [e for part in read for e in part.columns] == data
            assert [n for part in read for n in part.numbers] == list(range(len(data)))


def test_what_is_written_here_is_never_decoded_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries, "BLOCK_BYTES", 100)
    monkeypatch.setattr(entries, "json_content", pytest.fail)
    names = [f"{row}.wav" for row in range(50)]
    for labels in (None, [["a, b", "c"]] * 50):
        write_manifest(tmp_path / "m.json", names, labels)
        assert read_clips(tmp_path / "m.json") == [str(tmp_path / name) for name in names]


def write(path: Path, names: list[str], labels: str = "x") -> Path:
    data = [{"wav": name, "labels": labels} for name in names]
    path.write_text(json.dumps({"data": data}).replace("}, {", "},\n{"), encoding="utf-8")
    os.utime(path, (1, 1))
    return path


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every list counts as a large one."""
    monkeypatch.setenv("SSAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ssast.pipelines.clips.manifest.LARGE_BYTES", 0)
    monkeypatch.setattr("ssast.pipelines.clips.holdout.MANY", 0)
    monkeypatch.setattr(entries, "BLOCK_BYTES", 100)
    monkeypatch.setattr(entries, "BLOCK_ROWS", 3)


@pytest.mark.usefixtures("large")
def test_a_large_manifest_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{row * 7919 % 101:03d}.wav" for row in range(100)]
    config = Config(data=Data(train=str(write(tmp_path / "m.json", names)), valid_share=0.1))
    paths = [str(tmp_path / name) for name in names]
    train, valid = find_clips(config)
    held = hold_out(np.array(paths), 0.1)
    assert list(train) == [p for p, h in zip(paths, held, strict=True) if not h]
    assert list(valid) == [p for p, h in zip(paths, held, strict=True) if h]
    with monkeypatch.context() as patch:
        patch.setattr("ssast.pipelines.clips.manifest.write_files", lambda *a: pytest.fail("again"))
        patch.setattr("ssast.pipelines.clips.holdout.hold_out", lambda *a: pytest.fail("again"))
        again = find_clips(config)
        assert again == (train, valid)
    write(tmp_path / "m.json", [*names, "more.wav"])
    assert len(read_clips(tmp_path / "m.json")) == 101
    same_size = write(tmp_path / "m.json", [*names, "most.wav"])
    os.utime(same_size, (2, 2))
    assert read_clips(tmp_path / "m.json")[100] == str(tmp_path / "most.wav")


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_messages_name_the_entry_in_any_block(tmp_path: Path, suffix: str) -> None:
    names = [f"{row:03d}.wav" for row in range(40)]
    for place, name, message in (
        (33, "./007.wav", "./007.wav is listed already at {first}"),
        (21, " ", "expected the path of a clip under 'wav', found ' '"),
        (0, "", "expected the path of a clip under 'wav', found ''"),
    ):
        given = [*names[:place], name, *names[place:]]
        if suffix == "json":
            path, unit, first = write(tmp_path / "m.json", given), "entry", 0
        else:
            path, unit, first = tmp_path / "m.csv", "line", 2
            path.write_text("wav,labels\n" + "".join(f'"{n}",x\n' for n in given))
            os.utime(path, (1, 1))
        expected = f"{path}: {unit} {place + first}: " + message.format(first=f"{unit} {7 + first}")
        for read in (read_clips, read_manifest):
            with pytest.raises(DataError) as caught:
                read(path)
            assert str(caught.value) == expected
    assert not list((tmp_path / "cache").rglob("*.arrays"))


def test_a_manifest_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "m.json", ["a.wav", "b.wav"])
    real = entries.json.loads

    def changing(text: str) -> Any:
        os.utime(path, (3, 3))
        return real(text)

    monkeypatch.setattr(entries.json, "loads", changing)
    with pytest.raises(DataError, match=r"m.json: was changed while it was read: start again"):
        read_clips(path)
