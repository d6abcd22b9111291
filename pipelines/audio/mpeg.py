"""Lengths of MP3 files: by the table in their first frame (Xing, Info, VBRI), and by their frames.

Without a table libsndfile guesses the length from the bit rate of the first frames and the size of
the file, tags included, and reads no sample behind the length that it has guessed. Then the frames
are counted, from header to header, and the file gets a table.
"""

import struct
from functools import lru_cache

from ssast.pipelines.audio.headers import Reader, Repair, Sound, missing, without_tags
from ssast.pipelines.errors import DataError

XING, VBRI = "Xing", "VBRI"
READ_BYTES = 2**20
RATES_HZ = (44100, 48000, 32000)
KBPS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
KBPS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
SAME = 0xFFFE0C00  # bits that all frames have in common: sync, version, layer, sample rate
FEW_SAMPLES = 2 * 1152  # decoders differ in the first and the last frame
MOST_JUNK = 2**18  # bytes before the first frame, or of a tag that is none
COVER_SHARE = 0.01  # of the bytes, by which a table may be wrong


@lru_cache(maxsize=4096)
def frame(word: int) -> tuple[int, int, int] | None:
    """Read a frame's header.

    Returns:
        Bytes of the frame, samples per channel, sample rate in Hz; None if this is no header of
        layer III, or one of the free format.
    """
    version, layer, index, rate = word >> 19 & 3, word >> 17 & 3, word >> 12 & 15, word >> 10 & 3
    if word >> 21 != 0x7FF or version == 1 or layer != 1 or index in (0, 15) or rate == 3:
        return None
    is_1 = version == 3
    rate_hz = RATES_HZ[rate] >> (0 if is_1 else 1 if version == 2 else 2)
    kbps, samples = (KBPS_1[index], 1152) if is_1 else (KBPS_2[index], 576)
    return samples // 8 * kbps * 1000 // rate_hz + (word >> 9 & 1), samples, rate_hz


def examine_mp3(read: Reader, start: int, size: int, is_damaged: bool = False) -> Sound | None:
    """Find the length of an MP3 file; see :func:`~ssast.pipelines.audio.lengths.examine`.

    Args:
        read: Reads bytes of the file.
        start: Where its frames are looked for.
        size: Size of the file in bytes.
        is_damaged: Whether what stands in front of the frames is left out.
    """
    end = without_tags(read, size)
    first = next_frame(read, start, min(end, start + MOST_JUNK), end, 0)
    if first is None:
        return None
    word = int.from_bytes(read(first, 4), "big")
    length, samples, rate_hz = frame(word) or (0, 0, 0)
    channels = 1 if word >> 6 & 3 == 3 else 2
    table, stated, num_bytes = read_table(read(first, length), word)
    body = first + length if table else first
    whole = Repair(b"", first, size) if is_damaged else None
    if stated is not None and num_bytes is not None:
        off = abs(end - first - num_bytes)
        if off <= max(2 * length, COVER_SHARE * num_bytes):
            return Sound(rate_hz, channels, stated * samples, stated * samples, repair=whole)
    count = count_frames(read, body, end, word & SAME)
    if stated is not None and missing(stated * samples, count * samples, FEW_SAMPLES):
        raise DataError(f"truncated: {count * samples} of {stated * samples} samples")
    if not count:
        return None
    if stated == count and table == XING:
        return Sound(rate_hz, channels, stated * samples, stated * samples, repair=whole)
    repair = Repair(table_frame(word, count), body, end)
    by_table = None if stated is None else stated * samples
    return Sound(rate_hz, channels, by_table, count * samples, repair=repair)


def read_table(data: bytes, word: int) -> tuple[str | None, int | None, int | None]:
    """Return which table a frame is, if one, and how many frames and bytes that states."""
    at = 4 + side_bytes(word)
    if data[at : at + 4] in (b"Xing", b"Info") and len(data) >= at + 8:
        flags, stated, num_bytes = data[at + 7], None, None
        at += 8
        if flags & 1 and len(data) >= at + 4:
            (stated,) = struct.unpack_from(">I", data, at)
            at += 4
        if flags & 2 and len(data) >= at + 4:
            (num_bytes,) = struct.unpack_from(">I", data, at)
        return XING, stated or None, num_bytes or None
    if data[36:40] == b"VBRI" and len(data) >= 54:
        (stated,) = struct.unpack_from(">I", data, 50)
        return VBRI, stated or None, None  # libsndfile does not know this one: count, in any case
    return None, None, None


def side_bytes(word: int) -> int:
    """Return the bytes of checksum and side information behind a frame's header."""
    is_mono = word >> 6 & 3 == 3
    checksum = 0 if word >> 16 & 1 else 2
    if word >> 19 & 3 == 3:
        return checksum + (17 if is_mono else 32)
    return checksum + (9 if is_mono else 17)


def table_frame(word: int, count: int) -> bytes:
    """Return a frame with a table (Xing) for ``count`` frames like the one with this header."""
    word = word & ~0xF200 | 0x10000 | 8 << 12  # no checksum or padding, enough bytes
    found = frame(word)
    assert found is not None
    data = bytearray(found[0])
    struct.pack_into(">I", data, 0, word)
    struct.pack_into(">4sII", data, 4 + side_bytes(word), b"Xing", 1, count)
    return bytes(data)


def next_frame(read: Reader, at: int, limit: int, end: int, same: int) -> int | None:
    """Return where the next frame starts that another one, or the end, follows."""
    data = read(at, limit - at)
    place = -1
    while (place := data.find(b"\xff", place + 1)) >= 0:
        word = int.from_bytes(data[place : place + 4].ljust(4, b"\0"), "big")
        found = frame(word)
        if found is None or (same and word & SAME != same):
            continue
        behind = at + place + found[0]
        if behind == end:
            return at + place
        follower = int.from_bytes(read(behind, 4).ljust(4, b"\0"), "big")
        if behind < end and frame(follower) and follower & SAME == word & SAME:
            return at + place
    return None


def count_frames(read: Reader, at: int, end: int, same: int) -> int:
    """Count the complete frames from ``at`` to ``end``, whatever stands between them."""
    count = 0
    base, data = at, b""
    while at + 4 <= end:
        place = at - base
        if place + 4 > len(data):
            base, data, place = at, read(at, READ_BYTES), 0
            if len(data) < 4:
                break
        word = int.from_bytes(data[place : place + 4], "big")
        found = frame(word) if word & SAME == same else None
        if found is None:
            following = next_frame(read, at + 1, min(end, at + MOST_JUNK), end, same)
            if following is None:
                break
            at = following
            continue
        at += found[0]
        count += at <= end
    return count
