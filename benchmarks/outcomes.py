"""What the runs of ``ssast bench reproduce`` amount to: accuracies, gains, differences."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssast.benchmarks.study import (
    ABLATIONS,
    MODELS,
    FineTuning,
    Model,
    Plan,
    accuracy,
    chosen_rate,
    diverged,
)

# Gong et al., AAAI 2022: base models, mAP (AudioSet-20K) or accuracy, in percent. From scratch
# there is a patch model alone.
PUBLISHED = {
    "AudioSet-20K": {"scratch": 14.8, "patch": 31.0, "frame": 29.2},
    "ESC-50": {"scratch": 41.9, "patch": 88.8, "frame": 85.9},
    "Speech Commands 2": {"scratch": 92.6, "patch": 98.0, "frame": 98.1},
    "Speech Commands 1": {"scratch": 87.2, "patch": 96.0, "frame": 96.7},
    "VoxCeleb1": {"scratch": 30.1, "patch": 64.3, "frame": 80.8},
    "IEMOCAP": {"scratch": 51.9, "patch": 59.6, "frame": 60.5},
}
# The same, AudioSet-20K, of patch models pretrained in other ways.
PUBLISHED_ABLATIONS = {
    "short": 31.0,
    "generative": 16.1,
    "discriminative": 30.6,
    "masked-100": 28.7,
    "masked-250": 30.4,
}


@dataclass(frozen=True)
class Cell:
    """What is finished of a model on a task.

    Attributes:
        rate: The chosen learning rate.
        tried: Accuracies on held-out clips by learning rate, NaN where training diverged.
        accuracies: On the test clips, by seed.
        num_diverged: Seeds without an accuracy.
    """

    rate: float
    tried: Mapping[float, float]
    accuracies: tuple[float, ...]
    num_diverged: int

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.mean(self.accuracies)


Cells = Mapping[tuple[str, str], Cell]


def gather(plan: Plan, out: Path) -> dict[tuple[str, str], Cell]:
    """The cells with a test accuracy, by names of model and task."""
    cells = {}
    for model in MODELS.values():
        for task in plan.tasks_of(model):
            rate = chosen_rate(plan, model, task, out)
            if rate is None:
                continue
            folders = [
                FineTuning(model, task, rate, seed).folder(out) for seed in range(plan.seeds)
            ]
            found = [accuracy(folder, "test") for folder in folders]
            values = tuple(value for value in found if value is not None)
            if not values:
                continue
            tried = {}
            for each in plan.rates if model.tuned else ():
                value = accuracy(FineTuning(model, task, each, 0).folder(out), "valid")
                tried[each] = float("nan") if value is None else value
            gone = sum(map(diverged, folders))
            cells[model.name, task] = Cell(rate, tried, values, gone)
    return cells


def gains(cells: Cells, family: str) -> dict[str, list[float]]:
    """Relative gains of a pretrained over the scratch model, by task, a number for each seed."""
    found = {}
    for (name, task), cell in cells.items():
        other = cells.get((f"{family}-scratch", task))
        if name == family and other is not None:
            pairs = zip(cell.accuracies, other.accuracies, strict=False)
            found[task] = [ours / theirs - 1 for ours, theirs in pairs if theirs]
    return {task: values for task, values in found.items() if values}


def over_tasks(columns: Iterable[Sequence[float]]) -> list[float]:
    """The mean over the tasks, for each seed that all of them have."""
    return [statistics.mean(row) for row in zip(*columns, strict=False)]


def comparison(ours: Sequence[float], theirs: Sequence[float]) -> int:
    """1 or -1 if the mean of ours is higher or lower by more than two standard errors, else 0.

    The errors are those of the mean over seeds; with fewer than two of either it is 0.
    """
    if min(len(ours), len(theirs)) < 2:
        return 0
    difference = statistics.mean(ours) - statistics.mean(theirs)
    error = sum(statistics.variance(values) / len(values) for values in (ours, theirs)) ** 0.5
    return (difference > 2 * error) - (difference < -2 * error)


def averaged(plan: Plan, cells: Cells, model: Model) -> list[float]:
    """Test accuracy over the ablations' tasks, for each seed; empty if one is not finished."""
    tasks = plan.tasks_of(ABLATIONS[0])
    if any((model.name, task) not in cells for task in tasks):
        return []
    return over_tasks(cells[model.name, task].accuracies for task in tasks)


def published_gain(family: str) -> float:
    """Mean relative gain over training from scratch in the paper, in percent."""
    return 100 * statistics.mean(row[family] / row["scratch"] - 1 for row in PUBLISHED.values())
