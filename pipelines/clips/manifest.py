"""Read and write the list of clips and their labels.

What is read: tables (the JSON of the published SSAST code, CSV and its kin, JSON Lines, lists,
``wav.scp``, Parquet), a folder of audio files, a folder of prepared shards, and a JSON that picks
clips of such a folder.
Whether the audio files exist is not checked here: the pipeline replaces and reports missing clips.
"""

import json
import logging
import math
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from ssast.pipelines.clips.columns import PLAIN, TableFormat, say_once, say_unused
from ssast.pipelines.clips.entries import CLIP_KEY, PREPARED_KEY, Entries, Table
from ssast.pipelines.clips.folders import AUDIO_SUFFIXES, FFMPEG_SUFFIXES, audio_files
from ssast.pipelines.clips.labels import LabelReader, format_labels, is_name
from ssast.pipelines.clips.listed import FileList, write_files
from ssast.pipelines.clips.paths import absolute, are_plain, plain, resolve, values_of
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
from ssast.pipelines.clips.shared import Arrays, ArrayWriter, forget, shared_arrays, state_of
from ssast.pipelines.clips.tables import SUFFIXES, is_table, open_table
from ssast.pipelines.clips.tars import TarIndex, find_files, names_tars, tars_in
from ssast.pipelines.errors import DataError
from ssast.pipelines.files import write_atomically
from ssast.pipelines.text import shown

log = logging.getLogger(__name__)

LARGE_BYTES = 2**22  # of a manifest whose list of clips is kept for other processes


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


def read_manifest(
    path: str | Path, classes: Collection[str] | None = None, table: TableFormat = PLAIN
) -> Manifest:
    """Read a manifest.

    Args:
        path: One of

            - a table: CSV with any delimiter, JSON, JSON Lines, Parquet, by the suffix of its name.
              Columns are told by their names (:mod:`~.columns`). Labels are a name, a number or a
              list (in text, one of JSON in a column ``labels``), and may be empty;
            - of these, the published JSON ``{"data": [{"wav": "a.flac", "labels": "dog,bark"},
              ...]}``, where commas separate labels;
            - a text file with a path in each line, or Kaldi's ``wav.scp``;
            - a folder that was prepared: the clips in its shards;
            - a JSON file ``{"prepared": "..", "data": [{"clip": "a-00000.flac", "labels": "dog"},
              ...]}``: clips of a prepared folder (or of its URL) by their names in the shards;
            - tar archives in the layout of WebDataset, see :func:`~.tars.find_files`: the sounds in
              them, with the labels of their samples;
            - any other folder: all audio files in it and below, sorted; or all in its tar archives.

            A URL must be of tar archives or of a folder of them, or of a prepared folder.

            Relative paths are relative to the manifest's folder.
        classes: Names of the known classes: where one holds separators, it is one label.
        table: What is set of the format of a table.

    Raises:
        DataError: No such file, not in this form, empty, or a clip is listed twice.
    """
    clips = _unlisted_clips(path, table)
    if isinstance(clips, TarIndex):
        return Manifest(clips, clips.labels(), str(path))
    path = as_path(path)
    if clips is not None:
        labels = read_labels(path, len(clips)) if isinstance(clips, ShardIndex) else None
        return Manifest(clips, labels, str(path))
    reader = LabelReader(str(path), classes)
    clips = _listed_clips(path, table, reader)
    return Manifest(clips, reader.finish(), str(path))


def read_clips(path: str | Path, table: TableFormat = PLAIN) -> ClipPaths:
    """Read the clips of a manifest or of a folder without their labels.

    The processes of a machine share the list of a large manifest: one of them reads it, once.

    Args:
        path: See :func:`read_manifest`, also for the errors.
        table: What is set of the format of a table.

    Raises:
        DataError: No such file, not in this form, empty, or a clip is listed twice.
    """
    clips = _unlisted_clips(path, table)
    return _listed_clips(as_path(path), table) if clips is None else clips


