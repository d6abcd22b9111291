"""Lengths of files made of chunks: WAV, RF64, W64, AIFF and CAF, and of AU."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from ssast.pipelines.audio.headers import (
    FEW_SAMPLES,
    MISSING_SHARE,
    Reader,
    Repair,
    Sound,
    without_tags,
)
from ssast.pipelines.errors import DataError

PCM, PLAIN_BITS = 1, (8, 16, 24, 32)
FIXED = (1, 3, 6, 7, 0xFFFE)  # WAV codecs whose blocks are single samples: PCM, float, A-law, u-law
MOST_CHUNKS = 1000  # in front of the samples or behind them
W64_RIFF = b"riff\x2e\x91\xcf\x11"
AU_BYTES = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8, 27: 1}  # of a sample of each encoding
RIFF_LIMIT = 2**32 - 2**16  # bytes of samples: a longer file needs the header of RF64


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


RIFF, IFF = Form("<4sI", 2, False, 12), Form(">4sI", 2, False, 12)
W64, CAF = Form("<4s12xQ", 8, True, 40), Form(">4sQ", 1, False, 8)


@dataclass(frozen=True, slots=True)
class Data:
    """The samples of a file.

    Attributes:
        at: First byte of the samples.
        stated: Their bytes by the header.
        fields: Offset, format and addend of each place that states the size.
        block: Bytes of a sample of all channels, or of a block of a codec that has blocks.
        rate_hz: Sample rate.
        channels: Number of channels.
        fixed: Whether a block is one sample of each channel.
        plain: See :class:`Sound`.
        form: How chunks behind the samples are written; None where there are none.
    """

    at: int
    stated: int
    fields: tuple[tuple[int, str, int], ...]
    block: int
    rate_hz: int
    channels: int
    fixed: bool
    plain: bool
    form: Form | None


def chunks(read: Reader, form: Form, at: int, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, first byte and stated size of the chunks from ``at`` on."""
    width = struct.calcsize(form.header)
    for _ in range(MOST_CHUNKS):
        head = read(at, width)
        if at + width > size or len(head) < width:
            return
        name, length = struct.unpack(form.header, head)
        length -= width if form.counts_itself else 0
        yield name, at + width, length
        at += width + max(length, 0)
        at += -at % form.align


def are_chunks(read: Reader, form: Form, at: int, size: int) -> bool:
    """Return whether chunks follow from ``at`` to the end of the file: no samples, then."""
    end = at
    for name, start, length in chunks(read, form, at, size):
        if not all(0x20 <= byte < 0x7F for byte in name) or not 0 <= length <= size - start:
            return False
        end = start + length
    return size - end <= form.align


def examine_chunks(read: Reader, size: int, head: bytes) -> Sound | None:
    """Find the length of a WAV, RF64, W64, AIFF, CAF or AU file.

    Raises:
        DataError: It is truncated.
    """
    magic, kind = head[:4], head[8:12]
    data = None
    if magic in (b"RIFF", b"RF64") and kind == b"WAVE":
        data = wav_data(read, size, magic == b"RF64")
    elif head[:8] == W64_RIFF:
        data = w64_data(read, size)
    elif magic == b"FORM" and kind in (b"AIFF", b"AIFC"):
        data = aiff_data(read, size)
    elif magic == b"caff":
        data = caf_data(read, size)
    elif magic == b".snd":
        data = au_data(read)
    if data is None or data.block < 1 or data.rate_hz < 1 or data.channels < 1:
        return None
    return settled(read, size, data)


