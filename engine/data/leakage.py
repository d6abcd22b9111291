"""Checks that training data share no recordings with the data that a model is evaluated on."""

import itertools
from collections.abc import Callable, Mapping

import numpy as np

from ssast.engine.data.labels import LabelledClips
from ssast.pipelines.clips.overlap import Contents, Pairs, shared_recordings
from ssast.pipelines.clips.shards import ClipPaths
from ssast.pipelines.errors import DataError


def check_disjoint(sets: Mapping[str, ClipPaths]) -> None:
    """Refuse data sets that have recordings in common; no clip is read.

    Args:
        sets: Clips by the name of the set, for messages.

    Raises:
        DataError: Two sets have a file, or a recording of the same prepared folder, in common.
    """
    for (name, one), (other_name, other) in itertools.combinations(sets.items(), 2):
        shared = shared_recordings(one, other)
        if shared:
            raise DataError(
                f"{name} and {other_name} both hold {shared[0][0]}: expected no recording in two "
                "data sets"
            )


def check_files_exist(
    splits: Mapping[str, LabelledClips], share: float, contents: Contents
) -> None:
    """Check that few of the clips of each split are missing or empty.

    Args:
        splits: Clips by the name of their split.
        share: Largest share of the clips of a split that may be.
        contents: Knows the sizes of the clips.

    Raises:
        DataError: More are missing or empty.
    """
    for name, clips in splits.items():
        sizes = contents.sizes(clips.paths)
        gone = np.flatnonzero(sizes <= 0)
        if len(gone) > share * len(clips):
            what = "is missing" if sizes[gone[0]] < 0 else "is an empty file"
            raise DataError(
                f"{name} ({clips.source}): {len(gone)} of {len(clips)} clips are missing or empty, "
                f"expected at most {share:.0%} (data.max_rejected): {clips.paths[int(gone[0])]} "
                f"{what}"
            )


def check_no_leakage(splits: Mapping[str, LabelledClips], contents: Contents) -> None:
    """Refuse splits that have recordings or copies of clips in common.

    Found are the same file in two splits, clips of one recording of a prepared folder, prepared
    clips with equal samples, also of different folders, and files with equal bytes. Not found are
    recordings that were encoded, cut or resampled in another way.

    Args:
        splits: Clips by the name of their split.
        contents: Reads the clips, as few as possible.

    Raises:
        DataError: Two splits share recordings or clips.
    """
    kinds: tuple[tuple[str, Callable[[ClipPaths, ClipPaths], Pairs]], ...]
    kinds = (("recordings", shared_recordings), ("clips", contents.copies))
    for what, compare in kinds:
        for (name, one), (other_name, other) in itertools.combinations(splits.items(), 2):
            shared = compare(one.paths, other.paths)
            if shared:
                first, second = shared[0]
                raise DataError(
                    f"{len(shared)} {what} of {name} ({one.source}) are also in {other_name} "
                    f"({other.source}), such as {first} and {second}: expected none; "
                    "finetune.allow_leakage=true trains all the same"
                )
