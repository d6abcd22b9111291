"""AudioSet, ESC-50 and FSD50K in the layouts of their publishers."""

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ssast.pipelines.clips.folders import audio_files
from ssast.pipelines.datasets.tables import (
    Dataset,
    Listed,
    class_table,
    existing,
    labels_of,
    once,
    root_with,
    table,
)
from ssast.pipelines.errors import DataError

# A segment is named by the id of its video, as downloaders do: Y<id>, <id>, <id>_<start>,
# <id>_<start>_<end>, in seconds or milliseconds. An id has 11 characters, "_" and "-" among them.
AUDIOSET_FILE = re.compile(r"Y?([\w-]{11})(?:[_-]\d+(?:\.\d+)?){0,2}", re.ASCII)
AUDIOSET_COLUMNS = ("YTID", "start_seconds", "end_seconds", "positive_labels")
FOLDS = range(1, 6)
ESC50_CLASSES = 50


def read_audioset(source: Path, *, segments: bool = False) -> Dataset:
    """Read AudioSet: ``balanced_train``, ``unbalanced_train``, ``train_2m`` (both), ``eval``.

    Needs the publishers' ``class_labels_indices.csv`` and ``<split>_segments.csv`` in the folder;
    the audio may lie anywhere below it. There is one segment of a video in all of AudioSet, so the
    id in the name of a file says which it is; of several files of a video the first is taken.
    Without ``unbalanced_train_segments.csv`` there are only ``balanced_train`` and ``eval``.

    The training splits have sampling weights, see :func:`balancing_weights`.

    Args:
        source: The user's copy.
        segments: Whether the files are whole videos, of which the clips are segments.

    Raises:
        DataError: The metadata is missing or malformed, or no file is named by a video's id.
    """
    classes = class_table(source / "class_labels_indices.csv")
    files = _files_by_video(source)
    seen: dict[str, str] = {}
    splits: dict[str, Sequence[Listed]] = {}
    splits["balanced_train"] = _segments(source, "balanced_train", classes, files, seen, segments)
    notes = []
    if (source / "unbalanced_train_segments.csv").exists():
        splits["unbalanced_train"] = _segments(
            source, "unbalanced_train", classes, files, seen, segments
        )
        splits["train_2m"] = [*splits["balanced_train"], *splits["unbalanced_train"]]
    else:
        notes.append("unbalanced_train, train_2m: left out, no unbalanced_train_segments.csv")
    splits["eval"] = _segments(source, "eval", classes, files, seen, segments)
    weigh = {split: balancing_weights for split in splits if split != "eval"}
    return Dataset(splits, list(classes.items()), weigh, notes=notes)


def balancing_weights(labels: Sequence[Sequence[str]]) -> list[float]:
    """Return weights that sample rare classes more often, as in the AST and SSAST recipes.

    The weight of a clip is the sum over its labels of 1000 / (clips with this label + 0.01).

    Args:
        labels: Labels of each clip.
    """
    counts = Counter(label for names in labels for label in names)
    share = {label: 1000.0 / (count + 0.01) for label, count in counts.items()}
    return [sum(share[label] for label in names) for names in labels]


def _files_by_video(source: Path) -> dict[str, str]:
    files: dict[str, str] = {}
    paths = audio_files(source)
    for path in paths:
        match = AUDIOSET_FILE.fullmatch(os.path.splitext(os.path.basename(path))[0])
        if match is not None:
            files.setdefault(match[1], path)
    if not files:
        raise DataError(
            f"{source}: expected audio named by YouTube id, as Y<id>.wav, <id>.flac or "
            f"<id>_30.wav, found {os.path.basename(paths[0])}"
        )
    return files


def _segments(
    source: Path,
    split: str,
    classes: dict[str, str],
    files: dict[str, str],
    seen: dict[str, str],
    cut: bool,
) -> list[Listed]:
    """Read ``<split>_segments.csv``, whose header is a comment."""
    clips = []
    rows = table(source / f"{split}_segments.csv", AUDIOSET_COLUMNS, headed=False, comment="#")
    for place, row in rows:
        video = row["YTID"]
        if len(video) != 11:
            raise DataError(f"{place}: expected a YouTube id of 11 characters, found {video!r}")
        once(seen, video, place)
        labels = labels_of(row["positive_labels"], classes, place)
        span = _span(row["start_seconds"], row["end_seconds"], place) if cut else None
        clips.append(Listed(video, files.get(video), labels, span))
    return clips


