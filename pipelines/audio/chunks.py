"""Lengths of files made of chunks: WAV, RF64, W64, AIFF and CAF, and of AU."""

import struct
from dataclasses import dataclass

from ssast.pipelines.audio.headers import (
    FEW_SAMPLES,
    MISSING_SHARE,
    Reader,
    Repair,
    Sound,
    missing,
    without_tags,
)
from ssast.pipelines.audio.optional import (
    OPTIONAL,
    Form,
    are_chunks,
    chunks,
    find_chunks,
    fit,
    lean_header,
)
from ssast.pipelines.errors import DataError

PCM, PLAIN_BITS = 1, (8, 16, 24, 32)
FIXED = (1, 3, 6, 7, 0xFFFE)  # WAV codecs whose blocks are single samples: PCM, float, A-law, u-law
W64_RIFF = b"riff\x2e\x91\xcf\x11"
AIFC_CODECS = (b"NONE", b"sowt", b"twos", b"fl32", b"FL32")
AU_BYTES = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8, 27: 1}  # of a sample of each encoding
RIFF_LIMIT = 2**32 - 2**16  # bytes of samples: a longer file needs the header of RF64


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
        lean: A header without optional chunks, which are damaged; ``fields`` are places in it.
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
    lean: bytes | None = None


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
    is_damaged = data.lean is not None
    if stated is None:
        behind = data.form is not None and are_chunks(read, data.form, data.at, size)
        found = 0 if behind else there
    elif stated > there:
        if missing(stated, there, few):
            raise DataError(f"truncated: {there} of {stated} bytes of samples")
        found = there
    else:
        found = stated
        rest, ends_well = what_follows(read, data, end, size)
        is_damaged |= not ends_well
        if rest is not None and end - rest > max(few, MISSING_SHARE * there):
            found = there  # a size that wrapped around at 4 GiB, or was never brought up to date
    found -= found % data.block
    is_right = found == data.stated - data.stated % data.block and data.stated > 0
    repair = None
    if (not is_right or is_damaged) and found:
        repair = repaired(read, size, data, found, is_damaged)
    return Sound(
        data.rate_hz,
        data.channels,
        stated // data.block if stated is not None and data.fixed else None,
        found // data.block if data.fixed else 0,
        data.plain and found < RIFF_LIMIT,
        repair,
    )


def what_follows(read: Reader, data: Data, end: int, size: int) -> tuple[int | None, bool]:
    """Look behind the samples, where these end by the size that is stated.

    Returns:
        The first byte behind them if no chunk stands there, and whether libsndfile reads the chunks
        that do.
    """
    rest = data.at + data.stated
    if data.form is None or rest >= end:
        return rest, True
    aligned = rest + -rest % data.form.align
    if are_chunks(read, data.form, aligned, size):
        return None, fit(chunks(read, data.form, aligned, size), data.channels)
    if any(read(at, 4) in OPTIONAL for at in (aligned, rest)):
        return None, False
    return aligned, True


def repaired(read: Reader, size: int, data: Data, found: int, is_damaged: bool) -> Repair:
    """Return the file with the size that was found in each place that states it.

    Args:
        read: Reads bytes of the file.
        size: Size of the file in bytes.
        data: The samples.
        found: Their bytes.
        is_damaged: Whether optional chunks, in front or behind, are left out.
    """
    header = bytearray(read(0, data.at) if data.lean is None else data.lean)
    end = size if data.form is None or found < size - data.at else data.at + found
    if is_damaged:
        end = data.at + found
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
        if at < len(header) and value < 2 ** (8 * struct.calcsize(kind)):
            struct.pack_into(kind, header, at, value)
    return Repair(bytes(header), data.at, end)


