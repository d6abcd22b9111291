"""The manifests of a demo: what to pretrain on, and labelled tasks that pretraining never hears."""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssast.pipelines.clips.holdout import hold_out_clips
from ssast.pipelines.clips.manifest import read_manifest, write_manifest
from ssast.pipelines.clips.shards import REJECTED, REPORT, ShardIndex, is_prepared
from ssast.pipelines.demo.tasks import EVAL_SHARE, Clip, Task, divide
from ssast.pipelines.errors import DataError
from ssast.pipelines.files import write_atomically
from ssast.pipelines.prepare.pack import is_finished

TRAIN, TASKS, FACTS = "train.json", "tasks", "demo.json"
KINDS = ("train", "eval")


@dataclass(frozen=True)
class DemoData:
    """A demo's data set on disk.

    Attributes:
        train: Manifest of the clips for pretraining.
        tasks: Manifests of the training and of the evaluation clips, by task.
        num_clips: Number of clips in ``train``.
        hours: Length of those in hours.
    """

    train: Path
    tasks: dict[str, tuple[Path, Path]]
    num_clips: int
    hours: float


def clips_of(index: ShardIndex) -> list[Clip]:
    """Return the clips of a prepared folder, in the order of its rows."""
    clips = [
        Clip(line["name"], line["part"], line["duration_s"], row)
        for row, line in index.sidecar_lines()
    ]
    return sorted(clips, key=lambda clip: clip.row)


def publish(
    out: Path,
    tasks: Iterable[Task],
    settings: dict[str, Any],
    facts: dict[str, Any],
    log: Callable[[str], None],
    excluded: Callable[[Sequence[Clip]], Iterable[Clip]] = lambda clips: (),
) -> DemoData:
    """Write the manifests, and last the file that says that all is done.

    Args:
        out: The prepared folder; duplicates were dropped.
        tasks: The labelled tasks.
        settings: What identifies the data set, see :func:`finished`.
        facts: More to write down beside the settings.
        log: Called with one line for each task and for the whole.
        excluded: Picks more clips to keep out of pretraining.

    Raises:
        DataError: Fewer than two clips are left for pretraining.
    """
    index = ShardIndex(out)
    clips = clips_of(index)
    shutil.rmtree(out / TASKS, ignore_errors=True)  # of another data set in this folder
    held = {clip.name for clip in excluded(clips)}  # whole recordings
    files: dict[str, list[str]] = {}
    for task in tasks:
        train, evaluation = write_task(task, index, clips, out / TASKS)
        if not evaluation:
            log(f"task {task.name}: left out, too few labelled clips")
            continue
        held |= {clip.name for clip, _ in evaluation}
        files[task.name] = [f"{TASKS}/{task.name}_{kind}.json" for kind in KINDS]
        log(
            f"task {task.name}: {task.what}; {len({label for _, label in evaluation})} classes, "
            f"{len(train)} + {len(evaluation)} clips"
        )
    rest = [clip for clip in clips if clip.name not in held]
    if len(rest) < 2:
        raise DataError(
            f"{out}: {len(rest)} clips are left for pretraining, expected 2 or more; see "
            f"{out / REJECTED}"
        )
    write_manifest(out / TRAIN, index.subset(np.array([clip.row for clip in rest])))
    found = {
        "settings": settings,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "num_clips": len(rest),
        "num_held_for_tasks": len(clips) - len(rest),
        "hours": round(sum(clip.duration_s for clip in rest) / 3600, 4),
        "tasks": files,
        **facts,
    }
    write_atomically(out / FACTS, json.dumps(found, indent=2) + "\n")
    log(f"{out}: {found['num_clips']} clips for pretraining, {found['hours']:.2f} h")
    done = finished(out, settings)
    assert done is not None
    return done


