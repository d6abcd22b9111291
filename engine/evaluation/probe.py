"""What the encoder has learned: simple classifiers on its frozen features.

A logistic regression and a k-nearest-neighbour vote, trained on the labelled clips of a task and
scored on its evaluation clips, for the pretrained encoder and for the same encoder with untrained
weights; and how well the angle between the features of two clips tells whether they have the same
label, as of speakers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ssast.engine.checkpoints.classifier import model_of
from ssast.engine.checkpoints.pretrained import load_pretrained
from ssast.engine.config import Config
from ssast.engine.data.clips import fbank_spec
from ssast.engine.evaluation.metrics import verification_metrics
from ssast.engine.formats.open import Opened
from ssast.engine.model.classifier import embed_clips
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.model.objective import MSPM
from ssast.engine.settings import Audio
from ssast.kernels.matmul import fast_matmul
from ssast.pipelines.clips.manifest import read_manifest
from ssast.pipelines.clips.shards import ClipPath, ClipPaths
from ssast.pipelines.errors import DataError
from ssast.pipelines.stream.stream import AudioStream

NUM_FOLDS = 5  # where there are no evaluation clips
MOST_PAIRED = 2000  # clips whose pairs are looked at


@dataclass(frozen=True)
class Score:
    """Accuracy on the evaluation clips of a task."""

    task: str
    weights: str
    linear: float
    knn: float
    chance: float
    """Of always naming the most frequent class of the training clips."""

    eer: float
    """Equal error rate of telling by the cosine of their features whether two evaluation clips have
    the same label; NaN if there are no pairs of both kinds."""

    num_train: int
    num_eval: int
    num_classes: int


def find_tasks(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Tasks in a folder: pairs of <task>_train.json and <task>_eval.json, by name.

    Raises:
        DataError: There is none.
    """
    pairs = {p.name.removesuffix("_train.json"): p for p in sorted(folder.glob("*_train.json"))}
    tasks = {name: (p, folder / f"{name}_eval.json") for name, p in pairs.items()}
    tasks = {name: pair for name, pair in tasks.items() if pair[1].is_file()}
    if not tasks:
        raise DataError(f"{folder}: no <task>_train.json with a <task>_eval.json beside it")
    return tasks


def untrained_encoder(config: Config) -> SpectrogramTransformer:
    """The encoder with the weights that a run of this configuration begins from."""
    torch.manual_seed(config.train.seed)
    return MSPM(config).encoder.eval()


@fast_matmul()
@torch.no_grad()
def features(
    encoder: SpectrogramTransformer, paths: ClipPaths, audio: Audio, device: torch.device
) -> dict[ClipPath, np.ndarray]:
    """Mean of the patch tokens that hold sound, [D], of each clip that can be read, by path."""
    encoder, found = encoder.to(device), {}
    with AudioStream(
        paths, fbank_spec(audio), batch_size=32, epochs=1, device=device, max_rejected=1.0
    ) as batches:
        for batch in batches:
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
) -> list[Score]:
    """Score each encoder on each task.

    Args:
        encoders: By a name for their weights.
        tasks: Manifests of the training and of the evaluation clips. Where there are no evaluation
            clips, each fifth of the training clips is evaluated on after training on the others.
        audio: Of the encoders' input.
        device: Where they shall work.

    Raises:
        DataError: A manifest is wrong or has no labels, none of its clips can be read, or a class
            has only one clip where fifths are taken.
    """
    labels = {
        task: [_labels(path) for path in pair if path is not None] for task, pair in tasks.items()
    }
    # Tasks share clips: each is encoded once.
    paths = sorted({path for pair in labels.values() for part in pair for path in part}, key=str)
    scores = []
    for weights, encoder in encoders.items():
        vectors = features(encoder, paths, audio, device)
        for task, (train, *rest) in labels.items():
            x, y = _arrays(train, vectors, tasks[task][0])
            x_eval, y_eval = _arrays(rest[0], vectors, tasks[task][1] or "") if rest else (x, y)
            classes, counts = np.unique(y, return_counts=True)
            if not rest and counts.min() < 2:
                raise DataError(
                    f"{tasks[task][0]}: {classes[counts.argmin()]} has one clip alone, expected "
                    "two or more of each class, or other clips to train on"
                )
            linear, knn = (
                model.fit(x, y).score(x_eval, y_eval) if rest else _cross_score(model, x, y)
                for model in _models(len(x))
            )
            score = Score(
                task,
                weights,
                linear=float(linear),
                knn=float(knn),
                chance=float((y_eval == classes[counts.argmax()]).mean()),
                eer=pairwise_eer(StandardScaler().fit(x).transform(x_eval), y_eval),
                num_train=len(y),
                num_eval=len(y_eval),
                num_classes=len(classes),
            )
            scores.append(score)
    return sorted(scores, key=lambda score: list(labels).index(score.task))


