"""The order of the clips: pure functions of (seed, position), with no state to save.

The training stream is endless: one seeded permutation of the clips after another, one per epoch.
Position p of the stream is the clip ``permutation(seed, p // n)[p % n]``. A batch may straddle two
epochs, so no clip is ever left out; and since the stream does not depend on batches or ranks, a run
resumes at any position with another batch size or world size.

With weights, an epoch of n clips holds each clip in proportion to its weight, rounded up or down at
random, in a seeded order.
"""

import hashlib
import socket
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ssast.pipelines.clips.shared import MANY, ArrayWriter, forget, shared_arrays
from ssast.pipelines.errors import DataError
from ssast.pipelines.text import read_text


def generator(seed: int, number: int, epoch: int = 0) -> np.random.Generator:
    """Return a generator that depends on these numbers alone; all three are 0 or more."""
    key = np.array([seed, number], dtype=np.uint64)
    counter = np.array([0, 0, 0, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def row_type(num_clips: int) -> np.dtype:
    """Return the smaller type of integers that hold the rows of so many clips."""
    return np.dtype(np.int32 if num_clips < 2**31 else np.int64)


def permutation(seed: int, epoch: int, num_clips: int) -> np.ndarray:
    """Return the order of the clips in one epoch.

    Args:
        seed: Seed of the stream, 0 or more.
        epoch: Number of the epoch, from 0.
        num_clips: Number of clips, n.

    Returns:
        A permutation of 0 .. n - 1, [n] int32 (int64 beyond 2**31 clips).
    """
    # The draws do not depend on the type: half of the memory for the same order.
    return generator(seed, epoch).permutation(np.arange(num_clips, dtype=row_type(num_clips)))


@lru_cache(maxsize=4)  # a batch touches one or two epochs, read-ahead perhaps a third
def epoch_order(seed: int, epoch: int, num_clips: int) -> np.ndarray:
    """Return the permutation of an epoch, read-only; see :func:`permutation`."""
    what = ("order", int(seed), num_clips)
    return _drawn_once(what, epoch, num_clips, lambda: permutation(seed, epoch, num_clips))


def _drawn_once(
    what: tuple[Any, ...], epoch: int, num_clips: int, draw: Callable[[], np.ndarray]
) -> np.ndarray:
    """Return the order of an epoch, read-only; that of many clips is drawn once on a machine."""
    if num_clips < MANY:
        order = draw()
        order.setflags(write=False)
        return order

    # NFS takes a file that another machine removes from under a mapping: each has its own.
    what = (*what, socket.gethostname())

    def build(writer: ArrayWriter) -> None:
        forget((*what, epoch - 2))  # a batch may need the last one
        writer.write("order", draw())

    return shared_arrays((*what, epoch), (np.__version__,), build)["order"]


class Weights:
    """Sampling weights: how often each clip is drawn in an epoch, relative to the others.

    Args:
        values: Weights, [n], finite, 0 or more, not all 0.
        sizes: Clips in each of the sets that follow each other in the manifest; an epoch then holds
            each set in proportion to its weight, rounded up or down. One set if not given.

    Raises:
        ValueError: The values are not so.
    """

    def __init__(self, values: np.ndarray, sizes: Sequence[int] = ()) -> None:
        values = np.asarray(values, dtype=np.float64)
        if not (np.isfinite(values).all() and (values >= 0).all() and values.sum() > 0):
            raise ValueError("weights must be finite, 0 or more, and not all 0")
        self._values = values
        rows = np.flatnonzero(values).astype(row_type(len(values)))
        self._sets = np.split(rows, np.searchsorted(rows, np.cumsum(sizes[:-1])))
        self._name = ("weighted order", tuple(sizes), hashlib.sha256(values.tobytes()).hexdigest())

    def __len__(self) -> int:
        return len(self._values)

    def most_frequent(self, count: int) -> np.ndarray:
        """Return the clips that are drawn most often, [count] int64."""
        return np.argsort(-self._values, kind="stable")[:count]

    @lru_cache(maxsize=4)  # noqa: B019  # lives as long as the stream
    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Draw the clips of one epoch, [n] integers, read-only.

        Systematic sampling in an order that is drawn anew: n equally spaced points, all shifted by
        one random number, fall into the cumulative weights of the clips, shuffled within each set.
        So a clip of share s is drawn floor(n s) or ceil(n s) times, whatever its neighbours in the
        manifest are, and independently of other epochs.
        """
        what = (*self._name, int(seed))
        return _drawn_once(what, epoch, len(self), lambda: self._draw(generator(seed, epoch)))

    def _draw(self, random: np.random.Generator) -> np.ndarray:
        shuffled = np.concatenate([random.permutation(rows) for rows in self._sets])
        sums = np.cumsum(self._values[shuffled])
        points = (np.arange(len(self)) + random.random()) * (sums[-1] / len(self))
        # The last point may be rounded up to the whole sum, behind the last clip.
        drawn = np.minimum(np.searchsorted(sums, points, side="right"), len(shuffled) - 1)
        return random.permutation(shuffled[drawn])


def read_weights(path: str | Path, num_clips: int) -> Weights:
    """Read sampling weights from a text file with a number in each line.

    Raises:
        DataError: The file cannot be read, is no such file, or has another number of weights.
    """
    try:
        values = np.array([float(line) for line in read_text(Path(path)).split()])
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{path}: expected a number a line: {error}") from error
    if len(values) != num_clips:
        raise DataError(
            f"{path}: {len(values)} weights, but there are {num_clips} training clips, without "
            "those held out, which data.valid names"
        )
    try:
        return Weights(values)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def clips_at(
    positions: np.ndarray, num_clips: int, seed: int, weights: Weights | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the clips at some positions of the training stream.

    Args:
        positions: Positions, [B] int64, 0 or more.
        num_clips: Number of clips, n, at least 1.
        seed: Seed of the stream, 0 or more.
        weights: Sampling weights; without them each clip is drawn once in an epoch.

    Returns:
        clip_ids: Rows of the clips, [B] int64.
        epochs: Epoch of each, [B] int64. With weights a clip may be drawn several times in an
            epoch, so this is the position instead: random numbers of (clip, epoch) then differ
            between its draws.

    Raises:
        ValueError: There are no clips, or a position or the seed is negative.
    """
    if num_clips < 1:
        raise ValueError(f"the stream needs at least one clip, got {num_clips}")
    if seed < 0:
        raise ValueError(f"the seed must be 0 or more, got {seed}")
    if positions.size and int(positions.min()) < 0:
        raise ValueError(f"positions must be 0 or more, got {int(positions.min())}")
    epochs, offsets = np.divmod(positions, num_clips)
    clip_ids = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        if weights is None:
            order = epoch_order(seed, int(epoch), num_clips)
        else:
            order = weights.order(seed, int(epoch))
        clip_ids[here] = order[offsets[here]]
    return clip_ids, epochs if weights is None else positions


def rank_positions(
    start: int, iteration: int, batch_size: int, rank: int, world_size: int
) -> np.ndarray:
    """Return the positions of one rank's batch: the ranks take the clips of the stream in turn.

    Over all ranks and iterations every position from ``start`` on occurs exactly once, and after
    k iterations exactly the first k * batch_size * world_size of them.

    Args:
        start: First position of the run.
        iteration: Number of batches that the rank has taken since ``start``.
        batch_size: Clips in a batch of one rank.
        rank: Rank of this process.
        world_size: Number of ranks.

    Returns:
        Positions, [batch_size] int64.
    """
    first = start + iteration * batch_size * world_size + rank
    return first + world_size * np.arange(batch_size, dtype=np.int64)


def crop_position(seed: int, clip_id: int, epoch: int) -> float:
    """Return the relative position of this epoch's crop in a long recording, in [0, 1)."""
    return float(generator(seed, clip_id, epoch).random())
