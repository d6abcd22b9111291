"""A fixed part of the held-out clips, for validations that must not take long.

Everything here is a pure function of the clips, their recordings and labels, and of the seed of the
hold-out: every run draws the same clips from the same held-out ones, whatever ``train.seed`` is.
"""

import numpy as np

from ssast.pipelines.clips.holdout import SEED, Labels, numbered, recordings_of
from ssast.pipelines.clips.mix import MixedClips
from ssast.pipelines.clips.order import permutation
from ssast.pipelines.clips.shards import ClipPaths


def draw_clips(paths: ClipPaths, count: int, labels: Labels | None = None) -> np.ndarray:
    """Choose clips that stand for all of them.

    Each class, or each set of a mix, has one clip at least if there is room, and its share of the
    clips, rounded down at most; those of a class are spread evenly over its recordings.

    Args:
        paths: The clips, n of them.
        count: Largest number of clips to choose.
        labels: Classes of each clip, [n]; clips without any are of one class more.

    Returns:
        Rows of the clips, ascending, [min(count, n)] int64.

    Raises:
        DataError: A list of a prepared folder cannot be read.
    """
    total = len(paths)
    if count >= total:
        return np.arange(total)
    _, recordings = np.unique(recordings_of(paths), return_inverse=True)
    rank = np.argsort(permutation(SEED, 0, int(recordings.max()) + 1))
    order = np.argsort(rank[recordings], kind="stable")  # clips of a recording side by side
    groups = sorted(_groups(paths, order, labels), key=len)
    chosen, room = np.zeros(total, bool), count

    def choose(group: np.ndarray, wanted: int) -> None:
        """Bring a group to a number of chosen clips, while there is room."""
        nonlocal room
        left = group[~chosen[group]]
        have = len(group) - len(left)
        number = min(max(wanted - have, 0), len(left), room)
        # The middles of equally long stretches of the drawn order.
        chosen[left[(2 * np.arange(number) + 1) * len(left) // (2 * max(number, 1))]] = True
        room -= number

    for group in groups:  # the rarest first, which then need not be looked for again
        choose(group, 1)
    for group in groups:
        choose(group, count * len(group) // total)
    choose(order, count)
    return np.flatnonzero(chosen)


def _groups(paths: ClipPaths, order: np.ndarray, labels: Labels | None) -> list[np.ndarray]:
    """Return the clips of each class or of each set, in the given order."""
    if labels is not None:
        clips, classes = numbered(labels)
    elif isinstance(paths, MixedClips):
        clips = np.arange(len(paths))
        classes = np.repeat(np.arange(len(paths.parts)), [len(part) for part in paths.parts])
    else:
        return [order]
    rows = np.lexsort((np.argsort(order)[clips], classes))
    return np.split(clips[rows], np.cumsum(np.bincount(classes))[:-1])
