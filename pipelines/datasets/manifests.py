"""Data sets from the user's own copy to manifests: published ones, folders, events, cuts.

A published set is read in the layout of its publishers, with their splits and labels. Each set
becomes the same files in an output folder::

    SPLIT.json            the clips of a split, as the published SSAST code has them
    SPLIT_weight.csv      where a split is sampled by weight: one number for each clip, in order
    labels.csv            index,mid,display_name of the classes, where there are labels
    missing.txt           clips that belong to a split and are not on disk: split, tab, name
    silence/              Speech Commands V1 only: clips that had to be cut
    report.json           the names of all of these files, written first; counts, when all are there

The audio itself stays where it is.
"""

import difflib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import soundfile

from ssast.pipelines.clips.manifest import write_manifest
from ssast.pipelines.clips.segment import Segment
from ssast.pipelines.datasets.annotations import Reading, read_audacity, read_raven
from ssast.pipelines.datasets.cuts import read_lhotse
from ssast.pipelines.datasets.events import read_audioset, read_esc50, read_fsd50k
from ssast.pipelines.datasets.folders import read_folders
from ssast.pipelines.datasets.speech import (
    read_iemocap,
    read_librispeech,
    read_speechcommands_v1,
    read_speechcommands_v2,
    read_voxceleb1,
)
from ssast.pipelines.datasets.tables import Cut, Dataset
from ssast.pipelines.errors import DataError
from ssast.pipelines.files import check_new, replacing, write_atomically

DATASETS: dict[str, Callable[[Path], Dataset]] = {
    "audioset": read_audioset,
    "librispeech": read_librispeech,
    "esc50": read_esc50,
    "speechcommands_v1": read_speechcommands_v1,
    "speechcommands_v2": read_speechcommands_v2,
    "voxceleb1": read_voxceleb1,
    "iemocap": read_iemocap,
    "fsd50k": read_fsd50k,
    "folders": read_folders,
}
ANNOTATIONS: dict[str, Callable[[Path, Reading], Dataset]] = {
    "raven": read_raven,
    "audacity": read_audacity,
    "audioset_segments": lambda source, _: read_audioset(source, segments=True),
    "lhotse": read_lhotse,
}
REPORT = "report.json"


def write_dataset(
    name: str,
    source: Path,
    out: Path,
    log: Callable[[str], None],
    reading: Reading | None = None,
) -> list[Path]:
    """Write the manifests of a data set.

    The same copy always gives the same files. Nothing is written before all of it has been read.

    Args:
        name: One of :data:`DATASETS` or :data:`ANNOTATIONS`.
        source: The user's copy: a folder; for lhotse also a file.
        out: Output folder; what an earlier run left there of the same data set is replaced.
        log: Gets a line for each split, and one for what was left out.
        reading: How the events of :data:`ANNOTATIONS` become clips.

    Returns:
        The manifests.

    Raises:
        DataError: No such data set, the copy is not in the layout of its publishers, a split has no
            clips, or ``out`` holds something else or cannot be written to.
    """
    if name not in DATASETS and name not in ANNOTATIONS:
        raise DataError(f"no data set {name!r}{_nearest(name)}")
    reading = reading or Reading()
    if name not in ("raven", "audacity") and reading != Reading(reading.label_column):
        raise DataError(f"{name}: windows are for raven and audacity")
    if reading.label_column is not None and name not in ("raven", "lhotse"):
        raise DataError(f"{name}: --label-column is for raven and lhotse")
    source, out = Path(os.path.abspath(source)), Path(os.path.abspath(out))
    if os.path.realpath(source) == os.path.realpath(out):
        raise DataError(f"{out}: the manifests need a folder of their own, not that of the audio")
    earlier = _earlier_files(name, out)
    if not (source.is_dir() or (name == "lhotse" and source.is_file())):
        raise DataError(f"{source}: expected the folder of {name}, found no folder")
    dataset = DATASETS[name](source) if name in DATASETS else ANNOTATIONS[name](source, reading)
    for split, clips in dataset.splits.items():
        if not any(clip.path for clip in clips):
            raise DataError(_without_clips(source, split, [clip.name for clip in clips]))
    try:
        return _write(name, source, out, dataset, earlier, log)
    except OSError as error:
        what = f"{error.filename or out}: {error.strerror or error}"
        raise DataError(f"writing the manifests failed: {what}") from error


