"""Manifests of some clips of a prepared folder, wherever a manifest can be given."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sounds import tone, write

from ssast.engine.config import Config
from ssast.engine.data.clips import find_clips
from ssast.engine.data.labels import read_labelled
from ssast.engine.data.leakage import check_disjoint, check_no_leakage
from ssast.engine.evaluation.predict import find_files
from ssast.engine.settings import Data
from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.audio.convert import Recipe
from ssast.pipelines.clips.manifest import read_manifest, write_manifest
from ssast.pipelines.clips.overlap import Contents
from ssast.pipelines.clips.shards import ShardIndex
from ssast.pipelines.errors import DataError
from ssast.pipelines.prepare.check import check_data
from ssast.pipelines.prepare.pack import Packing, prepare_shards
from ssast.pipelines.prepare.stats import measure
from ssast.pipelines.stream.stream import AudioStream

SPEC = FbankSpec(num_frames=48)


def prepare(source: Path, out: Path, clip_s: float = 0.5, **settings: float) -> ShardIndex:
    packing = Packing(Recipe(clip_s=clip_s), **{"shard_mib": 0.05, **settings})  # type: ignore[arg-type]
    prepare_shards(source, out, packing, jobs=2, progress=False, log=lambda line: None)
    return ShardIndex(out)


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    """A prepared folder: 10 recordings of 2 clips each, in several shards."""
    (tmp_path / "in").mkdir()
    for n in range(10):
        write(tmp_path / f"in/{n}.wav", tone(16000, seed=n), subtype="PCM_16")
    found = prepare(tmp_path / "in", tmp_path / "data/out")
    assert len(found) == 20 and len(set(found.table()[:, 0])) > 3
    return found


def pick(index: ShardIndex, manifest: Path, rows: list[int], labelled: bool = True) -> Path:
    labels = [("even", "odd")[row // 2 % 2 :][:1] for row in rows] if labelled else None
    write_manifest(manifest, index.subset(np.array(rows)), labels)
    return manifest


def test_round_trip(index: ShardIndex, tmp_path: Path) -> None:
    rows = [13, 2, 3, 19, 0]
    path = pick(index, tmp_path / "data/tasks/m.json", rows)
    content = json.loads(path.read_text())
    assert content["prepared"] == "../out"
    assert content["data"][0] == {"clip": index[13].name, "labels": "even"}
    found = read_manifest(path)
    assert isinstance(found.paths, ShardIndex)
    assert list(found.paths) == [index[row] for row in rows]
    assert found.labels == (("even",), ("odd",), ("odd",), ("odd",), ("even",))
    assert found.paths.recordings().tolist() == [6, 1, 1, 9, 0]
    assert found.paths.names() == [index[row].name for row in rows]
    assert read_manifest(pick(index, path, rows, labelled=False)).labels is None


def test_the_folder_and_its_manifests_are_moved_together(
    index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pick(ShardIndex(Path("data/out")), Path("data/tasks/m.json"), [1, 2])
    shutil.move(tmp_path / "data", tmp_path / "there")
    (tmp_path / "link").symlink_to("there/tasks")  # ".." is that of the folder itself
    for place in ("there/tasks/m.json", "link/m.json"):
        assert all(clip.read() for clip in read_manifest(place).paths)  # type: ignore[union-attr]


def test_a_folder_that_was_prepared_anew(index: ShardIndex, tmp_path: Path) -> None:
    path = pick(index, tmp_path / "data/m.json", [1, 2, 3, 19])
    audio = [np.frombuffer(clip.read(), np.uint8) for clip in read_manifest(path).paths]  # type: ignore[union-attr]
    prepare(tmp_path / "in", tmp_path / "data/out", shard_mib=1.0)  # the same clips elsewhere
    for clip, before in zip(read_manifest(path).paths, audio, strict=True):
        assert clip.read() == before.tobytes()  # type: ignore[union-attr]
    (tmp_path / "in/1.wav").unlink()
    prepare(tmp_path / "in", tmp_path / "data/out")
    with pytest.raises(DataError) as caught:
        read_manifest(path)
    assert str(caught.value).startswith(f"{path}: {tmp_path}/data/out: 2 of 4 clips are not there")
    assert "(the first is 1_wav_" in str(caught.value) and "prepared anew" in str(caught.value)
    (tmp_path / "data/out/report.json").unlink()
    with pytest.raises(DataError, match="prepared in part only"):
        read_manifest(path)
    shutil.rmtree(tmp_path / "data/out")
    with pytest.raises(DataError, match=r"m\.json: its clips are in .*/data/out, which is not"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"prepared": 3, "data": [{"clip": "a"}]}, "a prepared folder under 'prepared', found 3"),
        ({"prepared": "", "data": [{"clip": "a"}]}, "a prepared folder under 'prepared', found ''"),
        ({"prepared": "out", "data": []}, "lists no clips"),
        (
            {"prepared": "out", "data": [{"wav": "a"}]},
            "name of a clip under 'clip', found None",
        ),
        ({"prepared": "out", "data": [{"clip": 7}]}, "the name of a clip under 'clip', found 7"),
        ({"prepared": "out", "data": ["a"]}, "entry 0: expected {\"clip\": ...}, found 'a'"),
        ({"prepared": "out", "data": [{"clip": "a"}, {"clip": "a"}]}, "listed already at entry 0"),
        ({"prepared": "out", "data": [{"clip": "a", "label": 7.5}]}, "expected labels: text, a"),
        (
            {"prepared": "out", "data": [{"clip": "a"}]},
            "1 of 1 clips are not there",
        ),
        ({"data": [{"clip": "a"}]}, "of the clips, found ['clip']; data.columns="),
    ],
)
def test_wrong_manifests(index: ShardIndex, tmp_path: Path, content: dict, message: str) -> None:
    path = tmp_path / "data/m.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        read_manifest(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_a_sidecar_without_the_clip(index: ShardIndex, tmp_path: Path) -> None:
    path = pick(index, tmp_path / "data/m.json", [0])
    lines = (tmp_path / "data/out/shards/00000.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "data/out/shards/00000.jsonl").write_text("".join([lines[0], *lines[2:]]))
    with pytest.raises(DataError, match=r"00000\.jsonl: has no clip at byte 512.*prepare the data"):
        read_manifest(path)
    (tmp_path / "data/out/shards/00000.jsonl").unlink()
    with pytest.raises(DataError, match=r"00000\.jsonl: cannot be read: No such file"):
        read_manifest(path)


def test_they_stream_like_the_clips_of_the_folder(index: ShardIndex, tmp_path: Path) -> None:
    rows = [17, 4, 9]
    found = read_manifest(pick(index, tmp_path / "data/m.json", rows)).paths
    batches = []
    for paths in (found, index):
        options = {"batch_size": len(paths), "epochs": 1, "device": torch.device("cpu")}
        with AudioStream(paths, SPEC, **options) as stream:  # type: ignore[arg-type]
            batches.append(next(stream).fbank)
    torch.testing.assert_close(batches[0], batches[1][rows], rtol=0, atol=0)


def test_whole_recordings_of_them_are_held_out(index: ShardIndex, tmp_path: Path) -> None:
    rows = list(range(1, 17))
    path = pick(index, tmp_path / "data/m.json", rows)
    train, valid = find_clips(Config(data=Data(train=str(path), valid_share=0.2)))
    assert isinstance(train, ShardIndex) and isinstance(valid, ShardIndex)
    assert sorted(map(str, [*train, *valid])) == sorted(str(index[row]) for row in rows)
    assert not set(train.recordings()) & set(valid.recordings())


def test_a_copy_in_another_split_is_found(index: ShardIndex, tmp_path: Path) -> None:
    one = pick(index, tmp_path / "data/one.json", [0, 1, 2, 3])
    other = pick(index, tmp_path / "data/other.json", [4, 5, 6, 7])
    both = pick(index, tmp_path / "data/both.json", [3, 8])
    sets = {p.stem: read_labelled(str(p), ("even", "odd"), one_label=True) for p in (one, other)}
    check_no_leakage(sets, Contents())
    sets["both"] = read_labelled(str(both), ("even", "odd"), one_label=True)
    with pytest.raises(DataError, match=f"of one .* in both .*{index[3].name}"):
        check_no_leakage(sets, Contents())


def test_data_sets_of_one_folder_may_be_mixed(index: ShardIndex, tmp_path: Path) -> None:
    first = read_manifest(pick(index, tmp_path / "data/a.json", [0, 1, 2])).paths
    second = read_manifest(pick(index, tmp_path / "data/b.json", [4, 5])).paths
    third = read_manifest(pick(index, tmp_path / "data/c.json", [3])).paths
    check_disjoint({"a": first, "b": second})
    for sets in ({"a": first, "c": third}, {"b": second, "all": index}):  # parts of one recording
        with pytest.raises(DataError, match=r" and .* both hold .*: expected no recording in"):
            check_disjoint(sets)


def test_check_looks_at_these_clips_alone(index: ShardIndex, tmp_path: Path) -> None:
    path = pick(index, tmp_path / "data/m.json", [3, 2, 16])
    found = check_data(path, jobs=2, progress=False)
    assert (found.num_clips, found.labels, found.problems) == (3, {"even", "odd"}, [])
    assert found.seconds == pytest.approx(1.5)
    clip = index[16]
    shard = bytearray(Path(clip.path).read_bytes())
    shard[clip.offset + 60 : clip.offset + clip.size] = bytes(clip.size - 60)
    Path(clip.path).write_bytes(shard)
    [problem] = check_data(path, jobs=2, progress=False).problems
    assert problem.where.endswith(clip.name)
    assert check_data(pick(index, path, [0, 1]), jobs=2, progress=False).problems == []


def test_stats_and_predictions_take_them(index: ShardIndex, tmp_path: Path) -> None:
    path = pick(index, tmp_path / "data/m.json", [3, 2, 18])
    stats = measure(path, spec=SPEC, num_threads=1, progress=False)
    assert (stats.num_clips, stats.num_total) == (3, 3)
    assert find_files([path]) == [index[3], index[2], index[18]]


def test_prepared_clips_are_not_prepared_again(index: ShardIndex, tmp_path: Path) -> None:
    path = pick(index, tmp_path / "data/m.json", [3])
    with pytest.raises(DataError, match=r"m\.json: lists clips that are prepared: train on it"):
        prepare(path, tmp_path / "again")
