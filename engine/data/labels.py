"""Labelled clips: the order of the classes, targets, class weights, and checks."""

import difflib
import itertools
import logging
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssast.pipelines.clips.columns import PLAIN, TableFormat
from ssast.pipelines.clips.manifest import read_manifest
from ssast.pipelines.clips.mix import select
from ssast.pipelines.clips.shards import ClipPaths
from ssast.pipelines.datasets.tables import class_table
from ssast.pipelines.errors import DataError
from ssast.pipelines.stream.rejected import Counts
from ssast.pipelines.text import read_text, shown

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledClips:
    """Clips with class numbers, none for some perhaps, in compressed sparse rows.

    Attributes:
        paths: The clips, n of them.
        classes: Names of the classes, in their order.
        indices: Class numbers of all clips, one clip after the other, int64.
        offsets: Where the class numbers of each clip begin in ``indices``, [n + 1] int64.
        source: The manifest, for messages.
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
        """Return the classes of each clip, [n, K] int64, padded with C: see :func:`targets_of`."""
        count = np.diff(self.offsets)
        table = np.full((len(count), int(count.max(initial=1))), len(self.classes))
        clips = np.repeat(np.arange(len(count)), count)
        table[clips, np.arange(len(clips)) - self.offsets[clips]] = self.indices
        return torch.from_numpy(table)

    def targets(self) -> np.ndarray:
        """Return multi-hot targets, [n, C] int64."""
        rows = torch.arange(len(self))
        return targets_of(self.table(), rows, len(self.classes)).long().numpy()

    def counts(self) -> np.ndarray:
        """Return the number of clips of each class, [C] int64."""
        return np.bincount(self.indices, minlength=len(self.classes))

    def labels(self) -> list[list[int]]:
        """Return the class numbers of each clip."""
        numbers, ends = self.indices.tolist(), self.offsets.tolist()
        return [numbers[start:end] for start, end in itertools.pairwise(ends)]

    def take(self, rows: np.ndarray) -> "LabelledClips":
        """Return some of the clips."""
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
    """Return multi-hot targets, [B, C] float32, on the table's device.

    Args:
        table: Classes of each clip, see :meth:`LabelledClips.table`.
        rows: Clips, rows of the table, [B] int64.
        num_classes: Number of classes, C.
    """
    targets = torch.zeros(len(rows), num_classes + 1, device=table.device)
    return targets.scatter_(1, table[rows], 1.0)[:, :num_classes]


def find_classes(train: str, labels_csv: str | None, table: TableFormat = PLAIN) -> tuple[str, ...]:
    """Return the classes in their order: of the table, or the sorted labels of the training clips.

    Args:
        train: The training clips.
        labels_csv: The table of the classes, if there is one.
        table: What is set of the format of manifests.

    Raises:
        DataError: The table or the manifest is wrong, or there are fewer than two classes.
    """
    if labels_csv is not None:
        names = tuple(class_table(Path(labels_csv)))
    else:
        labels = read_manifest(train, table=table).labels
        if labels is None:
            hint = "data.columns={labels: NAME} names their column"
            if Path(train).is_dir():
                hint = "where its folders are classes, ssast data manifests folders makes a table"
            raise DataError(f"{train}: has no labels, fine-tuning needs them; {hint}")
        names = tuple(sorted({name for clip in labels for name in clip}))
    if len(names) < 2:
        raise DataError(f"{labels_csv or train}: expected two classes or more, found {len(names)}")
    _warn_of_composition(labels_csv or train, names)
    return names


def _warn_of_composition(source: str, names: Sequence[str]) -> None:
    """Warn of classes that look alike: macOS names files in another form (NFD) than people type."""
    alike = Counter(unicodedata.normalize("NFC", name) for name in names)
    twice = [name for name, count in alike.items() if count > 1]
    if twice:
        log.warning(
            "%s: %d classes are two for how their characters are composed (NFC, NFD) alone, such "
            "as %s", source, len(twice), shown(twice[0]),
        )  # fmt: skip


def class_names(classes: Sequence[str], table: str | Path | None) -> tuple[str, ...]:
    """Return the display names of the classes: those of the table, if they are unique.

    Args:
        classes: Labels, in their order.
        table: CSV of the classes, see :func:`find_classes`; without it the labels are the names.

    Raises:
        DataError: The table is wrong.
    """
    names = tuple(classes) if table is None else tuple(class_table(Path(table)).values())
    return names if len(set(names)) == len(names) else tuple(classes)


def read_labelled(
    path: str, classes: Sequence[str], *, one_label: bool, table: TableFormat = PLAIN
) -> LabelledClips:
    """Read the clips of a manifest with the numbers of their classes.

    Args:
        path: Path of the manifest.
        classes: Names of the classes, in their order.
        one_label: Require exactly one label of each clip.
        table: What is set of the format of manifests.

    Raises:
        DataError: The manifest is wrong or has no labels, a label is unknown, or a clip has not
            exactly one where one is required.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    manifest = read_manifest(path, numbers, table)
    if manifest.labels is None:
        raise DataError(f"{path}: has no labels, expected some of {len(classes)} classes")
    indices: list[int] = []
    offsets = [0]
    for clip, names in zip(manifest.paths, manifest.labels, strict=True):
        if one_label and not names:
            raise DataError(
                f"{path}: {clip} has no label, expected one: set finetune.loss=bce for clips that "
                "are of no class"
            )
        if one_label and len(names) > 1:
            raise DataError(
                f"{path}: {clip} has {len(names)} labels ({', '.join(names)}), expected one: "
                "set finetune.loss=bce for clips with several; a name that holds commas goes into "
                "'label', or in a list"
            )
        for name in names:
            if name not in numbers:
                near = difflib.get_close_matches(name, classes, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]}?" if near else ""
                marks = [
                    m
                    for m in ",;|"
                    if m in name and all(part.strip() in numbers for part in name.split(m))
                ]
                if marks:
                    hint = f"; several labels? data.label_separator='{marks[0]}' reads them"
                raise DataError(
                    f"{path}: {clip}: unknown label {name!r}, expected one of the "
                    f"{len(classes)} classes{hint}"
                )
        indices += sorted({numbers[name] for name in names})
        offsets.append(len(indices))
    return LabelledClips(
        manifest.paths, tuple(classes), np.array(indices, np.int64), np.array(offsets), str(path)
    )


