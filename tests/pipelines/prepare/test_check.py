"""ssast data check: silent about what is good, and every planted fault is found and named."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sounds import bad_files, tone, write

from ssast.engine.cli.main import main
from ssast.pipelines.audio.convert import Recipe
from ssast.pipelines.clips.manifest import write_manifest
from ssast.pipelines.clips.shards import ShardIndex
from ssast.pipelines.clips.sidecar import Sidecar
from ssast.pipelines.errors import DataError
from ssast.pipelines.prepare.check import Checked, check_data
from ssast.pipelines.prepare.pack import Packing, prepare_shards


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Labelled shards of twelve clips, two of them the same, in three shards."""
    folder = tmp_path / "in"
    folder.mkdir()
    for k in range(12):
        write(folder / f"{k:02d}.wav", tone(8000 + 16 * k, seed=k % 11), subtype="PCM_16")
    write(folder / "11.wav", tone(8000), subtype="PCM_16")
    names = [f"in/{k:02d}.wav" for k in range(12)]
    write_manifest(tmp_path / "m.json", names, [("even", "odd")[k % 2 :][:1] for k in range(12)])
    packing = Packing(Recipe(), shard_mib=0.07)
    prepare_shards(tmp_path / "m.json", tmp_path / "out", packing, progress=False, log=lambda _: 0)
    assert len(list((tmp_path / "out/shards").glob("*.tar"))) == 3
    return tmp_path / "out"


def checked(path: Path, **options: Path) -> Checked:
    return check_data(path, jobs=2, progress=False, **options)


def faults(path: Path, **options: Path) -> list[str]:
    return [f"{p.where}: {p.problem}" for p in checked(path, **options).problems]


def test_good_shards(out: Path) -> None:
    result = checked(out)
    assert (result.num_clips, result.problems) == (12, [])
    assert result.labels == {"even", "odd"}
    assert result.seconds == pytest.approx(6 + 55 * 0.001, abs=0.01)


def test_dropped_duplicates_are_no_fault(out: Path) -> None:
    packing = Packing(Recipe(), shard_mib=0.07, drop_duplicates=True)
    prepare_shards(out.parent / "m.json", out, packing, progress=False, log=lambda _: 0)
    result = checked(out)
    assert (result.num_clips, result.problems) == (11, [])


