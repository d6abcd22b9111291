"""Analysis of the runs of ``ssast bench reproduce``: accuracies, gains, significance."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssast.benchmarks.study.models import MODELS
from ssast.benchmarks.study.plan import (
    BATCH,
    FineTuning,
    Plan,
    accuracy,
    chosen_rate,
    diverged,
    kept_models,
)
from ssast.engine.evaluation.report import PREDICTIONS, read_predictions

# Gong et al., AAAI 2022: base models, mAP (AudioSet-20K) or accuracy, in percent. Only a patch
# model was trained from scratch; the paper gives 60.9 % as the average gain of pretraining.
PUBLISHED = {
    "AudioSet-20K": {"scratch": 14.8, "patch": 31.0, "frame": 29.2},
    "ESC-50": {"scratch": 41.9, "patch": 88.8, "frame": 85.9},
    "Speech Commands 2": {"scratch": 92.6, "patch": 98.0, "frame": 98.1},
    "Speech Commands 1": {"scratch": 87.2, "patch": 96.0, "frame": 96.7},
    "VoxCeleb1": {"scratch": 30.1, "patch": 64.3, "frame": 80.8},
    "IEMOCAP": {"scratch": 51.9, "patch": 59.6, "frame": 60.5},
}
# Ablations of the pretraining of the patch model, AudioSet-20K.
PUBLISHED_ABLATIONS = {
    "short": 31.0,
    "generative": 16.1,
    "discriminative": 30.6,
    "masked-100": 28.7,
    "masked-250": 30.4,
}


@dataclass(frozen=True)
class Cell:
    """Results of a model on a task.

    Attributes:
        rate: The chosen learning rate.
        tried: Validation accuracy by learning rate, NaN where training diverged.
        accuracies: Test accuracy by seed.
        num_diverged: Number of seeds whose training diverged.
        correct: Fraction of the seeds that classify each test clip correctly.
    """

    rate: float
    tried: Mapping[float, float]
    accuracies: tuple[float, ...]
    num_diverged: int
    correct: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean test accuracy over the seeds."""
        return statistics.mean(self.accuracies)


Cells = Mapping[tuple[str, str], Cell]


def gather(plan: Plan, out: Path) -> dict[tuple[str, str], Cell]:
    """Collect the finished results, by names of model and task."""
    cells = {}
    for model in (*MODELS.values(), *kept_models(plan)):
        for task in plan.tasks_of(model):
            rate = chosen_rate(plan, model, task, out)
            if rate is None:
                continue
            folders = [
                FineTuning(model, task, rate, seed).folder(out)
                for seed in range(plan.seeds_of(model))
            ]
            found = [accuracy(folder, "test") for folder in folders]
            values = tuple(value for value in found if value is not None)
            if not values:
                continue
            tried = {}
            for each in plan.rates if model.tuned else ():
                value = accuracy(FineTuning(model, task, each, 0).folder(out), "valid")
                tried[each] = float("nan") if value is None else value
            named = [
                [label == name for label, name in read_predictions(folder / "test" / PREDICTIONS)]
                for folder, value in zip(folders, found, strict=True)
                if value is not None
            ]
            correct = tuple(map(statistics.mean, zip(*named, strict=True)))
            gone = sum(map(diverged, folders))
            cells[model.name, task] = Cell(rate, tried, values, gone, correct)
    return cells


@dataclass(frozen=True)
class Gain:
    """Relative gain of a pretrained model over the same one from scratch.

    Attributes:
        accuracies: Mean test accuracies, from scratch and pretrained, on each task that both have
            finished.
        error: Standard error of the mean over the tasks, of fine-tuning seeds and test clips; None
            with one seed.
    """

    accuracies: Mapping[str, tuple[float, float]]
    error: float | None

    @property
    def by_task(self) -> dict[str, float]:
        """Gain on each task."""
        return {task: ours / theirs - 1 for task, (theirs, ours) in self.accuracies.items()}

    @property
    def mean(self) -> float:
        """Mean over the tasks."""
        return statistics.mean(self.by_task.values())


def gain(cells: Cells, name: str, family: str, tasks: Sequence[str]) -> Gain | None:
    """Return the gain of a model over training from scratch; None if no task is finished.

    Args:
        cells: The finished results.
        name: Name of the pretrained model.
        family: Its family, whose model from scratch is the reference.
        tasks: Tasks to average over, as far as they are finished.
    """
    scratch = f"{family}-scratch"
    pairs = {
        task: (cells[name, task], cells[scratch, task])
        for task in tasks
        if (name, task) in cells and (scratch, task) in cells and cells[scratch, task].mean
    }
    if not pairs:
        return None
    errors = [_gain_variance(*pair) for pair in pairs.values()]
    known = [error for error in errors if error is not None]
    return Gain(
        {task: (theirs.mean, ours.mean) for task, (ours, theirs) in pairs.items()},
        sum(known) ** 0.5 / len(pairs) if len(known) == len(pairs) else None,
    )