def write_task(
    task: Task, index: ShardIndex, clips: Sequence[Clip], folder: Path
) -> tuple[list[tuple[Clip, str]], list[tuple[Clip, str]]]:
    """Write ``<task>_train.json`` and ``<task>_eval.json``, unless too few clips are labelled.

    Args:
        task: The labelled task.
        index: A prepared folder.
        clips: Its clips, see :func:`clips_of`.
        folder: Folder of the manifests.

    Returns:
        See :func:`~ssast.pipelines.demo.tasks.divide`.
    """
    parts = divide(task, clips)
    for kind, part in zip(KINDS, parts, strict=True):
        if part:
            rows = np.array([clip.row for clip, _ in part])
            names = [[label] for _, label in part]
            write_manifest(folder / f"{task.name}_{kind}.json", index.subset(rows), names)
    return parts


def finished(out: Path, settings: dict[str, Any]) -> DemoData | None:
    """Return the data set in a folder, if it has these settings and every shard is there."""
    try:
        facts = json.loads((out / FACTS).read_text(encoding="utf-8"))
        if facts["settings"] != settings or not is_prepared(out):
            return None
        num_shards = json.loads((out / REPORT).read_text(encoding="utf-8"))["shards"]
        tasks = {name: (out / train, out / held) for name, (train, held) in facts["tasks"].items()}
        for manifest in (out / TRAIN, *(path for pair in tasks.values() for path in pair)):
            read_manifest(manifest)
        data = DemoData(out / TRAIN, tasks, facts["num_clips"], facts["hours"])
    except (OSError, ValueError, KeyError, TypeError):  # not finished, or tampered with
        return None
    return data if all(is_finished(out, number) for number in range(num_shards)) else None


def publish_labels(
    folder: Path, source: Path | None = None, log: Callable[[str], None] = print
) -> Path:
    """Make a task ``labels`` of the labels in a prepared folder, or of the folders of its sounds.

    Its evaluation clips, a fifth of each class, are kept out of pretraining.

    Args:
        folder: The prepared folder.
        source: What it was made of: if this is a folder, all sounds of which are in folders of it,
            the names of these are the labels where there are no others.
        log: Called with one line about the task.

    Returns:
        What to pretrain on: a manifest, or the folder itself if no task can be made of it.
    """
    shutil.rmtree(folder / TASKS, ignore_errors=True)  # of an earlier source
    manifest = read_manifest(folder)
    assert isinstance(manifest.paths, ShardIndex)
    given: Sequence[tuple[str, ...]] | None = manifest.labels
    if given is None and source is not None and source.is_dir():
        given = _folder_labels(manifest.paths, source)
    if given is None:
        return folder
    if any(len(names) != 1 for names in given):
        log("task labels: left out, clips have several labels, expected one each")
        return folder
    labels = np.array([name for (name,) in given])
    try:
        held = hold_out_clips(manifest.paths, EVAL_SHARE, given)
    except DataError as error:
        log(f"task labels: left out, {error}")
        return folder
    classes = np.intersect1d(labels[held], labels[~held])
    if len(classes) < 2:
        log(f"task labels: left out, {len(classes)} classes can be split, expected 2 or more")
        return folder
    parts = {"train": ~held & np.isin(labels, classes), "eval": held}
    for kind, chosen in parts.items():
        rows = np.flatnonzero(chosen)
        names = [[name] for name in labels[rows].tolist()]
        write_manifest(folder / TASKS / f"labels_{kind}.json", manifest.paths.subset(rows), names)
    log(f"task labels: {len(classes)} classes, {parts['train'].sum()} + {held.sum()} clips")
    write_manifest(folder / TRAIN, manifest.paths.subset(np.flatnonzero(~held)))
    return folder / TRAIN


def _folder_labels(index: ShardIndex, source: Path) -> list[tuple[str]] | None:
    """Return the folder below the source of each clip; None where clips are in none, or in one."""
    tops = [clip.name.partition("/") for clip in clips_of(index)]
    classes = {top for top, _, _ in tops}
    if len(classes) < 2 or not all(inside for _, _, inside in tops):
        return None
    if not all((source / top).is_dir() for top in classes):  # an archive
        return None
    return [(top,) for top, _, _ in tops]
