"""Read and write the list of clips and their labels.

Five forms are read: the JSON of the published SSAST code, a CSV with a header, a folder of audio
files, a folder of prepared shards, and a JSON that picks clips of such a folder.
Whether the audio files exist is not checked here: the pipeline replaces and reports missing clips.
"""

import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from ssast.pipelines.clips.entries import (
    CLIP_KEY,
    PATH_KEYS,
    PREPARED_KEY,
    Entries,
    csv_entries,
    json_entries,
)
from ssast.pipelines.clips.labels import LabelReader, format_labels, is_name
from ssast.pipelines.clips.listed import FileList, write_files
from ssast.pipelines.clips.remote import as_path, is_url
from ssast.pipelines.clips.segment import FileClip, Files, Segment, read_seconds, span_text
from ssast.pipelines.clips.shards import (
    ClipPath,
    ClipPaths,
    ShardClip,
    ShardIndex,
    is_prepared,
    read_labels,
)
from ssast.pipelines.clips.shared import ArrayWriter, shared_arrays, state_of
from ssast.pipelines.errors import DataError
from ssast.pipelines.files import write_atomically
from ssast.pipelines.text import shown

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
LARGE_BYTES = 2**22  # of a manifest whose list of clips is kept for other processes
# What os.path.normpath would change; names that hold line breaks may match as well.
UNUSUAL = re.compile(r"//|/\.{0,2}$|/\.{1,2}/|^\.{1,2}(?:/|$)", re.MULTILINE)


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
    clips = _clips_of_folder(path)
    if clips is not None:
        labels = read_labels(path, len(clips)) if isinstance(clips, ShardIndex) else None
        return Manifest(clips, labels, str(path))
    reader = LabelReader(str(path), classes)
    clips = _listed_clips(path, reader)
    return Manifest(clips, reader.finish(), str(path))


def read_clips(path: str | Path) -> ClipPaths:
    """Read the clips of a manifest or of a folder without their labels.

    The processes of a machine share the list of a large manifest: one of them reads it, once.

    Args:
        path: See :func:`read_manifest`, also for the errors.

    Raises:
        DataError: No such file, not in this form, empty, or a clip is listed twice.
    """
    path = as_path(path)
    clips = _clips_of_folder(path)
    return _listed_clips(path) if clips is None else clips


def _clips_of_folder(path: Path) -> ClipPaths | None:
    if is_url(path) and not is_prepared(path):
        raise DataError(f"{path}: not there, or no prepared shards: ssast data prepare makes some")
    if not path.is_dir():
        return None
    return ShardIndex(path) if is_prepared(path) else FileList.of(audio_files(path))


def _listed_clips(path: Path, labels: LabelReader | None = None) -> ClipPaths:
    """Return the clips of a JSON or CSV manifest; read the labels as well, if they are wanted."""
    if path.suffix.lower() not in (".json", ".csv"):
        found = "this file" if path.exists() else "nothing"
        raise DataError(f"{path}: expected a folder, a .json or a .csv manifest, found {found}")
    what = ("clips of a manifest", os.path.abspath(path))
    try:
        before = os.stat(path)
        state = state_of(path) if labels is None and before.st_size >= LARGE_BYTES else None
        arrays = shared_arrays(what, state, lambda writer: _write_clips(path, writer, labels))
        after = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(f"{path}: was changed while it was read: start again")
    clips = FileList(arrays, None if state is None else (what, state))
    if not len(clips):
        raise DataError(f"{path}: lists no clips")
    prepared = arrays["prepared"].tobytes()
    if not prepared:
        return clips
    index = prepared_index(path, json.loads(prepared))
    try:
        return index.named(cast(Sequence[str], clips))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _write_clips(path: Path, writer: ArrayWriter, labels: LabelReader | None) -> None:
    """Write the arrays of a :class:`FileList`, and what the manifest says of a prepared folder."""
    besides, parts = _entries(path)
    is_file = PREPARED_KEY not in besides

    def names() -> Iterator[Files]:
        for part in parts:
            yield _files(path, part, is_file)
            if labels is not None:
                labels.add(part)

    repeated = write_files(writer, names())
    if len(repeated):
        _check_unique(path, set(repeated.tolist()))
    prepared = b"" if is_file else json.dumps(besides[PREPARED_KEY]).encode()
    writer.write("prepared", np.frombuffer(prepared, np.uint8))


def _entries(path: Path) -> tuple[dict[str, Any], Iterator[Entries]]:
    return ({}, csv_entries(path)) if path.suffix.lower() == ".csv" else json_entries(path)


def prepared_index(path: Path, prepared: Any) -> ShardIndex:
    """Open the prepared folder that a manifest names.

    Args:
        path: Path of the manifest.
        prepared: The folder, relative to that of the manifest, or its URL.

    Raises:
        DataError: It is not there, or not prepared.
    """
    if not isinstance(prepared, str) or not prepared or "\0" in prepared:
        raise DataError(
            f"{path}: expected a prepared folder under 'prepared', found {shown(prepared)}"
        )
    # Links are followed before "..", as when the manifest was written.
    folder = as_path(prepared)
    if not is_url(folder):
        folder = Path(os.path.realpath(path.parent / folder))
    if not is_prepared(folder):
        raise DataError(f"{path}: its clips are in {folder}, which is not there or not prepared")
    return ShardIndex(folder)


