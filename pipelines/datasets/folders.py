"""Clips in folders, each of which is a class."""

import os
from collections import defaultdict
from pathlib import Path

from ssast.pipelines.clips.folders import audio_files
from ssast.pipelines.datasets.tables import Dataset, Listed
from ssast.pipelines.errors import DataError

SPLIT = "clips"
SPLITS = ("train", "training", "valid", "validation", "val", "dev", "test", "testing", "eval")


def read_folders(source: Path) -> Dataset:
    """Read ``CLASS/.../clip.wav``, or ``train/CLASS/.../clip.wav`` where all folders are splits.

    Args:
        source: Folder of the folders.

    Raises:
        DataError: There are no sounds in folders.
    """
    files = [(path, Path(os.path.relpath(path, source)).parts) for path in audio_files(source)]
    tops = {parts[0] for _, parts in files if len(parts) > 1}
    depth = 1 if tops and all(top.lower() in SPLITS for top in tops) else 0
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
