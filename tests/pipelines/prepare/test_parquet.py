"""Parquet files with sounds, as ``datasets`` writes them: prepared with their labels."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from sounds import tone, write

from ssast.pipelines.audio.convert import Recipe
from ssast.pipelines.clips.columns import TableFormat
from ssast.pipelines.clips.manifest import read_manifest
from ssast.pipelines.clips.shards import ShardIndex
from ssast.pipelines.errors import DataError, UnusableError
from ssast.pipelines.prepare import parquet
from ssast.pipelines.prepare.pack import Packing, prepare_shards
from ssast.pipelines.prepare.parquet import has_sounds, parquet_rows, read_cell

CLASSES = ["cat", "dog, loud", "owl"]
CLASS_LABEL = {"names": CLASSES, "_type": "ClassLabel"}


def write_parquet(
    path: Path, sounds: list[bytes | None], labels: list[Any], feature: Any = CLASS_LABEL
) -> Path:
    """As Dataset.to_parquet and the hub do: features in the schema, a few rows in each group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": sound, "path": f"{n % 2}.flac"} for n, sound in enumerate(sounds)]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {"file": ["x.flac"] * len(cells), "audio": pa.array(cells, kind), "label": labels}
    table = pa.table(columns)
    features = {"audio": {"_type": "Audio", "sampling_rate": 16000}, "label": feature}
    facts = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(facts), path, row_group_size=5)
    return path


@pytest.fixture
def sounds(tmp_path: Path) -> list[bytes]:
    return [write(tmp_path / f"{n}.flac", tone(8000 + n, seed=n)).read_bytes() for n in range(12)]


def prepared(source: Path, out: Path, jobs: int = 1) -> ShardIndex:
    packing = Packing(Recipe(clip_s=1.0, min_s=0.1), shard_mib=0.05)
    prepare_shards(source, out, packing, jobs=jobs, progress=False, log=lambda line: None)
    return ShardIndex(out)


@pytest.mark.parametrize("name", ["", "train-*.parquet", "train-{0..1}.parquet"])
def test_sounds_and_labels(name: str, sounds: list[bytes], tmp_path: Path) -> None:
    """Of a folder or of some of its files; the same bytes on any number of threads."""
    for n in range(2):
        write_parquet(
            tmp_path / f"in/train-{n}.parquet", list(sounds[6 * n : 6 * n + 6]), [0, 1, 2, 0, 1, -1]
        )
    one, two = (prepared(tmp_path / "in" / name, tmp_path / f"{k}", k) for k in (1, 3))
    assert read_manifest(tmp_path / "1").labels == (
        (("cat",), ("dog, loud",), ("owl",), ("cat",), ("dog, loud",), ()) * 2
    )
    for row, (clip, other) in enumerate(zip(one, two, strict=True)):
        found, _ = soundfile.read(io.BytesIO(clip.read()), dtype="float32")
        wanted, _ = soundfile.read(tmp_path / f"{row}.flac", dtype="float32")
        np.testing.assert_allclose(found, wanted, atol=1e-4)
        assert clip.read() == other.read()


def test_groups_are_read_once_in_order(
    sounds: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "a.parquet", list(sounds), [["x", "y"]] * 12, None)
    rows, labelled = parquet_rows(path)
    assert labelled and has_sounds(path) and {labels for *_, labels in rows} == {("x", "y")}
    assert [name for name, *_ in rows] == [f"{n:08d}_{n % 2}.flac" for n in range(12)]
    opened: list[Path] = []
    reader = parquet._Reader
    monkeypatch.setattr(parquet, "_Reader", lambda cell: (opened.append(cell), reader(cell))[1])
    assert [read_cell(cell) for _, cell, _, _ in rows] == sounds
    assert len(opened) == 3
    assert read_cell(rows[7][1]) == sounds[7] and read_cell(rows[9][1]) == sounds[9]
    assert len(opened) == 4


