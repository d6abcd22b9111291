"""Order, resumption, threads and settings of the stream."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sounds import tone, write, write_clips
from streams import CPU, FIELDS, open_stream, rows, same, take, torn

from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.clips.order import Weights, clips_at
from ssast.pipelines.errors import DataError
from ssast.pipelines.stream import source
from ssast.pipelines.stream.cache import MemoryCache, clip_bytes


@pytest.mark.parametrize("inside", [torch.inference_mode, torch.no_grad])
def test_a_stream_works_in_and_after_inference(paths: list[Path], inside: Any) -> None:
    expected = take(paths, 2)
    with inside():
        assert same(take(paths, 2), expected)
    assert same(take(paths, 2), expected)


def test_the_order_is_the_seeds(paths: list[Path]) -> None:
    batches = take(paths, 9, seed=3)
    ids, epochs = clips_at(np.arange(36), 14, 3)
    got = rows(batches)
    assert got["clip_ids"].tolist() == ids.tolist()
    assert got["epochs"].tolist() == epochs.tolist()
    assert got["valid"].all()


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    start=st.integers(0, 40),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 3),
)
def test_resume_anywhere_with_any_shape(
    paths: list[Path], start: int, batch_size: int, world_size: int
) -> None:
    """Ranks put back together give the one stream, bit for bit, from any position on."""
    count = 2 * batch_size * world_size
    with open_stream(paths, batch_size=1, start=start) as stream:
        whole = rows([next(stream) for _ in range(count)])
        assert stream.position == start + count
    for rank in range(world_size):
        part = rows(
            take(paths, 2, batch_size=batch_size, rank=rank, world_size=world_size, start=start)
        )
        mine = slice(rank, None, world_size)
        for name in FIELDS:
            assert torch.equal(part[name], whole[name][mine])


@pytest.mark.parametrize("fbank", ["torch", "dali"])
def test_resume_is_bit_identical(paths: list[Path], fbank: str) -> None:
    batches = take(paths, 10, fbank=fbank)
    with open_stream(paths, fbank=fbank) as stream:
        for _ in range(4):
            next(stream)
        position = stream.position
    assert position == 16
    assert same(take(paths, 6, fbank=fbank, start=position), batches[4:])


def test_batches_stay_as_they_are(paths: list[Path]) -> None:
    """A batch may be kept: no later one is written into its memory."""
    with open_stream(paths) as stream:
        kept = [next(stream) for _ in range(12)]
        copies = [batch.fbank.clone() for batch in kept]
        for _ in range(12):
            next(stream)
        assert all(torch.equal(b.fbank, c) for b, c in zip(kept, copies, strict=True))
    assert all(torch.equal(b.fbank, c) for b, c in zip(kept, copies, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("epochs", [1, 2])
def test_a_finite_pass_is_complete(paths: list[Path], world_size: int, epochs: int) -> None:
    seen = []
    for rank in range(world_size):
        with open_stream(paths, epochs=epochs, rank=rank, world_size=world_size) as stream:
            batches = list(stream)
            assert len(batches) == len(stream) == -(-14 * epochs // (4 * world_size))
            with pytest.raises(StopIteration):
                next(stream)
        got = rows(batches)
        assert got["valid"].sum() >= 14 * epochs // world_size
        assert (got["fbank"][~got["valid"]] == 0).all()
        assert (got["num_frames"][~got["valid"]] == 0).all()
        valid = got["valid"]
        pairs = zip(got["epochs"][valid].tolist(), got["clip_ids"][valid].tolist(), strict=True)
        seen += list(pairs)
    assert sorted(seen) == [(e, k) for e in range(epochs) for k in range(14)]


def test_a_finite_pass_from_its_middle_and_its_end(paths: list[Path]) -> None:
    with open_stream(paths, epochs=1, start=8) as stream:
        assert len(stream) == 2
        assert [b.clip_ids[b.valid].tolist() for b in stream] == [[8, 9, 10, 11], [12, 13]]
    with open_stream(paths, epochs=1, start=14) as stream:
        assert len(stream) == 0 and list(stream) == []


def test_an_endless_stream_has_no_length(paths: list[Path]) -> None:
    with open_stream(paths) as stream, pytest.raises(TypeError, match="endless"):
        len(stream)


def test_crops_and_weights_of_a_stream(tmp_path: Path) -> None:
    """Another part of a long recording in each epoch; the same after a resume, for any batches."""
    clips = write_clips(tmp_path, 6, samples=30000)
    settings = {"spec": FbankSpec(num_frames=40), "random_crop": True}
    got = rows(take(clips, 12, batch_size=3, **settings))
    by_clip = [got["fbank"][got["clip_ids"] == clip] for clip in range(6)]
    assert all(len(seen) == 6 and not torch.equal(seen[0], seen[1]) for seen in by_clip)
    again = rows(take(clips, 5, batch_size=6, start=6, **settings))
    assert torch.equal(again["fbank"], got["fbank"][6:36])
    weights = Weights(np.array([0.0, 1, 1, 1, 1, 2]))
    got = rows(take(clips, 12, batch_size=3, weights=weights, **settings))
    counts = torch.bincount(got["clip_ids"], minlength=6)
    assert counts.tolist() == [0, 6, 6, 6, 6, 12] and got["epochs"].tolist() == list(range(36))
    again = rows(take(clips, 5, batch_size=6, start=6, weights=weights, **settings))
    assert torch.equal(again["fbank"], got["fbank"][6:36])
    with pytest.raises(DataError, match="2 weights for 6 clips"):
        take(clips, 1, weights=Weights(np.ones(2)))


@pytest.mark.parametrize("fbank", ["torch", "dali"])
@pytest.mark.parametrize("kept", [0.4, 1.0])
def test_a_cache_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fbank: str, kept: float
) -> None:
    """All or some of the clips in memory; a bad one is not kept."""
    clips = [*write_clips(tmp_path, 10, samples=9000), tmp_path / "missing.wav"]
    reads: list[Path] = []
    real = source.read_clip

    def counted(path: Path, *args: Any, **settings: Any) -> Any:
        reads.append(path)
        return real(path, *args, **settings)

    monkeypatch.setattr(source, "read_clip", counted)
    spec = FbankSpec(num_frames=60)
    settings = {"spec": spec, "fbank": fbank, "max_rejected": 0.5, "batch_size": 4}
    without = take(clips, 22, **settings)  # 8 epochs
    every_time = len(reads)
    reads.clear()
    cache = MemoryCache(len(clips), spec, round(kept * 10 * clip_bytes(spec)))
    assert same(take(clips, 22, cache=cache, **settings), without)
    # Read ahead, a clip may be asked for before it is there; the others are read every time.
    assert len(reads) < (1 - 0.6 * kept) * every_time
    with pytest.raises(DataError, match="exclude each other"):
        take(clips, 1, cache=MemoryCache(11, spec, 1 << 30), random_crop=True)


def num_tasks(at_most: int = 0) -> int:
    """Threads of this process, those of libraries as well; the kernel forgets with a delay."""
    for _ in range(100):
        count = len(os.listdir("/proc/self/task"))
        if count <= at_most:
            break
        time.sleep(0.01)
    return count


@pytest.mark.parametrize("fbank", ["torch", "dali"])
@pytest.mark.parametrize("batches", [0, 1, 3])
def test_close_leaves_no_thread(paths: list[Path], fbank: str, batches: int) -> None:
    take(paths, 1, fbank=fbank)  # what libraries start once and keep
    threads, tasks = threading.active_count(), num_tasks()
    stream = open_stream(paths, fbank=fbank, num_threads=3)
    for _ in range(batches):
        next(stream)
    assert num_tasks() > tasks
    stream.close()
    stream.close()
    assert threading.active_count() == threads
    assert num_tasks(at_most=tasks) <= tasks
    with pytest.raises(StopIteration):
        next(stream)


def test_torch_keeps_its_threads(paths: list[Path]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with open_stream(paths) as stream:
            next(stream)
            assert torch.get_num_threads() == 3
            seen = []
            thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            assert seen == [3]
    finally:
        torch.set_num_threads(before)


PROGRAM = """
import sys, torch
from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.stream.stream import AudioStream
stream = AudioStream(sys.argv[1:], FbankSpec(), batch_size=2, device=torch.device("cpu"),
                     max_rejected=1.0)
