"""The order of the clips for all ranks of a large run, computed and checked on one machine."""

import resource
import time
from typing import Any

import numpy as np

from ssast.pipelines.clips.order import clips_at, permutation, rank_positions


def work_out_order(num_clips: int, world_size: int, batch: int, seed: int) -> dict[str, Any]:
    """Compute one epoch of every rank; check that each clip comes up exactly once.

    Args:
        num_clips: n, of the data set.
        world_size: Ranks.
        batch: Clips of a rank in a step.
        seed: Of the order.

    Returns:
        "partition": whether all clips of the epoch were read exactly once, by all ranks together;
        "seconds": for all ranks and steps; "rank_ms": for one rank and step, once the epoch is
        known; "epoch_s": to draw the epoch, once a rank and epoch; "peak_mib": of this process.
    """
    begin = time.perf_counter()
    order = permutation(seed, 0, num_clips)
    epoch_s = time.perf_counter() - begin
    times = np.zeros(num_clips, dtype=np.uint8)
    steps = -(-num_clips // (batch * world_size))
    begin = time.perf_counter()
    for step in range(steps):
        for rank in range(world_size):
            places = rank_positions(0, step, batch, rank, world_size)
            clips, epochs = clips_at(places, num_clips, seed)
            np.add.at(times, clips[epochs == 0], 1)
    seconds = time.perf_counter() - begin
    return {
        "clips": num_clips,
        "ranks": world_size,
        "steps": steps,
        "partition": bool((times == 1).all()),
        "seconds": seconds,
        "rank_ms": 1e3 * seconds / steps / world_size,
        "epoch_s": epoch_s,
        "permutation_mib": order.nbytes / 2**20,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }


def format_order(order: dict[str, Any]) -> str:
    """Format the result as text."""
    verdict = "each exactly once" if order["partition"] else "NOT each exactly once"
    return (
        f"order of {order['clips']:,} clips over {order['ranks']:,} ranks, {order['steps']:,} "
        f"steps: {verdict}\n"
        f"  drawn in {order['epoch_s']:.2f} s, {order['permutation_mib']:.0f} MiB; "
        f"{order['rank_ms']:.3f} ms for a rank's step, {order['seconds']:.1f} s for all; "
        f"{order['peak_mib']:,.0f} MiB at most in this process"
    )