def _gain_variance(ours: Cell, theirs: Cell) -> float | None:
    """Return the variance of ours / theirs by its linear terms; None with fewer than two seeds.

    It is that over seeds plus that over test clips, paired clip by clip.
    """
    if min(len(ours.accuracies), len(theirs.accuracies)) < 2:
        return None
    ratio = ours.mean / theirs.mean
    seeds = [statistics.variance(c.accuracies) / len(c.accuracies) for c in (ours, theirs)]
    residues = [a - ratio * b for a, b in zip(ours.correct, theirs.correct, strict=True)]
    clips = statistics.variance(residues) / len(residues)
    return (seeds[0] + ratio**2 * seeds[1] + clips) / theirs.mean**2


def gain_curve(plan: Plan, cells: Cells, family: str) -> list[tuple[int, Gain]]:
    """Return (clips seen, gain over training from scratch) at the kept steps and at the end.

    Nothing without one of the kept steps.
    """
    kept = [(model.step, model.name) for model in kept_models(plan) if model.family == family]
    points = [
        ((step or 0) * BATCH["pretrain"], found)
        for step, name in [*kept, (plan.steps, family)]
        if (found := gain(cells, name, family, plan.tasks)) is not None
    ]
    return points if len(points) > 1 else []


def over_tasks(columns: Iterable[Sequence[float]]) -> list[float]:
    """Average over the tasks, for each seed that all tasks have."""
    return [statistics.mean(row) for row in zip(*columns, strict=False)]


@dataclass(frozen=True)
class Difference:
    """Difference between the mean accuracies of two models over some tasks.

    Attributes:
        mean: The difference.
        of_seeds: Its standard error over seeds, on these test clips.
        of_clips: That over test clips, paired clip by clip.
    """

    mean: float
    of_seeds: float
    of_clips: float

    @property
    def error(self) -> float:
        """Standard error over seeds and test clips."""
        return math.hypot(self.of_seeds, self.of_clips)


def difference(ours: Sequence[Cell], theirs: Sequence[Cell]) -> Difference | None:
    """Compare two models on the same tasks; None with fewer than two seeds of either."""
    seeds = [over_tasks(cell.accuracies for cell in cells) for cells in (ours, theirs)]
    if min(map(len, seeds)) < 2:
        return None
    clips = 0.0
    for one, other in zip(ours, theirs, strict=True):
        each = [a - b for a, b in zip(one.correct, other.correct, strict=True)]
        clips += statistics.variance(each) / len(each) / len(ours) ** 2
    return Difference(
        statistics.mean(seeds[0]) - statistics.mean(seeds[1]),
        sum(statistics.variance(values) / len(values) for values in seeds) ** 0.5,
        clips**0.5,
    )


def significant_sign(ours: Sequence[Cell], theirs: Sequence[Cell]) -> int:
    """Compare mean accuracies: 1 if ours is significantly higher, -1 if lower, else 0.

    A difference is significant if it exceeds two standard errors (an approximate 95 % confidence
    interval), over seeds and test clips. With fewer than two seeds of either, none is.
    """
    found = difference(ours, theirs)
    if found is None:
        return 0
    return (found.mean > 2 * found.error) - (found.mean < -2 * found.error)


def compare(
    cells: Cells, one: str, other: str, tasks: Sequence[str]
) -> tuple[list[str], list[str], list[str]]:
    """Split tasks by whether a model is significantly better than another, worse, or neither."""
    signs = {t: significant_sign([cells[one, t]], [cells[other, t]]) for t in tasks}
    higher, lower, neither = ([t for t in tasks if signs[t] == sign] for sign in (1, -1, 0))
    return higher, lower, neither


def on_tasks(cells: Cells, name: str, tasks: Sequence[str]) -> list[Cell]:
    """Return the results of a model on some tasks; none if one is not finished."""
    found = [cells[name, task] for task in tasks if (name, task) in cells]
    return found if len(found) == len(tasks) else []


def published_gain(family: str) -> float:
    """Return the paper's mean relative gain over training from scratch, in percent."""
    return 100 * statistics.mean(row[family] / row["scratch"] - 1 for row in PUBLISHED.values())
