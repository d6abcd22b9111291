"""A list of audio files as a block of bytes and where each path begins in it, not as objects.

Clips that are parts of recordings have two numbers each beside their path. So 20 million paths take
1.5 GB, which the processes of a machine share, and their order and fingerprint are computed without
making them.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np

from ssast.pipelines.clips.order import row_type
from ssast.pipelines.clips.segment import WHOLE, FileClip, Files, file_clip
from ssast.pipelines.clips.shared import Arrays, ArrayWriter, Identity, private_arrays
from ssast.pipelines.text import NAME_BYTES

CHUNK = 2**16  # paths that are made at once
WORD = 8  # bytes that are compared at once
NEAR_S = 1e-6  # in which two clips may overlap by rounding


class FileList(Sequence[FileClip]):
    """Paths of audio files, and which part of each is the clip where it is not all of it.

    Args:
        arrays: ``names``, the bytes of all paths, one after the other, and :data:`WORD` more;
            ``begins``, where each begins in there, and where the last ends, [n + 1] int64;
            ``utf8``, whether they are all valid text, [1] bool; ``seconds``, if some clips are
            parts of recordings, begin and duration of each, [n, 2] float64.
        identity: What the list was read from, if it does not change with each call.
        rows: Rows of the paths, [n] integers; None for all of them.
    """

    def __init__(
        self, arrays: Arrays, identity: Identity | None = None, rows: np.ndarray | None = None
    ) -> None:
        self._arrays, self.identity, self._rows = arrays, identity, rows
        self._names, self._begins = arrays["names"], arrays["begins"]
        self._seconds = arrays.get("seconds")

    @staticmethod
    def of(clips: Iterable[FileClip]) -> "FileList":
        """Return a list of these clips, in the memory of this process."""
        return FileList.of_chunks([Files.of(clips)])

    @staticmethod
    def of_chunks(chunks: Iterable[Files]) -> "FileList":
        """Return a list of these clips, many at a time, in the memory of this process."""

        def build(writer: ArrayWriter) -> None:
            write_files(writer, chunks)

        return FileList(private_arrays(build))

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self._begins) - 1 if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, row: int) -> FileClip: ...

    @overload
    def __getitem__(self, row: slice) -> "FileList": ...

    def __getitem__(self, row: int | slice) -> "FileClip | FileList":
        """Return a clip, or a list of some."""
        if isinstance(row, slice):
            return self.subset(np.arange(len(self))[row])
        row = range(len(self))[row]
        place = row if self._rows is None else int(self._rows[row])
        name = _text(self._names[self._begins[place] : self._begins[place + 1]].tobytes())
        return name if self._seconds is None else file_clip(name, *self._seconds[place].tolist())

    def __iter__(self) -> Iterator[FileClip]:
        """Make the clips in turn."""
        if self._seconds is None:
            return self.files()
        return itertools.starmap(file_clip, zip(self.files(), *self._spans(), strict=True))

    @property
    def has_segments(self) -> bool:
        """Whether some clips are parts of recordings."""
        return self._seconds is not None

    def files(self) -> Iterator[str]:
        """Make the path of each clip in turn."""
        return itertools.chain.from_iterable(map(_text, part) for part in self._parts())

    def recordings(self) -> "FileList":
        """Return the whole files, each once, that clips are parts of; itself without such clips."""
        if self._seconds is None:
            return self
        _, first = np.unique(self.numbers(), return_index=True)
        rows = first if self._rows is None else self._rows[first]
        whole = {name: array for name, array in self._arrays.items() if name != "seconds"}
        return FileList(whole, None, rows)

    def overlapping(self) -> bool:
        """Return whether clips of one recording have samples in common."""
        if self._seconds is None:
            return False
        begins, durations = self._columns()
        numbers = self.numbers()
        order = np.lexsort((begins, numbers))
        ends = (begins + durations)[order]
        beside = numbers[order][1:] == numbers[order][:-1]
        return bool((beside & (begins[order][1:] < ends[:-1] - NEAR_S)).any())

    def _columns(self) -> tuple[np.ndarray, np.ndarray]:
        """Return begin and duration of each clip in s, [n] float64."""
        assert self._seconds is not None
        seconds = self._seconds if self._rows is None else self._seconds[self._rows]
        return seconds[:, 0], seconds[:, 1]

    def _spans(self) -> tuple[Iterator[float], Iterator[float]]:
        begins, durations = self._columns()
        return iter(begins.tolist()), iter(durations.tolist())

    def __eq__(self, other: object) -> bool:
        """Return whether another sequence holds the same clips."""
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def subset(self, rows: np.ndarray) -> "FileList":
        """Return some of the clips.

        Args:
            rows: Rows of this list, [n] integers.
        """
        return FileList(self._arrays, None, rows if self._rows is None else self._rows[rows])

    def fingerprint(self) -> str:
        """Return a hash of the names of the files, without their folders, and of the segments."""
        digest = hashlib.sha256()
        for number, part in enumerate(self._parts()):
            names = b"\n".join([path[path.rfind(b"/") + 1 :] for path in part])
            digest.update(b"\n" + names if number else names)
        if self._seconds is not None:
            digest.update(np.stack(self._columns(), 1).tobytes())
        return digest.hexdigest()

    def numbers(self) -> np.ndarray:
        """Return the place of each path when the different ones are sorted, [n] integers."""
        count = len(self)
        kind = row_type(count)
        if self._arrays["utf8"][0]:  # bytes are then in the order of the characters
            order, repeats = self._sorted(kind)
        else:
            names = list(self.files())
            order = np.array(sorted(range(count), key=names.__getitem__), kind)
            pairs = itertools.pairwise(order.tolist())
            repeats = np.array([False, *(names[a] == names[b] for a, b in pairs)])
        places = np.empty(count, kind)
        places[order] = np.arange(count, dtype=kind) - np.cumsum(repeats, dtype=kind)
        return places

    def _parts(self) -> Iterator[list[bytes]]:
        """Yield the bytes of the paths, many at a time."""
        for start in range(0, len(self), CHUNK):
            end = min(start + CHUNK, len(self))
            if self._rows is None:
                begins = self._begins[start : end + 1]
                block = self._names[begins[0] : begins[-1]].tobytes()
                places = itertools.pairwise((begins - begins[0]).tolist())
                yield [block[first:last] for first, last in places]
            else:
                rows = self._rows[start:end]
                ends = zip(
                    self._begins[rows].tolist(), self._begins[rows + 1].tolist(), strict=True
                )
                yield [self._names[first:last].tobytes() for first, last in ends]

    def _sorted(self, kind: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows in the order of their bytes, and which are equal to the one before.

        The order is found by words, each for those still tied.
        """
        begins, ends = self._begins[:-1], self._begins[1:]
        if self._rows is not None:
            begins, ends = begins[self._rows], ends[self._rows]
        lengths = (ends - begins).astype(kind)
        words = np.ndarray(
            (len(self._names) - WORD + 1,), ">u8", buffer=self._names.data, strides=(1,)
        )
        masks = np.array([(2**64 - 1) << (64 - 8 * n) & (2**64 - 1) for n in range(WORD + 1)], "u8")
        order = np.arange(len(begins), dtype=kind)
        places = order.copy()  # in `order`, of the paths that are tied
        groups = np.zeros(len(begins), kind)  # of paths that are equal so far
        for done in range(0, int(lengths.max(initial=0)), WORD):
            tied = order[places]
            word = np.empty(len(tied), np.uint64)
            for start in range(0, len(tied), CHUNK):
                part = slice(start, start + CHUNK)
                at = np.minimum(begins[tied[part]] + done, len(words) - 1)
                left = np.clip(lengths[tied[part]] - done, 0, WORD)
                word[part] = words[at].astype(np.uint64) & masks[left]
            by_word = np.lexsort((word, groups)).astype(kind)
            order[places] = tied[by_word]
            del tied
            word = word[by_word]
            del by_word
            new = np.ones(len(places), bool)
            new[1:] = (groups[1:] != groups[:-1]) | (word[1:] != word[:-1])
            groups = np.cumsum(new, dtype=kind)
            again = ~new
            again[:-1] |= again[1:]  # the first of each group as well
            places, groups = places[again], groups[again]
            if not len(places):
                break
        repeats = np.zeros(len(order), bool)
        repeats[places[1:][groups[1:] == groups[:-1]]] = True
        return order, repeats


