"""The files of a prepared data set: split, label, write, and know a finished one again."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssast.pipelines.audio.convert import Clip, share_of
from ssast.pipelines.clips.manifest import read_manifest, write_manifest
from ssast.pipelines.demo.flac_clips import Rejected
from ssast.pipelines.demo.tasks import Task, divide
from ssast.pipelines.errors import DataError
from ssast.pipelines.files import write_atomically

VALID_SHARE = 0.03


@dataclass(frozen=True)
class Prepared:
    """A data set on disk.

    Attributes:
        train: Manifest for pretraining.
        valid: Manifest of held-out clips.
        tasks: (training, evaluation) manifests by task.
        num_clips: Clips in ``train`` and ``valid``.
        hours: Their length.
    """

    train: Path
    valid: Path
    tasks: dict[str, tuple[Path, Path]]
    num_clips: int
    hours: float


def without_duplicates(clips: Iterable[Clip]) -> list[Clip]:
    """The clips, each sequence of samples once: the first stays."""
    first: dict[str, Clip] = {}
    for clip in clips:
        first.setdefault(clip.digest, clip)
    return list(first.values())


def split(clips: Sequence[Clip], valid_share: float) -> tuple[list[Clip], list[Clip]]:
    """Holds out a share for validation, by a hash of the name: no luck, no order, no overlap.

    The parts of one recording stay together, unless there is only one recording.

    Args:
        clips: Without duplicates.
        valid_share: Share of the recordings to hold out, in (0, 1); at least one is.

    Returns:
        (training clips, validation clips), both in the given order and not empty.

    Raises:
        DataError: There are fewer than two clips.
    """
    if len(clips) < 2:
        raise DataError(f"only {len(clips)} usable clip, at least 2 are needed: one is held out")
    one_recording = len({clip.name for clip in clips}) == 1
    draws = [share_of(clip.file if one_recording else clip.name) for clip in clips]
    limit = max(valid_share, min(draws))
    if limit >= max(draws):  # few clips, all of them below the share
        limit = min(draws)
    train = [clip for clip, draw in zip(clips, draws, strict=True) if draw > limit]
    valid = [clip for clip, draw in zip(clips, draws, strict=True) if draw <= limit]
    return train, valid


def publish(
    out: Path,
    clips: Iterable[Clip],
    rejected: Iterable[Rejected],
    tasks: Iterable[Task],
    settings: dict,
    facts: dict,
    log: Callable[[str], None],
    valid_share: float = VALID_SHARE,
    unheard: Iterable[Clip] = (),
) -> Prepared:
    """Writes the manifests, and last the report that says that all is done.

    Args:
        out: Output folder.
        clips: All clips.
        rejected: Recordings that cannot be used.
        tasks: The labelled tasks.
        settings: What identifies this data set, see :func:`finished`.
        facts: More for the report.
        log: Gets one line for each task and for the whole.
        valid_share: Share to hold out.
        unheard: More clips that are for no pretraining, like those that tasks evaluate on.

    Raises:
        DataError: Fewer than two clips are left.
    """
    lines = [json.dumps({"name": r.name, "reason": r.reason}) + "\n" for r in rejected]
    write_atomically(out / "rejected.jsonl", "".join(lines))
    (out / "report.json").unlink(missing_ok=True)  # from here on unfinished
    all_clips = list(clips)
    unique = without_duplicates(all_clips)
    shutil.rmtree(out / "tasks", ignore_errors=True)  # of another data set in this folder
    held = {clip.file for clip in unheard}
    task_files: dict[str, list[str]] = {}
    for task in tasks:
        train_part, eval_part = divide(task, unique)
        if not eval_part:
            log(f"task {task.name}: left out, too few labelled clips")
            continue
        held |= {clip.file for clip, _ in eval_part}
        if task.first_part:
            names = {clip.name for clip, _ in eval_part}
            held |= {clip.file for clip in unique if clip.name in names}
        task_files[task.name] = []
        for kind, part in (("train", train_part), ("eval", eval_part)):
            file = f"tasks/{task.name}_{kind}.json"
            labels = [label.split(",") for _, label in part]
            write_manifest(out / file, (f"../{clip.file}" for clip, _ in part), labels)
            task_files[task.name].append(file)
        log(
            f"task {task.name}: {task.what}; {len({label for _, label in eval_part})} classes, "
            f"{len(train_part)} + {len(eval_part)} clips"
        )
    rest = [clip for clip in unique if clip.file not in held]
    try:
        train, valid = split(rest, valid_share)
    except DataError as error:
        raise DataError(f"{settings['made_of']}: {error}; see {out / 'rejected.jsonl'}") from None
    write_manifest(out / "train.json", (clip.file for clip in train))
    write_manifest(out / "valid.json", (clip.file for clip in valid))
    hours = sum(clip.duration_s for clip in rest) / 3600
    report = {
        "settings": settings,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "num_train": len(train),
        "num_valid": len(valid),
        "num_held_for_tasks": len(held),
        "num_duplicates": len(all_clips) - len(unique),
        "num_rejected": len(lines),
        "hours": round(hours, 4),
        "tasks": task_files,
        **facts,
    }
    write_atomically(out / "report.json", json.dumps(report, indent=2) + "\n")
    log(f"{out}: {len(train)} clips to train on, {len(valid)} held out, {hours:.2f} h")
    done = finished(out, settings)
    assert done is not None
    return done


def finished(out: Path, settings: dict) -> Prepared | None:
    """The data set in ``out``, if it was made with these settings and every clip is there."""
    try:
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        if report["settings"] != settings:
            return None
        tasks = {name: (out / files[0], out / files[1]) for name, files in report["tasks"].items()}
        manifests = [
            out / "train.json",
            out / "valid.json",
            *(f for t in tasks.values() for f in t),
        ]
        clips = {path for manifest in manifests for path in read_manifest(manifest).paths}
    except (OSError, ValueError, KeyError, TypeError, IndexError):  # not finished, or tampered with
        return None
    if not all(map(os.path.isfile, map(str, clips))):
        return None
    count = report["num_train"] + report["num_valid"]
    return Prepared(out / "train.json", out / "valid.json", tasks, count, report["hours"])
