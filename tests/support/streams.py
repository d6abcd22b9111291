"""Streams of a few clips, and their batches."""

from pathlib import Path
from typing import Any

import torch

from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.stream.batch import Batch
from ssast.pipelines.stream.stream import AudioStream

CPU = torch.device("cpu")
SPEC = FbankSpec(num_frames=60, n_mels=32)
FIELDS = ("fbank", "num_frames", "clip_ids", "epochs", "valid")


def open_stream(paths: list[Path], **settings: Any) -> AudioStream:
    return AudioStream(paths, **{"spec": SPEC, "batch_size": 4, "device": CPU} | settings)


def take(paths: list[Path], count: int, **settings: Any) -> list[Batch]:
    with open_stream(paths, **settings) as stream:
        return [next(stream) for _ in range(count)]


def rows(batches: list[Batch]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([getattr(batch, name) for batch in batches]) for name in FIELDS}


def same(a: list[Batch], b: list[Batch]) -> bool:
    first, second = rows(a), rows(b)
    return all(torch.equal(first[name], second[name]) for name in FIELDS)


def torn(path: Path) -> Path:
    """Damage a FLAC file in its middle: it looks well until it is decoded."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 400] = bytes(range(100)) * 4
    path.write_bytes(data)
    return path
