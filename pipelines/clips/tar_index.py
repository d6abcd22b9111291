"""The index of tar archives: of each, and of all of them, as arrays that are kept."""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from ssast.pipelines.clips.listed import FileList, write_files
from ssast.pipelines.clips.members import Contents, Sound, Window, read_tar
from ssast.pipelines.clips.remote import (
    RETRY_S,
    as_path,
    changing,
    file_facts,
    file_size,
    is_url,
    read_range,
)
from ssast.pipelines.clips.retry import Retry
from ssast.pipelines.clips.segment import Files
from ssast.pipelines.clips.shared import Arrays, ArrayWriter, shared_arrays, state_of
from ssast.pipelines.errors import DataError, data_error
from ssast.pipelines.files import open_regular

FORMAT = 1  # to be raised when an index holds something else
LARGEST = 2**30  # bytes of a sound: it is read as a whole
WINDOW_BYTES = 2**18  # of a remote archive: where sounds are longer, their middles are not fetched
SHOWN_PROBLEMS = 3  # in a warning


def open_tar(path: str) -> tuple[Any, int]:
    """Open an archive, on a disk or behind a URL; return it with its size in bytes.

    Raises:
        OSError: It cannot be opened.
    """
    if not is_url(path):
        file = open_regular(path)
        return file, os.fstat(file.fileno()).st_size
    size = file_size(path)
    return Window(partial(read_range, path), size, WINDOW_BYTES), size


def state_of_tar(path: str) -> tuple[str, Any]:
    """Return an archive and what changes with it, None if it has just been changed."""
    try:
        if not is_url(path):
            return path, state_of(path)
        as_path(path)  # says which package is missing
        facts = Retry(RETRY_S).call(lambda: file_facts(path), path)
    except OSError as error:
        raise data_error(error, f"{path}: cannot be read: {_reason(error)}") from error
    return path, changing(facts)


def index_tar(path: str, state: tuple[str, Any], suffixes: frozenset[str]) -> Arrays:
    """Return the arrays of one archive.

    Raises:
        DataError: It cannot be read, or is compressed.
    """

    def read() -> Contents:
        file, size = open_tar(path)
        with contextlib.closing(file):
            return read_tar(path, file, size, suffixes)

    def build(writer: ArrayWriter) -> None:
        try:
            found = Retry(RETRY_S).call(read, path)
        except OSError as error:  # not of the cache, which would be done without
            raise DataError(f"{path}: cannot be read: {_reason(error)}") from error
        _write_tar(writer, found)

    kept = None if state[1] is None else (FORMAT, sorted(suffixes), state[1])
    return shared_arrays(("sounds in a tar", path), kept, build)


def _write_tar(writer: ArrayWriter, found: Contents) -> None:
    checked = [(sound, sound.problem or _problem(sound)) for sound in found.sounds]
    problems = [(sound.name, why) for sound, why in checked if why is not None]
    sounds = [sound for sound, why in checked if why is None]
    if found.problem is not None:
        problems.append(("", found.problem))
    samples = np.array([sound.sample for sound in sounds], np.int64)
    writer.write("table", np.array([(s.offset, s.size) for s in sounds], np.int64).reshape(-1, 2))
    writer.write("recordings", np.unique(samples, return_inverse=True)[1].astype(np.int64))
    write_files(writer, [Files([sound.name for sound in sounds])])
    facts = {
        "labels": [sound.labels for sound in sounds],
        "left_out": found.left_out,
        "sources": found.label_sources,
        "num_problems": len(problems),
        "problems": problems[:SHOWN_PROBLEMS],
    }
    writer.write("facts", np.frombuffer(json.dumps(facts).encode(), np.uint8))


def _problem(sound: Sound) -> str | None:
    if not sound.size:
        return "empty"
    return "larger than 1 GiB: ssast data prepare cuts it" if sound.size > LARGEST else None


def write_index(writer: ArrayWriter, parts: Sequence[Arrays]) -> None:
    """Write the index of all archives."""
    tables: list[np.ndarray] = [np.zeros((0, 3), np.int64)]
    recordings: list[np.ndarray] = [np.zeros(0, np.int64)]
    number_of: dict[str, int] = {}
    numbers: list[int] = []
    counts: list[int] = [0]
    left_out: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    problems: list[tuple[int, str, str]] = []
    num_problems = start = unlabelled = 0
    for place, part in enumerate(parts):
        table = part["table"]
        tables.append(np.column_stack([np.full(len(table), place), table]))
        recordings.append(part["recordings"] + start)
        start += int(part["recordings"].max(initial=-1)) + 1
        facts = json.loads(part["facts"].tobytes())
        for labels in facts["labels"]:
            unlabelled += labels is None
            numbers += [number_of.setdefault(name, len(number_of)) for name in labels or ()]
            counts.append(len(labels or ()))
        left_out.update(facts["left_out"])
        sources.update(facts["sources"])
        num_problems += facts["num_problems"]
        problems += [(place, *problem) for problem in facts["problems"]]
    writer.write("table", np.concatenate(tables))
    writer.write("recordings", np.concatenate(recordings))
    write_files(writer, (Files([*map(str, FileList(part))]) for part in parts))
    writer.write("labels", np.array(numbers, np.int32))
    writer.write("label_begins", np.cumsum(np.array(counts, np.int64)))
    facts = {
        "classes": list(number_of),
        "unlabelled": unlabelled,
        "left_out": left_out,
        "sources": sources,
        "num_problems": num_problems,
        "problems": problems[:SHOWN_PROBLEMS],
    }
    writer.write("facts", np.frombuffer(json.dumps(facts).encode(), np.uint8))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