def settled(read: Reader, size: int, data: Data) -> Sound:
    """Compare the stated size with what is there.

    Raises:
        DataError: More than a few samples and more than 1 % are missing.
    """
    width = 8 * struct.calcsize(data.fields[-1][1])
    # What recorders and pipes write in place of a size that they do not know: 0, the largest
    # number, with or without a sign, or one a little below it.
    top, unknown = 2**width, data.stated <= 0
    for most in (top, top // 2):
        unknown |= most - 2**16 <= data.stated + sum(data.fields[-1][2:]) < most
    unknown |= width == 64 and data.stated >= 2**62
    # A header without sound behind it is not damaged: its size of 0 is the truth.
    end = without_tags(read, size)
    there = max(0, end - data.at)
    few = FEW_SAMPLES * data.block if data.fixed else data.block
    stated = None if unknown else data.stated
    if stated is None:
        behind = data.form is not None and are_chunks(read, data.form, data.at, size)
        found = 0 if behind else there
    elif stated > there:
        if stated - there > max(few, MISSING_SHARE * stated):
            raise DataError(f"truncated: {there} of {stated} bytes of samples")
        found = there
    else:
        rest = data.at + stated
        if data.form is not None:
            rest += -rest % data.form.align
        found = stated
        if end - rest > max(few, MISSING_SHARE * there) and not (
            data.form is not None and are_chunks(read, data.form, rest, size)
        ):
            found = there  # a size that wrapped around at 4 GiB, or was never brought up to date
    found -= found % data.block
    is_right = found == data.stated - data.stated % data.block and data.stated > 0
    repair = None
    if not is_right and found:
        repair = repaired(read, size, data, found)
    return Sound(
        data.rate_hz,
        data.channels,
        stated // data.block if stated is not None and data.fixed else None,
        found // data.block if data.fixed else 0,
        data.plain and found < RIFF_LIMIT,
        repair,
    )


def repaired(read: Reader, size: int, data: Data, found: int) -> Repair:
    """Return the file with the size that was found in each place that states it."""
    header = bytearray(read(0, data.at))
    end = size if data.form is None or found < size - data.at else data.at + found
    if header[:4] == b"RIFF" and found >= RIFF_LIMIT:
        header[:12] = (
            b"RF64"
            + b"\xff" * 4
            + b"WAVE"
            + b"ds64"
            + struct.pack("<IQQQI", 28, len(header) + 28 + found, found, found // data.block, 0)
        )
        header[-4:] = b"\xff" * 4
        return Repair(bytes(header), data.at, end)
    for at, kind, more in data.fields:
        value = found + more
        if at < data.at and value < 2 ** (8 * struct.calcsize(kind)):
            struct.pack_into(kind, header, at, value)
    return Repair(bytes(header), data.at, end)


def wav_data(read: Reader, size: int, is_rf64: bool) -> Data | None:
    """Find the samples of a WAV or RF64 file."""
    rate_hz = channels = block = 0
    fixed = plain = False
    long_size: tuple[int, int] | None = None  # where RF64 states it, and what
    for name, at, length in chunks(read, RIFF, RIFF.start, size):
        if name == b"ds64" and is_rf64 and length >= 24:
            fields = read(at, 24)
            if len(fields) == 24:
                long_size = (at + 8, struct.unpack_from("<Q", fields, 8)[0])
        elif name == b"fmt " and length >= 16:
            fields = read(at, 26)
            if len(fields) < 16:
                return None
            codec, channels, rate_hz, _, block, bits = struct.unpack_from("<HHIIHH", fields)
            if codec == 0xFFFE and len(fields) == 26 and length >= 26:  # extensible: the codec is
                (codec,) = struct.unpack_from("<H", fields, 24)  # in the first bytes of its GUID
                plain = False
            else:
                plain = codec == PCM and bits in PLAIN_BITS and not is_rf64
            fixed = codec in FIXED
            plain = plain and block == channels * bits // 8
        elif name == b"data":
            field = (at - 4, "<I", 0)
            if is_rf64 and long_size is not None:
                place, length = long_size
                field = (place, "<Q", 0)
            return Data(at, length, (field,), block, rate_hz, channels, fixed, plain, RIFF)
    return None


def w64_data(read: Reader, size: int) -> Data | None:
    """Find the samples of a W64 file."""
    rate_hz = channels = block = codec = 0
    for name, at, length in chunks(read, W64, W64.start, size):
        if name == b"fmt ":
            fields = read(at, 14)
            if len(fields) < 14:
                return None
            codec, channels, rate_hz, _, block = struct.unpack("<HHIIH", fields)
        elif name == b"data":
            field = (at - 8, "<Q", 24)
            fixed = codec in FIXED
            return Data(at, length, (field,), block, rate_hz, channels, fixed, False, W64)
    return None


def aiff_data(read: Reader, size: int) -> Data | None:
    """Find the samples of an AIFF file, or of an AIFC file without compression."""
    rate_hz = channels = block = 0
    found: tuple[int, int] | None = None
    for name, at, length in chunks(read, IFF, IFF.start, size):
        if name == b"COMM":
            fields = read(at, min(length, 22))
            if len(fields) < 18:
                return None
            channels, _, bits, exponent, mantissa = struct.unpack_from(">hIhHQ", fields)
            if len(fields) == 22 and fields[18:] not in (b"NONE", b"sowt", b"twos", b"fl32"):
                return None
            block = channels * -(-bits // 8)
            shift = 16383 + 63 - exponent
            rate_hz = mantissa >> shift if 0 <= shift < 64 else 0
        elif name == b"SSND":
            found = at + 8, length - 8
        if found and block:
            at, length = found
            fields_at = ((at - 12, ">I", 8),)
            return Data(at, length, fields_at, block, rate_hz, channels, True, False, IFF)
    return None


def caf_data(read: Reader, size: int) -> Data | None:
    """Find the samples of a CAF file of linear PCM."""
    rate_hz = channels = block = 0
    for name, at, length in chunks(read, CAF, CAF.start, size):
        if name == b"desc":
            fields = read(at, 32)
            if len(fields) < 32:
                return None
            rate, codec, _, block, per_packet, channels, _ = struct.unpack(">d4sIIIII", fields)
            if codec not in (b"lpcm", b"ulaw", b"alaw") or per_packet != 1:
                return None
            rate_hz = int(rate) if 0 < rate < 1e9 else 0
        elif name == b"data":
            at, length = at + 4, length - 4  # a number of edits stands before the samples
            field = (at - 12, ">Q", 4)
            return Data(at, length, (field,), block, rate_hz, channels, True, False, CAF)
    return None


def au_data(read: Reader) -> Data | None:
    """Find the samples of an AU file."""
    head = read(0, 24)
    if len(head) < 24:
        return None
    at, length, codec, rate_hz, channels = struct.unpack_from(">5I", head, 4)
    if at < 24 or at > 2**20 or codec not in AU_BYTES:
        return None
    block = AU_BYTES[codec] * channels
    return Data(at, length, ((8, ">I", 0),), block, rate_hz, channels, True, False, None)
