"""The audio files in a folder, by their suffixes."""

import logging
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from ssast.pipelines.errors import DataError, read_error

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
        on_error: Called for a folder that cannot be read, which is then skipped.

    Raises:
        DataError: There are no such files, or a folder cannot be read and ``on_error`` is None.
    """
    files: list[str] = []
    foreign: Counter[str] = Counter()
    visited: set[str] = {os.path.realpath(leave_out)} if leave_out else set()
    top = os.path.abspath(folder)
    for root, folders, names in os.walk(top, onerror=on_error or _raise, followlinks=True):
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


def _raise(error: OSError) -> None:
    raise read_error(error, error.filename) from error
