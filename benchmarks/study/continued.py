"""Measure what continued pretraining brings to the released tiny model on sounds it has not heard.

It is pretrained further on telephone prompts (Debian packages), and a fresh model for as many
steps; then classifiers are fine-tuned on a few labelled prompts, from each of them and from the
released model as it is. Runs that are finished are kept.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssast.benchmarks.study.kept import check_kept
from ssast.benchmarks.study.plan import accuracy
from ssast.benchmarks.study.tables import mean_and_std, table
from ssast.engine.config import load_config
from ssast.engine.finetune import finetune
from ssast.engine.monitoring.monitor import read_metrics, scalars
from ssast.engine.pretrain import pretrain
from ssast.engine.train.finetuning import is_finished
from ssast.pipelines.clips.manifest import read_manifest, write_manifest
from ssast.pipelines.clips.mix import select
from ssast.pipelines.demo.corpora import fetch_demo
from ssast.pipelines.demo.prompts import PROMPT_PACKAGES, PROMPT_TASKS

RELEASED = "tiny_patch"
# name: what it begins from, recipe and settings; those of the fresh one as of the released one
PRETRAINING = {
    "continued": (RELEASED, "continue", ()),
    "fresh": (
        None,
        "demo",
        ("objective.num_masked=50", "objective.mask=official", "audio.ignore_padding=true"),
    ),
}

# A run of few steps: a head that learns fast, and clips as they are.
FINETUNING: tuple[str, ...] = ("optim.lr=5e-4", "finetune.head_lr_scale=10", "finetune.time_mask=0")
FINETUNING += ("finetune.freq_mask=0", "finetune.noise=0", "finetune.roll=0")


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        kind: pretrain or finetune.
        recipe: Name of its recipe.
        checkpoint: What it begins from; None from scratch.
        overrides: Its settings.
        folder: Its folder.
    """

    kind: str
    recipe: str
    checkpoint: str | None
    overrides: tuple[str, ...]
    folder: Path

    @property
    def command(self) -> str:
        """The command that does the same."""
        given = ["--checkpoint", self.checkpoint] if self.checkpoint else []
        words = ["ssast", self.kind, self.recipe, *given, *self.overrides]
        return " ".join([*words, f"run.folder={self.folder}"])

    def train(self) -> int:
        """Train what is missing; return the signal that stopped it, or 0."""
        print(self.command, flush=True)
        config = load_config(self.recipe, [*self.overrides, f"run.folder={self.folder}"])
        check_kept(config)
        if self.kind == "pretrain":
            return pretrain(config, self.checkpoint, resume=True)
        return 0 if is_finished(self.folder) else finetune(config, self.checkpoint, resume=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch the recordings, train what is missing and print the table.

    Args:
        arguments: Command-line arguments without the program's name; None: those of the process.

    Returns:
        0, or the status of a run that was stopped.

    Raises:
        DataError: The recordings cannot be had.
        ConfigError: A run in the folder had other settings.
    """
    parser = argparse.ArgumentParser("ssast bench continued", description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=Path("data/prompts"), help="folder of the recordings")
    add("--out", type=Path, default=Path("runs/continued"), help="folder of the runs")
    add("--steps", type=int, default=1200, help="of pretraining, 24 clips each (%(default)s)")
    add("--epochs", type=int, default=4, help="of fine-tuning (%(default)s)")
    add("--labels", type=int, default=40, help="labelled clips of each class (%(default)s)")
    add("--seeds", type=int, default=3, help="of fine-tuning (%(default)s)")
    add("override", nargs="*", help="settings of all runs")
    options = parser.parse_args(arguments)
    data = fetch_demo(options.data, packages=PROMPT_PACKAGES, tasks=PROMPT_TASKS)
    train, test = data.tasks[PROMPT_TASKS[0].name]
    few = write_first(train, options.labels, options.out / "few.json")
    given = tuple(options.override)
    before = pretraining_runs(options.out, data.train, options.steps, given)
    after = finetuning_runs(before, options.out, (few, test), options.epochs, options.seeds, given)
    seeds = zip(*after.values(), strict=True)  # a seed after the other
    for run in (*before.values(), *(run for runs in seeds for run in runs)):
        if stopped := run.train():
            return 128 + stopped
    print(scores(before, after))
    return 0


def write_first(manifest: Path, count: int, out: Path) -> Path:
    """Write a manifest of the first clips of each class; return its path."""
    clips, seen, rows = read_manifest(manifest), Counter[tuple[str, ...]](), list[int]()
    for row, names in enumerate(clips.labels or ()):
        seen[names] += 1
        rows += [row] if seen[names] <= count else []
    labels = [clips.labels[row] for row in rows] if clips.labels else None
    write_manifest(out, select(clips.paths, np.array(rows)), labels)
    return out


def pretraining_runs(out: Path, train: Path, steps: int, given: tuple[str, ...]) -> dict[str, Run]:
    """Return the pretraining runs by name."""
    half = max(1, steps // 2)
    length = (f"train.steps={steps}", "train.batch_size=24", "optim.warmup_steps=0.1")
    common = (f"data.train={train}", *length, f"train.validate_every={half}", *given)
    return {
        name: Run("pretrain", recipe, begin, (*common, *settings), out / name)
        for name, (begin, recipe, settings) in PRETRAINING.items()
    }


def finetuning_runs(
    before: dict[str, Run],
    out: Path,
    clips: tuple[Path, Path],
    epochs: int,
    seeds: int,
    given: tuple[str, ...],
) -> dict[str, list[Run]]:
    """Return the fine-tuning runs of each seed, by what they begin from."""
    begins = {"released": RELEASED} | {name: str(run.folder) for name, run in before.items()}
    common: tuple[str, ...] = (
        f"data.train={clips[0]}",
        "data.valid_share=0.2",
        f"finetune.test={clips[1]}",
    )
    common += (f"finetune.epochs={epochs}", *FINETUNING, *given)
    return {
        name: [
            Run(
                *("finetune", "classifier", begin, (*common, f"train.seed={seed}")),
                out / f"{name}-{seed}",
            )
            for seed in range(seeds)
        ]
        for name, begin in begins.items()
    }


def scores(before: dict[str, Run], after: dict[str, list[Run]]) -> str:
    """Format held-out losses and test accuracies of finished runs as a Markdown table."""
    rows = []
    for name, runs in after.items():
        released = name not in before  # as the continued one before its first step
        found = _last(before["continued" if released else name].folder, 0 if released else -1)
        tested = [each for run in runs if (each := accuracy(run.folder, "test")) is not None]
        rows.append([name, f"{found[0]:.3f}", f"{100 * found[1]:.1f}", mean_and_std(tested)])
    header = ["begins from", "held-out loss", "pretext accuracy %", "test accuracy %"]
    return "\n".join(table(header, rows))


def _last(run: Path, number: int) -> tuple[float, float]:
    lines = read_metrics(run / "metrics.jsonl")
    names = ("valid/loss", "valid/pretext_accuracy")
    loss, right = (scalars(lines, name)[number][1] for name in names)
    return loss, right
