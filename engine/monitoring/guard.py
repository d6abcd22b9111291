"""Detection of training problems: non-finite gradients, loss spikes and collapse."""

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ssast.pipelines.files import append
from ssast.pipelines.text import json_line

WINDOW = 20  # last logged losses that a loss is compared with
MIN_LOSSES = 5  # no detection before there are that many

_log = logging.getLogger(__name__)


def non_finite_clips(
    micro_batches: Sequence[tuple[Tensor, dict[str, Tensor]]],
) -> tuple[list[int], bool]:
    """Find the clips of a step whose gradient was not finite.

    Args:
        micro_batches: Clip ids [B] and outputs of the module, [B, ...] each, per micro-batch.

    Returns:
        The clips whose outputs are not finite, and True; or, if all outputs are finite, all clips
        of this rank and False: a gradient does not tell which clip it came from.
    """
    bad: list[int] = []
    for clip_ids, outputs in micro_batches:
        rows = [~value.detach().flatten(1).isfinite().all(1) for value in _rows(outputs)]
        bad += clip_ids[torch.stack(rows).any(0)].tolist()
    everything = [clip for clip_ids, _ in micro_batches for clip in clip_ids.tolist()]
    return (bad, True) if bad else (everything, False)


def _rows(outputs: dict[str, Tensor]) -> list[Tensor]:
    return [value.unsqueeze(1) if value.ndim == 1 else value for value in outputs.values()]


class SkipLog:
    """Log of the clips of skipped steps, and a count of consecutive skips.

    Args:
        path: Path of skipped.jsonl, to which all ranks append.
        rank: Rank of this process.
        name_of: Function from the row of a clip to its path.
    """

    def __init__(self, path: Path, rank: int, name_of: Callable[[int], str]):
        self.path, self._rank, self._name_of = path, rank, name_of
        self.consecutive = 0

    def taken(self) -> None:
        """Note that a step was taken."""
        self.consecutive = 0

    def skipped(self, step: int, micro_batches: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> None:
        """Note that a step was skipped, and write its clips; see :func:`non_finite_clips`."""
        self.consecutive += 1
        clips, certain = non_finite_clips(micro_batches)
        line = {
            "step": step,
            "rank": self._rank,
            "certain": certain,
            "clips": [self._name_of(clip) for clip in clips],
        }
        try:
            append(self.path, json_line(line))
        except OSError as error:  # a full disk must not end the training
            _log.warning("%s is not written: %s: %s", self.path, error, json.dumps(line))


class SpikeGuard:
    """Detector of loss spikes.

    Args:
        factor: A loss is a spike when it exceeds the median of the last losses by more than this
            many median absolute deviations; None: never.
        losses: The last ones before a run was stopped.
    """

    def __init__(self, factor: float | None, losses: Iterable[float] = ()):
        self._factor = factor
        self.losses: deque[float] = deque(losses, maxlen=WINDOW)

    def spiked(self, loss: float) -> bool:
        """Return whether a loss is a spike; if not, later losses are compared with it too."""
        if self._factor is None or not math.isfinite(loss):
            return False  # no finite gradient: the step was skipped already
        if len(self.losses) >= MIN_LOSSES:
            median = statistics.median(self.losses)
            deviation = statistics.median(abs(past - median) for past in self.losses)
            # A floor, since a loss that barely moves has hardly any deviation.
            if loss - median > self._factor * max(deviation, 1e-3 * abs(median)):
                return True
        self.losses.append(loss)
        return False


class CollapseGuard:
    """Detector of a collapse: of metrics that stay below a floor.

    Args:
        floors: Lowest healthy value by name; other metrics are not looked at.
        reports: How many log lines in a row must be below it.
        below: How many were, by name, before a run was stopped.
    """

    def __init__(self, floors: Mapping[str, float], reports: int, below: Mapping[str, int] = {}):
        self.floors, self.reports = floors, reports
        self.below = {name: below.get(name, 0) for name in floors}

    def collapsed(self, values: Mapping[str, float]) -> str | None:
        """Take the metrics of one more log line; return the name of one that has collapsed."""
        for name, floor in self.floors.items():
            self.below[name] = self.below[name] + 1 if values[name] < floor else 0
            if self.below[name] >= self.reports:
                return name
        return None
