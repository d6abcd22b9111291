"""Write the results of a classifier: predictions, figures, a report."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from sklearn.metrics import confusion_matrix

from ssast.engine.config import Config, finetune_settings
from ssast.engine.data.labels import LabelledClips
from ssast.engine.data.splits import Splits
from ssast.engine.evaluation.metrics import class_metrics, clip_counts
from ssast.engine.evaluation.probabilities import probabilities, top_classes
from ssast.pipelines.clips.labels import format_labels, parse_labels
from ssast.pipelines.clips.manifest import clip_columns
from ssast.pipelines.clips.shards import ClipPath
from ssast.pipelines.figures import save_figure, subplots
from ssast.pipelines.files import write_atomically
from ssast.pipelines.text import NAME_BYTES, markdown

PREDICTIONS, REPORT = "predictions.csv", "report.md"
NUM_SHOWN = 5  # classes in a line of predictions.csv
MAX_NAMED = 40  # classes whose names fit beside a picture


def write_split(
    folder: Path,
    clips: LabelledClips,
    logits: np.ndarray,
    read: np.ndarray,
    values: dict[str, float],
    loss: str,
) -> None:
    """Write predictions.csv, metrics.json, classes.png and, of single labels, confusion.png.

    Args:
        folder: Output folder, created if need be.
        clips: The n clips of the split.
        logits: [n, C] logits.
        read: [n] bool, which clips could be read; the others are left out.
        values: Metrics of the split.
        loss: ``ce`` or ``bce``, which turns logits into probabilities.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scores = probabilities(logits, loss)
    rows = np.flatnonzero(read)
    targets = clips.targets()
    paths = [clips.paths[int(row)] for row in rows]
    truths = [[clips.classes[i] for i in np.flatnonzero(targets[row])] for row in rows]
    write_predictions(folder / PREDICTIONS, paths, scores[rows], clips.classes, truths)
    # After the predictions: where there are metrics, whatever ended the run, there are both.
    content = json.dumps(clip_counts(read) | values, indent=1) + "\n"
    write_atomically(folder / "metrics.json", content)
    _draw_classes(folder / "classes.png", scores[rows], targets[rows], clips.classes)
    if clips.single:
        draw_confusion(
            folder / "confusion.png", logits[rows].argmax(1), targets[rows].argmax(1), clips.classes
        )


