"""Data behind URLs: prepared there, checked, trained on by ranges of bytes; and when that fails."""

import json
import os
import shutil
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from sounds import tone, write

from ssast.engine.cli.main import main
from ssast.engine.config import Config
from ssast.engine.data.clips import find_clips
from ssast.engine.settings import Data
from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.audio.convert import Recipe
from ssast.pipelines.clips.manifest import read_manifest, write_manifest
from ssast.pipelines.clips.mix import is_remote, select
from ssast.pipelines.clips.remote import as_os_error, as_path, is_url, read_range
from ssast.pipelines.clips.shards import ShardClip, ShardIndex
from ssast.pipelines.clips.subset import draw_clips
from ssast.pipelines.errors import TRANSIENT, DataError, StorageError
from ssast.pipelines.prepare.check import check_data
from ssast.pipelines.prepare.pack import Packing, prepare_shards
from ssast.pipelines.stream.stream import AudioStream

SPEC = FbankSpec(num_frames=60)


@dataclass
class Storage:
    """What memory:// is asked for, and when it fails."""

    asked: Counter[str] = field(default_factory=Counter)
    together: threading.Barrier | None = None  # requests wait for so many others
    fails: int = 0  # of the next requests
    fails_at: int | None = None  # or: at so many uploads from now on

    def answer(self, request: str) -> None:
        self.asked[request] += 1
        if self.together is not None:
            self.together.wait(timeout=20)
        now = False
        if request == "put" and self.fails_at is not None:
            self.fails_at -= 1
            now = self.fails_at == -1
        if now or self.fails > 0:
            self.fails -= 1
            raise RuntimeError("503 slow down")  # no OSError, as of many libraries


@pytest.fixture(autouse=True)
def storage(monkeypatch: pytest.MonkeyPatch) -> Storage:
    """Empty at first."""
    storage = Storage()
    get, put = MemoryFileSystem.cat_file, MemoryFileSystem.put_file

    def cat_file(self: Any, path: str, start: Any = None, end: Any = None, **rest: Any) -> bytes:
        storage.answer("whole" if start is None else "range")
        return get(self, path, start=start, end=end, **rest)

    def put_file(self: Any, *arguments: Any, **rest: Any) -> None:
        storage.answer("put")
        put(self, *arguments, **rest)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    return storage


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    (folder / "a").mkdir(parents=True)
    for k in range(9):
        write(folder / ("a" if k % 2 else "") / f"{k}.wav", tone(9000 + 2000 * k, seed=k))
    (folder / "bad.wav").write_bytes(b"no sound")
    return folder


def prepared(source: str | Path, out: str | Path, **settings: Any) -> dict[str, Any]:
    recipe = Recipe(clip_s=0.5, min_s=0.1)
    packing = Packing(recipe, **{"shard_mib": 0.05, **settings})
    return prepare_shards(
        as_path(source), as_path(out), packing, jobs=2, progress=False, log=lambda line: None
    )


def contents(out: str | Path) -> dict[str, bytes]:
    """Files by name; of this machine or of the storage."""
    if is_url(out):
        base = as_path(out).path  # type: ignore[attr-defined]
        found = MemoryFileSystem().find(base)
        return {os.path.relpath(p, base): MemoryFileSystem().cat_file(p) for p in found}
    paths = [p for p in Path(out).rglob("*") if p.is_file() and p.name != ".lock"]
    return {str(p.relative_to(out)): p.read_bytes() for p in paths}


def test_the_same_bytes_as_on_a_disk(source: Path, tmp_path: Path) -> None:
    report = prepared(source, "memory://bucket/out")
    assert report == prepared(source, tmp_path / "out") and report["shards"] > 2
    assert contents("memory://bucket/out") == contents(tmp_path / "out")
    assert not list(tmp_path.glob("ssast-prepare-*"))


