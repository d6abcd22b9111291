"""Filterbanks in memory that processes share: whole ones or none, and nothing left behind."""

import errno
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ssast.kernels.fbank import FbankSpec, num_frames
from ssast.pipelines.clips.order import Weights
from ssast.pipelines.stream.cache import MemoryCache, cached_clips, clip_bytes

SPEC = FbankSpec(num_frames=60, n_mels=32)
SAMPLES = [16000, 400, 9000, 5000]  # one clip is cut, the others are padded


def sounds(seed: int = 0) -> Tensor:
    """Filterbanks of clips of these lengths."""
    features = torch.randn(4, 60, 32, generator=torch.Generator().manual_seed(seed))
    for row, samples in zip(features, SAMPLES, strict=True):
        row[num_frames(samples, SPEC) :] = 0
    return features


def test_what_is_put_comes_back() -> None:
    cache = MemoryCache(10, SPEC, 1 << 30)
    assert not any(map(cache.ready, range(10)))
    features = sounds()
    cache.put([7, 0, 9, 3], features, SAMPLES)
    cache.put([7, 0], sounds(1)[:2], [1, 1])  # they are there already
    assert [row for row in range(10) if cache.ready(row)] == [0, 3, 7, 9]
    found, lengths = cache.get([3, 7, 7, 9, 0])
    assert torch.equal(found, features[[3, 0, 0, 2, 1]])
    assert lengths == [SAMPLES[row] for row in (3, 0, 0, 2, 1)]
    cache.close()


@pytest.mark.parametrize("room", [0, 1, 3, 6])
def test_clips_without_room_are_not_kept(room: int) -> None:
    """The first ones have it, or with weights the most frequent ones; nothing makes room."""
    limit = room * clip_bytes(SPEC) + clip_bytes(SPEC) - 1
    assert cached_clips(5, SPEC, limit) == min(room, 5)
    weights = Weights(np.array([0.0, 1, 4, 1, 5]))
    for given, order in ((None, [0, 1, 2, 3, 4]), (weights, [4, 2, 1, 3, 0])):
        cache = MemoryCache(5, SPEC, limit, weights=given)
        for clip in range(5):
            cache.put([clip], sounds(clip)[:1], SAMPLES[:1])
        kept = [clip for clip in range(5) if cache.ready(clip)]
        assert kept == sorted(order[:room])
        for clip in kept:
            assert torch.equal(cache.get([clip])[0], sounds(clip)[:1])
        assert os.stat(cache.path).st_size <= limit
        cache.close()


def test_short_clips_take_less_memory() -> None:
    spec = FbankSpec(num_frames=1024)
    cache = MemoryCache(100, spec, 100 * clip_bytes(spec))
    cache.put(list(range(100)), torch.zeros(100, 1024, 128), [16000] * 100)  # 1 of 10 s
    assert os.stat(cache.path).st_blocks * 512 < 0.15 * 100 * clip_bytes(spec)
    cache.close()


WRITER = """
import os, signal, sys, torch
from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.stream.cache import MemoryCache
spec = FbankSpec(num_frames=60, n_mels=32)
cache = MemoryCache(10, spec, 1 << 30, path=sys.argv[1] if len(sys.argv) > 1 else None)
cache.put([1], torch.ones(1, 60, 32), [16000])
print(cache.path, flush=True)
write, written = cache._write, []
def killed(data, offset):
    if written:  # the filterbank is there, its number is not
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(write(data, offset))
if sys.stdin.readline().strip() == "die":
    cache._write = killed
cache.put([2], torch.full((1, 60, 32), 2.0), [16000])
"""


def writer(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WRITER, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_killed_writer_leaves_whole_clips_alone() -> None:
    cache = MemoryCache(10, SPEC, 1 << 30)
    with writer(cache.path) as other:
        assert other.stdout is not None
        assert other.stdout.readline()
        assert cache.ready(1) and torch.equal(cache.get([1])[0], torch.ones(1, 60, 32))
        other.communicate("die\n", timeout=60)
    assert other.returncode == -signal.SIGKILL
    assert not cache.ready(2)
    cache.put([2], sounds()[:1], SAMPLES[:1])
    assert torch.equal(cache.get([2])[0], sounds()[:1])
    cache.close()


def in_shared_memory() -> set[str]:
    """List /dev/shm without what other tests make there at the same time."""
    return {n for n in os.listdir("/dev/shm") if not n.startswith(("sem.", "torch_", "tmp"))}


def test_memory_lives_as_long_as_a_process_that_has_it_open() -> None:
    """It survives the one that created it; after a kill of the last one nothing is left."""
    shared = in_shared_memory()
    with writer() as creator:
        assert creator.stdout is not None
        path = creator.stdout.readline().strip()
        cache = MemoryCache(10, SPEC, 1 << 30, path=path)
        creator.kill()
        creator.wait(60)
    assert not os.path.exists(path)
    assert cache.ready(1)
    cache.put([5], sounds()[:1], SAMPLES[:1])
    assert cache.ready(5)
    cache.close()
    assert in_shared_memory() <= shared
    with pytest.raises(FileNotFoundError):
        MemoryCache(10, SPEC, 1 << 30, path=path)


@pytest.mark.parametrize("how", ["error", "part"])
def test_without_memory_no_more_is_cached(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = MemoryCache(10, SPEC, 1 << 30)
    cache.put([0], sounds()[:1], SAMPLES[:1])

    def no_room(descriptor: int, data: bytes, offset: int) -> int:
        if how == "part":
            return 1
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(os, "pwrite", no_room)
    with caplog.at_level(logging.WARNING):
        for clip in (1, 2):
            cache.put([clip], sounds()[:1], SAMPLES[:1])
    monkeypatch.undo()
    assert [r.getMessage() for r in caplog.records] == [
        "Cannot allocate memory: no more filterbanks are cached in memory"
    ]
    cache.put([3], sounds()[:1], SAMPLES[:1])
    assert [row for row in range(10) if cache.ready(row)] == [0]
    cache.close()


def test_two_writers_of_one_clip(tmp_path: Path) -> None:
    """Both have found it missing: they write the same."""
    first = MemoryCache(4, SPEC, 1 << 30)
    second = MemoryCache(4, SPEC, 1 << 30, path=first.path)
    honest = first._write
    first._write = lambda data, offset: (second.put([2], sounds()[:1], SAMPLES[:1]),  # type: ignore[method-assign, assignment]
                                         honest(data, offset))[1]  # fmt: skip
    first.put([2], sounds()[:1], SAMPLES[:1])
    for cache in (first, second):
        found, lengths = cache.get([2])
        assert torch.equal(found, sounds()[:1]) and lengths == SAMPLES[:1]
        cache.close()
