"""Read and write the list of clips and their labels.

Five forms are read: the JSON of the published SSAST code, a CSV with a header, a folder of audio
files, a folder of prepared shards, and a JSON that picks clips of such a folder.
Whether the audio files exist is not checked here: the pipeline replaces and reports missing clips.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssast.pipelines.clips.labels import doubtful, format_labels, is_name, parse_labels
from ssast.pipelines.clips.remote import as_path, is_url
from ssast.pipelines.clips.shards import ClipPaths, ShardClip, ShardIndex, is_prepared, read_labels
from ssast.pipelines.errors import DataError
from ssast.pipelines.files import write_atomically
from ssast.pipelines.text import csv_rows, read_text

log = logging.getLogger(__name__)

AUDIO_SUFFIXES = frozenset(
    f".{kind}"
    for kind in (
        *("wav", "flac", "ogg", "oga", "opus", "mp3", "aif", "aiff", "aifc"),
        *("au", "snd", "caf", "w64", "rf64", "sph", "voc"),
    )
)
FFMPEG_SUFFIXES = frozenset(  # of what ffmpeg reads and libsndfile does not
    f".{kind}"
    for kind in (
        *("m4a", "m4b", "mp4", "mov", "3gp", "aac", "wma", "asf", "webm", "weba", "mka", "mkv"),
        *("ac3", "eac3", "dts", "ape", "wv", "tta", "tak", "amr", "spx", "ra", "rm", "avi", "flv"),
    )
)
PATH_KEYS = ("wav", "path")
PREPARED_KEY, CLIP_KEY = "prepared", "clip"
LABEL_KEYS = ("labels", "label")  # several with commas between them, or one


@dataclass(frozen=True)
class Manifest:
    """Clips and their labels.

    Attributes:
        paths: Absolute paths of the audio files, or the index of prepared shards.
        labels: Labels of each clip, none for some perhaps; None if the manifest has no labels.
        source: Path of the manifest or folder, for messages.
    """

    paths: ClipPaths
    labels: tuple[tuple[str, ...], ...] | None
    source: str

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self.paths)


def read_manifest(path: str | Path, classes: Collection[str] | None = None) -> Manifest:
    """Read a manifest.

    Args:
        path: One of

            - a JSON file ``{"data": [{"wav": "a.flac", "labels": "dog,bark"}, ...]}``; labels are
              optional, but all entries have them or none;
            - a CSV file with a header that has ``wav`` or ``path``, and perhaps ``label`` or
              ``labels``; as in JSON, ``labels`` are several with commas between them, or a JSON
              list of names, and ``label`` is one name whatever it holds. Both may be empty;
            - a folder that was prepared: the clips in its shards;
            - a JSON file ``{"prepared": "..", "data": [{"clip": "a-00000.flac", "labels": "dog"},
              ...]}``: clips of a prepared folder (or of its URL) by their names in the shards;
            - any other folder: all audio files in it and below, sorted.

            A URL must be of a prepared folder.

            Relative paths are relative to the manifest's folder.
        classes: Names of the known classes: where one holds commas, it is one label.

    Raises:
        DataError: No such file, not in this form, empty, or a clip is listed twice.
    """
    path = as_path(path)
    if is_url(path) and not is_prepared(path):
        raise DataError(f"{path}: not there, or no prepared shards: ssast data prepare makes some")
    if path.is_dir():
        if is_prepared(path):
            clips = ShardIndex(path)
            return Manifest(clips, read_labels(path, len(clips)), str(path))
        return Manifest(tuple(audio_files(path)), None, str(path))
    if path.suffix.lower() not in (".json", ".csv"):
        found = "this file" if path.exists() else "nothing"
        raise DataError(f"{path}: expected a folder, a .json or a .csv manifest, found {found}")
    index: ShardIndex | None = None
    try:
        if path.suffix.lower() == ".csv":
            entries = csv_entries(path)
        else:
            content = json_content(path)
            entries = json_entries(path, content)
            if PREPARED_KEY in content:
                index = prepared_index(path, content[PREPARED_KEY])
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not entries:
        raise DataError(f"{path}: lists no clips")
    return parse_entries(path, entries, index, classes)


def read_clips(path: str | Path) -> ClipPaths:
    """Read the clips of a manifest or of a folder without their labels.

    Args:
        path: See :func:`read_manifest`, also for the errors.

    Raises:
        DataError: No such file, not in this form, empty, or a clip is listed twice.
    """
    path = as_path(path)
    if path.is_dir() and is_prepared(path):
        return ShardIndex(path)
    return read_manifest(path).paths


def prepared_index(path: Path, prepared: Any) -> ShardIndex:
    """Open the prepared folder that a manifest names.

    Args:
        path: Path of the manifest.
        prepared: The folder, relative to that of the manifest, or its URL.

    Raises:
        DataError: It is not there, or not prepared.
    """
    if not isinstance(prepared, str) or not prepared or "\0" in prepared:
        raise DataError(f"{path}: expected a prepared folder under 'prepared', found {prepared!r}")
    # Links are followed before "..", as when the manifest was written.
    folder = as_path(prepared)
    if not is_url(folder):
        folder = Path(os.path.realpath(path.parent / folder))
    if not is_prepared(folder):
        raise DataError(f"{path}: its clips are in {folder}, which is not there or not prepared")
    return ShardIndex(folder)


def parse_entries(
    path: Path,
    entries: Sequence[tuple[str, dict[str, Any]]],
    index: ShardIndex | None,
    classes: Collection[str] | None,
) -> Manifest:
    """Check the entries of a manifest.

    Args:
        path: Path of the manifest.
        entries: Location for messages and columns of each clip.
        index: The prepared folder whose clips are listed by name; None if files are listed.
        classes: See :func:`read_manifest`.

    Raises:
        DataError: A path or label is missing or not text, or a clip is listed twice, or is not in
            the prepared folder.
    """
    folder = os.path.abspath(path.parent)
    keys = PATH_KEYS if index is None else (CLIP_KEY,)
    clips: dict[str, str] = {}
    labels: list[tuple[str, ...]] = []
    label_key = next((k for k in LABEL_KEYS if k in entries[0][1]), None)
    several = label_key == LABEL_KEYS[0]
    for location, entry in entries:
        where = f"{path}: {location}"
        given = next((entry[key] for key in keys if key in entry), None)
        if not is_name(given):
            what = "path" if index is None else "name"
            raise DataError(
                f"{where}: expected the {what} of a clip under {keys[0]!r}, found {given!r}"
            )
        clip = os.path.normpath(os.path.join(folder, given)) if index is None else given
        if clip in clips:
            raise DataError(f"{where}: {given} is listed already at {clips[clip]}")
        clips[clip] = location
        if next((k for k in LABEL_KEYS if k in entry), None) != label_key:
            raise DataError(f"{where}: expected all entries to have labels, or none")
        if label_key is not None:
            try:
                names = parse_labels(entry[label_key], several=several, classes=classes or ())
            except ValueError as error:
                raise DataError(f"{where}: {error}, found {entry[label_key]!r:.60}") from error
            labels.append(names)
    if label_key is not None and classes is None:
        found = doubtful([entry[label_key] for _, entry in entries], several=several)
        if found is not None:
            message, count = found
            log.warning("%s: %d of %d clips: %s", path, count, len(entries), message)
    paths: ClipPaths = tuple(clips)
    if index is not None:
        try:
            paths = index.named(tuple(clips))
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
    return Manifest(paths, tuple(labels) if label_key else None, str(path))


def json_content(path: Path) -> dict[str, Any]:
    """Read ``{"data": [...], ...}``.

    Raises:
        DataError: Not JSON, or not of this form.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON: {error.msg} in line {error.lineno}") from error
    except (ValueError, RecursionError) as error:  # a number too long, lists too deep
        raise DataError(f"{path}: not JSON of a manifest: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise DataError(f'{path}: expected {{"data": [{{"wav": ..., "labels": ...}}, ...]}}')
    return content


def json_entries(path: Path, content: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return location (``entry 0``, ``entry 1``, ...) and columns of each clip of a JSON manifest.

    Raises:
        DataError: An entry is not an object.
    """
    key = CLIP_KEY if PREPARED_KEY in content else PATH_KEYS[0]
    for number, entry in enumerate(content["data"]):
        if not isinstance(entry, dict):
            raise DataError(
                f'{path}: entry {number}: expected {{"{key}": ...}}, found {entry!r:.60}'
            )
    return [(f"entry {number}", entry) for number, entry in enumerate(content["data"])]


def csv_entries(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read location (``line 2``, ``line 3``, ...) and columns of each clip of a CSV manifest.

    Raises:
        DataError: Not CSV, the header names no path column or one twice, or a line has more or
            fewer columns.
    """
    rows = csv_rows(read_text(path), path)
    header = [name.strip().lower() for name in next(rows, (1, []))[1]]
    if not set(header) & set(PATH_KEYS):
        raise DataError(f"{path}: expected a header with 'wav' or 'path', found {header!s:.200}")
    for name in PATH_KEYS + LABEL_KEYS:
        if header.count(name) > 1:
            raise DataError(f"{path}: expected one column {name!r}, found {header.count(name)}")
    entries = []
    for line, cells in rows:
        if len(cells) != len(header):
            hint = "; a cell that holds a comma is quoted" if len(cells) > len(header) else ""
            raise DataError(
                f"{path}: line {line}: expected {len(header)} columns, found {len(cells)}{hint}"
            )
        entries.append((f"line {line}", dict(zip(header, cells, strict=True))))
    return entries


def audio_files(
    folder: Path,
    *,
    leave_out: Path | None = None,
    suffixes: frozenset[str] = AUDIO_SUFFIXES,
    on_error: Callable[[OSError], None] | None = None,
) -> list[str]:
    """List the audio files in a folder and below: absolute paths, sorted.

    Hidden files and folders are skipped. Links are followed, each real folder once. Files that
    only ``ssast data prepare`` reads, with ffmpeg, are logged unless ``suffixes`` has them.

    Args:
        folder: Folder to search.
        leave_out: A folder to skip.
        suffixes: Suffixes of the files to look for, in lower case.
        on_error: Called for a folder that cannot be read; such folders are skipped.

    Raises:
        DataError: There are no such files.
    """
    files: list[str] = []
    foreign: Counter[str] = Counter()
    visited: set[str] = {os.path.realpath(leave_out)} if leave_out else set()
    top = os.path.abspath(folder)
    for root, folders, names in os.walk(top, onerror=on_error, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            kind = os.path.splitext(name)[1].lower()
            if kind in suffixes and not name.startswith("."):
                files.append(os.path.join(root, name))
            elif kind in FFMPEG_SUFFIXES and not name.startswith("."):
                foreign[kind] += 1
    there = ", ".join(f"{count} {kind}" for kind, count in sorted(foreign.items()))
    advice = f"{there}: ssast data prepare {folder} OUT converts them with ffmpeg"
    if not files and foreign:
        raise DataError(
            f"{folder}: no audio files that can be read directly in this folder, but {advice}"
        )
    if not files:
        kinds = " ".join(sorted(suffixes))
        raise DataError(f"{folder}: no audio files in this folder (looked for {kinds})")
    if foreign:
        log.warning("%s: %d files are read; left out are %s", folder, len(files), advice)
    return sorted(files)


def write_manifest(
    path: str | Path,
    paths: ClipPaths | Iterable[str | Path],
    labels: Iterable[Sequence[str]] | None = None,
) -> None:
    """Write a JSON manifest, atomically: the published form, or one of clips in shards.

    Args:
        path: Path of the manifest; its folder is created.
        paths: Audio files; relative paths are understood relative to the manifest's folder. Or
            clips of a prepared folder, which are listed by their names there.
        labels: Labels of each clip: a text with commas between them as in the published form, or
            a list where that would be read in another way.

    Raises:
        DataError: A label is blank or no text, or the names of prepared clips cannot be read.
        OSError: It cannot be written.
    """
    path, head = Path(path), ""
    if isinstance(paths, ShardIndex):
        head = f'"{PREPARED_KEY}": {json.dumps(_folder_from(path, paths.folder))}, '
        entries: list[dict[str, Any]] = [{CLIP_KEY: name} for name in paths.names()]
    else:
        entries = []
        for wav in paths:
            assert not isinstance(wav, ShardClip), "clips of shards are listed by their index"
            entries.append({PATH_KEYS[0]: os.fspath(wav)})
    if labels is not None:
        labels = list(labels)
        classes = {name for names in labels for name in names}
        for entry, names in zip(entries, labels, strict=True):
            if not all(map(is_name, names)):
                [clip] = entry.values()
                raise DataError(f"{clip}: expected labels that are text, found {names}")
            text = format_labels(names, classes)
            entry["labels"] = text if text == ",".join(names) else list(names)
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    write_atomically(path, f'{{{head}"data": [\n{lines}\n]}}\n')


def _folder_from(manifest: Path, folder: Path) -> str:
    """Return the prepared folder as a manifest names it: both may be moved together."""
    if is_url(folder):
        return str(folder)
    return os.path.relpath(os.path.realpath(folder), os.path.realpath(manifest.parent))
