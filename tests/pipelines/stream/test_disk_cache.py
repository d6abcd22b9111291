"""Filterbanks on disk: the same numbers, never old ones, whatever happens to the folder."""

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from sounds import tone, write, write_clips

from ssast.engine.config import load_config
from ssast.engine.errors import ConfigError
from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.audio.convert import Recipe
from ssast.pipelines.clips.manifest import read_manifest
from ssast.pipelines.errors import DataError
from ssast.pipelines.prepare.pack import Packing, prepare_shards
from ssast.pipelines.stream import disk_cache, source
from ssast.pipelines.stream.batch import Batch
from ssast.pipelines.stream.disk_cache import DiskCache
from ssast.pipelines.stream.stream import AudioStream

SPEC = FbankSpec(num_frames=60)


@pytest.fixture
def clips(tmp_path: Path) -> list[Path]:
    """Ten, some shorter than 60 frames, and one that is not there."""
    (tmp_path / "in").mkdir()
    return [*write_clips(tmp_path / "in", 10, samples=11000), tmp_path / "in/missing.wav"]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The clips that were read, as they are."""
    found: list[Any] = []
    real = source.read_clip

    def counted(path: Any, *args: Any, **settings: Any) -> Any:
        found.append(path)
        return real(path, *args, **settings)

    monkeypatch.setattr(source, "read_clip", counted)
    return found


def take(paths: Any, count: int, **settings: Any) -> list[Batch]:
    given = {"spec": SPEC, "batch_size": 4, "max_rejected": 1.0, "device": torch.device("cpu")}
    with AudioStream(paths, **given | settings) as stream:
        return [next(stream) for _ in range(count)]


def same(a: list[Batch], b: list[Batch]) -> bool:
    names = ("fbank", "num_frames", "clip_ids", "epochs", "valid")
    return all(
        torch.equal(getattr(x, n), getattr(y, n)) for x, y in zip(a, b, strict=True) for n in names
    )


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("fbank", ["torch", "dali"])
def test_a_later_run_reads_nothing(
    clips: list[Path], tmp_path: Path, reads: list[Any], fbank: str
) -> None:
    without = take(clips, 11, fbank=fbank)  # 4 epochs
    cache = tmp_path / "cache"
    assert same(take(clips, 11, fbank=fbank, cache_folder=cache), without)
    assert len(files(cache)) == 10
    reads.clear()
    for settings in ({}, {"batch_size": 2, "num_threads": 3, "read_ahead": 0}):
        again = take(clips, 11, fbank=fbank, cache_folder=cache, **settings)
        if not settings:
            assert same(again, without)
    assert set(reads) == {clips[-1]}
    validation = take(clips, 3, fbank=fbank, cache_folder=cache, epochs=1)
    assert set(reads) == {clips[-1]} and same(validation, take(clips, 3, fbank=fbank, epochs=1))


def test_weighted_clips_that_come_twice_in_a_batch(clips: list[Path], tmp_path: Path) -> None:
    from ssast.pipelines.clips.order import Weights

    settings = {"weights": Weights([5, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1]), "batch_size": 8}
    without = take(clips, 12, **settings)
    for _ in range(2):
        assert same(take(clips, 12, cache_folder=tmp_path / "cache", **settings), without)


def test_what_has_changed_is_computed_again(
    clips: list[Path], tmp_path: Path, reads: list[Any]
) -> None:
    cache = tmp_path / "cache"
    take(clips, 9, cache_folder=cache)
    before = clips[3].stat()
    samples = tone(int(before.st_size / 2 - 22), seed=99)
    write(clips[3], samples, subtype="PCM_16")
    assert clips[3].stat().st_size == before.st_size and clips[3].suffix == ".wav"
    reads.clear()
    assert same(take(clips, 9, cache_folder=cache), take(clips, 9))
    reads.clear()
    for other in (FbankSpec(num_frames=61), FbankSpec(num_frames=60, n_mels=64)):
        assert same(take(clips, 3, spec=other, cache_folder=cache), take(clips, 3, spec=other))
    assert len(set(reads)) == 11
    reads.clear()
    take(clips, 3, fbank="dali", cache_folder=cache)
    assert len(set(reads)) == 11


def test_a_clip_that_changes_while_it_is_read_is_not_kept_as_the_new_one(tmp_path: Path) -> None:
    clip = write(tmp_path / "a.wav", tone(9000), subtype="PCM_16")
    cache = DiskCache(tmp_path / "cache", [clip], SPEC, "test")
    assert not cache.ready(0)
    write(clip, tone(9000, seed=1), subtype="PCM_16")  # after it was read, before it is computed
    assert not cache.ready(0)
    cache.put([0], torch.ones(1, 60, 128), [9000])
    assert not cache.ready(0)
    cache.put([0], torch.full((1, 60, 128), 2.0), [9000])
    assert cache.ready(0)
    features, lengths = cache.get([0])
    assert lengths == [9000] and features[0, 0, 0] == 2 and features[0, -1, 0] == 0


@pytest.mark.parametrize("kept", [0, 5, 11, 12, 1000, -1])
def test_a_torn_or_damaged_file_is_not_used(tmp_path: Path, clips: list[Path], kept: int) -> None:
    cache = tmp_path / "cache"
    without = take(clips, 9, cache_folder=cache)
    for path in files(cache):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data[:kept] if kept >= 0 else data)
    assert same(take(clips, 9, cache_folder=cache), without)
    assert all(len(path.read_bytes()) > 1000 for path in files(cache))  # mended


def test_shards(tmp_path: Path, clips: list[Path], reads: list[Any]) -> None:
    packing = Packing(Recipe(clip_s=0.3))
    settings: dict[str, Any] = {"progress": False, "log": lambda line: None}
    prepare_shards(clips[0].parent, tmp_path / "out", packing, **settings)
    index = read_manifest(tmp_path / "out").paths
    without = take(index, 12)
    cache = tmp_path / "cache"
    assert same(take(index, 12, cache_folder=cache), without)
    assert len(files(cache)) == len(index) > 10
    reads.clear()
    assert same(take(index, 12, cache_folder=cache), without) and not reads


@pytest.mark.parametrize("total", [20, 4000], ids=["small", "large"])
@pytest.mark.parametrize("free", [1.2, 0.9])
def test_room_that_stays_free(
    total: int, free: float, clips: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = {20: 1 << 30, 4000: 2 << 30}[total]  # 5% of 20 GiB
    usage = namedtuple("usage", "total used free")(total << 30, 0, int(free * needed))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    take(clips, 3, cache_folder=tmp_path / "cache")
    assert len(files(tmp_path / "cache")) == (10 if free > 1 else 0)


@pytest.mark.parametrize("how", ["almost full", "full", "gone"])
def test_training_goes_on_without_room(
    how: str,
    clips: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = tmp_path / "cache"
    without = take(clips, 6)
    usage = namedtuple("usage", "total used free")
    with AudioStream(
        clips, SPEC, batch_size=4, device=torch.device("cpu"), cache_folder=cache, max_rejected=1.0
    ) as stream:
        found = [next(stream)]
        kept = len(files(cache))
        if how == "almost full":
            monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(20 << 30, 0, 1 << 29))
        elif how == "gone":
            shutil.rmtree(cache)
        else:

            def no_room(path: Path, data: bytes, **settings: bool) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            monkeypatch.setattr(disk_cache, "write_atomically", no_room)
        with caplog.at_level(logging.WARNING):
            found += [next(stream) for _ in range(5)]
    assert same(found, without)
    assert kept > 0 and len(files(cache)) == (0 if how == "gone" else kept)
    (message,) = [r.getMessage() for r in caplog.records if r.name == disk_cache.__name__]
    reason = {"full": "No space left", "almost full": "less than 1.0 GiB", "gone": "No such"}
    assert reason[how] in message and "no more filterbanks are cached" in message


def test_two_ranks_and_another_run_at_once(clips: list[Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    found: dict[int, list[Batch]] = {}

    def run(number: int) -> None:
        rank = {"rank": number % 2, "world_size": 2} if number < 2 else {}
        found[number] = take(clips, 12, cache_folder=cache, **rank)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, batches in found.items():
        rank = {"rank": number % 2, "world_size": 2} if number < 2 else {}
        assert same(batches, take(clips, 12, **rank))
    assert len(files(cache)) == 10


PROGRAM = """
import sys, torch
from pathlib import Path
from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.stream.stream import AudioStream

