"""The curves of a run, drawn from its metrics.jsonl."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ssast.engine.monitoring.monitor import read_metrics


def draw_curves(run: Path) -> Path:
    """Loss, its two parts, accuracy and learning rate over the steps, from metrics.jsonl.

    Returns:
        The picture, curves.png in the run's folder.
    """
    lines = read_metrics(run / "metrics.jsonl")
    panels = [
        ("loss", "loss (joint)"),
        ("nce", "InfoNCE (nats)"),
        ("mse", "reconstruction MSE"),
        ("accuracy", "accuracy (of patches told apart, or of clips)"),
        ("map", "mean average precision"),
        ("macro_f1", "macro F1"),
        ("lr", "learning rate"),
        ("clips_per_s", "clips/s"),
    ]
    panels = [(key, title) for key, title in panels if any(key in line for line in lines)]
    rows = -(-len(panels) // 3) or 1
    figure, axes = plt.subplots(rows, 3, figsize=(13, 3.4 * rows), squeeze=False)
    for axis, (key, title) in zip(axes.flat, panels, strict=False):
        for split, style in (
            ("train", {"lw": 1.2}),
            ("valid", {"marker": "o", "ms": 4, "lw": 1.5}),
        ):
            points = [(li["step"], li[key]) for li in lines if li["split"] == split and key in li]
            if points:
                axis.plot(*zip(*points, strict=True), label=split, **style)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    if panels:
        axes.flat[0].legend(fontsize=9)
    return _save(figure, run / "curves.png")


def _save(figure: Figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