for _ in range(4):
    batch = next(stream)
{end}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "status"), [("", 0), ("raise SystemExit(3)", 3), ("del stream", 0)]
)
def test_a_program_that_does_not_close_ends(
    paths: list[Path], tmp_path: Path, end: str, status: int
) -> None:
    """Without a hang, and without a word on stdout, a torn file and all."""
    clips = [*map(str, paths[:5]), str(torn(write(tmp_path / "a.flac", tone(9000))))]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(end=end), *clips],
        capture_output=True,
        timeout=120,
        text=True,
    )
    assert done.returncode == status, done.stderr
    assert done.stdout == "" and done.stderr == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paths": []}, "holds no clips"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"start": -1}, "start is -1"),
        ({"rank": 2, "world_size": 2}, "rank is 2"),
        ({"epochs": 0}, "epochs is 0"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"read_ahead": -1}, "read_ahead is -1"),
        ({"fbank": "numpy"}, "fbank is 'numpy'"),
    ],
)
def test_wrong_settings(paths: list[Path], change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_stream(**{"paths": paths, **change})


def test_a_batch_moves(paths: list[Path]) -> None:
    (batch,) = take(paths, 1)
    assert len(batch) == 4 and batch.to(CPU) is batch
    meta = batch.to(torch.device("meta"))
    assert all(getattr(meta, name).is_meta for name in FIELDS)


@pytest.mark.parametrize("fbank", ["auto", "dali", "torch"])
def test_every_device_gives_the_same_clips(
    device: torch.device, paths: list[Path], tmp_path: Path, fbank: str
) -> None:
    clips = [*paths, torn(write(tmp_path / "a.flac", tone(9000))), tmp_path / "missing.wav"]
    spec = FbankSpec()
    expected = rows(take(clips, 12, spec=spec, max_rejected=0.5))
    got = rows(take(clips, 12, spec=spec, device=device, fbank=fbank, max_rejected=0.5))
    for name in FIELDS:
        assert got[name].device == device
        if name != "fbank":
            assert torch.equal(got[name].cpu(), expected[name])
    torch.testing.assert_close(got["fbank"].cpu(), expected["fbank"], atol=5e-3, rtol=0)