def wav_data(read: Reader, size: int, is_rf64: bool) -> Data | None:
    """Find the samples of a WAV or RF64 file."""
    found = None
    if is_rf64:
        found = find_chunks(read, RIFF, size, (b"ds64", b"fmt ", b"data"))
    found = found or find_chunks(read, RIFF, size, (b"fmt ", b"data"))
    if found is None:
        return None
    format_, samples = found.needed[b"fmt "], found.needed[b"data"]
    fields = read(format_.at, min(format_.length, 26))
    if len(fields) < 16:
        return None
    codec, channels, rate_hz, _, block, bits = struct.unpack_from("<HHIIHH", fields)
    plain = codec == PCM and bits in PLAIN_BITS and not is_rf64 and block == channels * bits // 8
    if codec == 0xFFFE and len(fields) == 26:  # extensible: the codec is in its GUID's first bytes
        (codec,) = struct.unpack_from("<H", fields, 24)
    # In RF64, libsndfile takes no byte of padding behind a chunk of odd size.
    padded = is_rf64 and any(chunk.length % 2 for chunk in found.others)
    fits = found.fits(channels, b"fmt ") and not padded
    lean = None if fits else lean_header(read, RIFF, found)
    stated, place = samples.length, ((samples.at if lean is None else len(lean)) - 4, "<I", 0)
    long = found.needed.get(b"ds64")
    if long is not None and long.length >= 24 and len(sizes := read(long.at, 24)) == 24:
        (stated,) = struct.unpack_from("<Q", sizes, 8)
        place = ((long.at if lean is None else RIFF.start + RIFF.width) + 8, "<Q", 0)
    fixed = codec in FIXED
    return Data(samples.at, stated, (place,), block, rate_hz, channels, fixed, plain, RIFF, lean)


def w64_data(read: Reader, size: int) -> Data | None:
    """Find the samples of a W64 file."""
    found = find_chunks(read, W64, size, (b"fmt ", b"data"))
    if found is None or len(fields := read(found.needed[b"fmt "].at, 14)) < 14:
        return None
    codec, channels, rate_hz, _, block = struct.unpack("<HHIIH", fields)
    samples = found.needed[b"data"]
    lean = None if found.fits(channels, b"fmt ") else lean_header(read, W64, found)
    place = ((samples.at if lean is None else len(lean)) - 8, "<Q", 24)
    fixed = codec in FIXED
    return Data(
        samples.at, samples.length, (place,), block, rate_hz, channels, fixed, False, W64, lean
    )


def aiff_data(read: Reader, size: int) -> Data | None:
    """Find the samples of an AIFF file, or of an AIFC file without compression."""
    found = find_chunks(read, IFF, size, (b"COMM", b"SSND"))
    if found is None:
        return None
    common, samples = found.needed[b"COMM"], found.needed[b"SSND"]
    fields = read(common.at, min(common.length, 22))
    if len(fields) < 18:
        return None
    channels, _, bits, exponent, mantissa = struct.unpack_from(">hIhHQ", fields)
    if len(fields) == 22 and fields[18:] not in AIFC_CODECS:
        return None
    shift = 16383 + 63 - exponent
    rate_hz = mantissa >> shift if 0 <= shift < 64 else 0
    lean = None if found.fits(channels, b"COMM") else lean_header(read, IFF, found, 8)
    at, length = samples.at + 8, samples.length - 8  # an offset and a block size come first
    place = ((at if lean is None else len(lean)) - 12, ">I", 8)
    block = channels * -(-bits // 8)
    return Data(at, length, (place,), block, rate_hz, channels, True, False, IFF, lean)


def caf_data(read: Reader, size: int) -> Data | None:
    """Find the samples of a CAF file of linear PCM."""
    found = find_chunks(read, CAF, size, (b"desc", b"data"))
    if found is None or len(fields := read(found.needed[b"desc"].at, 32)) < 32:
        return None
    rate, codec, _, block, per_packet, channels, _ = struct.unpack(">d4sIIIII", fields)
    if codec not in (b"lpcm", b"ulaw", b"alaw") or per_packet != 1:
        return None
    lean = None if found.fits(channels, b"desc") else lean_header(read, CAF, found, 4)
    at = found.needed[b"data"].at + 4  # a number of edits stands before the samples
    length = found.needed[b"data"].length - 4
    place = ((at if lean is None else len(lean)) - 12, ">Q", 4)
    rate_hz = int(rate) if 0 < rate < 1e9 else 0
    return Data(at, length, (place,), block, rate_hz, channels, True, False, CAF, lean)


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
