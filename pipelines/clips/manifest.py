"""The list of clips and their labels: read and write.

Four forms are read: the JSON of the published SSAST code, a CSV with a header, a folder of audio
files, and a folder of prepared shards.
Whether the audio files exist is not checked here: the pipeline replaces a missing clip and says so.
"""

import csv
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssast.pipelines.clips.remote import is_url, located
from ssast.pipelines.clips.shards import ClipPaths, ShardIndex, is_prepared, read_labels
from ssast.pipelines.errors import DataError
from ssast.pipelines.files import write_atomically

AUDIO_SUFFIXES = frozenset(
    f".{kind}"
    for kind in (
        *("wav", "flac", "ogg", "oga", "opus", "mp3", "aif", "aiff", "aifc"),
        *("au", "snd", "caf", "w64", "rf64", "sph", "voc"),
    )
)
PATH_KEYS = ("wav", "path")
LABEL_KEYS = ("labels", "label")


@dataclass(frozen=True)
class Manifest:
    """Clips and labels.

    Attributes:
        paths: Absolute paths of the audio files, or the index of prepared shards.
        labels: The labels of each clip, or None if the manifest has none.
        source: Where it was read from, for messages.
    """

    paths: ClipPaths
    labels: tuple[tuple[str, ...], ...] | None
    source: str

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.paths)


def read_manifest(path: str | Path) -> Manifest:
    """Reads a manifest.

    Args:
        path: One of

            - a JSON file ``{"data": [{"wav": "a.flac", "labels": "dog,bark"}, ...]}``; labels are
              optional, but all entries have them or none;
            - a CSV file with a header that has ``wav`` or ``path``, and perhaps ``label`` or
              ``labels``;
            - a folder that was prepared: the clips in its shards;
            - any other folder: all audio files in it and below, sorted.

            A URL must be of a prepared folder.

            Relative paths are relative to the manifest's folder.

    Raises:
        DataError: No such file, not in this form, empty, or a clip is listed twice.
    """
    path = located(path)
    if is_url(path) and not is_prepared(path):
        raise DataError(f"{path}: not there, or no prepared shards: ssast data prepare makes some")
    if path.is_dir():
        if is_prepared(path):
            index = ShardIndex(path)
            return Manifest(index, read_labels(path, len(index)), str(path))
        return Manifest(tuple(audio_files(path)), None, str(path))
    readers: dict[str, Callable[[Path], list[tuple[str, dict[str, Any]]]]]
    readers = {".json": json_entries, ".csv": csv_entries}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        found = "this file" if path.exists() else "nothing"
        raise DataError(f"{path}: expected a folder, a .json or a .csv manifest, found {found}")
    try:
        entries = reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: byte {error.start}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not entries:
        raise DataError(f"{path}: lists no clips")
    return checked(path, entries)


def checked(path: Path, entries: Sequence[tuple[str, dict[str, Any]]]) -> Manifest:
    """Turns entries into a manifest.

    Args:
        path: The manifest.
        entries: (place for messages, columns) of each clip.

    Raises:
        DataError: A path or label is missing or not text, or a clip is listed twice.
    """
    folder = os.path.abspath(path.parent)
    paths: dict[str, str] = {}
    labels: list[tuple[str, ...]] = []
    label_key = next((k for k in LABEL_KEYS if k in entries[0][1]), None)
    for place, entry in entries:
        where = f"{path}: {place}"
        wav = next((entry[key] for key in PATH_KEYS if key in entry), None)
        if not isinstance(wav, str) or not wav.strip() or "\0" in wav:
            raise DataError(f"{where}: expected the path of a clip under 'wav', found {wav!r}")
        absolute = os.path.normpath(os.path.join(folder, wav))
        if absolute in paths:
            raise DataError(f"{where}: {wav} is listed already at {paths[absolute]}")
        paths[absolute] = place
        if next((k for k in LABEL_KEYS if k in entry), None) != label_key:
            raise DataError(f"{where}: expected all entries to have labels, or none")
        if label_key is not None:
            text = entry[label_key]
            names = (
                tuple(filter(None, map(str.strip, text.split(","))))
                if isinstance(text, str)
                else ()
            )
            if not names:
                raise DataError(f"{where}: expected comma-separated labels, found {text!r}")
            labels.append(names)
    return Manifest(tuple(paths), tuple(labels) if label_key else None, str(path))