def _models(num_train: int) -> tuple[BaseEstimator, BaseEstimator]:
    """The linear classifier and the vote of the nearest neighbours."""
    # Regularised rather strongly: a few thousand clips against a few hundred features.
    linear = LogisticRegression(C=0.1, tol=1e-3, max_iter=2000)
    # In cross-validation, a half of the clips is left to vote at the least.
    vote = KNeighborsClassifier(
        min(10, max(1, num_train // 2)), metric="cosine", weights="distance"
    )
    return make_pipeline(StandardScaler(), linear), make_pipeline(StandardScaler(), vote)


def _cross_score(model: BaseEstimator, x: np.ndarray, y: np.ndarray) -> float:
    """Accuracy over all clips, each evaluated by a model that was trained without its fold."""
    folds = min(NUM_FOLDS, int(np.unique(y, return_counts=True)[1].min()))
    split = StratifiedKFold(folds, shuffle=True, random_state=0)
    sizes = [len(held_out) for _, held_out in split.split(x, y)]
    return float(np.average(cross_val_score(model, x, y, cv=split), weights=sizes))


def pairwise_eer(x: np.ndarray, y: np.ndarray) -> float:
    """Equal error rate of the cosine between features [n, D], for whether labels [n] are the same.

    Over all pairs of the first clips; NaN if there are none that are the same, or none that differ.
    """
    x, y = x[:MOST_PAIRED], y[:MOST_PAIRED]
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    one, other = np.triu_indices(len(x), 1)
    same = y[one] == y[other]
    if same.all() or not same.any():
        return float("nan")
    return verification_metrics((x @ x.T)[one, other], same)["eer"]


def probe_model(opened: Opened, manifest: Path, train: Path | None = None) -> list[Score]:
    """Score the encoder of any model on labelled clips, beside one like it that is untrained.

    Args:
        opened: The model; a head is left out.
        manifest: The clips, with one label each.
        train: Others to train on; parts of the same if None, see :func:`probe`.

    Raises:
        DataError: See :func:`probe`.
    """
    trained = opened.encoder
    torch.manual_seed(0)
    fresh = SpectrogramTransformer(model_of(trained), opened.audio, trained.embed.stride).eval()
    tasks = {manifest.stem: (manifest, None) if train is None else (train, manifest)}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return probe({"untrained": fresh, "checkpoint": trained}, tasks, opened.audio, device)


def probe_run(
    run: Path, tasks: Path, others: Mapping[str, SpectrogramTransformer] | None = None
) -> tuple[list[Score], Path]:
    """Score the encoder of a run beside the untrained one.

    Args:
        run: Folder of the run.
        tasks: Folder of the tasks.
        others: More encoders of the same input, by a name for their weights.

    Returns:
        The scores, and where they were written: probe.json in the run's folder.

    Raises:
        CheckpointError: The run has no whole checkpoint.
        DataError: See :func:`find_tasks` and :func:`probe`.
    """
    pairs = find_tasks(tasks)
    model, config = load_pretrained(run)
    encoders = {"untrained": untrained_encoder(config), "pretrained": model.encoder}
    encoders |= others or {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scores = probe(encoders, pairs, config.audio, device)
    return scores, write_scores(scores, run / "probe.json")


def write_scores(scores: Sequence[Score], path: Path) -> Path:
    """Write the scores as a JSON list; returns the path."""
    path.write_text(json.dumps([vars(score) for score in scores], indent=1) + "\n")
    return path


def format_scores(scores: Sequence[Score]) -> str:
    """A table, one line for each task and encoder."""
    lines = [
        f"{'task':14}{'classes':>8}{'train':>7}{'eval':>6}  "
        f"{'encoder':12}{'linear':>8}{'kNN':>8}{'chance':>8}{'EER':>8}"
    ]
    for s in scores:
        lines.append(
            f"{s.task:14}{s.num_classes:8}{s.num_train:7}{s.num_eval:6}  {s.weights:12}"
            f"{s.linear:8.1%}{s.knn:8.1%}{s.chance:8.1%}{s.eer:8.1%}"
        )
    return "\n".join(lines)


def _labels(path: Path) -> dict[ClipPath, str]:
    """The one label of each clip of a manifest, by path."""
    manifest = read_manifest(path)
    if manifest.labels is None:
        raise DataError(f"{path}: has no labels, a probe needs them")
    for clip, names in zip(manifest.paths, manifest.labels, strict=True):
        if len(names) != 1:
            raise DataError(f"{path}: {clip} has {len(names)} labels, a probe needs one")
    return {clip: names[0] for clip, names in zip(manifest.paths, manifest.labels, strict=True)}


def _arrays(
    labels: dict[ClipPath, str], vectors: dict[ClipPath, np.ndarray], path: Path | str
) -> tuple[np.ndarray, np.ndarray]:
    clips = [clip for clip in labels if clip in vectors]
    if not clips:
        raise DataError(f"{path}: none of its {len(labels)} clips can be read")
    return np.stack([vectors[clip] for clip in clips]), np.array([labels[clip] for clip in clips])
