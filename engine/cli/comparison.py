"""The same fine-tuning twice, from scratch and from pretrained weights, and their curves."""

import json
from dataclasses import dataclass
from pathlib import Path

from ssast.engine.config import load_config
from ssast.engine.finetune import finetune
from ssast.engine.monitoring.monitor import read_metrics, scalars
from ssast.engine.parallel.ranks import leaving_world
from ssast.pipelines.figures import save_figure, subplots

# The rate that is better for training from scratch, of 3e-4 and 6e-4, on held-out clips.
EPOCHS, RATE, VALID_SHARE = 3, 3e-4, 0.15


@dataclass(frozen=True)
class Curve:
    """Accuracies of a fine-tuning run."""

    start: str
    """What it began from."""

    epochs: tuple[float, ...]
    valid: tuple[float, ...]
    """Accuracy on held-out clips after so many epochs, by which the best epoch is chosen."""

    test: float
    """Accuracy on test clips, which choose nothing."""

    num_test: int


def finetune_twice(
    pair: tuple[Path, Path], pretrained: Path, folder: Path, num_threads: int | None
) -> list[Curve] | int:
    """Fine-tune from scratch and from pretrained weights, with the same settings and clips.

    Each run goes on where an earlier call was stopped.

    Args:
        pair: Manifests of the clips to train on and of the test clips.
        pretrained: Pretrained weights.
        folder: Folder of both runs.
        num_threads: Threads that read clips, as ``data.num_threads``.

    Returns:
        The curves; or the number of the signal that stopped a run.

    Raises:
        DataError: Nothing can be held out of the clips, or too many cannot be read.
    """
    train, test = pair
    given = [f"data.train={train}", f"finetune.test={test}", f"data.valid_share={VALID_SHARE}"]
    given += [
        f"finetune.epochs={EPOCHS}",
        f"optim.lr={RATE}",
        "audio.ignore_padding=true",  # as the released weights: else they alone would have it
        f"data.num_threads={json.dumps(num_threads)}",
    ]
    starts = {"from scratch": None, "from released weights": pretrained}
    curves = []
    for start, weights in starts.items():
        run = folder / start.replace(" ", "_")
        with leaving_world():
            config = load_config("demo_finetune", [*given, f"run.folder={run}"])
            stopped = finetune(config, weights, resume=True)
        if stopped:
            return stopped
        curves.append(read_curve(start, run))
    return curves


def read_curve(start: str, run: Path) -> Curve:
    """Read the accuracies of a finished run."""
    points = dict(scalars(read_metrics(run / "metrics.jsonl"), "valid/accuracy"))
    steps_of_epoch = max(points) / EPOCHS
    test = json.loads((run / "test" / "metrics.json").read_text(encoding="utf-8"))
    epochs = tuple(step / steps_of_epoch for step in points)
    return Curve(start, epochs, tuple(points.values()), test["accuracy"], test["num_scored"])


def draw_comparison(curves: list[Curve], task: str, path: Path) -> Path:
    """Draw validation accuracy against epochs; the legend has the test accuracy."""
    figure, axis = subplots(figsize=(6.4, 4.2))
    for curve, color in zip(curves, ("tab:gray", "tab:blue"), strict=True):
        label = f"{curve.start} (test: {curve.test:.1%})"
        values = [100 * value for value in curve.valid]
        axis.plot(curve.epochs, values, marker="o", lw=2, color=color, label=label)
    axis.set_title(f"Fine-tuning on {task}, the same settings and clips", fontsize=11)
    axis.set_xlabel("epochs")
    axis.set_ylabel("accuracy on held-out clips, %")
    axis.set_xticks(range(EPOCHS + 1))
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left", fontsize=9)
    return save_figure(figure, path)