def test_goes_on_after_a_failure(source: Path, tmp_path: Path, storage: Storage) -> None:
    whole = prepared(source, tmp_path / "out")
    for storage.fails_at in (1, 0, 3, 1, 2):  # first the first sidecar
        with pytest.raises(DataError, match=r"preparing the data failed: .*503 slow down"):
            prepared(source, "memory://bucket/out")
        with pytest.raises(DataError, match="prepared in part only"):
            read_manifest("memory://bucket/out")
        there = contents("memory://bucket/out")
        sidecars = [name for name in there if name.endswith(".jsonl")]
        assert all(name.replace(".jsonl", ".tar") in there for name in sidecars)
    before, storage.fails_at = storage.asked["put"], None
    assert prepared(source, "memory://bucket/out") == whole
    assert contents("memory://bucket/out") == contents(tmp_path / "out")
    assert storage.asked["put"] - before < 2 * whole["shards"] + 4  # some were there already
    before = storage.asked["put"]
    prepared(source, "memory://bucket/out")
    assert storage.asked["put"] - before == 4  # the lists alone


def test_other_settings_leave_nothing_old(source: Path, tmp_path: Path, storage: Storage) -> None:
    prepared(source, "memory://bucket/out", shard_mib=0.01)
    MemoryFileSystem().pipe("/bucket/out/shards/README.txt", b"of the user")
    storage.fails_at = 5
    with pytest.raises(DataError, match="503 slow down"):
        prepared(source, "memory://bucket/out", shard_mib=0.01, codec="wav")
    storage.fails_at = None
    with pytest.raises(DataError, match="prepared in part only"):
        read_manifest("memory://bucket/out")
    prepared(source, "memory://bucket/out", shard_mib=1.0, codec="wav")
    prepared(source, tmp_path / "out", shard_mib=1.0, codec="wav")
    there = contents("memory://bucket/out")
    assert there.pop("shards/README.txt") == b"of the user"
    assert there == contents(tmp_path / "out")


def test_recordings_behind_a_url(source: Path, tmp_path: Path, storage: Storage) -> None:
    MemoryFileSystem().put(f"{source}/", "/there/", recursive=True)
    report = prepared("memory://there", tmp_path / "out")
    local = prepared(source, tmp_path / "local")
    for name, data in contents(tmp_path / "local").items():
        if name.endswith((".tar", ".npy", "rejected.jsonl")):
            assert contents(tmp_path / "out")[name] == data, name
    assert report["clips"] == local["clips"] and report["num_rejected"] == 1
    with pytest.raises(DataError, match="no recordings in there"):
        prepared("memory://nowhere", tmp_path / "other")
    prepared(source, "memory://done")
    with pytest.raises(DataError, match="is prepared already"):
        prepared("memory://done", tmp_path / "other")


def test_training_reads_ranges(source: Path, tmp_path: Path, storage: Storage) -> None:
    prepared(source, "memory://bucket/out")
    prepared(source, tmp_path / "out")
    found = find_clips(Config(data=Data(train="memory://bucket/out", valid_share=0.2)))
    local = find_clips(Config(data=Data(train=str(tmp_path / "out"), valid_share=0.2)))
    for here, there in zip(local, found, strict=True):
        assert isinstance(here, ShardIndex) and isinstance(there, ShardIndex)
        assert len(here) == len(there) and here.fingerprint() == there.fingerprint()
    mixed, _ = find_clips(
        Config(data=Data(mix={"memory://bucket/out": 1, str(tmp_path / "out"): 2}))
    )
    assert len(mixed) > len(found[0])
    some = select(mixed, draw_clips(mixed, 4))
    assert len(some) == 4 and is_remote(some) and not is_remote(select(some, np.arange(2, 4)))
    settings: dict[str, Any] = {"batch_size": 4, "device": torch.device("cpu")}
    storage.asked.clear()
    with AudioStream(local[0], SPEC, **settings) as a, AudioStream(found[0], SPEC, **settings) as b:
        for _ in range(8):
            assert torch.equal(next(a).fbank, next(b).fbank)
    assert storage.asked["range"] >= 32 and storage.asked["whole"] == 0


