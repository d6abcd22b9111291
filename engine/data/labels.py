"""Labels of clips: the order of the classes, targets, and what a split must not be."""

import difflib
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssast.pipelines.clips.manifest import read_manifest
from ssast.pipelines.clips.order import permutation
from ssast.pipelines.datasets.tables import class_table
from ssast.pipelines.errors import DataError


@dataclass(frozen=True)
class LabelledClips:
    """Clips and the numbers of their classes.

    Attributes:
        paths: One a clip.
        classes: Names, in their order.
        indices: Class numbers of all clips, one clip after the other.
        offsets: [n + 1] int64, where those of each clip begin.
        source: Where they were read from, for messages.
    """

    paths: Sequence[Any]
    classes: tuple[str, ...]
    indices: np.ndarray
    offsets: np.ndarray
    source: str

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.paths)

    @property
    def single(self) -> bool:
        """Whether every clip has one label."""
        return bool((np.diff(self.offsets) == 1).all())

    def table(self) -> Tensor:
        """The classes of each clip, [n, K] int64, filled up with C: see :func:`targets_of`."""
        count = np.diff(self.offsets)
        table = np.full((len(count), int(count.max(initial=1))), len(self.classes))
        clips = np.repeat(np.arange(len(count)), count)
        table[clips, np.arange(len(clips)) - self.offsets[clips]] = self.indices
        return torch.from_numpy(table)

    def targets(self) -> np.ndarray:
        """1 for the classes of each clip, else 0: [n, C] int64."""
        rows = torch.arange(len(self))
        return targets_of(self.table(), rows, len(self.classes)).long().numpy()

    def counts(self) -> np.ndarray:
        """Clips of each class, [C] int64."""
        return np.bincount(self.indices, minlength=len(self.classes))

    def take(self, rows: np.ndarray) -> "LabelledClips":
        """Some of the clips."""
        count = np.diff(self.offsets)[rows]
        parts = [self.indices[self.offsets[r] : self.offsets[r + 1]] for r in rows]
        return LabelledClips(
            [self.paths[int(r)] for r in rows],
            self.classes,
            np.concatenate(parts) if parts else self.indices[:0],
            np.concatenate([[0], np.cumsum(count)]),
            self.source,
        )


def targets_of(table: Tensor, rows: Tensor, num_classes: int) -> Tensor:
    """1 for the classes of these clips, else 0: [B, C] float32, on the table's device.

    Args:
        table: See :meth:`LabelledClips.table`.
        rows: [B] int64, clips of the table.
        num_classes: C.
    """
    targets = torch.zeros(len(rows), num_classes + 1, device=table.device)
    return targets.scatter_(1, table[rows], 1.0)[:, :num_classes]


def find_classes(train: str, labels_csv: str | None) -> tuple[str, ...]:
    """The classes in their order: of the table, or the sorted labels of the training clips.

    Raises:
        DataError: The table or the manifest is wrong, or there are fewer than two classes.
    """
    if labels_csv is not None:
        names = tuple(class_table(Path(labels_csv)))
    else:
        labels = read_manifest(train).labels
        if labels is None:
            raise DataError(f"{train}: has no labels, fine-tuning needs them")
        names = tuple(sorted({name for clip in labels for name in clip}))
    if len(names) < 2:
        raise DataError(f"{labels_csv or train}: expected two classes or more, found {len(names)}")
    return names


def class_names(classes: Sequence[str], table: str | Path | None) -> tuple[str, ...]:
    """What people call the classes: as their table says, if that tells them apart.

    Args:
        classes: Labels, in their order.
        table: A CSV of them, see :func:`find_classes`; without it labels are names.

    Raises:
        DataError: The table is wrong.
    """
    names = tuple(classes) if table is None else tuple(class_table(Path(table)).values())
    return names if len(set(names)) == len(names) else tuple(classes)


