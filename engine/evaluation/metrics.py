"""Metrics of a classifier, computed by scikit-learn."""

import math
import warnings
from statistics import NormalDist

import numpy as np
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    roc_auc_score,
    roc_curve,
    top_k_accuracy_score,
)

from ssast.engine.errors import ConfigError
from ssast.engine.evaluation.probabilities import chosen_classes, probabilities
from ssast.engine.registry import METRICS
from ssast.pipelines.text import one_line

TOP = 5
COUNTS = ("num_scored", "num_clips")  # beside the metrics of a split
TARGET_PRIOR = 0.01  # of the detection cost: how often it is the claimed class, as NIST has it


def classification_metrics(
    logits: np.ndarray, targets: np.ndarray, loss: str, own: str = "auto"
) -> dict[str, float]:
    """Compute the metrics of a set of clips.

    Args:
        logits: [n, C] logits.
        targets: [n, C], 1 for the classes of a clip, else 0.
        loss: ``ce`` or ``bce``, which the model was trained with: clips are ranked by their
            probabilities, and classes are chosen for F1, as that loss has it.
        own: As ``finetune.metric``; a metric of another package is added under its name.

    Returns:
        ``map`` (mean average precision), ``mauc`` (mean area under the ROC curve), ``dprime``
        (sqrt(2) times the normal quantile of it) over the classes that some clip has and some has
        not; ``macro_f1`` over the classes that some clip has; and where each clip has one class,
        ``accuracy``, ``top5`` of more than five classes, and ``eer`` and ``min_dcf`` of the trials
        that each clip makes with each class. A score that the clips do not define is left out.

    Raises:
        ConfigError: The metric ``own`` cannot be imported, or fails.
    """
    count, num_classes = logits.shape
    if not count:
        return {}
    scores: dict[str, float] = {}
    present = targets.any(0)
    single = bool((targets.sum(1) == 1).all())
    if single:
        truth, named = targets.argmax(1), logits.argmax(1)
        scores["accuracy"] = float(accuracy_score(truth, named))
        if num_classes > TOP:
            scores["top5"] = float(
                top_k_accuracy_score(truth, logits, k=TOP, labels=np.arange(num_classes))
            )
    mixed = present & ~targets.all(0)
    if mixed.any():
        ranked = probabilities(logits, loss)
        if single:
            scores |= verification_metrics(ranked.ravel(), targets.ravel())
        per_class = class_metrics(ranked, targets)
        scores["map"] = float(np.nanmean(per_class["average_precision"]))
        scores["mauc"] = float(np.nanmean(per_class["auc"]))
        scores["dprime"] = math.sqrt(2) * NormalDist().inv_cdf(
            min(max(scores["mauc"], 1e-12), 1 - 1e-12)
        )
    if present.any():
        scores["macro_f1"] = float(_f1(targets, chosen_classes(logits, loss))[present].mean())
    return scores | _own_metric(own, logits, targets)


def _f1(targets: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Compute the F1 of each class, [C], of [n, C]; 0 where no clip has it or is given it."""
    targets, chosen = targets.astype(bool), chosen.astype(bool)
    both = targets.sum(0) + chosen.sum(0)
    return 2 * (targets & chosen).sum(0) / np.maximum(both, 1)


def _own_metric(name: str, logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Return what a metric of another package gives, by its name; nothing of a name of ours.

    Nothing either where it is not finite, as the share of what is predicted before anything is.
    """
    if METRICS.is_built_in(name):
        return {}
    metric = METRICS.load(name)
    try:
        value = float(metric(logits, targets))
    except Exception as error:  # whatever another package's code raises
        raise ConfigError(
            f"finetune.metric {name!r}: {type(error).__name__}: {one_line(error)}"
        ) from error
    return {name: value} if math.isfinite(value) else {}


def clip_counts(read: np.ndarray) -> dict[str, float]:
    """Return how many clips of how many the metrics are of, from which could be read, [n] bool."""
    return dict(zip(COUNTS, (int(read.sum()), len(read)), strict=True))


def verification_metrics(scores: np.ndarray, same: np.ndarray) -> dict[str, float]:
    """Compute the metrics of a verification, as of speakers.

    Args:
        scores: [n] score of each trial, the higher the likelier that the claim is true.
        same: [n], 1 where the claim is true, else 0; some of both.

    Returns:
        ``eer``, where as many true claims are refused as false ones are accepted (as shares, on
        straight lines between thresholds); ``min_dcf``, the least cost P_miss p + P_false (1 - p)
        of a threshold with p = 0.01, as a multiple of that of refusing all (NIST SRE 2008, with
        equal costs).
    """
    false, hit, _ = roc_curve(same, scores)
    miss = 1 - hit
    cost = TARGET_PRIOR * miss + (1 - TARGET_PRIOR) * false
    return {
        "eer": float(np.interp(0.0, false - miss, false)),
        "min_dcf": float(cost.min() / TARGET_PRIOR),
    }


def class_metrics(scores: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """Compute average precision and area under the ROC curve of each class, [C].

    NaN for classes that all clips have, or none.
    """
    found = {name: np.full(scores.shape[1], np.nan) for name in ("average_precision", "auc")}
    for number in range(scores.shape[1]):
        truth = targets[:, number]
        if truth.any() and not truth.all():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found["average_precision"][number] = average_precision_score(
                    truth, scores[:, number]
                )
                found["auc"][number] = roc_auc_score(truth, scores[:, number])
    return found