def write_files(writer: ArrayWriter, chunks: Iterable[Files]) -> np.ndarray:
    """Write the arrays of a list of files.

    Args:
        writer: Where to.
        chunks: The clips, many at a time.

    Returns:
        Numbers of clips that may be listed twice: the ``hash`` of each such path or segment.
    """
    lengths: list[np.ndarray] = [np.zeros(1, np.int64)]
    hashes: list[np.ndarray] = [np.zeros(0, np.int64)]
    utf8, seconds = True, _Seconds()

    def parts() -> Iterator[bytes]:
        nonlocal utf8
        for chunk in chunks:
            names = chunk.names
            text = "".join(names)
            if text.isascii():
                block, sizes = text.encode(), map(len, names)
            else:
                encoded = [name.encode(errors=NAME_BYTES) for name in names]
                block, sizes = b"".join(encoded), map(len, encoded)
                utf8 = utf8 and is_text(text)
            lengths.append(np.fromiter(sizes, np.int64, len(names)))
            hashes.append(np.fromiter(map(hash, chunk.keys()), np.int64, len(names)))
            seconds.add(chunk)
            yield block
        yield bytes(WORD)

    writer.write_parts("names", parts())
    begins = np.concatenate(lengths)
    lengths.clear()
    np.cumsum(begins, out=begins)
    writer.write("begins", begins)
    writer.write("utf8", np.array([utf8]))
    seconds.write(writer)
    found = np.concatenate(hashes)
    hashes.clear()
    found.sort()
    return np.unique(found[1:][found[1:] == found[:-1]])


class _Seconds:
    """Begin and duration of the clips of a list, of which all may be whole files."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._whole = 0  # files before the first segment

    def add(self, chunk: Files) -> None:
        if chunk.seconds is not None:
            self._parts.append(chunk.seconds)
        elif self._parts:
            self._parts.append(np.tile(WHOLE, (len(chunk.names), 1)))
        else:
            self._whole += len(chunk.names)

    def write(self, writer: ArrayWriter) -> None:
        """Write the array, unless all clips are whole files."""
        if self._parts:
            before = np.tile(WHOLE, (self._whole, 1))
            writer.write("seconds", np.concatenate([before, *self._parts]))


def _text(name: bytes) -> str:
    return name.decode(errors=NAME_BYTES)


def is_text(text: str) -> bool:
    """Return whether all bytes of the names are valid UTF-8: no lone surrogates stand for them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
