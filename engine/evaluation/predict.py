"""What a classifier makes of clips, in batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssast.engine.checkpoints.classifier import Trained
from ssast.engine.data.clips import fbank_spec
from ssast.kernels.matmul import fast_matmul
from ssast.pipelines.clips.manifest import read_manifest
from ssast.pipelines.clips.remote import located
from ssast.pipelines.errors import DataError
from ssast.pipelines.stream.stream import AudioStream

BATCH = 32  # clips at a time outside of training


@dataclass(frozen=True)
class Prediction:
    """What a classifier makes of a clip.

    Attributes:
        path: Of the clip.
        classes: (name, probability), the likeliest first; none if it could not be read.
        reason: Why it could not be read.
    """

    path: str
    classes: tuple[tuple[str, float], ...]
    reason: str | None = None


def find_files(sources: Sequence[str | Path]) -> list[Any]:
    """Files as they are; folders and manifests as the clips that they stand for.

    A folder may be a URL, if it was prepared.

    Raises:
        DataError: A folder or a manifest is wrong, or nothing is named.
    """
    paths: list[Any] = []
    for source in sources:
        place = located(source)
        if place.is_dir() or place.suffix.lower() in (".json", ".csv"):
            paths += list(read_manifest(place).paths)
        else:
            paths.append(str(source))
    if not paths:
        raise DataError("no files: expected audio files, folders or manifests")
    return paths


@fast_matmul()
@torch.inference_mode()
def score_clips(
    trained: Trained, paths: Sequence[Any], device: torch.device
) -> tuple[np.ndarray, dict[int, str]]:
    """Logits [n, C] of clips, 0 for those that cannot be read, and the reason why, by clip."""
    classifier = trained.classifier.to(device).eval()
    audio = trained.config.audio
    logits = np.zeros((len(paths), len(trained.classes)))
    reasons: dict[int, str] = {}
    size = min(BATCH, len(paths))
    start = 0
    while start < len(paths):
        with AudioStream(
            paths,
            fbank_spec(audio),
            batch_size=size,
            start=start,
            epochs=1,
            device=device,
            max_rejected=1.0,
            on_reject=lambda clip, path, reason: reasons.__setitem__(clip, reason),
        ) as batches:
            try:
                for batch in batches:
                    start += size
                    frames = batch.num_frames if audio.ignore_padding else None
                    found = classifier(batch.fbank, frames).double().cpu().numpy()
                    valid = batch.valid.cpu().numpy()
                    logits[batch.clip_ids.cpu().numpy()[valid]] = found[valid]
            except DataError:
                # A stream ends at a first batch without any sound; the next begins behind it.
                start += size
                if not reasons.keys() >= set(range(start - size, min(start, len(paths)))):
                    raise
    return logits, reasons
