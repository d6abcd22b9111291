"""Figures of the results page."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssast.pipelines.figures import save_figure, subplots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

from ssast.benchmarks.study.analysis import Gain
from ssast.engine.monitoring.monitor import scalars

Curve = Sequence[tuple[float, float]]


def draw_gains(
    path: Path, tasks: Mapping[str, Mapping[str, Sequence[float]]], chances: Mapping[str, float]
) -> Path:
    """Draw bars of test accuracy by task and model, with the standard deviation over seeds.

    Args:
        path: Path of the PNG.
        tasks: Accuracies of each seed, by task and model.
        chances: Fraction of the largest class of each task, drawn as a dashed line.
    """
    names = list(dict.fromkeys(name for models in tasks.values() for name in models))
    figure, axis = subplots(figsize=(2.5 + 2 * len(tasks), 4))
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        found = [(place, m[name]) for place, m in enumerate(tasks.values()) if name in m]
        axis.bar(
            [place + (number + 0.5) * width - 0.4 for place, _ in found],
            [100 * statistics.mean(values) for _, values in found],
            width,
            yerr=[100 * statistics.stdev(v) if len(v) > 1 else 0 for _, v in found],
            capsize=3,
            color=_colour(name),
            label=name,
        )
    for place, task in enumerate(tasks):
        axis.hlines(100 * chances[task], place - 0.45, place + 0.45, "black", "--", lw=1)
    axis.set_xticks(range(len(tasks)), list(tasks))
    axis.set_ylabel("test accuracy, % (dashed: the largest class)")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8)
    return save_figure(figure, path)


def draw_learning(path: Path, tasks: Mapping[str, Mapping[str, Sequence[Curve]]]) -> Path:
    """Draw validation accuracy over fine-tuning epochs: seeds as thin lines, their mean thick.

    Args:
        path: Path of the PNG.
        tasks: (epoch, accuracy) of each seed, by task and model.
    """
    figure, axes = subplots(1, len(tasks), figsize=(4.2 * len(tasks), 3.6), squeeze=False)
    for axis, (task, models) in zip(axes.flat, tasks.items(), strict=True):
        for name, curves in models.items():
            for curve in curves:
                axis.plot(*_percent(curve), color=_colour(name), lw=0.6, alpha=0.5)
            mean = [
                (points[0][0], statistics.mean(value for _, value in points))
                for points in zip(*curves, strict=False)
            ]
            if mean:
                axis.plot(*_percent(mean), color=_colour(name), lw=2, label=name)
        axis.locator_params("x", nbins=5, integer=True)
        _label(axis, task, "epoch", "validation accuracy, %")
    if axes.flat[0].has_data():
        axes.flat[0].legend(fontsize=8)
    return save_figure(figure, path)


def draw_gain_curves(path: Path, families: Mapping[str, Sequence[tuple[int, Gain]]]) -> Path:
    """Draw test accuracy, and relative gain over training from scratch, against clips seen.

    A line per task; training from scratch is dashed. The mean gain over the tasks is thick, with
    half of its 95 % interval.

    Args:
        path: Path of the PNG.
        families: (clips, gain) by family of models.
    """
    shown = {family: points for family, points in families.items() if points}
    figure, axes = subplots(
        2, len(shown), figsize=(5.5 * len(shown), 7.5), squeeze=False, sharex="col", sharey="row"
    )
    for (upper, lower), (family, points) in zip(axes.T, shown.items(), strict=True):
        for number, task in enumerate(dict.fromkeys(t for _, g in points for t in g.accuracies)):
            there = [(n, gain) for n, gain in points if task in gain.accuracies]
            scratch, _ = there[0][1].accuracies[task]
            scores = [(n, gain.accuracies[task][1]) for n, gain in there]
            line = {"label": task, "color": f"C{number}", "lw": 1, "ms": 3}
            upper.plot(*_percent(scores), "o-", **line)
            upper.axhline(100 * scratch, color=line["color"], ls="--", lw=0.8)
            lower.plot(*_percent([(n, gain.by_task[task]) for n, gain in there]), "o-", **line)
        lower.errorbar(
            *_percent([(n, gain.mean) for n, gain in points]),
            [math.nan if gain.margin is None else 100 * gain.margin for _, gain in points],
            color="black",
            capsize=3,
            lw=2.5,
            elinewidth=1.2,
            fmt="s-",
            ms=4,
            label="mean, with its 95 % interval",
        )
        lower.axhline(0, color="black", ls="--", lw=0.8, label="0: training from scratch")
        lower.set_xscale("log")
        lower.set_xticks([n for n, _ in points], [f"{n:,}" for n, _ in points])
        lower.minorticks_off()
        _label(upper, family, "", "test accuracy, % (dashed: from scratch)")
        _label(lower, "", "clips seen in pretraining", "gain over training from scratch, %")
    if shown:
        handles, names = axes[1, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8)
    return save_figure(figure, path)


def draw_pretraining(path: Path, logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Draw validation losses and pretext accuracy over pretraining steps, a line per model.

    Args:
        path: Path of the PNG.
        logs: Lines of metrics.jsonl, by model.
    """
    panels = (
        ("valid/infonce_loss", "InfoNCE loss (nats)", 1),
        ("valid/mse_loss", "MSE loss", 1),
        ("valid/pretext_accuracy", "pretext (InfoNCE) accuracy, %", 100),
    )
    figure, axes = subplots(1, len(panels), figsize=(13, 4))
    for axis, (key, title, scale) in zip(axes, panels, strict=True):
        for name, lines in logs.items():
            points = [(step, scale * value) for step, value in scalars(lines, key)]
            # A model without this metric still takes its colour: the same in all panels.
            axis.plot(*(zip(*points, strict=True) if points else ([], [])), label=name, lw=1.5)
        axis.locator_params("x", nbins=5, integer=True)
        _label(axis, title, "step", "")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8)
    return save_figure(figure, path)


def _percent(curve: Curve) -> tuple[list[float], list[float]]:
    return [x for x, _ in curve], [100 * y for _, y in curve]


def _colour(name: str) -> str:
    """Return the colour of a model: by family, paler from scratch."""
    dark, pale = ("#b5482b", "#e9b9a6") if name.startswith("frame") else ("#2b5fb5", "#a9c2ea")
    return pale if "scratch" in name else dark


def _label(axis: "Axes", title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.grid(alpha=0.3)
