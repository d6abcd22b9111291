"""Notices training that goes wrong: gradients that are not finite, losses that jump."""

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

WINDOW = 20  # log lines that a loss is compared with
ENOUGH = 5  # and how many there must be at least


def culprits(seen: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> tuple[list[int], bool]:
    """The clips of a step that had no finite gradient.

    Args:
        seen: For each micro-step its clip ids [B] and what the module gave for them, [B, ...].

    Returns:
        Those whose own outputs are not finite; all of the rank's clips where there are none, since
        a gradient says no more. And whether they are the former.
    """
    bad: list[int] = []
    for clip_ids, outputs in seen:
        rows = [~value.detach().flatten(1).isfinite().all(1) for value in _rows(outputs)]
        bad += clip_ids[torch.stack(rows).any(0)].tolist()
    everything = [clip for clip_ids, _ in seen for clip in clip_ids.tolist()]
    return (bad, True) if bad else (everything, False)


def _rows(outputs: dict[str, Tensor]) -> list[Tensor]:
    return [value.unsqueeze(1) if value.ndim == 1 else value for value in outputs.values()]


class SkipLog:
    """Writes the clips of skipped steps to skipped.jsonl and counts skips in a row.

    Args:
        path: Of the file; all ranks append to it.
        rank: This process's.
        name_of: Path of a clip, by its row.
    """

    def __init__(self, path: Path, rank: int, name_of: Callable[[int], str]):
        self.path, self._rank, self._name_of = path, rank, name_of
        self.in_row = 0

    def taken(self) -> None:
        """The step was taken."""
        self.in_row = 0

    def skipped(self, step: int, seen: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> None:
        """The step was left out."""
        self.in_row += 1
        clips, certain = culprits(seen)
        line = {
            "step": step,
            "rank": self._rank,
            "certain": certain,
            "clips": [self._name_of(clip) for clip in clips],
        }
        with self.path.open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


class SpikeGuard:
    """Tells whether a loss is out of line with those before it.

    Args:
        factor: How many times the median deviation from the median of the last losses is too much;
            None: nothing is.
    """

    def __init__(self, factor: float | None):
        self._factor = factor
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def spiked(self, loss: float) -> bool:
        """Whether this one is; takes it into account for later ones if not."""
        if self._factor is None or not math.isfinite(loss):
            return False  # a loss that is no number has no gradient: its step was skipped
        if len(self._losses) >= ENOUGH:
            middle = statistics.median(self._losses)
            spread = statistics.median(abs(past - middle) for past in self._losses)
            if loss - middle > self._factor * max(spread, 1e-3 * abs(middle)):
                return True
        self._losses.append(loss)
        return False
