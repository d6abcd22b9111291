"""The figures of the page about a data set."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ssast.pipelines.figures import save_figure, subplots
from ssast.pipelines.prepare.look import SILENT_DB, Look

BLUE, GREY = "#3b6ea5", "#8a8f98"
NAMED_CLASSES = 40  # at most; more are drawn as a curve
COLUMNS = 4  # of the grid of spectrograms
LONGEST_TITLE = 34  # characters above a spectrogram
QUIETEST_DB = -100.0  # of the histogram; what lies below is in its first bin


def draw_lengths(look: Look, path: Path) -> Path:
    """Draw the lengths of the clips, and that of the frames that are suggested."""
    seconds = np.array([clip.seconds for clip in look.heard])
    figure, axes = subplots(figsize=(7, 2.6))
    low, high = float(seconds.min()), float(seconds.max())
    is_wide = high > 20 * max(low, 1e-3)
    low, high = max(low, 1e-3), max(high, low * 1.001, 2e-3)
    edges = np.geomspace(low, high, 41) if is_wide else np.linspace(0, 1.02 * high, 41)
    axes.hist(seconds, edges, color=BLUE)
    if is_wide:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    crop_s = look.stats.num_frames / 100
    axes.axvline(crop_s, color="black", linestyle=":", label=f"num_frames: {crop_s:g} s")
    axes.set(xlabel="length in s", ylabel="clips")
    axes.legend(frameon=False)
    return save_figure(_plain(figure), path)


def draw_levels(look: Look, path: Path) -> Path:
    """Draw the levels of the clips, and how much of each is silence."""
    figure, (left, right) = subplots(1, 2, figsize=(7, 2.6))
    levels = np.clip([clip.level_db for clip in look.heard], QUIETEST_DB, 6)
    left.hist(levels, np.linspace(QUIETEST_DB, 6, 54), color=BLUE)
    left.set(xlabel="level (RMS) in dB of full scale", ylabel="clips")
    right.hist([100 * clip.silent for clip in look.heard], np.linspace(0, 100, 41), color=BLUE)
    right.set(xlabel=f"% of a clip below {SILENT_DB:g} dB", ylabel="clips")
    right.set_yscale("symlog", linthresh=1)
    return save_figure(_plain(figure), path)


def draw_classes(counts: Counter[str], path: Path) -> Path:
    """Draw the number of clips of each class, the most frequent first."""
    values = sorted(counts.values(), reverse=True)
    if len(counts) <= NAMED_CLASSES:
        named = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        figure, axes = subplots(figsize=(7, 0.8 + 0.22 * len(named)))
        axes.barh(range(len(named)), values, color=BLUE)
        axes.set_yticks(range(len(named)), [_short(name) for name, _ in named])
        axes.invert_yaxis()
        axes.set(xlabel="clips")
        axes.margins(y=0.01)
    else:
        figure, axes = subplots(figsize=(7, 2.6))
        axes.fill_between(range(1, len(values) + 1), values, step="mid", color=BLUE)
        axes.set_yscale("log")
        axes.set(xlabel="classes, the most frequent first", ylabel="clips", xlim=(1, len(values)))
    return save_figure(_plain(figure), path)


def draw_spectrograms(look: Look, path: Path) -> Path:
    """Draw the log-mel of some clips, on one scale, with labels and names."""
    count = len(look.spectrograms)
    rows = -(-count // COLUMNS)
    figure, grid = subplots(rows, COLUMNS, figsize=(11, 1.75 * rows), squeeze=False)
    low = look.stats.mean - 2 * look.stats.std
    high = look.stats.mean + 2.5 * look.stats.std
    for axes in grid.flat[count:]:
        axes.axis("off")
    for axes, names, (clip, values) in zip(grid.flat, look.names, look.spectrograms, strict=False):
        seconds = len(values) / 100
        axes.imshow(
            values.T,
            origin="lower",
            aspect="auto",
            extent=(0, seconds, 0, values.shape[1]),
            vmin=low,
            vmax=high,
            cmap="magma",
        )
        title = ", ".join(names) or str(clip).rpartition("/")[2]
        axes.set_title(_short(title), fontsize=8, loc="left")
        axes.set_yticks([])
        axes.tick_params(labelsize=7, length=2)
        axes.locator_params(axis="x", nbins=4)
    return save_figure(figure, path)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_TITLE else text[: LONGEST_TITLE - 3] + "..."


def _plain(figure: Any) -> Any:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(color=GREY, labelsize=8)
    return figure
