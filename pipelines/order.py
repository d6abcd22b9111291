"""Which clip comes when: pure functions of (seed, position), with no state to save.

The training stream is endless: one seeded permutation of the manifest after another, one per
epoch. Position p of the stream is the clip ``permutation(seed, p // n)[p % n]``. A batch may
straddle two epochs, so no clip is ever left out; and since the stream does not know batches or
ranks, a run goes on at any position with another batch size or number of ranks.
"""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=4)  # a batch touches one or two epochs, read-ahead perhaps a third
def permutation(seed: int, epoch: int, num_clips: int) -> np.ndarray:
    """The order of one pass over the manifest.

    Args:
        seed: Of the stream, 0 or more.
        epoch: Pass over the manifest, from 0.
        num_clips: n, rows of the manifest.

    Returns:
        [n] int64, a permutation of 0 .. n - 1; read-only.
    """
    bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    order = np.random.Generator(bits).permutation(num_clips)
    order.setflags(write=False)
    return order


def clips_at(positions: np.ndarray, num_clips: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The clips at some positions of the training stream.

    Args:
        positions: [B] int64, 0 or more.
        num_clips: n, rows of the manifest, at least 1.
        seed: Of the stream, 0 or more.

    Returns:
        clip_ids: [B] int64, rows of the manifest.
        epochs: [B] int64, the pass over the manifest of each.

    Raises:
        ValueError: For an empty manifest, a negative position or a negative seed.
    """
    if num_clips < 1:
        raise ValueError(f"the stream needs at least one clip, got {num_clips}")
    if seed < 0:
        raise ValueError(f"the seed must be 0 or more, got {seed}")
    if positions.size and int(positions.min()) < 0:
        raise ValueError(f"positions must be 0 or more, got {int(positions.min())}")
    epochs, places = np.divmod(positions, num_clips)
    clip_ids = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        clip_ids[here] = permutation(seed, int(epoch), num_clips)[places[here]]
    return clip_ids, epochs


def rank_positions(
    start: int, iteration: int, batch_size: int, rank: int, world_size: int
) -> np.ndarray:
    """The positions of one rank's batch: the ranks take the stream's clips in turn.

    Over all ranks and iterations every position from ``start`` on occurs exactly once, and after
    k iterations exactly the first k * batch_size * world_size of them.

    Args:
        start: First position of the run.
        iteration: Batches that the rank has taken since ``start``.
        batch_size: Clips per rank and batch.
        rank: Of this process, from 0.
        world_size: Number of ranks.

    Returns:
        [batch_size] int64.
    """
    first = start + iteration * batch_size * world_size + rank
    return first + world_size * np.arange(batch_size, dtype=np.int64)
