"""Labels of clips: the order of the classes, targets, and what a split must not be."""

import difflib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssast.pipelines.clips.manifest import read_manifest
from ssast.pipelines.clips.overlap import size_of
from ssast.pipelines.clips.shards import ClipPaths, select
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

    paths: ClipPaths
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

    def labels(self) -> list[list[int]]:
        """Class numbers of each clip."""
        numbers, ends = self.indices.tolist(), self.offsets.tolist()
        return [numbers[start:end] for start, end in itertools.pairwise(ends)]

    def take(self, rows: np.ndarray) -> "LabelledClips":
        """Some of the clips."""
        count = np.diff(self.offsets)[rows]
        parts = [self.indices[self.offsets[r] : self.offsets[r + 1]] for r in rows]
        return LabelledClips(
            select(self.paths, rows),
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
        gone = [clip for clip in clips.paths if not size_of(clip)]
        if len(gone) > share * len(clips):
            what = "is missing" if size_of(gone[0]) is None else "is an empty file"
            raise DataError(
                f"{name} ({clips.source}): {len(gone)} of {len(clips)} clips are missing or empty, "
                f"expected at most {share:.0%} (data.max_rejected): {gone[0]} {what}"
            )
