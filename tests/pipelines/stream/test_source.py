"""Reading ahead: stateless in position, never raising, nothing left behind."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sounds import bad_files, write_clips

from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.audio.encoded import silence
from ssast.pipelines.clips.order import clips_at
from ssast.pipelines.stream import source
from ssast.pipelines.stream.source import ClipSource

SPEC = FbankSpec(num_frames=200)


def at(iteration: int) -> SimpleNamespace:
    return SimpleNamespace(iteration=iteration)


def labels_of(clips: ClipSource, iteration: int) -> list[list[int]]:
    return [label.tolist() for label in clips(at(iteration))[1]]


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return write_clips(tmp_path, 10, samples=5000)


def test_files_arrive_in_order(paths: list[Path]) -> None:
    clips = ClipSource(paths, SPEC, batch_size=4, seed=5)
    for iteration in range(6):
        encoded, labels = clips(at(iteration))
        ids, epochs = clips_at(np.arange(4 * iteration, 4 * iteration + 4), 10, 5)
        assert [data.tobytes() for data in encoded] == [paths[i].read_bytes() for i in ids]
        assert [label.tolist() for label in labels] == [
            [i, epoch, 1] for i, epoch in zip(ids, epochs, strict=True)
        ]
        assert all(label.dtype == np.int64 for label in labels)
    clips.close()


@pytest.mark.parametrize("read_ahead", [0, 1, 5])
def test_any_iteration_any_time(paths: list[Path], read_ahead: int) -> None:
    straight = ClipSource(paths, SPEC, batch_size=3, read_ahead=read_ahead)
    jumping = ClipSource(paths, SPEC, batch_size=3, read_ahead=read_ahead)
    expected = [labels_of(straight, k) for k in range(8)]
    for k in (7, 0, 3, 4, 3, 2):
        assert labels_of(jumping, k) == expected[k]
    jumping.restart(6)
    assert [labels_of(jumping, k) for k in range(3)] == expected[2:5]
    straight.close()
    jumping.close()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_finite_stream_is_filled_up(paths: list[Path], world_size: int) -> None:
    seen = []
    for rank in range(world_size):
        clips = ClipSource(paths, SPEC, batch_size=4, rank=rank, world_size=world_size, epochs=1)
        for iteration in range(-(-10 // (4 * world_size))):
            encoded, labels = clips(at(iteration))
            _, _, present = clips.clips(iteration)
            seen += [label.tolist() for label in labels if label[2]]
            for data, label, here in zip(encoded, labels, present, strict=True):
                assert bool(label[2]) == bool(here)
                assert 0 <= label[0] < 10
                assert here or data.tobytes() == silence(SPEC).tobytes()
        assert not clips.reasons
        clips.close()
    assert sorted(seen) == [[k, 0, 1] for k in range(10)]


def test_bad_files_become_silence(paths: list[Path], tmp_path: Path) -> None:
    bad = bad_files(tmp_path)
    everything = [*paths, *bad]
    clips = ClipSource(everything, SPEC, batch_size=len(everything), epochs=1)
    clips.verify_all()
    encoded, labels = clips(at(0))
    assert [int(label[2]) for label in labels] == [1] * len(paths) + [0] * len(bad)
    assert sorted(clips.reasons) == list(range(len(paths), len(everything)))
    assert {data.tobytes() for data in encoded[len(paths) :]} == {silence(SPEC).tobytes()}
    clips.close()


def test_a_rejected_clip_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    real = source.read_clip

    def counted(path: Path, spec: FbankSpec, **settings: Any) -> np.ndarray:
        reads.append(path)
        return real(path, spec, **settings)

    monkeypatch.setattr(source, "read_clip", counted)
    clips = ClipSource([tmp_path / "missing.wav"], SPEC, batch_size=1, read_ahead=0)
    for iteration in range(5):
        assert labels_of(clips, iteration) == [[0, iteration, 0]]
    assert len(reads) == 1
    clips.close()


def test_close_ends_the_threads(paths: list[Path]) -> None:
    before = threading.active_count()
    clips = ClipSource(paths, SPEC, batch_size=4, num_threads=5)
    clips(at(0))
    assert threading.active_count() > before
    clips.close()
    assert threading.active_count() == before