def change(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def change_index(out: Path, row: int, column: int, by: int) -> None:
    rows = np.load(out / "index.npy")
    rows[row, column] += by
    np.save(out / "index.npy", rows)


def change_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


SHARD = "shards/00001.tar"
FAULTS: dict[str, tuple[Callable[[Path, int, int], object], list[str]]] = {
    # what to do with the folder and the place and size of a clip; what must be said
    "a flipped bit in the middle of a clip": (
        lambda out, at, size: change(out / SHARD, at + size // 2, b"\x55\xaa\x55"),
        ["{clip}: (cannot be decoded|decodes to other samples)"],
    ),
    "a damaged format": (
        lambda out, at, size: change(out / SHARD, at, b"none"),
        ["{clip}: cannot be decoded: Format not recognised"],
    ),
    "a damaged header": (
        lambda out, at, size: change(out / SHARD, at - 512, bytes(100)),
        ["{clip}: no tar header before byte .*: bad checksum"],
    ),
    "a truncated shard": (
        lambda out, at, size: (out / SHARD).write_bytes((out / SHARD).read_bytes()[: at + 9]),
        ["{clip}: the shard is truncated", "{shard}: .* bytes, expected .* by its clips"],
    ),
    "a shard that lost its end": (
        lambda out, at, size: (out / SHARD).write_bytes((out / SHARD).read_bytes()[:-512]),
        ["{shard}: .* bytes, expected .* by its clips"],
    ),
    "a shard that is gone": (
        lambda out, at, size: (out / SHARD).unlink(),
        ["{shard}: cannot be checked: No such file"],
    ),
    "a sidecar that is gone": (
        lambda out, at, size: (out / "shards/00001.jsonl").unlink(),
        ["00001.jsonl: cannot be checked: No such file"],
    ),
    "a damaged sidecar": (
        lambda out, at, size: (out / "shards/00001.jsonl").write_text("{"),
        ["cannot be checked: .*00001.jsonl: damaged"],
    ),
    "another shard": (
        lambda out, at, size: (out / SHARD).rename(out / "shards/00009.tar"),
        ["{shard}: cannot be checked: No such", "00009.*: cannot be checked: No such"],
    ),
    "an index off by one byte": (
        lambda out, at, size: change_index(out, 5, 1, 1),
        ["index.npy: row 5: .* are no clip of", "{shard}: 1 of its clips are not in index"],
    ),
    "a row twice": (
        lambda out, at, size: np.save(
            out / "index.npy", np.load(out / "index.npy")[[*range(11), 10]]
        ),
        ["index.npy: its rows are not in order, or one is", "00002.tar: 1 of its clips are not"],
    ),
    "a row too few": (
        lambda out, at, size: (
            np.save(out / "index.npy", np.load(out / "index.npy")[:-1]),
            np.save(out / "recordings.npy", np.load(out / "recordings.npy")[:-1]),
            change_text(out / "labels.json", ", [1]]", "]"),
        ),
        ["index.npy: has 11 rows, report.json says 12", "00002.tar: 1 of its clips are not"],
    ),
    "labels in another order": (
        lambda out, at, size: change_text(out / "labels.json", '"even", "odd"', '"odd", "even"'),
        ["row 0: .*other labels than in the shard"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(out: Path, fault: str) -> None:
    plant, expected = FAULTS[fault]
    line = Sidecar.read(out / "shards/00001.jsonl").clips[-1]
    plant(out, line["offset"], line["size"])
    found = faults(out)
    assert found
    for pattern in expected:
        where = pattern.format(clip=f"{out / SHARD}: {line['file']}", shard=out / SHARD)
        assert any(re.search(where, text) for text in found), found
    clips = {text for text in found if ".flac: " in text and "row" not in text}
    assert len(clips) <= 1  # the others are fine


def test_other_samples_are_found_where_no_format_guards_them(out: Path) -> None:
    packing = Packing(Recipe(), "wav")
    shutil.rmtree(out)
    prepare_shards(out.parent / "in", out, packing, progress=False, log=lambda _: 0)
    line = Sidecar.read(out / "shards/00000.jsonl").clips[3]
    change(out / "shards/00000.tar", line["offset"] + 5000, b"\x55")
    [found] = faults(out)
    assert found.endswith(f"00000.tar: {line['file']}: decodes to other samples than were packed")


def test_damaged_lists_are_one_error(out: Path) -> None:
    (out / "labels.json").write_text('{"names": [], "clips": [[0]]}')
    with pytest.raises(DataError, match=r"labels\.json: damaged"):
        check_data(out)
    (out / "index.npy").write_bytes(b"no index")
    with pytest.raises(DataError, match=r"index\.npy: cannot be read"):
        ShardIndex(out)
    np.save(out / "index.npy", np.zeros((4, 2), np.int64))
    with pytest.raises(DataError, match="expected 3 columns, found 2"):
        ShardIndex(out)


def test_bad_files(tmp_path: Path) -> None:
    reasons = bad_files(tmp_path)
    write_manifest(tmp_path / "m.json", [*reasons, *sorted(tmp_path.glob("good.*"))])
    result = checked(tmp_path / "m.json")
    found = {problem.where: problem.problem for problem in result.problems}
    assert set(found) == {str(path) for path in reasons}
    for path, pattern in reasons.items():
        assert re.search(pattern, found[str(path)])
    assert result.num_clips == len(reasons) + 3


def test_files_are_decoded_to_their_ends(tmp_path: Path) -> None:
    """Damage behind the part that training looks at."""
    path = write(tmp_path / "long.flac", tone(16000 * 30))
    data = bytearray(path.read_bytes())
    data[-2000:-1000] = bytes(1000)
    path.write_bytes(data)
    assert len(faults(tmp_path)) == 1


def test_unknown_labels(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "labels.csv").write_text("index,mid,display_name\n0,even,Even\n")
    found = faults(out)
    assert len(found) == 6 and all(text.endswith("unknown label 'odd'") for text in found)
    (out.parent / "classes.csv").write_text("index,mid,display_name\n0,even,Even\n1,odd,Odd\n")
    assert faults(out, classes=out.parent / "classes.csv") == []
    (out.parent / "classes.csv").write_text("even\nodd\n")
    with pytest.raises(DataError, match="expected a header with mid"):
        faults(out, classes=out.parent / "classes.csv")


def test_clips_in_a_table_that_is_named_labels(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", tone(16000))
    for name in ("labels.csv", "train.csv"):
        (tmp_path / name).write_text("filename,label\na.wav,x\n")
        assert faults(tmp_path / name) == []


def test_command(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.jsonl"
    assert main(["data", "check", str(out), "--report", str(report)]) == 0
    assert "12 clips, 0.00 h, 2 labels, 0 problems" in capsys.readouterr().out
    assert report.read_text() == ""
    for shard in (out / "shards").glob("*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    assert main(["data", "check", str(out), "--report", str(report)]) == 1
    shown = capsys.readouterr().out
    assert "12 problems" in shown and "... and 2 more, see --report" in shown
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert len(lines) == 12 and all("no tar header" in line["problem"] for line in lines)
    assert main(["data", "check", str(tmp_path / "nowhere")]) == 2
