"""Prepared shards as the clips of a run."""

import hashlib
import io
import json
import os
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from prepared import RECIPE, prepared, rejected, samples_of
from runs import call, overrides, write_config
from shards import make_recordings, prepare

from ssast.engine.config import Config
from ssast.engine.data.clips import find_clips
from ssast.engine.settings import Data
from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.audio.convert import cut
from ssast.pipelines.audio.decode import Item
from ssast.pipelines.audio.encoded import read_clip
from ssast.pipelines.clips.manifest import read_manifest, write_manifest
from ssast.pipelines.clips.mix import fingerprint
from ssast.pipelines.clips.shards import ShardIndex
from ssast.pipelines.clips.sidecar import Sidecar
from ssast.pipelines.errors import DataError
from ssast.pipelines.stream.stream import AudioStream

SPEC = FbankSpec(num_frames=200)


@pytest.mark.parametrize("codec", ["flac", "wav"])
def test_round_trip_is_bit_exact(source: Path, tmp_path: Path, codec: str) -> None:
    """The same samples as were cut; the members that tarfile and the index see agree."""
    index = prepared(source, tmp_path / "out", codec=codec)
    expected: dict[str, list[np.ndarray]] = {}
    for path in sorted(source.rglob("*.*")):
        if path.suffix != ".tar":
            name = str(path.relative_to(source))
            expected[name] = [part.samples for part in cut(Item(name, path), RECIPE)]
            if path.parent == source / "a":  # in the archive as well
                expected[f"more.tar/inside/{path.name}"] = expected[name]
    found: dict[str, list[np.ndarray]] = {name: [] for name in expected}
    members: list[tuple[str, bytes]] = []
    shards = sorted((tmp_path / "out/shards").glob("*.tar"))
    assert len(shards) > 3
    for shard in shards:
        for line in Sidecar.read(shard.with_suffix(".jsonl")).clips:
            data = shard.read_bytes()[line["offset"] : line["offset"] + line["size"]]
            found[line["name"]].append(samples_of(data))
            assert line["part"] == len(found[line["name"]]) - 1
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None and (member.mtime, member.uid, member.mode) == (0, 0, 0o644)
                assert member.name.isascii() and len(member.name) <= 100
                members.append((f"{shard}: {member.name}", file.read()))
    for name, parts in expected.items():
        for got, wanted in zip(found[name], parts, strict=True):
            np.testing.assert_array_equal(got, wanted)
    assert [str(clip) for clip in index] == [name for name, _ in members]
    for clip, (_, data) in zip(index, members, strict=True):
        assert read_clip(clip, SPEC).tobytes() == data == clip.read()
        decoded, _ = soundfile.read(io.BytesIO(read_clip(clip, SPEC, verify=True).tobytes()))
        np.testing.assert_array_equal(decoded * 2**15, samples_of(data))
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["clips"] == len(members) == len(index)
    assert report["source_rates_hz"] == {"8000": 3, "16000": 5, "44100": 4}
    assert report["duplicates"] == sum(len(v) for k, v in expected.items() if "tar" in k)


def test_the_index_is_a_sequence(source: Path, tmp_path: Path) -> None:
    index = prepared(source, tmp_path / "out")
    every = list(index)
    rows = np.array([5, 0, 3])
    assert list(index.subset(rows)) == [every[5], every[0], every[3]]
    assert list(index.subset(rows).subset(np.array([2]))) == [every[3]]
    assert list(index[2:4]) == every[2:4] and index[-1] == every[-1]
    with pytest.raises(IndexError):
        index[len(index)]
    assert index.fingerprint() != index[1:].fingerprint()
    moved = shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    assert ShardIndex(Path(moved)).fingerprint() == index.fingerprint()


def test_a_shard_that_changed_is_named(source: Path, tmp_path: Path) -> None:
    index = prepared(source, tmp_path / "out")
    clip = index[len(index) - 1]
    name = str(clip)
    shard = Path(clip.path)
    data = shard.read_bytes()
    shard.write_bytes(data[: clip.offset + 100])
    with pytest.raises(DataError) as caught:
        read_clip(clip, SPEC)
    assert f"{name}: the shard is truncated" in str(caught.value)
    shard.write_bytes(os.urandom(len(data)))  # the sidecar still knows the name
    with pytest.raises(DataError) as caught:
        read_clip(clip, SPEC)
    assert f"{name}: the shard was overwritten" in str(caught.value)
    shard.unlink()
    with pytest.raises(DataError, match="No such file"):
        read_clip(clip, SPEC)
    assert str(clip) == name


