"""The labelled clips of a probe: tasks in a folder, labels and recordings, folds of recordings."""

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from ssast.engine.data.labels import check_read
from ssast.engine.data.leakage import check_disjoint
from ssast.pipelines.clips.columns import TableFormat
from ssast.pipelines.clips.holdout import assign_folds, recordings_of
from ssast.pipelines.clips.manifest import Manifest, read_manifest
from ssast.pipelines.clips.shards import ClipPath
from ssast.pipelines.errors import DataError

NUM_FOLDS = 5  # where there are no evaluation clips

Labelled = dict[ClipPath, tuple[str, int]]
"""The one label and the recording of each clip."""


def find_tasks(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Find the tasks in a folder: pairs of <task>_train.json and <task>_eval.json, by name.

    Raises:
        DataError: There is none.
    """
    pairs = {p.name.removesuffix("_train.json"): p for p in sorted(folder.glob("*_train.json"))}
    tasks = {name: (p, folder / f"{name}_eval.json") for name, p in pairs.items()}
    tasks = {name: pair for name, pair in tasks.items() if pair[1].is_file()}
    if not tasks:
        raise DataError(f"{folder}: no <task>_train.json with a <task>_eval.json beside it")
    return tasks


def labels_of(manifest: Manifest) -> Labelled:
    """Return the one label and the recording of each clip of a manifest.

    Raises:
        DataError: A clip has not one label.
    """
    path = manifest.source
    if manifest.labels is None:
        raise DataError(f"{path}: has no labels, a probe needs them")
    for clip, names in zip(manifest.paths, manifest.labels, strict=True):
        if len(names) != 1:
            raise DataError(f"{path}: {clip} has {len(names)} labels, a probe needs one")
    recordings = recordings_of(manifest.paths).tolist()
    rows = zip(manifest.paths, manifest.labels, recordings, strict=True)
    return {clip: (names[0], recording) for clip, names, recording in rows}


def read_tasks(
    tasks: Mapping[str, tuple[Path, Path | None]], table: TableFormat
) -> tuple[dict[str, list[Labelled]], list[ClipPath]]:
    """Read the labels of tasks, of each its training and evaluation clips, and list all clips.

    Raises:
        DataError: A manifest is wrong, see :func:`labels_of`; or clips of a recording are both
            trained on and evaluated on.
    """
    manifests = {
        task: [read_manifest(path, table=table) for path in pair if path is not None]
        for task, pair in tasks.items()
    }
    labels = {task: list(map(labels_of, pair)) for task, pair in manifests.items()}
    for pair in manifests.values():
        parts = zip(("training clips", "evaluation clips"), pair, strict=False)
        check_disjoint({f"{part} {found.source}": found.paths for part, found in parts})
    # Tasks share clips: each is listed, and encoded, once.
    paths = sorted({path for pair in labels.values() for part in pair for path in part}, key=str)
    return labels, paths


def readable_clips(
    labels: Labelled, read: Collection[ClipPath], path: Path | str, share: float
) -> tuple[list[ClipPath], np.ndarray, np.ndarray]:
    """Return the clips that could be read, and their labels and recordings, [n] each.

    Raises:
        DataError: More than a share of them could not.
    """
    could = np.array([clip in read for clip in labels])
    check_read(str(path), list(labels), could, share)
    clips = [clip for clip in labels if clip in read]
    names, recordings = zip(*(labels[clip] for clip in clips), strict=True)
    return clips, np.array(names), np.array(recordings)


def check_classes(y: np.ndarray, path: Path) -> None:
    """Check that labels [n] to train on are of two classes or more.

    Raises:
        DataError: They are of one.
    """
    if len(np.unique(y)) < 2:
        raise DataError(
            f"{path}: the clips to train on are all {y[0]}, expected two classes or more"
        )


def recording_folds(
    y: np.ndarray, recordings: np.ndarray, path: Path
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the rows to train on and to evaluate on of each fold of whole recordings.

    Raises:
        DataError: A class has one recording alone, or there is one class.
    """
    counts = {name: len(np.unique(recordings[y == name])) for name in np.unique(y)}
    rarest = min(counts, key=lambda name: counts[name])
    if counts[rarest] < 2:
        raise DataError(
            f"{path}: {rarest} has one recording alone, expected two or more of each class, or "
            "other clips to train on"
        )
    fold = assign_folds(recordings, [(name,) for name in y], min(NUM_FOLDS, counts[rarest]))
    parts = [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in np.unique(fold)]
    for train, _ in parts:
        check_classes(y[train], path)
    return parts
