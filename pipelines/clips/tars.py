"""Tar archives of others as a data set: found by name, indexed once a machine, read in place.

The index of each archive and that of all of them are arrays that the processes of a machine share,
see :mod:`~.shared`: after a kill, the archives that were done are not read again.
"""

import glob
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import overload

import numpy as np
from tqdm.auto import tqdm

from ssast.pipelines.clips.listed import FileList
from ssast.pipelines.clips.members import PACKED
from ssast.pipelines.clips.remote import as_path, is_url, matching
from ssast.pipelines.clips.shards import ShardClip
from ssast.pipelines.clips.shared import Arrays, ArrayWriter, Identity, shared_arrays
from ssast.pipelines.clips.tar_index import FORMAT, index_tar, state_of_tar, write_index
from ssast.pipelines.cores import usable_cores
from ssast.pipelines.errors import DataError, data_error
from ssast.pipelines.text import shows_progress

log = logging.getLogger(__name__)

MOST_TARS = 100_000  # that a name stands for
REMOTE_THREADS = 32  # that wait for storage
IS_TAR = re.compile(r"\.tar(\?[^/]*)?$", re.IGNORECASE)
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{},]*(?:,[^{},]*)+))\}")


@dataclass(frozen=True, slots=True)
class TarClip(ShardClip):
    """A sound in an archive of others.

    Attributes:
        member: Its name in there.
    """

    member: str

    @property
    def name(self) -> str:
        """Name of the clip."""
        return self.member


def names_tars(place: object) -> bool:
    """Return whether this is the name of tar archives, a pattern or a range of them perhaps."""
    text = str(place)
    return bool(IS_TAR.search(text) or text.lower().endswith(PACKED)) and not os.path.isdir(text)


def find_files(place: str | Path) -> list[str]:
    """Return the files that a name stands for, sorted: absolute paths or URLs of archives.

    Args:
        place: Path or URL; ``{000..099}`` stands for each of these numbers, ``{a,b}`` for each of
            these texts, and ``*``, ``?`` and ``[...]`` for what is there.

    Raises:
        DataError: There is no such archive, one is compressed, or the name stands for too many.
    """
    text = str(place)
    if text.lower().endswith(PACKED):
        raise DataError(f"{text}: a compressed archive cannot be read in place: unpack it")
    if not is_url(text) and os.path.exists(text):
        return [os.path.abspath(text)]
    found: list[str] = []
    for name in itertools.islice(_expanded(text), MOST_TARS + 1):
        if not is_url(name):
            name = os.path.abspath(os.path.expanduser(name))
        if glob.has_magic(name.partition("?")[0] if is_url(name) else name):
            matches = sorted(_matches(name))
            if not matches:
                raise DataError(f"{name}: there is no such archive")
            found += matches
        else:
            found.append(name)
    if len(found) > MOST_TARS:
        raise DataError(f"{text:.200}: stands for more than {MOST_TARS} archives")
    missing = [name for name in found if not is_url(name) and not os.path.exists(name)]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(f"{missing[0]}: there is no such archive{more}")
    return sorted(dict.fromkeys(found))


def tars_in(folder: object) -> list[str]:
    """Return the tar archives right in a folder behind a URL, sorted.

    Raises:
        DataError: The folder cannot be listed.
    """
    return sorted(_matches(f"{str(folder).rstrip('/')}/*.tar"))


def _expanded(text: str) -> Iterator[str]:
    """Yield what a name with braces stands for."""
    braces = BRACES.search(text)
    if braces is None:
        yield text
        return
    first, last, listed = braces.groups()
    choices: Iterator[str] | list[str]
    if listed is not None:
        choices = listed.split(",")
    else:
        step = 1 if int(first) <= int(last) else -1
        width = max(len(first), len(last)) if first[0] == "0" or last[0] == "0" else 0
        choices = (f"{n:0{width}d}" for n in range(int(first), int(last) + step, step))
    for choice in choices:
        yield from _expanded(text[: braces.start()] + choice + text[braces.end() :])


def _matches(pattern: str) -> list[str]:
    if not is_url(pattern):
        return [os.path.abspath(path) for path in glob.glob(pattern, recursive=True)]
    as_path(pattern.partition("*")[0])  # says which package is missing
    try:
        return matching(pattern)
    except OSError as error:
        raise data_error(
            error, f"{pattern}: cannot be listed: {error.strerror or error}"
        ) from error


