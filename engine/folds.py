"""Cross-validate: a fine-tuning run for each fold of a data set, and one report on all of them.

runs/esc50_patch/
  fold_1/ ... fold_5/   runs as any other
  report.md  metrics.json  confusion.png
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.checkpoints.weights import CHOSEN, Weights
from ssast.engine.config import OVERRIDE, Config, check_paths, finetune_settings, load_config
from ssast.engine.data.splits import find_splits
from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.evaluation.metrics import COUNTS
from ssast.engine.evaluation.report import (
    PREDICTIONS,
    REPORT,
    describe,
    draw_confusion,
    read_predictions,
)
from ssast.engine.finetune import finetune
from ssast.engine.formats.initial import begin_from, initial_checkpoint, with_checkpoint
from ssast.engine.formats.open import MissingMetadata
from ssast.engine.monitoring.loggers import check_loggers
from ssast.engine.monitoring.reporting import reporting
from ssast.engine.parallel.long_work import run_long
from ssast.engine.parallel.ranks import expecting_peers, init_world, run_on_main
from ssast.engine.train.callbacks import Callback
from ssast.engine.train.finetuning import finished_at
from ssast.engine.train.run import has_begun
from ssast.pipelines.errors import DataError
from ssast.pipelines.files import write_atomically
from ssast.pipelines.text import markdown, say

LABELS = "labels.csv"  # of the classes, beside the manifests of the folds


@dataclass(frozen=True)
class Fold:
    """Manifests of one fold: to train on, and to evaluate on."""

    number: int
    train: Path
    evaluate: Path


def find_folds(folder: str | Path) -> list[Fold]:
    """Find the folds whose manifests are in a folder, by their numbers.

    Raises:
        DataError: There are fewer than two, or one has only one of its manifests.
    """
    folder = Path(folder)
    paths = {path.stem: path for path in folder.glob("*.json")}
    numbers = {int(m[1]) for m in (re.fullmatch(r"(?:train|eval)_(\d+)", n) for n in paths) if m}
    for number in sorted(numbers):
        for name in (f"train_{number}", f"eval_{number}"):
            if name not in paths:
                raise DataError(f"{folder}: expected {name}.json, fold {number} has no such file")
    if len(numbers) < 2:
        raise DataError(
            f"{folder}: expected train_1.json, eval_1.json, train_2.json, ..., found "
            f"{len(numbers) or 'no'} fold{'s' * (len(numbers) != 1)}: ssast data manifests writes "
            "them; or set data.train for a single run"
        )
    return [Fold(n, paths[f"train_{n}"], paths[f"eval_{n}"]) for n in sorted(numbers)]


def uses_folds(config: Config) -> bool:
    """Return whether a configuration asks for cross-validation, not for a single run.

    Args:
        config: Configuration; if it has both, ``data.train`` overrides the folds of a recipe, but
            not those of the command line.

    Raises:
        ConfigError: Both were named there.
    """
    if finetune_settings(config).folds is None:
        return False
    stated = config.stated or {}
    if stated.get("finetune.folds") != OVERRIDE:
        return config.data.train is None
    if stated.get("data.train") == OVERRIDE and config.data.train is not None:
        raise ConfigError("finetune.folds and data.train exclude each other: set one of them")
    return True


def cross_validate(
    config: Config,
    checkpoint: str | Path | None = None,
    *,
    resume: bool = False,
    metadata: MissingMetadata | None = None,
    weights: Weights | None = None,
    callbacks: Sequence[Callback] = (),
) -> int:
    """Fine-tune once for each fold, then write one report on all of them.

    Args:
        config: Configuration as for :func:`~ssast.engine.finetune.finetune`, with
            ``finetune.folds``.
        checkpoint: Path of a model to begin from; see there.
        resume: Resume the runs of the folds; finished ones stay as they are.
        metadata: See there.
        weights: See there.
        callbacks: See there; called in the run of each fold.

    Returns:
        0, or the number of the signal that stopped a run after it had saved a checkpoint.

    Raises:
        ConfigError: A fold's folder holds a run, and ``resume`` is False; or see
            :func:`~ssast.engine.finetune.finetune`, also for the others.
        DataError: See :func:`find_folds`.
        CheckpointError: The weights do not fit, or a checkpoint cannot be written.
        TrainingError: Training diverged.
    """
    settings = finetune_settings(config)
    if settings.folds is None or config.run.folder is None:
        raise ConfigError("finetune.folds and run.folder must both be set")
    check_loggers(config.run.loggers)
    check_paths(config)
    taken = "finetune.test" if settings.fold_role == "test" else "data.valid"
    given = settings.test if settings.fold_role == "test" else config.data.valid
    if given is not None and (config.stated or {}).get(taken, OVERRIDE) == OVERRIDE:
        raise ConfigError(
            f"finetune.folds and {taken} exclude each other with finetune.fold_role "
            f"{settings.fold_role}: each fold has its own"
        )
    run = Path(config.run.folder)
    folds = find_folds(settings.folds)
    if checkpoint is None and settings.checkpoint is None and resume:
        # Folds that have not begun start from the weights that the first did.
        checkpoint = initial_checkpoint(fold_folder(run, folds[0].number))
    # Read once for all folds. Where each has begun, it may be gone; settings are the first fold's.
    first = replace(config, run=replace(config.run, folder=str(fold_folder(run, folds[0].number))))
    begun = resume and all(has_begun(fold_folder(run, fold.number)) for fold in folds)
    pretrained, adopted, _ = begin_from(
        with_checkpoint(first, checkpoint, resume=False), checkpoint, metadata, weights, begun=begun
    )
    configs = {fold.number: fold_config(config, fold) for fold in folds}
    world = init_world(config.train.timeout_s)
    once = partial(run_long, world=world, here=world.local_rank == 0)
    with expecting_peers(world):
        if not resume:
            run_on_main(lambda: _check_free(run, folds), world)
        for fold in folds:  # so that a mistake in the last one is reported at once
            find_splits(fold_config(adopted, fold), run_once=once)
    for fold in folds:
        if world.is_main:
            say(f"fold {fold.number} of {len(folds)}: {fold.evaluate}")
        stopped = finetune(
            configs[fold.number],
            checkpoint if pretrained is None else pretrained,
            resume=resume,
            callbacks=callbacks,
        )
        if stopped:
            return stopped
    split = settings.fold_role
    numbers = [fold.number for fold in folds]

    def report() -> None:
        with reporting(f"the classifiers of all folds are finished, in {run}; --resume writes it"):
            write_folds(run, numbers, split, settings.folds)

    with expecting_peers(world):
        run_on_main(report, world)
    return 0


def _check_free(run: Path, folds: Sequence[Fold]) -> None:
    """Refuse folders that hold runs."""
    for fold in folds:
        folder = fold_folder(run, fold.number)
        if Checkpoints(folder / "checkpoints").latest() is not None:
            raise ConfigError(
                f"{folder} holds a run: add --resume (in Python resume=True) to resume it, or "
                "choose another run.folder"
            )


def fold_config(config: Config, fold: Fold) -> Config:
    """Return the configuration of one fold's run."""
    settings = finetune_settings(config)
    table = fold.train.parent / LABELS
    labels = settings.labels or (str(table) if table.is_file() else None)
    evaluate = str(fold.evaluate)
    data = replace(config.data, train=str(fold.train))
    settings = replace(settings, folds=None, labels=labels)
    if settings.fold_role == "valid":
        data = replace(data, valid=evaluate)
    else:
        settings = replace(settings, test=evaluate)
    run = replace(config.run, folder=str(fold_folder(Path(config.run.folder or ""), fold.number)))
    return replace(config, data=data, finetune=settings, run=run)