def json_entries(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Reads ``{"data": [{...}, ...]}``; places are ``entry 0``, ``entry 1``, ...

    Raises:
        DataError: Not JSON, or not of this form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON: {error.msg} in line {error.lineno}") from error
    data = content.get("data") if isinstance(content, dict) else None
    if not isinstance(data, list):
        raise DataError(f'{path}: expected {{"data": [{{"wav": ..., "labels": ...}}, ...]}}')
    for number, entry in enumerate(data):
        if not isinstance(entry, dict):
            raise DataError(f'{path}: entry {number}: expected {{"wav": ...}}, found {entry!r:.60}')
    return [(f"entry {number}", entry) for number, entry in enumerate(data)]


def csv_entries(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Reads a CSV with a header; places are ``line 2``, ``line 3``, ...

    Raises:
        DataError: The header names no path column, or a line has more or fewer columns.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        header = [name.strip().lower() for name in reader.fieldnames or ()]
        if not set(header) & set(PATH_KEYS):
            raise DataError(f"{path}: expected a header with 'wav' or 'path', found {header}")
        reader.fieldnames = header
        entries = []
        for row in reader:
            place = f"line {reader.line_num}"
            if None in row or None in row.values():
                raise DataError(f"{path}: {place}: expected {len(header)} columns")
            entries.append((place, dict(row)))
    return entries


def audio_files(
    folder: Path,
    *,
    leave_out: Path | None = None,
    suffixes: frozenset[str] = AUDIO_SUFFIXES,
    on_error: Callable[[OSError], None] | None = None,
) -> list[str]:
    """Absolute paths of the audio files in a folder and below, sorted.

    Hidden files and folders are passed over. Linked folders are followed, each real folder once.

    Args:
        folder: Where to look.
        leave_out: A folder that is passed over.
        suffixes: Endings of the files to look for, in small letters.
        on_error: Called for a folder that cannot be read; by default it is passed over.

    Raises:
        DataError: There are none.
    """
    files: list[str] = []
    visited: set[str] = {os.path.realpath(leave_out)} if leave_out else set()
    top = os.path.abspath(folder)
    for root, folders, names in os.walk(top, onerror=on_error, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += (
            os.path.join(root, name)
            for name in names
            if os.path.splitext(name)[1].lower() in suffixes and not name.startswith(".")
        )
    if not files:
        kinds = " ".join(sorted(suffixes))
        raise DataError(f"{folder}: no audio files in this folder (looked for {kinds})")
    return sorted(files)


def write_manifest(
    path: str | Path,
    paths: Iterable[str | Path],
    labels: Iterable[Sequence[str]] | None = None,
) -> None:
    """Writes the published JSON form, in one move.

    Args:
        path: The manifest; its folder is created.
        paths: Audio files; relative paths are understood relative to the manifest's folder.
        labels: Labels of each clip.

    Raises:
        DataError: A label is empty or holds a comma.
        OSError: It cannot be written.
    """
    entries = [{"wav": os.fspath(wav)} for wav in paths]
    if labels is not None:
        for entry, names in zip(entries, labels, strict=True):
            if not names or any(not name.strip() or "," in name for name in names):
                raise DataError(f"{entry['wav']}: labels must not be empty or hold commas: {names}")
            entry["labels"] = ",".join(names)
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    write_atomically(Path(path), f'{{"data": [\n{lines}\n]}}\n')
