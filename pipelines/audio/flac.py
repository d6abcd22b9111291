"""Lengths of FLAC files: by their header, and by the number of their last frame."""

from collections.abc import Iterator

from ssast.pipelines.audio.headers import Reader, Repair, Sound, differs, missing, without_tags
from ssast.pipelines.errors import DataError

STREAMINFO = 42  # bytes of the magic and of the first block of metadata
BLOCK_SIZES = {1: 192, **{n: 576 << n - 2 for n in range(2, 6)}}
BLOCK_SIZES |= {n: 256 << n - 8 for n in range(8, 16)}
EXTRA = {12: 1, 13: 2, 14: 2}  # bytes of a sample rate behind the number


def table(polynomial: int, bits: int) -> list[int]:
    """Return the 256 remainders for a checksum."""
    found = []
    for value in range(256):
        value <<= bits - 8
        for _ in range(8):
            value = value << 1 ^ (polynomial if value >> bits - 1 else 0)
        found.append(value & (1 << bits) - 1)
    return found


CRC8, CRC16 = table(0x107, 8), table(0x18005, 16)


def crc8(data: bytes) -> int:
    """Return the checksum of a frame's header."""
    value = 0
    for byte in data:
        value = CRC8[value ^ byte]
    return value


def crc16(data: bytes) -> int:
    """Return the checksum of a frame; 0 if it ends with its own."""
    value = 0
    for byte in data:
        value = (value << 8 & 0xFFFF) ^ CRC16[value >> 8 ^ byte]
    return value


def examine_flac(read: Reader, start: int, size: int) -> Sound | None:
    """Find the length of a FLAC file; see :func:`~ssast.pipelines.audio.lengths.examine`.

    The last frame has its number in its header, so neither the frames before it nor its samples
    need to be read.
    """
    head = read(start, STREAMINFO)
    if len(head) < STREAMINFO or head[4] & 0x7F:
        return None
    largest = int.from_bytes(head[10:12], "big")
    rate_hz, channels = int.from_bytes(head[18:21], "big") >> 4, (head[20] >> 1 & 7) + 1
    bits = ((head[20] & 1) << 4 | head[21] >> 4) + 1
    stated = int.from_bytes(head[21:26], "big") & (1 << 36) - 1
    body = first_frame(read, start, size)
    if body is None:
        return None
    end = without_tags(read, size)
    reach = largest * channels * -(-(bits + 1) // 8) + 1024  # no frame is longer: it would be PCM
    found = None
    while found is None:
        begin = max(body, end - reach)
        found = last_sample(read(begin, end - begin), head, stated)
        if begin == body or stated:
            break
        reach *= 8  # something else stands behind the last frame
    if found is None:
        if stated and end <= body:
            raise DataError(f"truncated: 0 of {stated} samples")
        return Sound(rate_hz, channels, stated or None, stated, start == 0)
    if stated and missing(stated, found):
        raise DataError(f"truncated: {found} of {stated} samples")
    repair = None
    # Fewer samples than stated, but not many fewer: the decoder would fail at the end of the file.
    if found and found != stated and (found < stated or not stated or differs(stated, found)):
        length = (int.from_bytes(head[21:26], "big") >> 36 << 36 | found).to_bytes(5, "big")
        repair = Repair(head[:21] + length + head[26:], start + STREAMINFO, size)
    else:
        found = stated
    return Sound(rate_hz, channels, stated or None, found, start == 0, repair)


def first_frame(read: Reader, start: int, size: int) -> int | None:
    """Return where the frames start, behind the blocks of metadata."""
    at = start + 4
    for _ in range(1000):
        block = read(at, 4)
        if len(block) < 4:
            return None
        at += 4 + int.from_bytes(block[1:], "big")
        if block[0] & 0x80:
            return at if at <= size else None
    return None


def last_sample(data: bytes, head: bytes, stated: int) -> int | None:
    """Return the number of samples up to the end of the last frame that is complete.

    Args:
        data: The end of the file.
        head: STREAMINFO.
        stated: Samples by STREAMINFO.
    """
    for at, first, count in frame_headers(data, head):
        if first + count == stated or crc16(data[at:]) == 0:
            return first + count
        if first + count < stated or not stated:
            return first  # the file breaks off in this frame
    return None


def frame_headers(data: bytes, head: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield place, first sample and number of samples of the frames in ``data``, the last first."""
    fixed = int.from_bytes(head[8:10], "big")
    at = len(data)
    while (at := data.rfind(b"\xff", 0, at)) >= 0:
        fields = data[at : at + 16]
        if len(fields) < 6 or fields[1] & 0xFE != 0xF8 or fields[3] & 1:
            continue
        code, rate = fields[2] >> 4, fields[2] & 15
        length = utf8_length(fields[4])
        if code == 0 or rate == 15 or length is None or fields[3] >> 4 > 10:
            continue
        number = fields[4] & (0x7F if length == 1 else (1 << 7 - length) - 1)
        for byte in fields[5 : 4 + length]:
            number = number << 6 | byte & 0x3F
        at_size = 4 + length
        width = {6: 1, 7: 2}.get(code, 0)
        count = (
            BLOCK_SIZES.get(code) or int.from_bytes(fields[at_size : at_size + width], "big") + 1
        )
        at_crc = at_size + width + EXTRA.get(rate, 0)
        if at_crc >= len(fields) or crc8(fields[:at_crc]) != fields[at_crc]:
            continue
        yield at, number if fields[1] & 1 else number * fixed, count


def utf8_length(byte: int) -> int | None:
    """Return the bytes of a number that begins with this one; None if none does."""
    ones = 8 - (byte ^ 0xFF).bit_length()
    return None if ones == 1 or ones == 8 else max(1, ones)