def test_many_requests_at_once(source: Path, storage: Storage) -> None:
    """However few threads decode; a request waits for 15 others here."""
    prepared(source, "memory://bucket/out", shard_mib=1.0)
    clips = read_manifest("memory://bucket/out").paths
    storage.asked.clear()
    storage.together = threading.Barrier(16)
    with AudioStream(
        clips, SPEC, batch_size=8, device=torch.device("cpu"), num_threads=1, read_ahead=3
    ) as stream:
        assert bool(next(stream).valid.all()) and storage.asked["range"] >= 16
        storage.together.abort()


def test_a_sidecar_that_was_cut_off_is_made_again(source: Path, tmp_path: Path) -> None:
    """As storage may leave it that is no object store."""
    prepared(source, "memory://bucket/out")
    whole = contents("memory://bucket/out")
    sidecar = as_path("memory://bucket/out/shards/00000.jsonl")
    lines = sidecar.read_bytes().splitlines(keepends=True)
    assert len(lines) > 2
    sidecar.write_bytes(b"".join(lines[:-1]))
    prepared(source, "memory://bucket/out")
    assert contents("memory://bucket/out") == whole


def test_a_disk_cache_of_remote_clips(source: Path, tmp_path: Path, storage: Storage) -> None:
    prepared(source, "memory://bucket/out")
    clips = read_manifest("memory://bucket/out").paths
    settings: dict[str, Any] = {"batch_size": 4, "device": torch.device("cpu"), "epochs": 1}
    found = []
    for _ in range(2):
        storage.asked.clear()
        with AudioStream(clips, SPEC, cache_folder=tmp_path / "cache", **settings) as stream:
            found.append(torch.cat([batch.fbank for batch in stream]))
    assert torch.equal(*found) and storage.asked["range"] == 0


def test_a_failing_request_is_made_again(source: Path, storage: Storage) -> None:
    prepared(source, "memory://bucket/out")
    clips = read_manifest("memory://bucket/out").paths
    settings: dict[str, Any] = {"batch_size": 4, "device": torch.device("cpu"), "epochs": 1}
    storage.fails = 2
    with AudioStream(clips, SPEC, num_threads=1, **settings) as stream:
        assert bool(next(stream).valid.all()) and not stream.rejected


