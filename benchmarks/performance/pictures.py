"""Pictures of the performance page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ssast.benchmarks.training.variants import DEFAULT, OPTIONS, VARIANTS, Variant, label
from ssast.pipelines.figures import save_figure, subplots

if TYPE_CHECKING:
    from ssast.benchmarks.performance.tables import Row

DARK, PALE, ORANGE, GREY = "#2b5fb5", "#a9c2ea", "#e0a458", "#8a8a8a"
PART_COLOURS = ("#8a8a8a", "#a9c2ea", "#6d9eeb", "#2b5fb5", "#1d3f78", "#7fb685", "#c65b4b",
                "#e0a458", "#d9d9d9", "#b39bc8")  # fmt: skip


def draw_steps(path: Path, sizes: "Mapping[str, Sequence[Row]]", words: str) -> Path:
    """Draw the speedup of each variant over the published step as bars, a panel for each size.

    The default of ``ssast pretrain`` is dark, its options are orange.

    Args:
        path: Path of the PNG file.
        sizes: Measured variants of each size, the published step first.
        words: Title: what a step computes, and on which machine.
    """
    measured = {row.variant for rows in sizes.values() for row in rows}
    variants = [v for v in (*VARIANTS.values(), *OPTIONS.values()) if v in measured]
    figure, axes = subplots(
        1,
        len(sizes),
        figsize=(3.4 + 2.9 * len(sizes), 1.5 + 0.32 * len(variants)),
        sharey=True,
        squeeze=False,
    )
    for axis, (size, rows) in zip(axes.flat, sizes.items(), strict=True):
        for row in rows:
            place = variants.index(row.variant)
            axis.barh(place, row.speedup, 0.75, color=_colour(row.variant))
            text = f" {row.speedup:.1f}x" if row is not rows[0] else f" {row.wall_s:.3g} s"
            if row.variant == DEFAULT:
                text += f", {row.wall_s:.3g} s"
            axis.text(row.speedup, place, text, va="center", fontsize=8)
        axis.set_xlim(0, 1.32 * max(row.speedup for row in rows))
        axis.set_title(size, fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("times as fast as the published step", fontsize=8)
        axis.tick_params(labelsize=8)
    axes[0, 0].set_yticks(range(len(variants)), map(label, variants), fontsize=9)
    axes[0, 0].invert_yaxis()
    figure.suptitle(words, fontsize=9)
    return save_figure(figure, path)


def _colour(variant: Variant) -> str:
    if variant in OPTIONS.values():
        return ORANGE
    return {VARIANTS["published"]: GREY, DEFAULT: DARK}.get(variant, PALE)


def draw_parts(path: Path, shares: Mapping[str, Mapping[str, float]]) -> Path:
    """Draw the shares of the parts of a step, a bar for each size."""
    figure, axis = subplots(figsize=(9, 1.3 + 0.5 * len(shares)))
    for place, parts in enumerate(shares.values()):
        left = 0.0
        for (part, share), colour in zip(parts.items(), PART_COLOURS, strict=False):
            axis.barh(place, share, 0.7, left, color=colour, label=None if place else part)
            if share > 0.05:
                axis.text(left + share / 2, place, f"{share:.0%}", ha="center", va="center",
                          fontsize=8, color="white")  # fmt: skip
            left += share
    axis.set_yticks(range(len(shares)), list(shares))
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.set_xlabel("share of the time of a step", fontsize=9)
    axis.legend(ncols=5, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return save_figure(figure, path)


def draw_scaling(path: Path, rates: Mapping[str, Mapping[str, float]]) -> Path:
    """Draw clips per second: lines over numbers, bars over names.

    Args:
        path: Path of the PNG file.
        rates: Clips per second of each value, by what was varied.
    """
    figure, axes = subplots(1, len(rates), figsize=(3.2 * len(rates), 3.1), squeeze=False)
    for axis, (what, found) in zip(axes.flat, rates.items(), strict=True):
        values = list(found.values())
        if all(name.isdigit() for name in found):
            numbers = [int(name) for name in found]
            axis.plot(numbers, values, "o-", color=DARK)
            axis.set_xscale("log", base=2)
            axis.set_xticks(numbers, list(found))
            axis.minorticks_off()
        else:
            axis.bar(list(found), values, 0.6, color=DARK)
            for place, value in enumerate(values):
                axis.text(place, value, f"{value:.3g}", ha="center", va="bottom", fontsize=8)
        axis.set_ylim(0, 1.15 * max(values))
        axis.set_xlabel(what, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(axis="y", alpha=0.3)
    axes[0, 0].set_ylabel("clips per second", fontsize=9)
    return save_figure(figure, path)
