"""Evaluate a fine-tuned classifier on labelled clips."""

import logging
from pathlib import Path

import numpy as np

from ssast.engine.config import finetune_settings
from ssast.engine.data.labels import check_read, read_labelled
from ssast.engine.evaluation.metrics import classification_metrics, clip_counts
from ssast.engine.evaluation.predict import default_device, score_clips
from ssast.engine.formats.open import LoadedModel, as_classifier
from ssast.engine.registry import METRICS
from ssast.engine.settings import Precision
from ssast.pipelines.clips.columns import PLAIN, TableFormat
from ssast.pipelines.files import check_writable

NUM_LOGGED = 5  # reasons why clips could not be read

_log = logging.getLogger(__name__)


def evaluate(
    model: LoadedModel | str | Path,
    manifest: str | Path,
    out: str | Path | None = None,
    max_rejected: float | None = None,
    *,
    precision: Precision = "fp32",
    table: TableFormat = PLAIN,
    progress: bool = True,
) -> dict[str, float]:
    """Compute the metrics of a classifier on the clips of a manifest.

    Args:
        model: A fine-tuned classifier, or the path of one.
        manifest: Manifest with labels.
        out: Folder for predictions and figures; none are written if None.
        max_rejected: Largest share of clips that may be unreadable; ``data.max_rejected`` of the
            model's run if None. They are left out of the metrics, and logged.
        precision: Precision of matmuls and attention; logits are float32.
        table: What is set of the format of a manifest.
        progress: Show a progress bar on stderr, if that is a terminal.

    Returns:
        See :func:`~ssast.engine.evaluation.metrics.classification_metrics`; and ``num_scored`` of
        ``num_clips``.

    Raises:
        CheckpointError: There is no classifier at the path.
        ConfigError: A published file, which lacks metadata: open it with
            :func:`~ssast.engine.formats.open.open_classifier`.
        DataError: The manifest is wrong, has labels the classifier does not know, or too many
            of its clips cannot be read; or ``out`` cannot be written to.
    """
    loaded = as_classifier(model)
    clips = read_labelled(str(manifest), loaded.classes, one_label=loaded.loss == "ce", table=table)
    if out is not None:
        check_writable(out)
    logits, reasons = score_clips(loaded, clips.paths, default_device(), progress, precision)
    read = np.array([row not in reasons for row in range(len(clips))])
    share = loaded.config.data.max_rejected if max_rejected is None else max_rejected
    check_read(str(manifest), clips.paths, read, share)
    for row, reason in list(reasons.items())[:NUM_LOGGED]:
        _log.warning("%s cannot be read: %s", clips.paths[row], reason)
    own = finetune_settings(loaded.config).metric
    if own not in METRICS.names():
        _log.warning("finetune.metric %s is left out: its package is not installed", own)
        own = "auto"
    values = classification_metrics(logits[read], clips.targets()[read], loaded.loss, own)
    if out is not None:
        from ssast.engine.evaluation.report import write_split  # matplotlib takes a second

        write_split(Path(out), clips, logits, read, values, loaded.loss)
    return clip_counts(read) | values