class TarIndex(Sequence[TarClip]):
    """The sounds of tar archives, as a sequence that is not held in memory.

    Args:
        tars: Paths or URLs of the archives.
        arrays: ``table`` [n, 3] int64: archive, offset and size of each sound; ``recordings`` [n]:
            number of its sample; those of a :class:`FileList` of the names; ``labels`` [m] int32
            and ``label_begins`` [n + 1]: numbers of its labels; ``facts``: JSON.
        identity: What the arrays were read from, if it does not change with each call.
        rows: Rows of the sounds, [n] integers; None for all of them.
    """

    def __init__(
        self,
        tars: Sequence[str],
        arrays: Arrays,
        identity: Identity | None = None,
        rows: np.ndarray | None = None,
    ) -> None:
        self.tars, self.identity, self._rows, self._arrays = tars, identity, rows, arrays
        self._names = FileList(arrays)

    @staticmethod
    def open(tars: Sequence[str], suffixes: frozenset[str], foreign: frozenset[str]) -> "TarIndex":
        """Index archives, or find their index, and say once what is left out.

        Args:
            tars: Their paths or URLs.
            suffixes: Suffixes of sounds.
            foreign: Suffixes of those that only ``ssast data prepare`` reads.

        Raises:
            DataError: An archive cannot be read or is compressed, or there are no sounds.
        """
        remote = any(map(is_url, tars))
        threads = REMOTE_THREADS if remote else usable_cores()
        what = ("sounds in tars", tuple(tars))
        with ThreadPoolExecutor(threads, thread_name_prefix="ssast-tar") as pool:
            states = list(pool.map(state_of_tar, tars))

            def build(writer: ArrayWriter) -> None:
                one = partial(index_tar, suffixes=suffixes)
                parts = tqdm(
                    pool.map(one, tars, states),
                    total=len(tars),
                    desc="index",
                    unit=" tars",
                    disable=len(tars) < 10 or not shows_progress(),
                )
                write_index(writer, list(parts))

            known = all(state[1] is not None for state in states)
            state = (FORMAT, sorted(suffixes), tuple(states)) if known else None
            arrays = shared_arrays(what, state, build)
        index = TarIndex(tars, arrays, None if state is None else (what, state))
        _describe(tuple(tars), arrays["facts"].tobytes(), len(index), foreign)
        if not len(index):
            raise DataError(f"{_title(tars)}: no sounds that can be read in there")
        return index

    def __len__(self) -> int:
        """Return the number of sounds."""
        return len(self._arrays["table"] if self._rows is None else self._rows)

    @overload
    def __getitem__(self, row: int) -> TarClip: ...

    @overload
    def __getitem__(self, row: slice) -> "TarIndex": ...

    def __getitem__(self, row: int | slice) -> "TarClip | TarIndex":
        """Return a sound, or some of them."""
        if isinstance(row, slice):
            return self.subset(np.arange(len(self))[row])
        row = range(len(self))[row]
        place = row if self._rows is None else int(self._rows[row])
        tar, offset, size = self._arrays["table"][place].tolist()
        return TarClip(self.tars[tar], offset, size, str(self._names[place]))

    @property
    def is_remote(self) -> bool:
        """Whether some of the archives are behind URLs."""
        return any(map(is_url, self.tars))

    def subset(self, rows: np.ndarray) -> "TarIndex":
        """Return some of the sounds.

        Args:
            rows: Rows of this sequence, [n] integers.
        """
        rows = rows if self._rows is None else self._rows[rows]
        return TarIndex(self.tars, self._arrays, None, rows)

    def recordings(self) -> np.ndarray:
        """Return the number of each sound's sample, [n] int64; of its row if there is but one."""
        numbers = self._arrays["recordings"]
        if not numbers.any():
            numbers = np.arange(len(numbers))
        return numbers if self._rows is None else numbers[self._rows]

    def labels(self) -> tuple[tuple[str, ...], ...] | None:
        """Return the labels of each sound; None if none of the archives has any."""
        names = json.loads(self._arrays["facts"].tobytes())["classes"]
        if not len(self._arrays["labels"]):
            return None
        numbers, begins = self._arrays["labels"].tolist(), self._arrays["label_begins"].tolist()
        rows = range(len(self)) if self._rows is None else self._rows.tolist()
        return tuple(
            tuple(names[number] for number in numbers[begins[row] : begins[row + 1]])
            for row in rows
        )

    def fingerprint(self) -> str:
        """Return a hash of the names of the archives and the positions of the sounds."""
        digest = hashlib.sha256(
            "\n".join(map(os.path.basename, self.tars)).encode("utf-8", "replace")
        )
        table = self._arrays["table"]
        for start in range(0, len(self), 2**16):
            rows = slice(start, start + 2**16)
            part = table[rows if self._rows is None else self._rows[rows]]
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()


@cache
def _describe(tars: tuple[str, ...], facts: bytes, count: int, foreign: frozenset[str]) -> None:
    """Say once what was found in archives, and what was not used."""
    found, title = json.loads(facts), _title(tars)
    labels = ""
    if found["sources"]:
        kinds = ", ".join(f"{number} from {kind}" for kind, number in found["sources"].items())
        labels = f", labels: {kinds}"
        if found["unlabelled"]:
            labels += f", {found['unlabelled']} sounds have none"
    log.info("%s: %d sounds in %d archives%s", title, count, len(tars), labels)
    if found["left_out"]:
        there = describe_left_out(found["left_out"], foreign)
        log.warning("%s: left out are members that are no sounds and no labels: %s", title, there)
    if found["num_problems"]:
        first = [f"{tars[n]}: {name}: {why}".replace(": : ", ": ") for n, name, why in
                 found["problems"]]  # fmt: skip
        log.warning(
            "%s: %d of %d sounds cannot be used, the first: %s",
            title, found["num_problems"], found["num_problems"] + count, "; ".join(first),
        )  # fmt: skip


def describe_left_out(counts: dict[str, int], foreign: frozenset[str] = frozenset()) -> str:
    """Return the numbers of members that are left out, by suffix, as text."""
    text = ", ".join(f"{number} {kind:.40}" for kind, number in sorted(counts.items())[:20])
    if foreign & counts.keys():
        text += " (ssast data prepare converts sounds with ffmpeg)"
    return text


def _title(tars: Sequence[str]) -> str:
    return tars[0] if len(tars) == 1 else f"{tars[0]} and {len(tars) - 1} more"
