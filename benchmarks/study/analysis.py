"""Analysis of the runs of ``ssast bench reproduce``: accuracies, gains, significance."""

import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from ssast.benchmarks.study.models import MODELS, Model
from ssast.benchmarks.study.plan import (
    FineTuning,
    Plan,
    accuracy,
    chosen_rate,
    diverged,
    kept_models,
    pretraining_config,
)
from ssast.benchmarks.study.significance import Cell, Spread, over_tasks, spread_of
from ssast.engine.evaluation.report import PREDICTIONS, read_predictions
from ssast.pipelines.clips.holdout import recordings_of
from ssast.pipelines.clips.manifest import read_clips
from ssast.pipelines.clips.shards import ShardIndex
from ssast.pipelines.demo.publish import clips_of
from ssast.pipelines.demo.sounds import STUDY_TASKS

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


Cells = Mapping[tuple[str, str], Cell]


@cache
def _names(data: str) -> list[str]:
    """Return the name of the recording of each clip of the study's data, by row."""
    return [clip.name for clip in clips_of(ShardIndex(Path(data)))]


@cache
def groups_of(plan: Plan, task: str) -> tuple[Hashable, ...]:
    """Return the group of each test clip of a task, of which none is on both sides of its split.

    Of a task that is none of the study's: its recording.
    """
    clips = read_clips(plan.labelled(task, "eval"))
    known = next((each for each in STUDY_TASKS if each.name == task), None)
    recordings = recordings_of(clips).tolist()
    if known is None or not isinstance(clips, ShardIndex):
        return tuple((task, number) for number in recordings)
    names = _names(plan.data)
    rows = range(len(clips)) if clips.rows is None else clips.rows.tolist()
    labels = [known.label(names[row]) for row in rows]
    return tuple(
        (task, number) if label is None else label.group
        for label, number in zip(labels, recordings, strict=True)
    )


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
            finished = {
                seed: folder
                for seed, folder in enumerate(folders)
                if accuracy(folder, "test") is not None
            }
            if not finished:
                continue
            tried = {}
            for each in plan.rates if model.tuned else ():
                value = accuracy(FineTuning(model, task, each, 0).folder(out), "valid")
                tried[each] = float("nan") if value is None else value
            right = np.array([
                [label == name for label, name in read_predictions(folder / "test" / PREDICTIONS)]
                for folder in finished.values()
            ])  # fmt: skip
            gone = sum(map(diverged, folders))
            groups = groups_of(plan, task)
            if len(groups) != right.shape[1]:  # some clips could not be read
                groups = ()
            cells[model.name, task] = Cell(rate, tried, gone, tuple(finished), right, groups)
    return cells


def is_complete(plan: Plan, model: Model, cell: Cell | None) -> bool:
    """Return whether each seed of a model on a task is finished, or diverged."""
    return cell is not None and len(cell.seeds) + cell.num_diverged >= plan.seeds_of(model)


@dataclass(frozen=True)
class Gain:
    """Relative gain of a pretrained model over the same one from scratch.

    Attributes:
        accuracies: Mean test accuracies, from scratch and pretrained, on each task that both have
            finished.
        margin: Half of the 95 % interval of the mean over the tasks, over fine-tuning seeds and
            groups of test clips; None with one seed.
    """

    accuracies: Mapping[str, tuple[float, float]]
    margin: float | None

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
    ours, theirs = zip(*pairs.values(), strict=True)
    # The linear terms of ours / theirs.
    weights = [1 / other.mean / len(pairs) for other in theirs]
    their_weights = [
        weight * one.mean / other.mean
        for weight, one, other in zip(weights, ours, theirs, strict=True)
    ]
    spread = spread_of(ours, theirs, weights, their_weights)
    return Gain(
        {task: (theirs.mean, ours.mean) for task, (ours, theirs) in pairs.items()},
        None if spread is None else spread.margin,
    )


def gain_curve(plan: Plan, cells: Cells, family: str) -> list[tuple[int, Gain]]:
    """Return (clips seen, gain over training from scratch) at the kept steps and at the end.

    Only points at which all tasks are finished: a mean over fewer is another curve, and one over
    fewer seeds has another interval. Nothing without one of the kept steps.
    """
    kept = [model for model in kept_models(plan) if model.family == family]
    batch = pretraining_config(plan, MODELS[family], Path()).train.batch_size
    points = []
    for model in (*kept, MODELS[family]):
        needed = (model, MODELS[f"{family}-scratch"])
        if all(is_complete(plan, m, cells.get((m.name, t))) for m in needed for t in plan.tasks):
            found = gain(cells, model.name, family, plan.tasks)
            if found is not None and len(found.by_task) == len(plan.tasks):
                points.append(((model.step or plan.steps) * batch, found))
    return points if len(points) > 1 else []


def difference(ours: Sequence[Cell], theirs: Sequence[Cell]) -> tuple[float, Spread] | None:
    """Return how much higher a model's mean accuracy over some tasks is, and its spread.

    None with fewer than two seeds of either.
    """
    share = [1 / len(ours)] * len(ours)
    spread = spread_of(ours, theirs, share, share)
    if spread is None:
        return None
    return statistics.mean(over_tasks(ours)) - statistics.mean(over_tasks(theirs)), spread


def significant_sign(ours: Sequence[Cell], theirs: Sequence[Cell]) -> int:
    """Compare mean accuracies: 1 if ours is significantly higher, -1 if lower, else 0.

    A difference is significant if its 95 % interval, over seeds and groups of test clips, does not
    hold 0. With fewer than two seeds of either, none is.
    """
    found = difference(ours, theirs)
    return 0 if found is None else _sign(*found)


def _sign(mean: float, spread: Spread) -> int:
    return (mean > spread.margin) - (mean < -spread.margin)


def compare(
    cells: Cells, one: str, other: str, tasks: Sequence[str]
) -> tuple[list[str], list[str], list[str]]:
    """Split tasks by whether a model is significantly better than another, worse, or neither.

    Tasks on which one of them has fewer than two seeds are left out.
    """
    pairs = {t: difference([cells[one, t]], [cells[other, t]]) for t in tasks}
    signs = {t: _sign(*found) for t, found in pairs.items() if found is not None}
    higher, lower, neither = ([t for t in signs if signs[t] == sign] for sign in (1, -1, 0))
    return higher, lower, neither


def on_tasks(cells: Cells, name: str, tasks: Sequence[str]) -> list[Cell]:
    """Return the results of a model on some tasks; none if one is not finished."""
    found = [cells[name, task] for task in tasks if (name, task) in cells]
    return found if len(found) == len(tasks) else []


def published_gain(family: str) -> float:
    """Return the paper's mean relative gain over training from scratch, in percent."""
    return 100 * statistics.mean(row[family] / row["scratch"] - 1 for row in PUBLISHED.values())