def _span(start: str, end: str, place: str) -> tuple[float, float]:
    """Return begin and duration in s.

    Raises:
        DataError: They are no times, or not in this order.
    """
    try:
        start_s, end_s = float(start), float(end)
    except ValueError:
        start_s = end_s = math.nan
    if not 0 <= start_s < end_s < math.inf:
        raise DataError(f"{place}: expected start and end in seconds, found {start!r}, {end!r}")
    return start_s, end_s - start_s


def read_esc50(source: Path) -> Dataset:
    """Read ESC-50: ``train_1`` to ``train_5`` and ``eval_1`` to ``eval_5``.

    ``eval_k`` is the publishers' fold k, ``train_k`` are the other four. The label of class 7 is
    ``/m/07rwj07``, as in the published manifests.

    Args:
        source: The user's copy, with ``meta/esc50.csv`` and ``audio/``.

    Raises:
        DataError: The metadata is missing or malformed, or there are not 50 classes.
    """
    root = root_with(source, "meta/esc50.csv", "ESC-50-master", "ESC-50")
    meta = root / "meta" / "esc50.csv"
    folds: dict[int, list[Listed]] = {fold: [] for fold in FOLDS}
    categories: dict[int, str] = {}
    seen: dict[str, str] = {}
    for place, row in table(meta, ("filename", "fold", "target", "category")):
        name, fold, target = row["filename"], row["fold"], row["target"]
        once(seen, name, place)
        if fold not in map(str, FOLDS):
            raise DataError(f"{place}: expected a fold from 1 to 5, found {fold!r}")
        if target not in map(str, range(ESC50_CLASSES)):
            raise DataError(f"{place}: expected a target from 0 to 49, found {target!r}")
        category = categories.setdefault(int(target), row["category"])
        if category != row["category"]:
            raise DataError(
                f"{place}: expected category {category} of target {target}, "
                f"found {row['category']!r}"
            )
        clip = Listed(name, existing(root / "audio" / name), (_esc50_label(int(target)),))
        folds[int(fold)].append(clip)
    if len(categories) != ESC50_CLASSES:
        raise DataError(f"{meta}: expected {ESC50_CLASSES} classes, found {len(categories)}")
    splits = {}
    for held in FOLDS:
        splits[f"train_{held}"] = [c for other in FOLDS if other != held for c in folds[other]]
        splits[f"eval_{held}"] = folds[held]
    classes = [(_esc50_label(target), category) for target, category in sorted(categories.items())]
    return Dataset(splits, classes)


def _esc50_label(target: int) -> str:
    return f"/m/07rwj{target:02d}"


def read_fsd50k(source: Path) -> Dataset:
    """Read FSD50K: ``train`` and ``valid`` (the publishers' split of their dev set), ``eval``.

    Labels are AudioSet's mids, the classes those of ``vocabulary.csv``, in its order.

    Args:
        source: The user's copy, with ``FSD50K.ground_truth``, ``FSD50K.dev_audio`` and
            ``FSD50K.eval_audio``.

    Raises:
        DataError: The metadata is missing or malformed.
    """
    root = root_with(source, "FSD50K.ground_truth", "FSD50K")
    truth = root / "FSD50K.ground_truth"
    classes = class_table(truth / "vocabulary.csv", ("index", "label", "mid"), headed=False)
    splits: dict[str, list[Listed]] = {"train": [], "valid": [], "eval": []}
    split_of = {"train": "train", "val": "valid"}
    seen: dict[str, str] = {}
    for place, row in table(truth / "dev.csv", ("fname", "mids", "split")):
        split = split_of.get(row["split"])
        if split is None:
            raise DataError(f"{place}: expected split train or val, found {row['split']!r}")
        once(seen, row["fname"], place)
        splits[split].append(_fsd50k_clip(root / "FSD50K.dev_audio", row, classes, place))
    for place, row in table(truth / "eval.csv", ("fname", "mids")):
        once(seen, row["fname"], place)
        splits["eval"].append(_fsd50k_clip(root / "FSD50K.eval_audio", row, classes, place))
    return Dataset(splits, list(classes.items()))


def _fsd50k_clip(folder: Path, row: dict[str, str], classes: dict[str, str], place: str) -> Listed:
    name = f"{row['fname']}.wav"
    return Listed(name, existing(folder / name), labels_of(row["mids"], classes, place))
