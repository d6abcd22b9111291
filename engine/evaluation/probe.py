"""Probe an encoder: simple classifiers on its frozen features.

A logistic regression and a k-nearest-neighbour vote, trained on the labelled clips of a task and
scored on its evaluation clips, for the pretrained encoder and for the same encoder with untrained
weights; and how well the angle between the features of two clips tells whether they have the same
label, as of speakers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ssast.engine.checkpoints.classifier import model_settings
from ssast.engine.config import Config
from ssast.engine.evaluation.metrics import verification_metrics
from ssast.engine.evaluation.precision import autocast_in
from ssast.engine.evaluation.predict import BATCH, default_device, one_pass
from ssast.engine.evaluation.probe_tasks import (
    check_classes,
    read_tasks,
    readable_clips,
    recording_folds,
)
from ssast.engine.evaluation.progress import with_progress
from ssast.engine.formats.open import LoadedModel
from ssast.engine.model.backbones import build_encoder
from ssast.engine.model.classifier import embed_clips
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.model.objective import PretrainingModel, build_objective
from ssast.engine.settings import Audio, Data, Precision
from ssast.kernels.matmul import fast_matmul
from ssast.pipelines.clips.columns import PLAIN, TableFormat
from ssast.pipelines.clips.shards import ClipPath, ClipPaths
from ssast.pipelines.errors import DataError
from ssast.pipelines.files import write_atomically
from ssast.pipelines.text import parse_json

SCORES = "probe.json"
UNTRAINED = "untrained"  # name of the fresh weights in scores
MAX_PAIRED = 2000  # clips whose pairs are looked at


@dataclass(frozen=True)
class Score:
    """Scores of an encoder on the evaluation clips of a task."""

    task: str
    weights: str
    linear: float
    knn: float
    chance: float
    """Accuracy of always predicting the most frequent class of the training clips."""

    eer: float
    """Equal error rate of deciding by the cosine of features whether two evaluation clips have the
    same label; NaN if there are no pairs of both kinds."""

    num_train: int
    """Training clips that could be read, of ``all_train``; likewise the evaluation clips."""

    all_train: int
    num_eval: int
    all_eval: int
    num_classes: int


def untrained_encoder(config: Config) -> SpectrogramTransformer:
    """Build an encoder with the weights that a run of this configuration begins from."""
    torch.manual_seed(config.train.seed)
    return build_objective(config).encoder.eval()


@fast_matmul()
@torch.no_grad()
def features(
    encoder: SpectrogramTransformer,
    paths: ClipPaths,
    audio: Audio,
    device: torch.device,
    progress: bool = False,
    precision: Precision = "fp32",
) -> dict[ClipPath, np.ndarray]:
    """Compute the mean of the valid patch tokens, [D], of each readable clip, by path."""
    encoder, found = encoder.to(device), {}
    with (
        autocast_in(precision, device),
        one_pass(paths, audio, device, batch_size=BATCH) as batches,
    ):
        for batch in with_progress(batches, len(paths), "encode", progress):
            pooled = embed_clips(encoder, batch.fbank, num_frames=batch.num_frames)
            vectors = pooled.double().cpu().numpy()
            for clip, vector, valid in zip(batch.clip_ids, vectors, batch.valid, strict=True):
                if valid:
                    found[paths[int(clip)]] = vector
    return found


def probe(
    encoders: dict[str, SpectrogramTransformer],
    tasks: Mapping[str, tuple[Path, Path | None]],
    audio: Audio,
    device: torch.device,
    max_rejected: float = Data().max_rejected,
    table: TableFormat = PLAIN,
    progress: bool = False,
    precision: Precision = "fp32",
) -> list[Score]:
    """Score each encoder on each task.

    Args:
        encoders: Encoders, by a name for their weights.
        tasks: Manifests of the training and of the evaluation clips. Where there are no evaluation
            clips, the recordings of the training clips are dealt out to five folds, each of which
            is evaluated on after training on the others.
        audio: Settings of the encoders' input.
        device: Device of the encoders.
        max_rejected: Largest share of the clips of a manifest that may be unreadable; they are
            left out.
        table: What is set of the format of the manifests.
        progress: Show a progress bar on stderr, if that is a terminal.
        precision: Precision of matmuls and attention; features are float32.

    Raises:
        DataError: A manifest is wrong or has no labels, too few of its clips can be read,
            the clips to train on are of one class, or a class has only one recording where folds
            are made.
    """
    labels, paths = read_tasks(tasks, table)
    scores = []
    for weights, encoder in encoders.items():
        vectors = features(encoder, paths, audio, device, progress, precision)
        for task, (train, *rest) in labels.items():
            clips, y, recordings = readable_clips(train, vectors, tasks[task][0], max_rejected)
            x = np.stack([vectors[clip] for clip in clips])
            x_eval, y_eval, of_eval = x, y, recordings
            if rest:
                clips, y_eval, of_eval = readable_clips(
                    rest[0], vectors, tasks[task][1] or "", max_rejected
                )
                x_eval = np.stack([vectors[clip] for clip in clips])
                check_classes(y, tasks[task][0])
                linear, knn = (
                    model.fit(x, y).score(x_eval, y_eval) for model in _models(len(x) // 2)
                )
            else:
                folds = recording_folds(y, recordings, tasks[task][0])
                linear, knn = _cross_scores(x, y, folds)
            classes, counts = np.unique(y, return_counts=True)
            score = Score(
                task,
                weights,
                linear=float(linear),
                knn=float(knn),
                chance=float((y_eval == classes[counts.argmax()]).mean()),
                eer=pairwise_eer(StandardScaler().fit(x).transform(x_eval), y_eval, of_eval),
                num_train=len(y),
                all_train=len(train),
                num_eval=len(y_eval),
                all_eval=len(rest[0] if rest else train),
                num_classes=len(classes),
            )
            scores.append(score)
    return sorted(scores, key=lambda score: list(labels).index(score.task))


def _models(num_voters: int) -> tuple[BaseEstimator, BaseEstimator]:
    """Return the linear and the nearest-neighbour classifier."""
    # Regularised rather strongly: a few thousand clips against a few hundred features.
    linear = LogisticRegression(C=0.1, tol=1e-3, max_iter=2000)
    vote = KNeighborsClassifier(min(10, max(1, num_voters)), metric="cosine", weights="distance")
    return make_pipeline(StandardScaler(), linear), make_pipeline(StandardScaler(), vote)


def _cross_scores(
    x: np.ndarray, y: np.ndarray, folds: list[tuple[np.ndarray, np.ndarray]]
) -> list[float]:
    """Cross-validate both classifiers; return their accuracies over all clips."""
    sizes = [len(held) for _, held in folds]
    least = min(len(x) // 2, *(len(train) for train, _ in folds))
    return [
        float(np.average(cross_val_score(model, x, y, cv=folds), weights=sizes))
        for model in _models(least)
    ]


def pairwise_eer(x: np.ndarray, y: np.ndarray, recordings: np.ndarray) -> float:
    """Compute the equal error rate of verifying labels by the cosine of features.

    Args:
        x: [n, D] features, paired each with each; of many, so many that are drawn.
        y: [n] labels.
        recordings: [n] recording of each clip; clips of one recording make no pair.

    Returns:
        NaN if the labels of no pair are the same, or those of all are.
    """
    if len(x) > MAX_PAIRED:  # drawn: a manifest is often in the order of its classes
        rows = np.random.default_rng(0).choice(len(x), MAX_PAIRED, replace=False)
        x, y, recordings = x[rows], y[rows], recordings[rows]
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    one, other = np.triu_indices(len(x), 1)
    apart = recordings[one] != recordings[other]
    one, other = one[apart], other[apart]
    same = y[one] == y[other]
    if same.all() or not same.any():
        return float("nan")
    return verification_metrics((x @ x.T)[one, other], same)["eer"]


def probed_encoders(loaded: LoadedModel) -> dict[str, SpectrogramTransformer]:
    """Return the encoder of any model, and an untrained one like it."""
    trained = loaded.encoder
    if isinstance(loaded.model, PretrainingModel):
        fresh = untrained_encoder(loaded.config)
    else:
        torch.manual_seed(0)
        fresh = build_encoder(model_settings(trained), loaded.audio, trained.embed.stride).eval()
    return {UNTRAINED: fresh, "checkpoint": trained}


def probe_model(
    loaded: LoadedModel,
    tasks: Mapping[str, tuple[Path, Path | None]],
    max_rejected: float | None = None,
    table: TableFormat = PLAIN,
    progress: bool = True,
    precision: Precision = "fp32",
) -> list[Score]:
    """Score the encoder of any model on labelled clips, and an untrained one like it.

    Args:
        loaded: Any model; a head is ignored.
        tasks: See :func:`probe`.
        max_rejected: See :func:`probe`; ``data.max_rejected`` of the model's run if None.
        table: What is set of the format of the manifests.
        progress: Show a progress bar on stderr, if that is a terminal.
        precision: Precision of matmuls and attention; features are float32.

    Raises:
        DataError: See :func:`probe`.
    """
    share = loaded.config.data.max_rejected if max_rejected is None else max_rejected
    encoders = probed_encoders(loaded)
    device = default_device()
    return probe(encoders, tasks, loaded.audio, device, share, table, progress, precision)


def write_scores(scores: Sequence[Score], path: Path) -> Path:
    """Write the scores as a JSON list, see :func:`write_rows`, and return its path."""
    rows = [
        {key: None if value != value else value for key, value in vars(score).items()}  # NaN
        for score in scores
    ]
    return write_rows(rows, path)


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write what was found of tasks and weights beside what a file has of others; return its path.

    Raises:
        DataError: See :func:`read_rows`.
    """
    found = read_rows(path) | {(row["task"], row["weights"]): row for row in rows}
    write_atomically(path, json.dumps([*found.values()], indent=1) + "\n")
    return path


def read_rows(path: Path) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Read what :func:`write_rows` wrote, by task and weights; nothing if there is no file.

    Raises:
        DataError: The file holds something else.
    """
    if not path.exists():
        return {}
    try:
        return {(row["task"], row["weights"]): row for row in parse_json(path.read_bytes())}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path}: expected a list of scores by task and weights, found something else: remove "
            "it, or give --out"
        ) from error


def format_scores(scores: Sequence[Score]) -> str:
    """Format the scores as a table, one line for each task and encoder."""
    lines = [
        f"{'task':14}{'classes':>8}{'train':>14}{'eval':>14}  "
        f"{'encoder':12}{'linear':>8}{'kNN':>8}{'chance':>8}{'EER':>8}"
    ]
    for s in scores:
        train, held = f"{s.num_train} of {s.all_train}", f"{s.num_eval} of {s.all_eval}"
        lines.append(
            f"{s.task:14}{s.num_classes:8}{train:>14}{held:>14}  {s.weights:12}"
            f"{s.linear:8.1%}{s.knn:8.1%}{s.chance:8.1%}{s.eer:8.1%}"
        )
    return "\n".join(lines)