def fold_folder(run: Path, number: int) -> Path:
    """Return the folder of a fold's run."""
    return run / f"fold_{number}"


def write_folds(
    run: Path, numbers: Sequence[int], split: str, source: str | None
) -> dict[str, Any]:
    """Write report.md, metrics.json and confusion.png of finished folds.

    Args:
        run: Folder of the runs.
        numbers: Numbers of the folds.
        split: ``test`` or ``valid``, the split that is a fold in each run.
        source: Folder of the manifests, for the report.

    Returns:
        What metrics.json holds: ``folds`` (metrics by fold), ``mean`` and ``std`` (of a sample:
        n - 1) over the folds, and, of single labels, ``pooled``: the accuracy over all clips.
    """
    folders = {number: fold_folder(run, number) / split for number in numbers}
    folds = {n: json.loads((f / "metrics.json").read_text("utf-8")) for n, f in folders.items()}
    names = [name for name in folds[numbers[0]] if all(name in values for values in folds.values())]
    names = [name for name in names if name not in COUNTS]
    table = np.array([[folds[number][name] for name in names] for number in numbers])
    found: dict[str, Any] = {
        "folds": {str(number): values for number, values in folds.items()},
        "mean": dict(zip(names, table.mean(0).tolist(), strict=True)),
        "std": dict(zip(names, table.std(0, ddof=1).tolist(), strict=True)),
    }
    if "accuracy" in names:  # of clips with one label each
        pairs = [
            pair for folder in folders.values() for pair in read_predictions(folder / PREDICTIONS)
        ]
        found["pooled"] = {"accuracy": float(np.mean([label == name for label, name in pairs]))}
        # In the order of the runs; a run without a table of classes knows only those it has seen.
        classes = list(
            dict.fromkeys(name for n in numbers for name in _classes(fold_folder(run, n)))
        )
        index = {name: number for number, name in enumerate(classes)}
        labels, predicted = np.array([[index[label], index[name]] for label, name in pairs]).T
        draw_confusion(run / "confusion.png", predicted, labels, classes)
    write_atomically(run / "metrics.json", json.dumps(found, indent=1) + "\n")
    counts = {
        n: (int(values["num_scored"]), int(values["num_clips"])) for n, values in folds.items()
    }
    config = load_config(fold_folder(run, numbers[0]) / "config.yaml")
    epochs = _epochs([fold_folder(run, number) for number in numbers])
    text = _report(f"{run.name}: {len(numbers)} folds of {source}", config, epochs, counts, found)
    write_atomically(run / REPORT, text)
    shown = "  ".join(f"{n} {found['mean'][n]:.4f} +- {found['std'][n]:.4f}" for n in names)
    say(f"{len(numbers)} folds: {shown}\n{run / 'report.md'}")
    return found


