"""Chunks of audio files: those that the sound needs, and optional ones, which may be damaged.

Peaks, texts, markers and broadcast or ID3 metadata (PEAK, LIST, cue, bext, cart, id3, ...) say
nothing that decoding needs, and libsndfile gives up on some of them. Where one is damaged, the
decoder gets a header without any.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ssast.pipelines.audio.headers import Reader

MOST_CHUNKS = 1000  # in front of the samples or behind them
SEARCHED = 2**20  # bytes in front of the samples, where the chunks' sizes do not lead to them
OPTIONAL = frozenset(  # names that tell a chunk, whatever its size, from samples
    name.encode()
    for name in (
        *("PEAK", "LIST", "bext", "id3 ", "ID3 ", "cart", "fact", "cue ", "smpl", "inst"),
        *("iXML", "axml", "chna", "JUNK", "junk", "FLLR", "PAD ", "plst", "levl", "acid"),
        *("_PMX", "aXML", "ANNO", "NAME", "AUTH", "(c) ", "MARK", "INST", "COMT", "APPL"),
        *("MIDI", "AESD", "CHAN", "peak", "info", "free", "strg", "mark", "uuid", "chan"),
    )
)
LEAST = {b"fact": 4, b"smpl": 36, b"info": 4}  # bytes that libsndfile reads, whatever the size says
FRAGILE = (b"COMT", b"MARK")  # lists whose inner sizes libsndfile believes
PEAKS = {b"PEAK": (8, 8), b"peak": (4, 12)}  # bytes in all, and more for each channel


@dataclass(frozen=True, slots=True)
class Form:
    """How chunks are written.

    Attributes:
        header: Format of a chunk's header: its name and its size.
        align: Chunks start at multiples of it.
        counts_itself: Whether the size includes the header.
        start: Where the first chunk starts.
    """

    header: str
    align: int
    counts_itself: bool
    start: int

    @property
    def width(self) -> int:
        """Return the bytes of a chunk's header."""
        return struct.calcsize(self.header)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk: its name, its first byte behind the header, and its size as stated."""

    name: bytes
    at: int
    length: int


@dataclass(frozen=True, slots=True)
class Found:
    """The chunks up to the samples.

    Attributes:
        needed: Those that the sound needs, by name.
        others: The others.
        is_whole: Whether the sizes lead from each chunk to the next, those needed in their order.
    """

    needed: dict[bytes, Chunk]
    others: list[Chunk]
    is_whole: bool

    def fits(self, channels: int, needed: bytes) -> bool:
        """Return whether libsndfile reads the optional chunks.

        Args:
            channels: Number of channels.
            needed: Name of the chunk with the format, which must stand before the peaks.
        """
        before = any(c.name in PEAKS and c.at < self.needed[needed].at for c in self.others)
        return self.is_whole and not before and fit(self.others, channels)


def fit(others: Iterable[Chunk], channels: int) -> bool:
    """Return whether optional chunks are such that libsndfile reads them."""
    for chunk in others:
        if chunk.name in PEAKS:
            whole, each = PEAKS[chunk.name]
            if chunk.length != whole + each * channels:
                return False
        if chunk.name in FRAGILE or chunk.length < LEAST.get(chunk.name, 0):
            return False
    return True


def chunks(read: Reader, form: Form, at: int, size: int) -> Iterator[Chunk]:
    """Yield the chunks from ``at`` on."""
    for _ in range(MOST_CHUNKS):
        head = read(at, form.width)
        if at + form.width > size or len(head) < form.width:
            return
        name, length = struct.unpack(form.header, head)
        length -= form.width if form.counts_itself else 0
        yield Chunk(name, at + form.width, length)
        at += form.width + max(length, 0)
        at += -at % form.align


def is_name(name: bytes) -> bool:
    """Return whether the name of a chunk is made of printable characters."""
    return all(0x20 <= byte < 0x7F for byte in name)


def are_chunks(read: Reader, form: Form, at: int, size: int) -> bool:
    """Return whether chunks follow from ``at`` to the end of the file: no samples, then."""
    end = at
    for chunk in chunks(read, form, at, size):
        if not is_name(chunk.name) or not 0 <= chunk.length <= size - chunk.at:
            return False
        end = chunk.at + chunk.length
    return size - end <= form.align


def find_chunks(read: Reader, form: Form, size: int, needed: tuple[bytes, ...]) -> Found | None:
    """Find the chunks that the sound needs: by the sizes of the chunks, or by their names.

    Args:
        read: Reads bytes of the file.
        form: How its chunks are written.
        size: Size of the file in bytes.
        needed: Names of the chunks, that of the samples last.

    Returns:
        The chunks; None where one is missing.
    """
    found: dict[bytes, Chunk] = {}
    others, is_whole = [], True
    for chunk in chunks(read, form, form.start, size):
        if chunk.name in needed:
            found.setdefault(chunk.name, chunk)
        else:
            others.append(chunk)
            is_whole &= is_name(chunk.name) and 0 <= chunk.length <= size - chunk.at
        if len(found) == len(needed):
            in_order = {name: found[name] for name in needed}
            return Found(in_order, others, is_whole and list(found) == list(needed))
    at = form.start
    found = {}
    data = read(at, SEARCHED)
    for name in needed:
        place = -1
        while name not in found:
            place = data.find(name, place + 1)
            if place < 0:
                return None
            first = next(chunks(read, form, at + place, size), None)
            if first is not None and is_plausible(first, size, name == needed[-1]):
                found[name] = first
    return Found(found, others, False)


def is_plausible(chunk: Chunk, size: int, holds_samples: bool) -> bool:
    """Return whether a name that was found somewhere is that of a chunk, not a part of a text."""
    if not holds_samples:
        return 14 <= chunk.length <= 1024
    unknown = (0, -24, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, 0x7FFFF000)
    return 0 < chunk.length <= size - chunk.at or chunk.length in unknown


def lean_header(read: Reader, form: Form, found: Found, extra: int = 0) -> bytes:
    """Return a header of the chunks that the sound needs alone.

    Args:
        read: Reads bytes of the file.
        form: How its chunks are written.
        found: The chunks.
        extra: Bytes of the last chunk in front of the samples.
    """
    header = read(0, form.start)
    *before, last = found.needed.values()
    for chunk in before:
        body = read(chunk.at - form.width, form.width + chunk.length)
        header += body + bytes(-len(body) % form.align)
    return header + read(last.at - form.width, form.width + extra)
