"""Cuts of lhotse: what ``CutSet.to_file`` writes, read by lhotse itself.

A cut is a clip, a segment of its recording; its labels are those of its supervisions. Only cuts
that are a span of one file are taken: the others are counted by what they are.
"""

import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ssast.pipelines.clips.labels import is_name
from ssast.pipelines.datasets.annotations import Reading
from ssast.pipelines.datasets.tables import Dataset, Listed, existing
from ssast.pipelines.errors import DataError, UnavailableError
from ssast.pipelines.text import one_line, shown

SUFFIXES = (".jsonl", ".jsonl.gz")
FIELDS = ("text", "speaker", "language", "gender")  # of a supervision
CUSTOM, CUSTOM_LABEL = "custom.", "custom.label"
KINDS = {  # of sources of sound that are no files
    "memory": "with their sound in memory",
    "url": "behind a URL",
    "command": "from a command",
    "shar": "in a Shar folder",
}
REMEDY = "lhotse's CutSet.save_audios writes the sound of such cuts to files"


def read_lhotse(source: Path, reading: Reading) -> Dataset:
    """Read the cuts in a file (.jsonl, .jsonl.gz), or in all such files of a folder.

    Each file is a split. Without ``reading.label_column`` the labels are in ``custom.label`` if any
    supervision has it, and else in ``text``.

    Args:
        source: The file or folder.
        reading: Names the labels: ``text``, ``speaker``, ``language``, ``gender`` or
            ``custom.NAME``, of supervisions; the last also of cuts.

    Raises:
        UnavailableError: lhotse is not installed.
        DataError: There are no cuts, lhotse cannot read them, or none is a span of a file.
    """
    files = _files(source)
    field = _label_field(files, reading.label_column)
    splits: dict[str, list[Listed]] = {}
    notes = [f"labels: {field}"]
    for split, path in files.items():
        splits[split], more = _read(path, field)
        notes += more
    names = sorted({name for clips in splits.values() for clip in clips for name in clip.labels})
    if not names and reading.label_column is not None:
        raise DataError(f"{source}: no supervision has a {field}; --label-column names the labels")
    if not names:
        notes[0] = "no labels: no supervision has a custom.label or a text; --label-column names it"
    return Dataset(splits, [(name, name) for name in names], notes=notes)


def _files(source: Path) -> dict[str, Path]:
    """Return the files of cuts by the names of their splits."""
    if source.is_dir():
        found = sorted(path for path in source.iterdir() if path.name.endswith(SUFFIXES))
    else:
        found = [source] if source.name.endswith(SUFFIXES) else []
    found = [path for path in found if path.is_file() and path.name[0] != "."]
    if not found:
        raise DataError(f"{source}: expected cuts of lhotse ({' or '.join(SUFFIXES)}), found none")
    files: dict[str, Path] = {}
    for path in found:
        split = path.name.removesuffix(".gz").removesuffix(".jsonl")
        if split in files:
            raise DataError(f"{source}: {files[split].name} and {path.name} have the same name")
        files[split] = path
    return files


def _label_field(files: Mapping[str, Path], wanted: str | None) -> str:
    if wanted is None:
        for path in files.values():
            for cut in _cuts(path):
                with _well_formed(path, cut):
                    if _values(cut, CUSTOM_LABEL):
                        return CUSTOM_LABEL
        return FIELDS[0]
    if wanted not in FIELDS and not (wanted.startswith(CUSTOM) and wanted != CUSTOM):
        known = ", ".join((*FIELDS, f"{CUSTOM}NAME"))
        raise DataError(f"--label-column is {wanted!r}, expected one of {known}")
    return wanted


def _cuts(path: Path) -> Iterator[Any]:
    """Yield the cuts in a file.

    Raises:
        UnavailableError: lhotse is not installed.
        DataError: It holds something else.
    """
    try:
        import lhotse
    except ImportError as error:
        raise UnavailableError(
            f"{path}: cuts need lhotse: pip install 'ssast-engine[lhotse]'"
        ) from error
    count = 0
    try:
        cuts = lhotse.load_manifest_lazy(path)
        if isinstance(cuts, lhotse.CutSet):
            for cut in cuts:
                yield cut
                count += 1
            return
    except Exception as error:  # of gzip, of JSON, and whatever lhotse raises for malformed fields
        why = f"{type(error).__name__}: {one_line(error):.200}"
        raise DataError(f"{path}: lhotse cannot read it after {count} cuts: {why}") from error
    kind = "nothing" if cuts is None else f"a {type(cuts).__name__}"
    raise DataError(f"{path}: expected cuts, found {kind}")