def test_what_cannot_be_read(sounds: list[bytes], tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "in/a.parquet", [sounds[0], None, b"", b"no sound"], [0] * 4)
    assert len(prepared(path, tmp_path / "out")) == 1
    lines = (tmp_path / "out/rejected.jsonl").read_text().splitlines()
    reasons = [json.loads(line)["reason"] for line in lines]
    assert ["holds no bytes" in reason for reason in reasons] == [True, True, False]
    with pytest.raises(
        DataError, match="holds the sounds themselves, in the column 'audio': ssast"
    ):
        read_manifest(path)
    write_parquet(path, [sounds[0]], [7])
    with pytest.raises(DataError, match=r"a\.parquet: row 0: class 7, expected 0 to 2"):
        prepared(path, tmp_path / "out2")
    [(_, cell, _, _)], _ = parquet_rows(write_parquet(path, [sounds[0]], ["a"], None))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UnusableError, match="cannot be read"):
        read_cell(cell)
    with pytest.raises(DataError, match="not a Parquet file"):
        prepared(path, tmp_path / "out3")
    with pytest.raises(DataError, match="there is no such archive"):
        prepared(tmp_path / "none-*.parquet", tmp_path / "out4")


def test_damaged_groups(sounds: list[bytes], tmp_path: Path) -> None:
    """Whichever byte of the labels is wrong: they are read, or it is one error."""
    path = write_parquet(tmp_path / "a.parquet", list(sounds[:3]), [2, 0, 1])
    data = path.read_bytes()
    labels = pq.ParquetFile(path).metadata.row_group(0).column(3)
    start = labels.dictionary_page_offset
    messages = []
    for place in range(start, start + labels.total_compressed_size):
        path.write_bytes(data[:place] + b"\x07" + data[place + 1 :])
        try:
            parquet_rows(path)
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > 10 and all(str(path) in message for message in messages)
    assert any("row group 0: " in message for message in messages)


def test_rows_that_are_only_stated(sounds: list[bytes], tmp_path: Path) -> None:
    """A footer in which a group of 3 rows has a million."""
    path, million = tmp_path / "a.parquet", b"\x80\x89\x7a"  # as Thrift writes it; 3 is 6
    pq.write_table(pa.table({"audio": [{"bytes": sounds[0]}] * 3}), path)
    data = path.read_bytes()
    size = int.from_bytes(data[-8:-4], "little")
    footer = data[-8 - size : -8]
    for place in (place for place in range(size) if footer[place] == 6):
        changed = footer[:place] + million + footer[place + 1 :]
        ending = len(changed).to_bytes(4, "little") + b"PAR1"
        path.write_bytes(data[: -8 - size] + changed + ending)
        with contextlib.suppress(pa.ArrowException, OSError):
            if pq.ParquetFile(path).metadata.row_group(0).num_rows == 10**6:
                break
    with pytest.raises(DataError, match=r"states 1000000 rows of sounds in \d+ bytes"):
        parquet_rows(path)


def test_several_labels_in_a_text(sounds: list[bytes], tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", sounds[:3], ["a;b", "c", ""], None)
    given = [labels for *_, labels in parquet_rows(path, TableFormat(label_separator=";"))[0]]
    assert given == [("a", "b"), ("c",), ()]
    assert [labels for *_, labels in parquet_rows(path)[0]] == [("a;b",), ("c",), ()]


def test_what_the_labels_are_read_from_is_said_once(
    sounds: list[bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for n in range(3):
        write_parquet(tmp_path / f"in/{n}.parquet", list(sounds[:2]), [0, 1])
    other = TableFormat({"labels": "file"})
    for table in (TableFormat(), other, TableFormat({"labels": ""})):
        for n in range(3):
            parquet_rows(tmp_path / f"in/{n}.parquet", table)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/in/*.parquet: Parquet: clips in 'audio', {read}"
        for read in (
            "labels in 'label'; not used: 'file'",
            "labels in 'file'; not used: 'label' ('label' may be labels: data.columns={labels: "
            "NAME} takes another column)",
            "no labels; not used: 'file', 'label' ('label' may be labels: data.columns={labels: "
            "NAME} takes another column)",
        )
    ]
