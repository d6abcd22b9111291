"""Probe an encoder by layer: a linear head on each, and on their learned weighted sum.

The strength of the regularisation and the best layer are chosen by cross-validation over the
recordings of the training clips; the evaluation clips only score the choice.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ssast.engine.evaluation.features import Level, embed_encoder
from ssast.engine.evaluation.precision import autocast_in
from ssast.engine.evaluation.predict import BATCH, default_device, one_pass
from ssast.engine.evaluation.probe import UNTRAINED, probed_encoders, write_rows
from ssast.engine.evaluation.probe_head import Features, Pooling, fit_head
from ssast.engine.evaluation.probe_tasks import (
    check_classes,
    read_tasks,
    readable_clips,
    recording_folds,
)
from ssast.engine.evaluation.progress import with_progress
from ssast.engine.formats.open import LoadedModel
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.settings import Audio, Precision
from ssast.kernels.matmul import fast_matmul
from ssast.pipelines.clips.columns import PLAIN, TableFormat
from ssast.pipelines.clips.holdout import assign_folds
from ssast.pipelines.clips.shards import ClipPath, ClipPaths
from ssast.pipelines.errors import DataError

STRENGTHS = (0.1, 1.0, 10.0)
"""Inverse regularisation strengths to choose from, C of scikit-learn; of equal ones the first."""

INNER_FOLDS = 3
MAX_GIB = 4.0  # of features in memory; training takes as much again
NUM_RESAMPLES = 1000
REPORTS = "probe_layers.json"
WEIGHTED = "weighted"

Interval = tuple[float, float] | None
"""A 95 % bootstrap interval over recordings; None where there is one recording alone."""


@dataclass(frozen=True)
class LayerScore:
    """Scores of a head on a layer."""

    layer: str
    """Number of the layer, 0 for the patch embedding; or ``weighted``, the sum of all layers."""

    pooling: Pooling
    inner: float
    """Accuracy on held-out recordings of the training clips, by which C and the layer are chosen;
    it is the best of several, and so a little too high."""

    accuracy: float
    """Accuracy on the evaluation clips."""

    interval: Interval
    c: tuple[float, ...]
    """Chosen C of each fold; of one where there are evaluation clips."""

    layer_weights: tuple[float, ...]
    """Weights of the layers in the weighted sum, the mean over folds."""


@dataclass(frozen=True)
class LayerReport:
    """Scores of all layers of an encoder on a task."""

    task: str
    weights: str
    num_classes: int
    num_train: int
    num_eval: int
    scores: tuple[LayerScore, ...]
    best: str
    """Layer with the best inner accuracy."""

    best_pooling: Pooling
    best_accuracy: float
    """Accuracy on the evaluation clips of what was chosen by inner accuracy: in each fold anew,
    where there are folds."""

    best_interval: Interval
    gain: float
    """Its accuracy less that of the last layer with mean pooling."""

    gain_interval: Interval


@fast_matmul()
@torch.no_grad()
def all_layers(
    encoder: SpectrogramTransformer,
    paths: ClipPaths,
    audio: Audio,
    device: torch.device,
    *,
    columns: bool,
    progress: bool = False,
    precision: Precision = "fp32",
) -> Features:
    """Compute the features of all layers of clips in one pass; the count of unreadable ones is 0.

    Args:
        encoder: The encoder.
        paths: The n clips.
        audio: Settings of the encoder's input.
        device: Device of the encoder.
        columns: Keep each column of patches, not their mean alone.
        progress: Show a progress bar on stderr, if that is a terminal.
        precision: Precision of matmuls and attention; features are float32.

    Raises:
        DataError: They take more than :data:`MAX_GIB` of memory.
    """
    encoder = encoder.to(device)
    width = encoder.embed.grid[1] if columns else 1
    shape = (len(paths), len(encoder.blocks) + 1, width, encoder.embed_dim)
    gib = 4 * float(np.prod(shape)) / 2**30
    if gib > MAX_GIB:
        raise DataError(
            f"features of all layers of {len(paths)} clips take {gib:.1f} GiB, expected at most "
            f"{MAX_GIB:g}: give fewer clips" + (", or leave out --attentive" if columns else "")
        )
    found, counts = np.zeros(shape, np.float32), np.zeros(len(paths), np.int64)
    with (
        autocast_in(precision, device),
        one_pass(paths, audio, device, batch_size=BATCH) as batches,
    ):
        for batch in with_progress(batches, len(paths), "encode", progress):
            level: Level = "frame" if columns else "clip"
            vectors, held = embed_encoder(encoder, batch.fbank, batch.num_frames, level, "all")
            rows, valid = batch.clip_ids.cpu().numpy(), batch.valid.cpu().numpy()
            values = vectors.nan_to_num(0).cpu().numpy()
            found[rows[valid]] = (values if columns else values[:, :, None])[valid]
            counts[rows[valid]] = held.cpu().numpy()[valid] if columns else 1
    return Features(found, counts)


def probe_layers(
    loaded: LoadedModel,
    tasks: Mapping[str, tuple[Path, Path | None]],
    poolings: Sequence[Pooling] = ("mean",),
    max_rejected: float | None = None,
    table: TableFormat = PLAIN,
    progress: bool = True,
    precision: Precision = "fp32",
    untrained: bool = True,
) -> Iterator[LayerReport]:
    """Score each layer of the encoder of any model, and of an untrained one like it.

    Args:
        loaded: Any model; a head is ignored.
        tasks: See :func:`~ssast.engine.evaluation.probe.probe`.
        poolings: Poolings to score.
        max_rejected: See :func:`~ssast.engine.evaluation.probe.probe_model`.
        table: What is set of the format of the manifests.
        progress: Show a progress bar on stderr, if that is a terminal.
        precision: Precision of matmuls and attention; features are float32.
        untrained: Score the untrained encoder as well.

    Yields:
        A report for each encoder and task.

    Raises:
        DataError: See :func:`~ssast.engine.evaluation.probe.probe`; or :func:`all_layers`.
    """
    share = loaded.config.data.max_rejected if max_rejected is None else max_rejected
    labels, paths = read_tasks(tasks, table)
    for weights, encoder in probed_encoders(loaded).items():
        if weights == UNTRAINED and not untrained:
            continue
        device, columns = default_device(), "attentive" in poolings
        features = all_layers(
            encoder,
            paths,
            loaded.audio,
            device,
            columns=columns,
            progress=progress,
            precision=precision,
        )
        row_of: dict[ClipPath, int] = {
            path: row for row, path in enumerate(paths) if features.counts[row]
        }
        for task, (train, *rest) in labels.items():
            clips, y, recordings = readable_clips(train, row_of, tasks[task][0], share)
            rows = np.array([row_of[clip] for clip in clips])
            if rest:
                check_classes(y, tasks[task][0])
                clips, y_eval, of_eval = readable_clips(
                    rest[0], row_of, tasks[task][1] or "", share
                )
                splits = [(np.arange(len(y)), np.arange(len(y), len(y) + len(clips)))]
                rows = np.concatenate([rows, [row_of[clip] for clip in clips]])
                y = np.concatenate([y, y_eval])
                # Those of two manifests are numbered apart.
                recordings = np.concatenate([recordings, of_eval + recordings.max() + 1])
            else:
                splits = recording_folds(y, recordings, tasks[task][0])
            yield score_layers(
                features.take(rows), y, recordings, splits, poolings, task=task, weights=weights
            )


def score_layers(
    features: Features,
    y: np.ndarray,
    recordings: np.ndarray,
    splits: list[tuple[np.ndarray, np.ndarray]],
    poolings: Sequence[Pooling] = ("mean",),
    *,
    task: str = "",
    weights: str = "",
) -> LayerReport:
    """Score a linear head on each layer, and on their weighted sum.

    Args:
        features: Features of n clips.
        y: [n] labels.
        recordings: [n] recording of each clip.
        splits: Rows to train on and to evaluate on, of each fold; all rows of the latter differ.
        poolings: Poolings to score.
        task: Name of the task, for the report.
        weights: Name of the encoder's weights, for the report.

    Raises:
        DataError: The clips to train on are of one recording.
    """
    depth = features.values.shape[1] - 1
    layers = [*map(str, range(depth + 1)), WEIGHTED]
    last: tuple[str, Pooling] = (str(depth), "mean")
    # The last layer first: where others are as good, it is what is taken.
    kinds = [(layer, pooling) for pooling in poolings for layer in (layers[-2], *layers)]
    kinds = list(dict.fromkeys([last, *kinds]))
    held = np.concatenate([part for _, part in splits])
    chosen = np.zeros(len(y), bool)
    scores, inner, correct = [], [], []
    for layer, pooling in kinds:
        part = features if layer == WEIGHTED else features.layer(int(layer))
        part = part.mean() if pooling == "mean" else part
        results = [_score(part, y, recordings, *split, pooling) for split in splits]
        found = np.zeros(len(y), bool)
        for (_, rows), result in zip(splits, results, strict=True):
            found[rows] = result.correct
        inner.append([result.inner for result in results])
        correct.append(found)
        scores.append(
            LayerScore(
                layer,
                pooling,
                inner=float(np.mean(inner[-1])),
                accuracy=float(found[held].mean()),
                interval=bootstrap_interval(found[held], recordings[held]),
                c=tuple(result.c for result in results),
                layer_weights=tuple(np.mean([r.layer_weights for r in results], 0).tolist())
                if layer == WEIGHTED
                else (),
            )
        )
    for fold, (_, rows) in enumerate(splits):
        chosen[rows] = correct[int(np.argmax([values[fold] for values in inner]))][rows]
    gains = chosen[held].astype(float) - correct[0][held]
    best = scores[int(np.argmax([score.inner for score in scores]))]
    return LayerReport(
        task,
        weights,
        num_classes=len(np.unique(y)),
        num_train=len(splits[0][0]) if len(splits) == 1 else len(y),
        num_eval=len(held),
        scores=tuple(sorted(scores, key=lambda s: (s.pooling != "mean", layers.index(s.layer)))),
        best=best.layer,
        best_pooling=best.pooling,
        best_accuracy=float(chosen[held].mean()),
        best_interval=bootstrap_interval(chosen[held], recordings[held]),
        gain=float(gains.mean()),
        gain_interval=bootstrap_interval(gains, recordings[held]),
    )


@dataclass(frozen=True)
class _Result:
    inner: float
    c: float
    correct: np.ndarray
    layer_weights: tuple[float, ...]


def _score(
    features: Features,
    y: np.ndarray,
    recordings: np.ndarray,
    train: np.ndarray,
    held: np.ndarray,
    pooling: Pooling,
) -> _Result:
    """Choose C on folds of the training clips, train on all of them, and predict the others."""
    classes, targets = np.unique(y[train], return_inverse=True)
    fold = assign_folds(recordings[train], [(name,) for name in y[train]], INNER_FOLDS)
    parts = [(train[fold != k], targets[fold != k], train[fold == k]) for k in np.unique(fold)]
    if len(parts) < 2:
        raise DataError("the clips to train on are of one recording, expected two or more")
    rates = []
    for c in STRENGTHS:
        right = 0
        for rows, numbers, others in parts:
            head = fit_head(features.take(rows), numbers, len(classes), c, pooling)
            right += int((classes[head.predict(features.take(others))] == y[others]).sum())
        rates.append(right / len(train))
    c = STRENGTHS[int(np.argmax(rates))]
    head = fit_head(features.take(train), targets, len(classes), c, pooling)
    correct = classes[head.predict(features.take(held))] == y[held]
    return _Result(max(rates), c, correct, head.layer_weights)


def bootstrap_interval(values: np.ndarray, recordings: np.ndarray) -> Interval:
    """Return the 95 % interval of the mean of values [n], resampling whole recordings [n]."""
    _, groups = np.unique(recordings, return_inverse=True)
    sums, counts = np.bincount(groups, values.astype(float)), np.bincount(groups)
    if len(counts) < 2:
        return None
    random = np.random.default_rng(0)
    draws = random.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), NUM_RESAMPLES)
    low, high = np.percentile((draws @ sums) / (draws @ counts), [2.5, 97.5])
    return float(low), float(high)


def write_reports(reports: Sequence[LayerReport], path: Path) -> Path:
    """Write the reports as a JSON list, see :func:`~.probe.write_rows`, and return its path."""
    return write_rows([dataclasses.asdict(report) for report in reports], path)


def format_report(report: LayerReport) -> str:
    """Format a report as a table, one line for each layer, and what is best below it."""
    last = max(int(s.layer) for s in report.scores if s.layer != WEIGHTED)
    names = {"0": "0 (patch embedding)", str(last): f"{last} (last)", WEIGHTED: "weighted sum"}
    lines = [
        f"{report.task}, {report.weights}: {report.num_classes} classes, {report.num_train} "
        f"training and {report.num_eval} evaluation clips",
        f"  {'layer':20} {'pooling':10}{'inner':>8}{'accuracy':>10}  95 % interval",
    ]
    for s in report.scores:
        lines.append(
            f"  {names.get(s.layer, s.layer):20} {s.pooling:10}{s.inner:8.1%}{s.accuracy:10.1%}  "
            f"{_shown(s.interval)}"
        )
    lines.append(
        f"  best by inner folds: {names.get(report.best, report.best)}, {report.best_pooling} "
        f"pooling: {report.best_accuracy:.1%} [{_shown(report.best_interval)}], "
        f"{report.gain:+.1%} [{_shown(report.gain_interval, '+')}] over the last layer's mean"
    )
    return "\n".join(lines)


def _shown(interval: Interval, sign: str = "") -> str:
    if interval is None:
        return "one recording"
    return f"{interval[0]:{sign}.1%} to {interval[1]:{sign}.1%}"
