"""Copies of files in two data sets: what is read to find them, and what is known from before."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from shards import make_recordings, prepare

from ssast.pipelines.clips import digests, overlap
from ssast.pipelines.clips.digests import RECORD, DigestCache
from ssast.pipelines.clips.overlap import MIDDLE_BYTES, Contents, shared_recordings


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the digests."""
    monkeypatch.setenv("SSAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/lists/digests.bin"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is read: names of files, and whether the middle or the whole."""
    found: list[tuple[str, str]] = []
    real = overlap._digest

    def counted(clip: Path, kind: str) -> tuple[np.ndarray, int]:
        found.append((Path(clip).name, kind))
        return real(clip, kind)

    monkeypatch.setattr(overlap, "_digest", counted)
    return found


def write(folder: Path, **contents: bytes) -> list[Path]:
    """Files that were not changed just now."""
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        os.utime(folder / name, (1, 1))
    return [folder / name for name in contents]


SIZE = 5 * MIDDLE_BYTES


def sound(number: int, *, end: int = 0) -> bytes:
    """Bytes that differ in the middle, or only at the end."""
    data = bytearray(np.random.default_rng(number).bytes(SIZE))
    data[-1] = end
    return bytes(data)


def test_only_files_of_equal_size_and_middle_are_read(
    tmp_path: Path, read: list[tuple[str, str]]
) -> None:
    one = write(tmp_path / "one", a=sound(1), b=sound(2), c=sound(3), d=sound(4)[1:], e=b"x")
    other = write(tmp_path / "other", f=sound(5), g=sound(2), h=sound(3, end=1), i=b"xy", j=b"y")
    missing = tmp_path / "missing"
    ticks: list[None] = []
    contents = Contents(lambda: ticks.append(None))
    assert contents.copies([*one, missing], [*other, missing]) == [(one[1], other[1])]
    middles = {name for name, kind in read if kind == "middle"}
    wholes = {name for name, kind in read if kind == "whole"}
    assert middles == set("abcefghj") and wholes == set("bcgh")
    assert len(read) == len(middles) + len(wholes) == contents.num_read <= len(ticks)
    assert contents.bytes_read == 6 * MIDDLE_BYTES + 2 + 4 * SIZE
    assert contents.sizes([*one, missing]).tolist() == [SIZE, SIZE, SIZE, SIZE - 1, 1, -1]


def test_a_file_is_read_once_in_several_splits(tmp_path: Path, read: list[tuple[str, str]]) -> None:
    sets = [
        write(tmp_path / "all", **{f"{k}{n}": sound(10 * k + n) for n in range(3)})
        for k in range(3)
    ]
    contents = Contents()
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert contents.copies(sets[one], sets[other]) == []
    assert sorted(read) == [(f"{k}{n}", "middle") for k in range(3) for n in range(3)]


def test_the_second_start_reads_nothing(tmp_path: Path, read: list[tuple[str, str]]) -> None:
    sets = write(tmp_path, a=sound(1), b=sound(2)), write(tmp_path, c=sound(1), d=sound(4))
    for _ in range(2):
        contents = Contents()
        assert contents.copies(*sets) == [(sets[0][0], sets[1][0])]
    assert len(read) == 6 == contents.num_known and not contents.num_read
    assert contents.summary().endswith("6 known from before")
    write(tmp_path, d=sound(1))
    os.utime(tmp_path / "d", (2, 2))
    assert len(Contents().copies(*sets)) == 2
    assert read[6:] == [("d", "middle"), ("d", "whole")]
    shutil.copyfile(tmp_path / "b", tmp_path / "new")  # of the same size and time, another inode
    os.utime(tmp_path / "new", (2, 2))
    os.replace(tmp_path / "new", tmp_path / "d")
    assert len(Contents().copies(*sets)) == 2
    assert read[8:] == [("d", "middle"), ("b", "whole"), ("d", "whole")]


def test_a_file_that_has_just_been_written_is_read_again(
    tmp_path: Path, read: list[tuple[str, str]]
) -> None:
    sets = write(tmp_path, a=sound(1)), write(tmp_path, b=sound(2))
    os.utime(tmp_path / "b")
    for _ in range(2):
        Contents().copies(*sets)
    assert read == [("a", "middle"), ("b", "middle"), ("b", "middle")]


@pytest.mark.parametrize("damage", ["torn", "changed", "empty", "unwritable"])
def test_a_damaged_cache_costs_only_time(tmp_path: Path, cache: Path, damage: str) -> None:
    sets = write(tmp_path, a=sound(1), b=sound(2)), write(tmp_path, c=sound(1), d=sound(4))
    if damage == "unwritable":
        cache.mkdir(parents=True)
    else:
        Contents().copies(*sets)
        data = cache.read_bytes()
        assert len(data) == 6 * RECORD
        place = 2 * RECORD + 17
        changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        cache.write_bytes({"torn": data[:-7], "changed": changed, "empty": b""}[damage])
    known = {"torn": 5, "changed": 5, "empty": 0, "unwritable": 0}[damage]
    for after in (known, 0 if damage == "unwritable" else 6):
        contents = Contents()
        assert contents.copies(*sets) == [(sets[0][0], sets[1][0])]
        assert (contents.num_known, contents.num_read) == (after, 6 - after)


def test_the_newest_digests_are_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = np.random.default_rng(0).integers(0, 2**63, (30, 2)).astype("u8")
    for part in (slice(0, 10), slice(10, 20), slice(20, 30)):
        DigestCache().add(keys[part], ~keys[part])
    found, known = DigestCache().find(keys[::-1])
    assert known.all() and (found == ~keys[::-1]).all()
    assert not DigestCache().find(keys + np.uint64(1))[1].any()
    monkeypatch.setattr(digests, "LIMIT_RECORDS", 20)
    DigestCache()
    found, known = DigestCache().find(keys)
    assert known.tolist() == [False] * 20 + [True] * 10 and cache.stat().st_size == 10 * RECORD


def test_prepared_clips_and_files_are_compared_by_their_bytes(tmp_path: Path) -> None:
    paths = make_recordings(tmp_path / "source", 3)
    index = prepare(tmp_path / "source", tmp_path / "out", codec="wav")
    (tmp_path / "copy.wav").write_bytes(index[1].read())
    files = [*map(str, paths), str(tmp_path / "copy.wav")]
    assert Contents().copies(index, files) == [(index[1], files[-1])]
    assert Contents().copies(files, index) == [(files[-1], index[1])]


def test_files_of_the_same_path_are_of_one_recording() -> None:
    one, other = ["a", "b", "c", "d"], ["d", "x", "b"]
    assert shared_recordings(one, other) == [("b", "b"), ("d", "d")]
    assert shared_recordings(other, one) == [("d", "d"), ("b", "b")]


def test_empty_files_are_no_copies_of_each_other(tmp_path: Path) -> None:
    """A download that failed leaves one; they hold no sound that could be in two sets."""
    sets = []
    for name in ("train", "valid"):
        (tmp_path / f"{name}.wav").touch()
        sets.append([str(tmp_path / f"{name}.wav")])
    assert Contents().copies(*sets) == []