def _classes(run: Path) -> list[str]:
    """Return the classes of a finished run."""
    chosen = Checkpoints(run / CHOSEN).latest()
    if chosen is None:
        raise CheckpointError(f"{run}: no finished fine-tuning run")
    return Checkpoints.load(chosen, check=False)[1]["classes"]


def _epochs(runs: Sequence[Path]) -> str:
    """Return how many epochs the finished folds were trained, which patience may have ended."""
    steps = [finished_at(run) or 0 for run in runs]
    each = [load_config(run / "config.yaml").train.validate_every for run in runs]
    taken = sorted({f"{n / length:.3g}" for n, length in zip(steps, each, strict=True)}, key=float)
    return f"{' to '.join(dict.fromkeys((taken[0], taken[-1])))} epochs each"


def _report(
    title: str,
    config: Config,
    epochs: str,
    counts: Mapping[int, tuple[int, int]],
    found: Mapping[str, Any],
) -> str:
    settings, names = finetune_settings(config), list(found["mean"])
    chosen_on = "the fold itself" if settings.fold_role == "valid" else "held-out training clips"
    lines = [
        f"# {markdown(title)}",
        "",
        f"{describe(config)}, {epochs}. Weights are chosen on {chosen_on}.",
        "",
        "| fold | scored clips | " + " | ".join(names) + " |",
        "| --- | ---: |" + " ---: |" * len(names),
    ]

    def row(title: str, clips: object, values: Mapping[str, float]) -> str:
        return f"| {title} | {clips} | " + " | ".join(f"{values[n]:.4f}" for n in names) + " |"

    for number, (scored, total) in counts.items():
        title, values = f"[{number}](fold_{number}/report.md)", found["folds"][str(number)]
        lines.append(row(title, f"{scored} of {total}", values))
    scored, total = np.array(list(counts.values())).sum(0)
    lines.append(row("mean", f"{scored} of {total}", found["mean"]))
    lines.append(row("standard deviation", "", found["std"]))
    if "pooled" in found:
        accuracy = found["pooled"]["accuracy"]
        lines += ["", f"Accuracy over all scored clips: {accuracy:.4f}.", "", "![](confusion.png)"]
    return "\n".join(lines) + "\n"