with AudioStream(
    sorted(Path(sys.argv[1]).glob("*")), FbankSpec(num_frames=60), batch_size=4,
    device=torch.device("cpu"), cache_folder=sys.argv[2],
) as stream:
    for batch in stream:
        print(len(batch), flush=True)
"""


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_that_is_wrong(tmp_path: Path) -> None:
    folder, cache = tmp_path / "in", tmp_path / "cache"
    folder.mkdir()
    clips = write_clips(folder, 40, samples=11000)
    command = [sys.executable, "-c", PROGRAM, str(folder), str(cache)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None and [run.stdout.readline() for _ in range(3)]
        run.send_signal(signal.SIGKILL)
    assert 4 <= len(files(cache)) < 40
    for _ in range(2):
        assert same(take(clips, 20, cache_folder=cache), take(clips, 20))


def test_what_killed_runs_have_begun_is_removed(
    clips: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it may still be written; the entries stay."""
    cache, now = tmp_path / "cache", time.time()
    with monkeypatch.context() as killed:
        killed.setattr(os, "replace", lambda *names: None)
        killed.setattr(disk_cache.DiskCache, "_read", lambda *given: None)
        cache.mkdir()
        (cache / "probe").touch()
        take(clips, 3, cache_folder=cache)
    begun = [path for path in files(cache) if path.parent == cache]
    assert len(begun) >= 8 and all(path.name.startswith(".tmp-") for path in begun)
    take(clips, 3, cache_folder=cache)
    assert set(begun) <= set(files(cache))
    for path in begun[1:]:
        os.utime(path, (now - 7200, now - 7200))
    take(clips, 3, cache_folder=cache)
    assert [path for path in files(cache) if path.parent == cache] == begun[:1]
    assert len(files(cache)) == 11


def test_wrong_settings(tmp_path: Path, clips: list[Path]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: cannot be written to: File exists"):
        take(clips, 1, cache_folder=tmp_path / "file")
    for more in ("data.cache_gib=1", "data.random_crop=true"):
        with pytest.raises(ConfigError, match=r"data.cache_folder and .* exclude each other"):
            load_config("tiny_patch", ["data.cache_folder=/tmp/x", more])
    with pytest.raises(DataError, match="exclude each other"):
        take(clips, 1, cache_folder=tmp_path, random_crop=True)