def write_predictions(
    path: Path,
    clips: Sequence[ClipPath],
    scores: np.ndarray,
    classes: Sequence[str],
    truths: Sequence[Sequence[str]],
) -> None:
    """Write a CSV of clips, their labels, and their likeliest classes with probabilities.

    Clips and labels are columns of a manifest, as :func:`~.manifest.read_manifest` reads them, but
    for clips in shards and archives, which have their names as in messages.

    Args:
        path: Path of the CSV file.
        clips: The n clips; those that are segments have the columns of one.
        scores: [n, C] probabilities.
        classes: Names of the C classes.
        truths: Labels of each clip.
    """
    count = min(NUM_SHOWN, len(classes))
    entries = [clip_columns(clip) for clip in clips]
    names = ["wav", *sorted({name for entry in entries for name in entry} - {"wav"})]
    header = [*names, "labels"]
    for number in range(1, count + 1):
        header += [f"class{number}", f"probability{number}"]
    with path.open("w", encoding="utf-8", errors=NAME_BYTES, newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for entry, row, truth in zip(entries, scores, truths, strict=True):
            line = [str(entry.get(name, "")) for name in names]
            line.append(format_labels(truth, classes, None))
            for name, probability in top_classes(row, classes, count):
                line += [name, f"{probability:.4f}"]
            writer.writerow(line)


def read_predictions(path: Path) -> list[tuple[str, str]]:
    """Read the one label and the likeliest class of each clip from a CSV of predictions.

    Raises:
        ValueError: A clip has no label, or several.
    """
    found = []
    with path.open(encoding="utf-8", errors=NAME_BYTES, newline="") as file:
        for row in csv.DictReader(file):
            (label,) = parse_labels(row["labels"], separator=None)
            found.append((label, row["class1"]))
    return found


def write_report(
    path: Path,
    config: Config,
    splits: Splits,
    chosen: str,
    results: Mapping[str, Mapping[str, float]],
    read: Mapping[str, np.ndarray],
    epochs: float,
) -> None:
    """Write the report of a fine-tuning run.

    Args:
        path: Path of the Markdown file, in the run's folder.
        config: Configuration of the run.
        splits: Clips of the run.
        chosen: Which weights were chosen.
        results: Metrics by split.
        read: [n] bool by split, which of its clips could be read; the others are not scored.
        epochs: Number of epochs that were trained.
    """
    drawn, held_out = len(splits.valid_drawn), len(splits.valid)
    judges = "the" if drawn == held_out else f"{drawn} of the {held_out}"
    names = sorted({name for values in results.values() for name in values})
    lines = [
        f"# {markdown(path.parent.name)}",
        "",
        f"{describe(config)}, {len(splits.classes)} classes, {epochs:.3g} epochs of "
        f"{len(splits.train)} clips. Weights: {chosen}, chosen on {judges} held-out clips.",
        "",
        "| split | scored clips | " + " | ".join(names) + " |",
        "| --- | ---: |" + " ---: |" * len(names),
    ]
    for split, values in results.items():
        cells = [f"{values[name]:.4f}" if name in values else "" for name in names]
        clips = f"{read[split].sum()} of {len(read[split])}"
        lines.append(f"| {split} | {clips} | " + " | ".join(cells) + " |")
    lines += ["", "![curves](curves.png)", ""]
    for split in results:
        for picture in ("confusion.png", "classes.png"):
            if (path.parent / split / picture).is_file():
                lines.append(f"![{split} {picture}]({split}/{picture})")
    # Whole or not at all: a run that has it is not reported on again.
    write_atomically(path, "\n".join(lines) + "\n")


def describe(config: Config) -> str:
    """Describe the model and the loss of a fine-tuning in a few words of Markdown."""
    settings, model = finetune_settings(config), config.model
    return (
        f"{model.size} with {model.patch[0]} x {model.patch[1]} patches, from "
        f"{markdown(settings.checkpoint or 'scratch')}, loss {settings.loss}"
    )


def draw_confusion(
    path: Path, predicted: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> None:
    """Draw a confusion matrix, normalised over the clips of each label.

    Args:
        path: Path of the PNG file.
        predicted: [n] index of the predicted class.
        labels: [n] index of the label.
        classes: Names of the C classes.
    """
    numbers = np.arange(len(classes))
    counts = confusion_matrix(labels, predicted, labels=numbers).astype(float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = min(4 + 0.22 * min(len(classes), MAX_NAMED), 13)
    figure, axis = subplots(figsize=(size + 1, size), layout="tight")
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axis, fraction=0.046)
    if len(classes) <= MAX_NAMED:
        axis.set_xticks(numbers, classes, rotation=90, fontsize=7)
        axis.set_yticks(numbers, classes, fontsize=7)
    axis.set_xlabel("predicted")
    axis.set_ylabel("label")
    axis.set_title("share of the clips of each label", fontsize=10)
    save_figure(figure, path)


def _draw_classes(
    path: Path, scores: np.ndarray, targets: np.ndarray, classes: Sequence[str]
) -> None:
    found = class_metrics(scores, targets)["average_precision"]
    order = [i for i in np.argsort(np.nan_to_num(found, nan=-1.0)) if not np.isnan(found[i])]
    size = 2 + 0.2 * min(len(order), MAX_NAMED)
    figure, axis = subplots(figsize=(7, max(size, 2.5)), layout="tight")
    axis.barh(np.arange(len(order)), found[order])
    if len(order) <= MAX_NAMED:
        axis.set_yticks(np.arange(len(order)), [classes[i] for i in order], fontsize=7)
    axis.set_xlim(0, 1)
    axis.set_xlabel("average precision")
    save_figure(figure, path)
