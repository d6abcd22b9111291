"""Predict the classes of clips with a fine-tuned classifier."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from ssast.engine.data.clips import fbank_spec
from ssast.engine.evaluation.cut_clips import CutClips
from ssast.engine.evaluation.precision import autocast_in, class_logits
from ssast.engine.evaluation.probabilities import probabilities, top_classes
from ssast.engine.evaluation.progress import with_progress
from ssast.engine.formats.open import LoadedModel, as_classifier
from ssast.engine.settings import Audio, Precision
from ssast.kernels.matmul import fast_matmul
from ssast.pipelines.clips.columns import PLAIN, TableFormat
from ssast.pipelines.clips.manifest import holds_clips, read_clips
from ssast.pipelines.errors import DataError
from ssast.pipelines.stream.stream import AudioStream

BATCH = 32  # clips at a time outside of training, on a GPU
Module = TypeVar("Module", bound=nn.Module)
CPU_TOKENS = 4096  # at a time on a CPU: with more, what is between two layers leaves its caches


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of a clip.

    Attributes:
        path: Path of the clip.
        classes: (name, probability), the likeliest first; none if the clip could not be read.
        reason: Why it could not be read.
    """

    path: str
    classes: tuple[tuple[str, float], ...]
    reason: str | None = None


def predict(
    model: LoadedModel | str | Path,
    sources: str | Path | Sequence[str | Path],
    top: int = 5,
    *,
    precision: Precision = "fp32",
    table: TableFormat = PLAIN,
    progress: bool = True,
) -> list[Prediction]:
    """Predict the classes of files, of all files in folders, or of the clips of manifests.

    Classes are given their display names. Of a file longer than the model's input only the
    beginning is used; see :func:`~ssast.engine.evaluation.timeline.timelines` for the rest.

    Args:
        model: A fine-tuned classifier, or the path of one.
        sources: Audio files, folders, manifests.
        top: Number of classes for each clip.
        precision: Precision of matmuls and attention; probabilities are float32.
        table: What is set of the format of a manifest.
        progress: Show a progress bar on stderr, if that is a terminal.

    Raises:
        CheckpointError: There is no classifier at the path.
        ConfigError: A published file, which lacks metadata: open it with
            :func:`~ssast.engine.formats.open.open_classifier`.
        DataError: A folder or a manifest is wrong.
    """
    loaded = as_classifier(model)
    paths = find_files(sources, table)
    logits, reasons = score_clips(loaded, paths, default_device(), progress, precision)
    scores = probabilities(logits, loaded.loss)
    return [
        Prediction(str(path), (), reasons[row])
        if row in reasons
        else Prediction(str(path), tuple(top_classes(scores[row], loaded.names, top)))
        for row, path in enumerate(paths)
    ]


def default_device() -> torch.device:
    """Return the GPU of this process, the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_device(module: Module, device: torch.device) -> Module:
    """Move a module to a device for evaluation; it can be trained afterwards.

    Weights that move in inference mode could not be.
    """
    with torch.inference_mode(False):
        return module.to(device).eval()


def clips_at_once(loaded: LoadedModel, device: torch.device) -> int:
    """Return the number of clips of a batch that suits a model on a device."""
    if device.type != "cpu":
        return BATCH
    rows, columns = loaded.encoder.embed.grid
    return min(BATCH, max(1, CPU_TOKENS // (rows * columns)))


def find_files(sources: str | Path | Sequence[str | Path], table: TableFormat = PLAIN) -> list[Any]:
    """List the clips of sources: files as they are, folders and manifests by their clips.

    A folder may be a URL, if it was prepared. One source may stand alone.

    Raises:
        DataError: A folder or a manifest is wrong, or nothing is named.
    """
    paths: list[Any] = []
    for source in [sources] if isinstance(sources, str | Path) else sources:
        paths += read_clips(source, table) if holds_clips(source) else [str(source)]
    if not paths:
        raise DataError("no files: expected audio files, folders or manifests")
    return paths


def one_pass(
    paths: Sequence[Any],
    audio: Audio,
    device: torch.device,
    *,
    batch_size: int,
    on_reject: Callable[[int, str, str], None] | None = None,
) -> AudioStream:
    """Return a stream that reads each clip once, in order, however many cannot be read."""
    return AudioStream(
        paths,
        fbank_spec(audio),
        batch_size=min(batch_size, len(paths)),
        epochs=1,
        device=device,
        max_rejected=1.0,
        on_reject=on_reject,
    )


@fast_matmul()
@torch.inference_mode()
def score_clips(
    loaded: LoadedModel,
    paths: Sequence[Any],
    device: torch.device,
    progress: bool = False,
    precision: Precision = "fp32",
) -> tuple[np.ndarray, dict[int, str]]:
    """Compute the logits [n, C] of clips; warn of those that are longer than the input.

    Returns:
        Logits, 0 for clips that cannot be read, and the reasons for those, by row.
    """
    classifier = on_device(loaded.classifier, device)
    audio = loaded.audio
    logits = np.zeros((len(paths), loaded.num_classes))
    reasons: dict[int, str] = {}
    cut = CutClips(paths, audio)
    with (
        autocast_in(precision, device),
        one_pass(
            paths,
            audio,
            device,
            batch_size=clips_at_once(loaded, device),
            on_reject=lambda clip, path, reason: reasons.__setitem__(clip, reason),
        ) as batches,
    ):
        for batch in with_progress(batches, len(paths), "predict", progress):
            valid = batch.valid  # the last batch is filled up
            if valid.any():
                frames = batch.num_frames[valid] if audio.ignore_padding else None
                found = class_logits(classifier, batch.fbank[valid], frames)
                logits[batch.clip_ids[valid].cpu().numpy()] = found.double().cpu().numpy()
            cut.add(batch)
    cut.warn()
    return logits, reasons