def read_labelled(path: str, classes: Sequence[str], *, one_label: bool) -> LabelledClips:
    """The clips of a manifest with the numbers of their classes.

    Args:
        path: The manifest.
        classes: Names, in their order.
        one_label: Each clip must have exactly one.

    Raises:
        DataError: The manifest is wrong or has no labels, a label is unknown, or a clip has more
            than one where one is wanted.
    """
    manifest = read_manifest(path)
    if manifest.labels is None:
        raise DataError(f"{path}: has no labels, expected some of {len(classes)} classes")
    numbers = {name: number for number, name in enumerate(classes)}
    indices: list[int] = []
    offsets = [0]
    for clip, names in zip(manifest.paths, manifest.labels, strict=True):
        if one_label and len(names) != 1:
            raise DataError(
                f"{path}: {clip} has {len(names)} labels ({', '.join(names)}), expected one: "
                "set finetune.loss=bce for clips with several"
            )
        for name in names:
            if name not in numbers:
                near = difflib.get_close_matches(name, classes, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise DataError(
                    f"{path}: {clip}: unknown label {name!r}, expected one of the "
                    f"{len(classes)} classes{hint}"
                )
        indices += sorted({numbers[name] for name in names})
        offsets.append(len(indices))
    return LabelledClips(
        manifest.paths, tuple(classes), np.array(indices), np.array(offsets), str(path)
    )


def hold_out(clips: LabelledClips, share: float) -> tuple[LabelledClips, LabelledClips]:
    """Splits clips, class by class, the same way whenever it is asked.

    Args:
        clips: Of all classes.
        share: Of the clips of each class that are held out; at least one of two or more.

    Returns:
        The other clips, and those that are held out.

    Raises:
        DataError: No class has two clips.
    """
    first = clips.indices[clips.offsets[:-1]]
    order = permutation(0, 0, len(clips))
    held = np.zeros(len(clips), bool)
    for number in np.unique(first):
        members = order[first[order] == number]
        if len(members) > 1:
            held[members[: max(1, round(share * len(members)))]] = True
    if not held.any():
        raise DataError(f"{clips.source}: no class has two clips to split; set data.valid")
    return clips.take(np.flatnonzero(~held)), clips.take(np.flatnonzero(held))


def check_classes_are_learned(train: LabelledClips) -> None:
    """Every class must have a training clip.

    Raises:
        DataError: One has none.
    """
    empty = np.flatnonzero(train.counts() == 0)
    if len(empty):
        names = ", ".join(train.classes[i] for i in empty[:3])
        more = ", ..." if len(empty) > 3 else ""
        raise DataError(
            f"{train.source}: {len(empty)} of {len(train.classes)} classes have no training clip "
            f"({names}{more}), expected one at least"
        )


def class_weights(given: str, train: LabelledClips) -> np.ndarray | None:
    """Factors of the classes in the loss, [C] float64; None where all are 1.

    Args:
        given: ``none``; ``balanced``, the mean number of clips of a class over that of each, so
            that over all clips of one label the mean factor is 1; or a file, a number a line.
        train: The training clips, some of each class.

    Raises:
        DataError: The file cannot be read, or does not hold a number of 0 or more for each class.
    """
    if given == "none":
        return None
    if given == "balanced":
        return len(train.indices) / len(train.classes) / train.counts()
    where = f"finetune.class_weights {given}"
    try:
        weights = np.array([float(word) for word in Path(given).read_text("utf-8").split()])
    except OSError as error:
        raise DataError(
            f"{where}: expected none, balanced or a file, which cannot be read: {error.strerror}"
        ) from error
    except ValueError as error:
        raise DataError(f"{where}: expected a number a line: {error}") from error
    if len(weights) != len(train.classes):
        raise DataError(f"{where}: {len(weights)} numbers for {len(train.classes)} classes")
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise DataError(f"{where}: expected finite numbers of 0 or more, not all of them 0")
    return weights


def check_files_are_there(splits: dict[str, LabelledClips], share: float) -> None:
    """No more than a share of the clips of each split may be missing or empty.

    Args:
        splits: Clips by the name of their split.
        share: Of the clips of a split.

    Raises:
        DataError: More are.
    """
    for name, clips in splits.items():
        gone = [clip for clip in clips.paths if not _size(clip)]
        if len(gone) > share * len(clips):
            what = "is missing" if _size(gone[0]) is None else "is an empty file"
            raise DataError(
                f"{name} ({clips.source}): {len(gone)} of {len(clips)} clips are missing or empty, "
                f"expected at most {share:.0%} (data.max_rejected): {gone[0]} {what}"
            )


def check_no_leakage(splits: dict[str, LabelledClips]) -> None:
    """No clip may be in two splits, be it the same file or a copy of it.

    Files of equal size alone are read: other ones cannot be copies.

    Args:
        splits: Clips by the name of their split.

    Raises:
        DataError: Two splits share clips.
    """
    names = list(splits)
    for number, one in enumerate(names):
        for other in names[number + 1 :]:
            shared = shared_clips(splits[one].paths, splits[other].paths)
            if shared:
                first, second = shared[0]
                raise DataError(
                    f"{len(shared)} clips of {one} ({splits[one].source}) are also in {other} "
                    f"({splits[other].source}), such as {first} and {second}: expected none; "
                    "finetune.allow_leakage=true trains all the same"
                )


def shared_clips(one: Sequence[Any], other: Sequence[Any]) -> list[tuple[str, str]]:
    """Pairs of clips, of one list and of another, that hold the same bytes."""
    ours, theirs = {_size(c) for c in one}, {_size(c) for c in other}
    equal = (ours & theirs) - {None}
    found: dict[str | None, Any] = {}
    pairs = []
    with ThreadPoolExecutor(4, thread_name_prefix="ssast-hash") as threads:
        here = [clip for clip in one if _size(clip) in equal]
        for clip, digest in zip(here, threads.map(_digest, here), strict=True):
            found.setdefault(digest, clip)
        there = [clip for clip in other if _size(clip) in equal]
        for clip, digest in zip(there, threads.map(_digest, there), strict=True):
            if digest is not None and digest in found:
                pairs.append((str(found[digest]), str(clip)))
    return pairs


def _size(clip: Any) -> int | None:
    """Bytes of a clip; None for one that is missing: the pipeline will say so."""
    try:
        return clip.size if hasattr(clip, "size") else os.stat(clip).st_size
    except OSError:
        return None


def _digest(clip: Any) -> str | None:
    try:
        data = clip.read() if hasattr(clip, "read") else Path(clip).read_bytes()
    except (OSError, DataError):
        return None
    return hashlib.sha256(data).hexdigest()
