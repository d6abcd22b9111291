"""Clips in folders, each of which is a class."""

import os
from collections import defaultdict
from pathlib import Path

from ssast.pipelines.clips.folders import audio_files
from ssast.pipelines.datasets.tables import Dataset, Listed
from ssast.pipelines.errors import DataError

SPLIT = "clips"
SPLITS = (
    "train",
    "training",
    "valid",
    "validate",
    "validation",
    "val",
    "dev",
    "test",
    "testing",
    "eval",
)


def read_folders(source: Path) -> Dataset:
    """Read ``CLASS/.../clip.wav``, or ``train/CLASS/.../clip.wav`` where all folders are splits.

    One folder named like a split, beside others, is a class.

    Args:
        source: Folder of the folders.

    Raises:
        DataError: There are no sounds in folders, or several are splits and others are not.
    """
    files = [(path, Path(os.path.relpath(path, source)).parts) for path in audio_files(source)]
    tops = {parts[0] for _, parts in files if len(parts) > 1}
    others = sorted(top for top in tops if top.lower() not in SPLITS)
    if others and len(tops) - len(others) > 1:
        known = ", ".join(sorted(tops - {*others}))
        raise DataError(
            f"{source}: {known} are splits, expected splits alone beside them, found "
            f"{', '.join(map(repr, others)):.200}: rename or move these (splits are "
            f"{', '.join(SPLITS)})"
        )
    depth = 1 if tops and not others else 0
    splits: dict[str, list[Listed]] = defaultdict(list)
    loose = 0
    for path, parts in files:
        if len(parts) < depth + 2:
            loose += 1
            continue
        split = parts[0] if depth else SPLIT
        splits[split].append(Listed(os.path.join(*parts), path, (parts[depth],)))
    if not splits:
        raise DataError(f"{source}: expected folders of sounds, one for each class, found none")
    names = sorted({name for clips in splits.values() for clip in clips for name in clip.labels})
    notes = [f"{loose} sounds in no folder of a class are left out"] if loose else []
    return Dataset(dict(sorted(splits.items())), [(name, name) for name in names], notes=notes)
