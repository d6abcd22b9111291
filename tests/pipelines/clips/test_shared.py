"""Arrays that the processes of a machine share: made once, and again when stale or torn."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ssast.pipelines.clips import shared
from ssast.pipelines.clips.order import epoch_order, permutation
from ssast.pipelines.clips.shared import LISTS, ArrayWriter, shared_arrays, state_of
from ssast.pipelines.files import cache_folder

TWO_RANKS = """
import sys, time
from pathlib import Path
import numpy as np
from ssast.pipelines.clips.shared import shared_arrays

def build(writer):
    with open(sys.argv[1], "a") as file:
        file.write("built\\n")
    time.sleep(0.5)
    writer.write("rows", np.arange(100_000))

rows = shared_arrays(("test",), (1,), build)["rows"]
maps = Path("/proc/self/maps").read_text()
print(int(rows.sum()), maps.count(".arrays"))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SSAST_CACHE", str(tmp_path / "cache"))
    return cache_folder(LISTS)


class Counted:
    """Writes what it is given, and counts how often."""

    def __init__(self, values: list[int]) -> None:
        self.values, self.count = values, 0

    def __call__(self, writer: ArrayWriter) -> None:
        self.count += 1
        writer.write_parts("bytes", [b"abc", b"", b"de"])
        writer.write("rows", np.array(self.values).reshape(-1, 1))
        writer.write("none", np.zeros((0, 3), np.int32))


def test_one_process_makes_them_and_the_others_map_them(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TWO_RANKS, str(tmp_path / "log")]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [rank.communicate()[0] for rank in ranks] == ["4999950000 1\n"] * 2
    assert (tmp_path / "log").read_text() == "built\n"


def test_they_are_made_again_when_what_they_were_made_of_has_changed() -> None:
    build = Counted([1, 2])
    for state, count in (((1,), 1), ((1,), 1), ((2,), 2), ((2,), 2), ((1,), 3), (None, 4)):
        found = shared_arrays(("a",), state, build)
        assert build.count == count
        assert found["rows"].tolist() == [[1], [2]] and found["bytes"].tobytes() == b"abcde"
        assert found["none"].shape == (0, 3) and not found["rows"].flags.writeable
    shared_arrays(("b",), (1,), build)
    shared_arrays(("a",), (1,), build)
    assert build.count == 5


@pytest.mark.parametrize("damage", ["cut", "emptied", "zeroed", "changed", "longer"])
def test_torn_files_are_made_again(folder: Path, damage: str) -> None:
    build = Counted([1, 2])
    shared_arrays(("a",), (1,), build)
    (path,) = folder.glob("*.arrays")
    data = path.read_bytes()
    place = data.index(np.array([1, 2]).tobytes())
    torn = {
        "cut": data[:-70],
        "emptied": b"",
        "zeroed": data[:place] + bytes(len(data) - place),
        "changed": data[:place] + b"\7" + data[place + 1 :],
        "longer": data + b"x",
    }
    path.write_bytes(torn[damage])
    assert shared_arrays(("a",), (1,), build)["rows"].tolist() == [[1], [2]]
    assert build.count == 2 and path.read_bytes() == data


def test_without_a_folder_each_process_makes_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SSAST_CACHE", str(tmp_path / "file"))
    build = Counted([1, 2])
    for count in (1, 2):
        assert shared_arrays(("a",), (1,), build)["rows"].tolist() == [[1], [2]]
        assert build.count == count


def test_those_used_long_ago_are_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = Counted([1, 2])
    for name in "ab":
        shared_arrays((name,), (1,), build)
        for path in folder.glob("*.arrays"):
            os.utime(path, (1, 1))
    shared_arrays(("a",), (1,), build)  # is in use
    size = next(folder.glob("*.arrays")).stat().st_size
    monkeypatch.setattr(shared, "LIMIT_BYTES", 2 * size)
    shared_arrays(("c",), (1,), build)
    assert build.count == 3
    for name, count in (("c", 3), ("a", 3), ("b", 4)):
        shared_arrays((name,), (1,), build)
        assert build.count == count


def test_a_file_that_has_just_been_written_is_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.touch()
    assert state_of(path) is None
    os.utime(path, (1, 1))
    before = state_of(path)
    assert before is not None
    os.utime(path, (2, 2))
    assert state_of(path) not in (None, before)
    os.utime(path, (time.time() + 60,) * 2)
    assert state_of(path) is None


def test_the_order_of_many_clips_is_drawn_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssast.pipelines.clips.order.MANY", 100)
    epoch_order.cache_clear()
    for epoch in range(4):
        assert (epoch_order(5, epoch, 100) == permutation(5, epoch, 100)).all()
        assert len(list(folder.glob("*.arrays"))) == min(epoch + 1, 2)
    monkeypatch.setattr(
        "ssast.pipelines.clips.order.permutation", lambda *key: pytest.fail("drawn")
    )
    epoch_order.cache_clear()
    assert epoch_order(5, 3, 100).tolist() == permutation(5, 3, 100).tolist()