def holds_clips(place: str | Path) -> bool:
    """Return whether this is a folder, a table or tar archives, which hold clips, and no sound."""
    if names_tars(place):
        return True
    path = as_path(place)
    return path.is_dir() or is_table(path)


def _unlisted_clips(place: str | Path, table: TableFormat) -> ClipPaths | None:
    """Return the clips of a folder or of tar archives; None for a manifest."""
    found = _found_clips(place)
    if found is not None:
        say_unused(place, table)
    return found


def _found_clips(place: str | Path) -> ClipPaths | None:
    if names_tars(place):
        return _clips_of_tars(find_files(place))
    path = as_path(place)
    if is_url(path) and not is_prepared(path):
        tars = tars_in(path)
        if tars:
            return _clips_of_tars(tars)
        raise DataError(f"{path}: not there, or no prepared shards: ssast data prepare makes some")
    if not path.is_dir():
        return None
    if is_prepared(path):
        return ShardIndex(path)
    return _clips_in(path)


def _clips_in(folder: Path) -> ClipPaths:
    """Return the audio files in a folder and below; if there are none, what its archives hold."""
    found = audio_files(folder, suffixes=AUDIO_SUFFIXES | {".tar"})
    tars = [path for path in found if path.lower().endswith(".tar")]
    if not tars:
        return FileList.of(found)
    if len(tars) < len(found):
        count = len(found) - len(tars)
        log.warning("%s: %d files are read, left out are %d archives", folder, count, len(tars))
        return FileList.of(path for path in found if not path.lower().endswith(".tar"))
    for path in tars:
        prepared = Path(path).parents[1]
        if os.path.basename(os.path.dirname(path)) == "shards" and is_prepared(prepared):
            raise DataError(f"{folder}: holds prepared shards in {prepared}: train on that")
    return _clips_of_tars(tars)


def _clips_of_tars(tars: list[str]) -> TarIndex:
    return TarIndex.open(tars, AUDIO_SUFFIXES, FFMPEG_SUFFIXES)


def _listed_clips(path: Path, table: TableFormat, labels: LabelReader | None = None) -> ClipPaths:
    """Return the clips of a table; read the labels as well, if they are wanted."""
    if not is_table(path):
        found = "this file" if path.exists() else "nothing"
        if found != "nothing" and path.name.endswith(".jsonl.gz"):
            found += "; ssast data manifests lhotse makes a manifest of cuts"
        raise DataError(
            f"{path}: expected a folder or a manifest ({' '.join(SUFFIXES)}), found {found}"
        )
    what = ("clips of a manifest", os.path.abspath(path), *table.key())
    try:
        before = os.stat(path)
        state = state_of(path) if labels is None and before.st_size >= LARGE_BYTES else None

        def read() -> Arrays:
            return shared_arrays(what, state, lambda w: _write_clips(path, table, w, labels))

        opened = open_table(path, table)
        if not opened.is_plain():
            say_once(str(path), f"{opened.form}: {opened.columns.describe()}")
        arrays = read()
        if not _holds(arrays):
            forget(what)
            arrays = read()
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


def _holds(arrays: Arrays) -> bool:
    """Return whether the environment variables in paths have the values that were put in."""
    used = json.loads(arrays["environment"].tobytes())
    return bool(used == values_of(used))


def _write_clips(
    path: Path, table: TableFormat, writer: ArrayWriter, labels: LabelReader | None
) -> None:
    """Write the arrays of a :class:`FileList`, and what the manifest says of a prepared folder."""
    opened = open_table(path, table)
    is_file = PREPARED_KEY not in opened.besides
    variables: set[str] = set()
    if labels is not None:
        labels.begin(opened, table.label_separator)

    def names() -> Iterator[Files]:
        for part in opened.entries:
            yield _files(path, opened, part, variables)
            if labels is not None:
                labels.add(part)

    repeated = write_files(writer, names())
    if len(repeated):
        _check_unique(path, table, set(repeated.tolist()))
    prepared = b"" if is_file else json.dumps(opened.besides[PREPARED_KEY]).encode()
    writer.write("prepared", np.frombuffer(prepared, np.uint8))
    environment = json.dumps(values_of(variables)).encode()
    writer.write("environment", np.frombuffer(environment, np.uint8))


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