@contextlib.contextmanager
def _well_formed(path: Path, cut: Any) -> Iterator[None]:
    """Turn what malformed fields raise, whose types lhotse does not check, into one line."""
    try:
        yield
    except DataError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {one_line(error):.200}"
        raise DataError(f"{path}: cut {cut.id!s:.80}: malformed: {why}") from error


def _read(path: Path, field: str) -> tuple[list[Listed], list[str]]:
    """Return the clips of a file, and what there is to say of them."""
    clips: list[Listed] = []
    left_out: Counter[str] = Counter()
    first: dict[str, str] = {}
    unlabelled = parts = count = 0
    for cut in _cuts(path):
        count += 1
        with _well_formed(path, cut):
            recording, why = _file_of(cut)
            if why is not None:
                left_out[why] += 1
                first.setdefault(why, str(cut.id))
                continue
            labels = _labels(cut, field, f"{path}: cut {cut.id}")
            unlabelled += not labels
            parts += any(_is_part(supervision, cut) for supervision in cut.supervisions)
            found = existing(recording, path.parent / recording)
            name = str(cut.id) if found else f"{cut.id}: {recording}"
            clips.append(Listed(name, found and os.path.abspath(found), labels, _span(cut, path)))
    what = "; ".join(f"{n} {why}, the first {first[why]}" for why, n in left_out.items())
    if not clips:
        raise DataError(f"{path}: none of its {count} cuts is a span of a file: {what}: {REMEDY}")
    notes = []
    if left_out:
        notes.append(f"{path}: left out are {left_out.total()} cuts: {what}; {REMEDY}")
    if unlabelled and unlabelled < len(clips):
        notes.append(f"{path}: {unlabelled} cuts have no label")
    if parts:
        notes.append(
            f"{path}: {parts} cuts are longer than one of their supervisions, and have its label "
            "as a whole; `lhotse cut trim-to-supervisions` makes each supervision a cut"
        )
    return clips, notes


def _file_of(cut: Any) -> tuple[str, str | None]:
    """Return the path of a cut's file as it is stated, or the reason why it has none."""
    if not hasattr(cut, "recording"):
        return "", "of several tracks, or padding"
    if cut.recording is None:
        return "", "without a recording"
    names = [
        one["name"] if isinstance(one, dict) else type(one).__name__
        for one in cut.recording.transforms or ()
    ]
    if set(names) - {"Resample"}:  # which leaves times as they are
        return "", f"transformed ({', '.join(sorted(set(names)))})"
    wanted = {cut.channel} if isinstance(cut.channel, int) else set(cut.channel)
    sources = [one for one in cut.recording.sources if wanted & set(one.channels)]
    for one in sources:
        if one.type != "file":
            return "", KINDS.get(one.type, f"with sound of type {one.type}")
    if len(sources) != 1 or set(sources[0].channels) != wanted:
        return "", "of some channels of a file, or of several files"
    return os.fspath(sources[0].source), None


def _span(cut: Any, path: Path) -> tuple[float, float] | None:
    """Return begin and duration of a cut in s; None for a whole file."""
    begin_s, duration_s = float(cut.start), float(cut.duration)
    if not (0 <= begin_s < math.inf and 0 < duration_s < math.inf):
        raise DataError(
            f"{path}: cut {cut.id}: expected a begin of 0 s or later and a duration above 0 s, "
            f"found {begin_s:g} s and {duration_s:g} s"
        )
    if begin_s == 0 and abs(duration_s - cut.recording.duration) < 1 / cut.sampling_rate:
        return None
    return begin_s, duration_s


def _is_part(supervision: Any, cut: Any) -> bool:
    """Return whether a supervision leaves more than 10 % of its cut, and 0.1 s, unlabelled."""
    covered = min(supervision.end, cut.duration) - max(supervision.start, 0)
    return bool(cut.duration - covered > max(0.1, 0.1 * cut.duration))


def _values(cut: Any, field: str) -> list[Any]:
    """Return what a cut and its supervisions have in a field."""
    holders = list(cut.supervisions)
    if not field.startswith(CUSTOM):
        found = [getattr(holder, field) for holder in holders]
    else:
        name = field.removeprefix(CUSTOM)
        customs = [getattr(holder, "custom", None) or {} for holder in (*holders, cut)]
        found = [custom.get(name) for custom in customs]
    return [value for value in found if value is not None and value != ""]


def _labels(cut: Any, field: str, place: str) -> tuple[str, ...]:
    names: list[str] = []
    for value in _values(cut, field):
        for name in value if isinstance(value, list) else [value]:
            text = str(name).strip() if type(name) in (str, int) else ""
            if not is_name(text):
                raise DataError(
                    f"{place}: expected labels of text under {field}, found {shown(value)}"
                )
            names.append(text)
    return tuple(dict.fromkeys(names))