def _write(
    name: str,
    source: Path,
    out: Path,
    dataset: Dataset,
    earlier: Sequence[str],
    log: Callable[[str], None],
) -> list[Path]:
    """Write all files, and the report when all others are there."""
    texts, counts = _texts(dataset)
    manifests = {split: f"{split}.json" for split in dataset.splits}
    files = sorted([*texts, *manifests.values(), *dataset.made])
    check_new(out / file for file in files if file not in earlier)  # never over the user's own
    mine = sorted({*earlier, *files})  # for the next run, if this one is killed
    unfinished = {"data_set": name, "unfinished": True, "files": mine}
    write_atomically(out / REPORT, json.dumps(unfinished) + "\n")
    for file in set(earlier) - set(files):
        (out / file).unlink(missing_ok=True)
    for file, cut in dataset.made.items():
        _write_sound(out / file, cut)
    for split, clips in dataset.splits.items():
        found = [clip for clip in clips if clip.path]
        labels = [clip.labels for clip in found] if dataset.classes else None
        paths = [_clip(os.path.join(out, clip.path or ""), clip.span) for clip in found]
        write_manifest(out / manifests[split], paths, labels)
        log(_summary(split, counts[split], out))
    for file, text in texts.items():
        write_atomically(out / file, text)
    for note in dataset.notes:
        log(note)
    report = {
        "data_set": name,
        "source": str(source),
        "classes": len(dataset.classes),
        "splits": counts,
        "notes": list(dataset.notes),
        "files": files,
    }
    write_atomically(out / REPORT, json.dumps(report, indent=2) + "\n")
    return [out / file for file in manifests.values()]


def _clip(path: str, span: tuple[float, float] | None) -> str | Segment:
    return path if span is None else Segment(path, *span)


def _texts(dataset: Dataset) -> tuple[dict[str, str], dict[str, dict[str, int]]]:
    """Return the text files beside the manifests, and (clips, missing) of each split."""
    texts: dict[str, str] = {}
    counts: dict[str, dict[str, int]] = {}
    missing: list[str] = []
    if dataset.classes:
        rows = (f"{i},{_cell(mid)},{_quoted(n)}\n" for i, (mid, n) in enumerate(dataset.classes))
        texts["labels.csv"] = "index,mid,display_name\n" + "".join(rows)
    for split, clips in dataset.splits.items():
        found = [clip.labels for clip in clips if clip.path]
        missing += (f"{split}\t{clip.name}\n" for clip in clips if not clip.path)
        counts[split] = {"clips": len(found), "missing": len(clips) - len(found)}
        if split in dataset.weigh:
            weights = dataset.weigh[split](found)
            texts[f"{split}_weight.csv"] = "".join(f"{weight:.18e}\n" for weight in weights)
    if missing:
        texts["missing.txt"] = "".join(missing)
    return texts, counts


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _cell(label: str) -> str:
    return _quoted(label) if label != label.strip() or set(label) & set(',"\r\n') else label


def _summary(split: str, count: Mapping[str, int], out: Path) -> str:
    line = f"{split}: {count['clips']} clips"
    if count["missing"]:
        line += f"; {count['missing']} more are not on disk, see {out / 'missing.txt'}"
    return line


def _write_sound(path: Path, cut: Cut) -> None:
    """Write a 16 bit WAV file, whole or not at all."""
    try:
        with replacing(path) as temporary:
            soundfile.write(temporary, cut.samples, cut.rate_hz, format="WAV", subtype="PCM_16")
    except soundfile.LibsndfileError as error:
        raise OSError(0, error.error_string, str(path)) from error


def _earlier_files(name: str, out: Path) -> list[str]:
    """Return the files that an earlier run on this data set wrote.

    Raises:
        DataError: The folder holds another data set.
    """
    try:
        report: Any = json.loads((out / REPORT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{out}: cannot be read: {error.strerror}") from error
    except ValueError:
        report = None
    found = report.get("data_set") if isinstance(report, dict) else None
    if found != name:
        raise DataError(
            f"{out}: expected an empty folder or manifests of {name}, "
            f"found the {REPORT} of {found or 'something else'}"
        )
    return [file for file in report.get("files", []) if _is_inside(file)]


def _is_inside(file: str) -> bool:
    """Return whether a path stays in the folder: only then may it be removed."""
    return not os.path.isabs(file) and ".." not in Path(file).parts


def _without_clips(source: Path, split: str, names: Sequence[str]) -> str:
    if not names:
        return f"{source}: split {split}: expected clips, found none listed"
    return f"{source}: split {split}: found none of its {len(names)} clips, as {names[0]}"


def _nearest(name: str) -> str:
    known = [*DATASETS, *ANNOTATIONS]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
