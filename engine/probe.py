"""What the encoder has learned: simple classifiers on its frozen features.

A logistic regression and a k-nearest-neighbour vote, trained on the labelled clips of a task and
scored on its evaluation clips, for the pretrained encoder and for the same encoder with the
untrained weights that its pretraining began from.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ssast.engine.classifier import embed_clips
from ssast.engine.clips import fbank_spec
from ssast.engine.config import Config
from ssast.engine.model import SpectrogramTransformer
from ssast.engine.objective import MSPM
from ssast.pipelines.batch import DataError
from ssast.pipelines.dali import AudioStream
from ssast.pipelines.manifest import Manifest, read_manifest


@dataclass(frozen=True)
class Score:
    """Accuracy on the evaluation clips of a task."""

    task: str
    weights: str
    linear: float
    knn: float
    chance: float
    """Of always naming the most frequent class of the training clips."""

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


@torch.inference_mode()
def features(
    encoder: SpectrogramTransformer, manifest: Manifest, config: Config, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Mean patch tokens [num_clips, D] of a manifest, and which clips could be read [num_clips]."""
    encoder, spec = encoder.to(device), fbank_spec(config.audio)
    found: list[torch.Tensor] = []
    valid: list[torch.Tensor] = []
    with AudioStream(manifest.paths, spec, batch_size=32, epochs=1, device=device) as batches:
        for batch in batches:
            found.append(embed_clips(encoder, batch.fbank).float().cpu())
            valid.append(batch.valid.cpu())
    count = len(manifest)
    return torch.cat(found)[:count].numpy(), torch.cat(valid)[:count].numpy()


def probe(
    encoders: dict[str, SpectrogramTransformer],
    tasks: dict[str, tuple[Path, Path]],
    config: Config,
    device: torch.device,
) -> list[Score]:
    """Score each encoder on each task.

    Raises:
        DataError: A manifest is wrong or has no labels.
    """
    scores = []
    for task, pair in tasks.items():
        manifests = [read_manifest(path) for path in pair]
        labels = [_single_labels(manifest) for manifest in manifests]
        for weights, encoder in encoders.items():
            split = [features(encoder, manifest, config, device) for manifest in manifests]
            (x, y), (x_eval, y_eval) = [
                (f[valid], named[valid]) for (f, valid), named in zip(split, labels, strict=True)
            ]
            # Regularised rather strongly: a few thousand clips against a few hundred features.
            linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
            knn = make_pipeline(
                StandardScaler(),
                KNeighborsClassifier(min(10, len(x)), metric="cosine", weights="distance"),
            )
            classes, counts = np.unique(y, return_counts=True)
            scores.append(
                Score(
                    task,
                    weights,
                    linear=linear.fit(x, y).score(x_eval, y_eval),
                    knn=knn.fit(x, y).score(x_eval, y_eval),
                    chance=float((y_eval == classes[counts.argmax()]).mean()),
                    num_train=len(y),
                    num_eval=len(y_eval),
                    num_classes=len(classes),
                )
            )
    return scores


def write_scores(scores: Sequence[Score], path: Path) -> Path:
    """Write the scores as a JSON list; returns the path."""
    path.write_text(json.dumps([vars(score) for score in scores], indent=1) + "\n")
    return path


def format_scores(scores: Sequence[Score]) -> str:
    """A table, one line for each task and encoder."""
    lines = [
        f"{'task':14}{'classes':>8}{'train':>7}{'eval':>6}  "
        f"{'encoder':12}{'linear':>8}{'kNN':>8}{'chance':>8}"
    ]
    for s in scores:
        lines.append(
            f"{s.task:14}{s.num_classes:8}{s.num_train:7}{s.num_eval:6}  {s.weights:12}"
            f"{s.linear:8.1%}{s.knn:8.1%}{s.chance:8.1%}"
        )
    return "\n".join(lines)


def _single_labels(manifest: Manifest) -> np.ndarray:
    if manifest.labels is None:
        raise DataError(f"{manifest.source}: has no labels, a probe needs them")
    for path, names in zip(manifest.paths, manifest.labels, strict=True):
        if len(names) != 1:
            raise DataError(f"{manifest.source}: {path} has {len(names)} labels, a probe needs one")
    return np.array([names[0] for names in manifest.labels])