def test_labels_are_kept(source: Path, tmp_path: Path) -> None:
    files = sorted(str(path) for path in source.rglob("*.*") if path.suffix != ".tar")
    labels = [("dog", "bark") if k % 2 else ("cat",) for k in range(len(files))]
    write_manifest(tmp_path / "m.json", [*files, "gone.wav"], [*labels, ("cat",)])
    manifest = read_manifest(tmp_path / "m.json")
    prepared(tmp_path / "m.json", tmp_path / "out")
    found = read_manifest(tmp_path / "out")
    assert manifest.labels and found.labels and len(found.labels) == len(found.paths)
    of_name = {os.path.relpath(f, tmp_path): names for f, names in zip(files, labels, strict=True)}
    clips = [c for s in sorted(tmp_path.glob("out/shards/*.jsonl")) for c in Sidecar.read(s).clips]
    assert [of_name[clip["name"]] for clip in clips] == list(found.labels)
    names = json.loads((tmp_path / "out/labels.json").read_text())["names"]
    assert names == ["bark", "cat", "dog"]
    assert rejected(tmp_path / "out") == {"gone.wav": "cannot be read: No such file or directory"}


def test_clips_of_a_recording_are_held_out_together(source: Path, tmp_path: Path) -> None:
    index = prepared(source, tmp_path / "out")
    config = Config(data=Data(train=str(tmp_path / "out"), valid_share=0.2))
    train, valid = find_clips(config)
    assert isinstance(train, ShardIndex) and isinstance(valid, ShardIndex)
    assert sorted(map(str, [*train, *valid])) == sorted(map(str, index))
    assert not set(train.recordings()) & set(valid.recordings())
    assert len(valid) >= round(0.2 * len(index))


def test_clips_lost_in_mid_epoch_are_reported(source: Path, tmp_path: Path) -> None:
    index = prepared(source, tmp_path / "out")
    lost = {k for k, clip in enumerate(index) if clip.path == index[0].path}
    names = {k: str(index[k]) for k in lost}
    Path(index[0].path).write_bytes(b"overwritten")
    with AudioStream(
        index, SPEC, batch_size=4, epochs=1, device=torch.device("cpu"), max_rejected=1.0
    ) as stream:
        batches = list(stream)
        assert {k: path for k, (path, _) in stream.rejected.items()} == names
    valid = torch.cat([batch.clip_ids[batch.valid] for batch in batches])
    assert set(valid.tolist()) == set(range(len(index))) - lost


def test_millions_of_clips_cost_nothing_to_open(tmp_path: Path) -> None:
    count = 2_000_000
    rows = np.stack([np.arange(count) // 1000, 512 * np.arange(count), np.full(count, 9)], 1)
    np.save(tmp_path / "index.npy", rows.astype(np.int64))
    np.save(tmp_path / "recordings.npy", np.arange(count) // 3)
    (tmp_path / "shards").mkdir()
    (tmp_path / "report.json").write_text("{}")
    assert (tmp_path / "index.npy").stat().st_size < 48.1e6
    started = time.process_time()
    index = read_manifest(tmp_path).paths
    assert len(index) == count and index[1_234_567].offset == 512 * 1_234_567  # type: ignore[union-attr]
    assert time.process_time() - started < 0.1
    train, valid = find_clips(Config(data=Data(train=str(tmp_path))))
    assert len(train) + len(valid) == count
    assert 40_000 <= len(valid) <= 40_002
    for clips in (index, valid):
        assert fingerprint(clips) == hashlib.sha256(clips.table().tobytes()).hexdigest()  # type: ignore[union-attr]


def test_pretraining_does_not_read_labels(tmp_path: Path) -> None:
    source = tmp_path / "source"
    paths = make_recordings(source, 4)
    write_manifest(source / "m.json", paths, [["a"], ["b"]] * 2)
    prepare(source / "m.json", tmp_path / "out")
    (tmp_path / "out/labels.json").write_text("{")
    train, valid = find_clips(Config(data=Data(train=str(tmp_path / "out"), valid_share=0.25)))
    assert len(train) + len(valid) == 4
    with pytest.raises(DataError, match=r"labels.json: damaged: prepare the data again"):
        read_manifest(tmp_path / "out")


@pytest.mark.slow
def test_a_run_trains_on_shards_and_goes_on(source: Path, tmp_path: Path) -> None:
    prepared(source, tmp_path / "out")
    config = write_config(tmp_path)
    settings = [f"data.train={tmp_path / 'out'}", f"run.folder={tmp_path / 'run'}"]
    for steps, more in ((2, []), (4, ["--resume"])):
        done = call("pretrain", config, *overrides(train__steps=steps), *settings, *more)
        assert done.returncode == 0, done.stderr
        assert f"step {steps} of {steps}" in done.stdout
    assert not (tmp_path / "run/rejected.jsonl").exists()