def warn_of_empty_classes(train: LabelledClips) -> None:
    """Warn of classes without a training clip: the classifier has them, but cannot learn them."""
    empty = np.flatnonzero(train.counts() == 0)
    if len(empty):
        names = ", ".join(train.classes[i] for i in empty[:3])
        more = ", ..." if len(empty) > 3 else ""
        log.warning(
            f"{train.source}: {len(empty)} of {len(train.classes)} classes have no training clip "
            f"({names}{more}): the classifier has them, but learns nothing of them"
        )


def class_weights(given: str, train: LabelledClips) -> np.ndarray | None:
    """Return the factors of the classes in the loss, [C] float64; None if all are 1.

    Args:
        given: ``none``; ``balanced``, the mean number of clips a class over the number of each, so
            that with one label a clip the mean factor over all clips is 1 (1 also for a class
            without clips); or the path of a text file with a number in each line.
        train: The training clips.

    Raises:
        DataError: The file cannot be read, or does not hold a number of 0 or more for each class.
    """
    if given == "none":
        return None
    if given == "balanced":
        counts = train.counts()
        mean = len(train.indices) / (counts > 0).sum()
        return mean / np.where(counts > 0, counts, mean)
    where = f"finetune.class_weights {given}"
    try:
        weights = np.array([float(word) for word in read_text(Path(given)).split()])
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


def check_read(source: str, paths: Sequence[Any], read: np.ndarray, share: float) -> None:
    """Check that enough clips could be read for metrics of them to mean something.

    Args:
        source: Name of the manifest, for the message.
        paths: The n clips.
        read: [n] bool, which of them could be read.
        share: Largest share that may be missing, see
            :meth:`~ssast.pipelines.stream.rejected.Counts.too_many`.

    Raises:
        DataError: None could be read, or more than this share could not.
    """
    total, missing = len(read), int((~read).sum())
    if missing == total:
        raise DataError(f"{source}: none of its {total} clips can be read")
    if Counts(total, total, missing, missing, shuffled=False).too_many(share):
        raise DataError(
            f"{source}: {missing} of {total} clips cannot be read, expected at most "
            f"{share:.0%} (data.max_rejected): {paths[int(np.flatnonzero(~read)[0])]}"
        )
