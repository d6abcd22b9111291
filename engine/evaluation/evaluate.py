"""Evaluate a fine-tuned classifier on labelled clips."""

from pathlib import Path

import numpy as np

from ssast.engine.data.labels import read_labelled
from ssast.engine.evaluation.metrics import classification_metrics
from ssast.engine.evaluation.predict import default_device, score_clips
from ssast.engine.formats.open import LoadedModel, as_classifier
from ssast.pipelines.errors import DataError


def evaluate(
    model: LoadedModel | str | Path, manifest: str | Path, out: Path | None = None
) -> dict[str, float]:
    """Compute the metrics of a classifier on the clips of a manifest.

    Args:
        model: A fine-tuned classifier, or the path of one.
        manifest: Manifest with labels.
        out: Folder for predictions and figures; none are written if None.

    Returns:
        See :func:`~ssast.engine.evaluation.metrics.classification_metrics`.

    Raises:
        CheckpointError: There is no classifier at the path.
        ConfigError: A published file, which lacks metadata: open it with
            :func:`~ssast.engine.formats.open.open_classifier`.
        DataError: The manifest is wrong, has labels the classifier does not know, or none of its
            clips can be read.
    """
    loaded = as_classifier(model)
    clips = read_labelled(str(manifest), loaded.classes, one_label=loaded.loss == "ce")
    logits, reasons = score_clips(loaded, clips.paths, default_device())
    read = np.array([row not in reasons for row in range(len(clips))])
    if not read.any():
        raise DataError(f"{manifest}: none of its {len(clips)} clips can be read")
    values = classification_metrics(logits[read], clips.targets()[read], loaded.loss)
    if out is not None:
        from ssast.engine.evaluation.report import write_split  # matplotlib takes a second

        write_split(out, clips, logits, read, values, loaded.loss)
    return values