def test_storage_that_fails_for_seconds(
    source: Path, storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    """Every clip is read all the same, in its place; the log says what happens."""
    prepared(source, "memory://bucket/out")
    clips = read_manifest("memory://bucket/out").paths
    settings: dict[str, Any] = {"batch_size": 4, "device": torch.device("cpu"), "epochs": 1}
    with AudioStream(clips, SPEC, **settings) as stream:
        expected = [batch.fbank for batch in stream]
    storage.fails = 10**6
    threading.Timer(3.0, lambda: setattr(storage, "fails", 0)).start()
    with AudioStream(clips, SPEC, **settings) as stream:
        batches = list(stream)
        assert not stream.rejected
    assert all(torch.equal(a, b.fbank) for a, b in zip(expected, batches, strict=True))
    said = [record.message for record in caplog.records]
    assert sum("storage fails: trying again for 300 s" in text for text in said) == 1
    assert sum("storage works again after" in text for text in said) == 1


def test_storage_that_fails_for_too_long(source: Path, storage: Storage) -> None:
    """The stream ends with an error of its own, whatever share of bad clips is allowed."""
    prepared(source, "memory://bucket/out")
    clips = read_manifest("memory://bucket/out").paths
    settings: dict[str, Any] = {"batch_size": 4, "device": torch.device("cpu"), "epochs": 1}
    storage.fails = 10**6
    with AudioStream(clips, SPEC, retry_s=0.5, max_rejected=1.0, **settings) as stream:
        with pytest.raises(StorageError, match=r"00000\.tar.*503 slow down: storage has failed"):
            next(stream)
        assert not stream.rejected
    begin = time.monotonic()
    with AudioStream(clips, SPEC, **settings) as stream:
        threading.Timer(0.5, stream._source.close).start()  # waiting threads end at once
        with pytest.raises(StorageError):
            next(stream)
    assert time.monotonic() - begin < 5


class Refusing(Exception):
    """As of aiohttp."""

    status = 403


def test_refused_requests_are_not_repeated() -> None:
    def refuse() -> None:
        raise Refusing("Forbidden")

    with pytest.raises(OSError, match="Refusing: Forbidden") as caught:
        as_os_error(refuse, "https://a/b")
    assert caught.value.errno not in TRANSIENT
    Refusing.status = 503
    with pytest.raises(OSError) as caught:
        as_os_error(refuse, "https://a/b")
    assert caught.value.errno in TRANSIENT


def test_a_shard_that_changed_is_named(source: Path) -> None:
    prepared(source, "memory://bucket/out")
    clips = read_manifest("memory://bucket/out").paths
    clip = clips[len(clips) - 1]
    assert isinstance(clip, ShardClip) and is_url(clip.path)
    name, data = str(clip), MemoryFileSystem().cat_file(as_path(clip.path).path)  # type: ignore[attr-defined]
    assert clip.read() == data[clip.offset : clip.offset + clip.size]
    assert read_range(clip.path, 0, 8) == data[:8]
    as_path(clip.path).write_bytes(data[: clip.offset + 100])
    with pytest.raises(DataError, match="the shard is truncated"):
        clip.read()
    as_path(clip.path).write_bytes(bytes(len(data)))
    with pytest.raises(DataError, match="the shard was overwritten"):
        clip.read()
    assert str(clip) == name
    as_path(clip.path).unlink()
    with pytest.raises(FileNotFoundError):
        clip.read()


def test_check_and_stats_of_a_url(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands themselves, in this process: memory is not shared with another one."""
    out = "memory://bucket/out"
    settings = ["--clip-s", "0.5", "--shard-mib", "0.05"]
    assert main(["data", "prepare", str(source), out, *settings]) == 0
    assert f"{out}: " in capsys.readouterr().out
    assert main(["data", "check", out]) == 0
    assert " 0 problems" in capsys.readouterr().out
    assert main(["data", "stats", out, "--num-frames", "40"]) == 0
    assert "audio.mean=" in capsys.readouterr().out
    shard = as_path(f"{out}/shards/00001.tar")
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(bytes(data))
    (problem,) = {p.where.split(": ")[0] for p in check_data(as_path(out), progress=False).problems}
    assert problem == f"{out}/shards/00001.tar"


def test_file_urls_are_paths(source: Path, tmp_path: Path) -> None:
    prepared(f"file://{source}", f"file://{tmp_path}/out")
    assert contents(tmp_path / "out")["report.json"]
    assert (
        len(read_manifest(f"file://{tmp_path}/out"))
        == json.loads((tmp_path / "out/report.json").read_text())["clips"]
    )


def test_what_is_not_there_is_said(source: Path, tmp_path: Path) -> None:
    write_manifest(tmp_path / "m.json", [source / "0.wav"])
    MemoryFileSystem().put(str(tmp_path / "m.json"), "/m.json")
    for place, message in (
        ("memory://m.json", "not there, or no prepared shards"),
        ("memory://nothing", "not there, or no prepared shards"),
        ("nonsense://a/b", "Unsupported filesystem: 'nonsense'"),
    ):
        with pytest.raises(DataError, match=message):
            read_manifest(place)
    if shutil.which("s3fs") is None and not Path(np.__file__).parents[1].joinpath("s3fs").exists():
        with pytest.raises(DataError, match="Install s3fs to access S3"):
            read_manifest("s3://bucket/out")