def _files(path: Path, opened: Table, part: Entries, variables: set[str] | None = None) -> Files:
    """Return the files of entries and which parts of them are clips, or names in shards.

    Raises:
        DataError: One is missing, not text, or not a part.
    """
    names = _names(path, opened, part, variables)
    if PREPARED_KEY in opened.besides:
        return Files(names)
    where = lambda row: f"{path}: {part.where(row)}"  # noqa: E731
    return Files(names, read_seconds(part.columns, opened.columns.time_keys, where))


def _names(
    path: Path, opened: Table, part: Entries, variables: set[str] | None = None
) -> list[str]:
    """Return the absolute paths of entries, or the names of clips in shards.

    Args:
        path: Path of the table.
        opened: The table.
        part: The entries.
        variables: Gets the environment variables that paths begin with.

    Raises:
        DataError: One is missing, not text, or leads nowhere.
    """
    is_file, key = PREPARED_KEY not in opened.besides, str(opened.columns.wav)
    folder = absolute(path.parent)
    if opened.root is not None:
        folder = resolve(opened.root, folder, variables)
    folder = os.path.join(folder, "")
    given = _plain_names(part.columns, key)
    if given is not None:
        return [n if n[0] == "/" else folder + n for n in given] if is_file else given
    names = []
    for row, entry in enumerate(part.columns):
        name = entry.get(key)
        if not is_name(name):
            what = "path" if is_file else "name"
            raise DataError(
                f"{path}: {part.where(row)}: expected the {what} of a clip under {key!r}, "
                f"found {shown(name)}"
            )
        try:
            names.append(resolve(name, folder, variables) if is_file else name)
        except ValueError as error:
            raise DataError(f"{path}: {part.where(row)}: {error}, found {shown(name)}") from error
    return names


def _plain_names(entries: Sequence[dict[str, Any]], key: str) -> list[str] | None:
    """Return what is given in entries, looked at together; None if one needs a closer look."""
    try:
        given = [entry[key] for entry in entries]
        "".join(given).encode(errors="surrogateescape")
    except (KeyError, TypeError, UnicodeEncodeError):
        return None
    return given if are_plain(given) else None


def _check_unique(path: Path, table: TableFormat, hashes: set[int]) -> None:
    """Check that no clip whose name has one of these hashes is listed twice.

    Raises:
        DataError: One is; the message says where.
    """
    opened = open_table(path, table)
    found: dict[FileClip, str] = {}
    for part in opened.entries:
        for row, clip in enumerate(_files(path, opened, part).clips()):
            if hash(clip) not in hashes:
                continue
            if clip in found:
                given = part.columns[row][str(opened.columns.wav)]
                if isinstance(clip, Segment):
                    given = f"{given}{span_text(clip.begin_s, clip.duration_s)}"
                raise DataError(
                    f"{path}: {part.where(row)}: {given} is listed already at {found[clip]}"
                )
            found[clip] = part.where(row)


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
        return {"wav": str(clip) if isinstance(clip, ShardClip) else plain(str(clip))}
    entry: dict[str, Any] = {"wav": plain(clip.path), "begin": clip.begin_s}
    return entry if math.isinf(clip.duration_s) else entry | {"duration": clip.duration_s}


def _folder_from(manifest: Path, folder: Path) -> str:
    """Return the prepared folder as a manifest names it: both may be moved together."""
    if is_url(folder):
        return str(folder)
    return os.path.relpath(os.path.realpath(folder), os.path.realpath(manifest.parent))
