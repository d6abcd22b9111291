"""Measure which learning rate a larger batch needs: the square-root rule against the linear one.

The demo's model is pretrained on the demo's recordings with equal numbers of clips, in batches of
24, 96 and 384 clips; the learning rate of the smallest is multiplied by the square root of the
ratio of the batches, and by the ratio. Runs that are there are kept; a picture and a table are made
of those that are finished.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from ssast.engine.config import load_config
from ssast.engine.errors import ConfigError
from ssast.engine.monitoring.monitor import read_metrics
from ssast.engine.pretrain import pretrain
from ssast.pipelines.figures import save_figure, subplots

BATCHES = (24, 96, 384)
LR, CLIPS, MICRO_BATCH = 1e-3, 36_864, 24
WARMUP = 0.1  # of the clips
VALIDATIONS = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, then draw what is finished and print the table.

    Args:
        arguments: Command-line arguments without the program's name; None: those of the process.

    Returns:
        0, or the status of a run that was stopped.

    Raises:
        ConfigError: There is nothing to draw; or see :func:`ssast.engine.pretrain.pretrain`.
    """
    parser = argparse.ArgumentParser("ssast bench batches", description=__doc__)
    add = parser.add_argument
    add("--data", default="data/demo/train.json", help="training clips (default %(default)s)")
    add("--clips", type=int, default=CLIPS, help="clips that each run sees (default %(default)s)")
    add("--lr", type=float, default=LR, help="of the smallest batch (default %(default)s)")
    add("--out", type=Path, default=Path("runs/batches"), help="folder of the runs")
    add("--picture", type=Path, help="PNG file (default: in the folder of the runs)")
    add("--page", action="store_true", help="train nothing")
    options = parser.parse_args(arguments)
    for batch, lr in runs(options.lr) if not options.page else ():
        if stopped := _train(options.out, options.data, options.clips, batch, lr):
            return 128 + stopped
    curves = read_runs(options.out)
    if not curves:
        raise ConfigError(f"{options.out}: no finished run to draw")
    print(table(curves))
    print(draw(curves, options.picture or options.out / "batches.png"))
    return 0


def runs(lr: float) -> list[tuple[int, float]]:
    """Return batch and learning rate of each run: the smallest, then both rules for the others."""
    ratios = [batch / BATCHES[0] for batch in BATCHES[1:]]
    scaled = [(b, lr * s) for b, r in zip(BATCHES[1:], ratios, strict=True) for s in (r**0.5, r)]
    return [(BATCHES[0], lr), *scaled]


def _train(out: Path, data: str, clips: int, batch: int, lr: float) -> int:
    folder = out / f"b{batch}-{lr:g}"
    steps = clips // batch
    given = {
        "data.train": data,
        "data.valid_share": 0.04,
        "objective.num_masked": 50,
        "train.batch_size": batch,
        "train.accumulation_steps": batch // MICRO_BATCH,
        "train.steps": steps,
        "train.validate_every": max(1, steps // VALIDATIONS),
        "train.log_every": max(1, steps // VALIDATIONS),
        "train.precision": "bf16",
        "optim.lr": lr,
        "optim.warmup_steps": WARMUP,
        "run.folder": folder,
    }
    config = load_config("demo", [f"{key}={value}" for key, value in given.items()])
    return pretrain(config, resume=True)


Curves = dict[tuple[int, float], list[tuple[int, float]]]
"""Clips seen and held-out loss at each validation, by batch and learning rate."""


def read_runs(out: Path) -> Curves:
    """Read the held-out losses of the finished runs in a folder."""
    found: Curves = {}
    for path in sorted(out.glob("b*/config.yaml")):
        config = load_config(path)
        batch = config.train.batch_size
        points = [
            (line["step"] * batch, line["valid/loss"])
            for line in read_metrics(path.parent / "metrics.jsonl")
            if "valid/loss" in line
        ]
        if points and points[-1][0] == config.train.steps * batch:
            found[batch, config.optim.lr] = points
    return dict(sorted(found.items()))


def table(curves: Curves) -> str:
    """Format the last held-out losses as a Markdown table."""
    lines = ["| batch | steps | learning rate | rule | held-out loss |"]
    lines += ["| --: | --: | --: | :-- | --: |"]
    for (batch, lr), points in curves.items():
        clips, loss = points[-1]
        lines.append(
            f"| {batch} | {clips // batch} | {lr:g} | {_rule(curves, batch, lr)} | {loss:.2f} |"
        )
    return "\n".join(lines)


def _rule(curves: Curves, batch: int, lr: float) -> str:
    smallest, first = next(iter(curves))
    ratio, factor = batch / smallest, lr / first
    named = {"": 1.0, "square root": math.sqrt(ratio), "linear": ratio}
    return next((rule for rule, value in named.items() if math.isclose(value, factor)), "")


def draw(curves: Curves, path: Path) -> Path:
    """Draw held-out loss against clips seen; return the picture's path."""
    figure, axes = subplots(figsize=(9, 4), layout="tight")
    styles = {"linear": "--", "square root": "-", "": "-"}
    colours = {batch: f"C{number}" for number, batch in enumerate(BATCHES)}
    for (batch, lr), points in curves.items():
        rule = _rule(curves, batch, lr)
        label = f"batch {batch}, lr {lr:g}" + (f" ({rule})" if rule else "")
        axes.plot(*zip(*points[1:], strict=True), styles[rule], color=colours[batch], label=label)
    axes.set_xlabel("clips seen")
    axes.set_ylabel("held-out loss")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)  # beside the curves
    return save_figure(figure, path)