def _files(path: Path, part: Entries, is_file: bool) -> Files:
    """Return the files of entries and which parts of them are clips, or names in shards.

    Raises:
        DataError: One is missing, not text, or not a part.
    """
    names = _names(path, part, is_file)
    if not is_file:
        return Files(names)
    where = lambda row: f"{path}: {part.where(row)}"  # noqa: E731
    return Files(names, read_seconds(part.columns, where))


def _names(path: Path, part: Entries, is_file: bool) -> list[str]:
    """Return the absolute paths of entries, or the names of clips in shards.

    Raises:
        DataError: One is missing or not text.
    """
    keys = PATH_KEYS if is_file else (CLIP_KEY,)
    folder = os.path.join(os.path.abspath(path.parent), "")
    given = _plain_names(part.columns, keys)
    if given is not None:
        return [n if n[0] == "/" else folder + n for n in given] if is_file else given
    names = []
    for row, entry in enumerate(part.columns):
        name = _given(entry, keys)
        if not is_name(name):
            what = "path" if is_file else "name"
            raise DataError(
                f"{path}: {part.where(row)}: expected the {what} of a clip under {keys[0]!r}, "
                f"found {shown(name)}"
            )
        names.append(os.path.normpath(os.path.join(folder, name)) if is_file else name)
    return names


def _given(entry: dict[str, Any], keys: Sequence[str]) -> Any:
    return next((entry[key] for key in keys if key in entry), None)


def _plain_names(entries: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[str] | None:
    """Return what is given in entries, looked at together; None if one needs a closer look."""
    key = next((key for key in keys if entries and key in entries[0]), None)
    if key is None or (key != keys[0] and any(keys[0] in entry for entry in entries)):
        return None
    try:
        given = [entry[key] for entry in entries]
        text = "\n".join(given)
        text.encode(errors="surrogateescape")
    except (KeyError, TypeError, UnicodeEncodeError):
        return None
    if "" in map(str.strip, given) or "\0" in text or UNUSUAL.search(text):
        return None
    return given


def _check_unique(path: Path, hashes: set[int]) -> None:
    """Check that no clip whose name has one of these hashes is listed twice.

    Raises:
        DataError: One is; the message says where.
    """
    besides, parts = _entries(path)
    is_file = PREPARED_KEY not in besides
    found: dict[FileClip, str] = {}
    for part in parts:
        for row, clip in enumerate(_files(path, part, is_file).clips()):
            if hash(clip) not in hashes:
                continue
            if clip in found:
                given = _given(part.columns[row], PATH_KEYS if is_file else (CLIP_KEY,))
                if isinstance(clip, Segment):
                    given = f"{given}{span_text(clip.begin_s, clip.duration_s)}"
                raise DataError(
                    f"{path}: {part.where(row)}: {given} is listed already at {found[clip]}"
                )
            found[clip] = part.where(row)


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
    paths: ClipPaths | Iterable[str | Path | Segment],
    labels: Iterable[Sequence[str]] | None = None,
) -> None:
    """Write a JSON manifest, atomically: the published form, or one of clips in shards.

    Args:
        path: Path of the manifest; its folder is created.
        paths: Audio files or segments of them; relative paths are understood relative to the
            manifest's folder. Or clips of a prepared folder, which are listed by their names there.
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
        for clip in paths:
            assert not isinstance(clip, ShardClip), "clips of shards are listed by their index"
            entries.append(clip_columns(clip))
    if labels is not None:
        labels = list(labels)
        classes = {name for names in labels for name in names}
        for entry, names in zip(entries, labels, strict=True):
            if not all(map(is_name, names)):
                name = next(iter(entry.values()))
                raise DataError(f"{name}: expected labels that are text, found {names}")
            text = format_labels(names, classes)
            entry["labels"] = text if text == ",".join(names) else list(names)
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    write_atomically(path, f'{{{head}"data": [\n{lines}\n]}}\n')


def clip_columns(clip: ClipPath) -> dict[str, Any]:
    """Return the columns of a manifest that stand for a clip; a clip in a shard has its name."""
    if not isinstance(clip, Segment):
        return {PATH_KEYS[0]: str(clip)}
    entry: dict[str, Any] = {PATH_KEYS[0]: clip.path, "begin": clip.begin_s}
    return entry if math.isinf(clip.duration_s) else entry | {"duration": clip.duration_s}


def _folder_from(manifest: Path, folder: Path) -> str:
    """Return the prepared folder as a manifest names it: both may be moved together."""
    if is_url(folder):
        return str(folder)
    return os.path.relpath(os.path.realpath(folder), os.path.realpath(manifest.parent))
