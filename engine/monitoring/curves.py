"""Plots of the metrics of a run."""

from pathlib import Path
from typing import Any

from ssast.engine.monitoring.monitor import read_metrics, scalars
from ssast.pipelines.figures import save_figure, subplots

# Title of a panel, and the metrics that it shows.
PANELS = (
    ("loss", "train/loss", "valid/loss", "ema/loss"),
    ("InfoNCE loss (nats)", "train/infonce_loss", "valid/infonce_loss", "ema/infonce_loss"),
    ("MSE loss", "train/mse_loss", "valid/mse_loss", "ema/mse_loss"),
    (
        "pretext (InfoNCE) accuracy",
        "train/pretext_accuracy",
        "valid/pretext_accuracy",
        "ema/pretext_accuracy",
    ),
    ("latent loss (MSE)", "train/latent_loss", "valid/latent_loss", "ema/latent_loss"),
    ("CLS loss (MSE)", "train/cls_loss", "valid/cls_loss", "ema/cls_loss"),
    ("standard deviation of the targets", "train/target_std", "valid/target_std"),
    ("the same between clips at one patch", "train/content_std", "valid/content_std"),
    ("standard deviation of the predictions", "train/prediction_std", "valid/prediction_std"),
    ("accuracy", "train/accuracy", "valid/accuracy", "ema/accuracy"),
    ("mean average precision", "valid/map", "ema/map"),
    ("macro F1", "valid/macro_f1", "ema/macro_f1"),
    ("learning rate", "train/lr"),
    ("gradient norm", "train/grad_norm"),
    ("clips/s", "perf/clips_per_s"),
)
STYLES: dict[str, dict[str, Any]] = {
    "train": {"lw": 1.2},
    "valid": {"marker": "o", "ms": 4, "lw": 1.5},
    "ema": {"marker": "s", "ms": 3, "lw": 1.0, "ls": "--"},
    "perf": {"lw": 1.2},
}


def draw_curves(run: Path) -> Path:
    """Plot metrics.jsonl over the steps, training and validation together.

    Returns:
        Path of the picture, curves.png in the run's folder.
    """
    lines = read_metrics(run / "metrics.jsonl")
    logged = {name for line in lines for name in line}
    panels = [(title, curves) for title, *curves in PANELS if logged.intersection(curves)]
    rows = -(-len(panels) // 3) or 1
    figure, axes = subplots(rows, 3, figsize=(13, 3.4 * rows), squeeze=False, layout="tight")
    for axis, (title, curves) in zip(axes.flat, panels, strict=False):
        for name in curves:
            if points := scalars(lines, name):
                group = name.partition("/")[0]
                axis.plot(*zip(*points, strict=True), label=group, **STYLES[group])
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    if panels:
        axes.flat[0].legend(fontsize=9)
    return save_figure(figure, run / "curves.png")
