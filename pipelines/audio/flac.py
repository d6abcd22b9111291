"""Lengths of FLAC files: by their header, and by the number of their last frame."""

from collections.abc import Iterator

from ssast.pipelines.audio.headers import Reader, Repair, Sound, differs, missing, without_tags
from ssast.pipelines.errors import DataError

STREAMINFO = 42  # bytes of the magic and of the first block of metadata
APPLICATION, SEEKTABLE, CUESHEET, PICTURE = 2, 3, 5, 6  # kinds of blocks of metadata
POINT = 18  # bytes of a place in a seek table
MOST_BLOCKS, MOST_METADATA = 1000, 2**20  # bytes are searched for the first frame
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
    body, is_damaged = first_frame(read, start, size, head)
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
        repair = Repair(without_metadata(head), body, size) if is_damaged else None
        return Sound(rate_hz, channels, stated or None, stated, start == 0, repair)
    if stated and missing(stated, found):
        raise DataError(f"truncated: {found} of {stated} samples")
    repair = None
    # Fewer samples than stated, but not many fewer: the decoder would fail at the end of the file.
    if found and found != stated and (found < stated or not stated or differs(stated, found)):
        length = (int.from_bytes(head[21:26], "big") >> 36 << 36 | found).to_bytes(5, "big")
        head = head[:21] + length + head[26:]
        repair = Repair(head, start + STREAMINFO, size)
    else:
        found = stated
    if is_damaged:
        repair = Repair(without_metadata(head), body, size)
    return Sound(rate_hz, channels, stated or None, found, start == 0, repair)


def without_metadata(head: bytes) -> bytes:
    """Return STREAMINFO as the last block of metadata."""
    return head[:4] + b"\x80" + head[5:]


def first_frame(read: Reader, start: int, size: int, head: bytes) -> tuple[int | None, bool]:
    """Find where the frames start, behind the blocks of metadata.

    Args:
        read: Reads bytes of the file.
        start: Where the file starts, behind tags.
        size: Size of the file in bytes.
        head: STREAMINFO.

    Returns:
        The place, None if it is not found; and whether the decoder would fail on the metadata.
    """
    at, is_damaged, is_last = start + 4, False, False
    for _ in range(MOST_BLOCKS):
        block = read(at, 4)
        if is_last or len(block) < 4:
            break
        length, is_last = int.from_bytes(block[1:], "big"), bool(block[0] & 0x80)
        is_damaged |= not is_readable(read, at + 4, block[0] & 0x7F, length)
        at += 4 + length
    header = frame_header(read(at, 16), 0, head) if is_last else None
    if header is not None and header[0] == 0:
        return at, is_damaged
    # The blocks' lengths lead elsewhere, unless the sound was cut out of a longer one.
    data = read(start + STREAMINFO, MOST_METADATA)
    place = -1
    while (place := data.find(b"\xff", place + 1)) >= 0:
        header = frame_header(data, place, head)
        if header is not None and header[0] == 0:
            return start + STREAMINFO + place, True
    return at if is_last and at <= size else None, False


def is_readable(read: Reader, at: int, kind: int, length: int) -> bool:
    """Return whether libFLAC goes on after a block of metadata."""
    if kind == APPLICATION:
        return length >= 4
    if kind == SEEKTABLE:
        points = read(at, length)
        firsts = [points[n : n + 8] for n in range(0, len(points), POINT)]
        return length % POINT == 0 and firsts == sorted(firsts)
    return kind not in (CUESHEET, PICTURE)  # of many fields, none of which is needed


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
    at = len(data)
    while (at := data.rfind(b"\xff", 0, at)) >= 0:
        header = frame_header(data, at, head)
        if header is not None:
            yield at, *header


def frame_header(data: bytes, at: int, head: bytes) -> tuple[int, int] | None:
    """Return the first sample of a frame and its number of samples; None if no header is there."""
    fields = data[at : at + 16]
    if len(fields) < 6 or fields[0] != 0xFF or fields[1] & 0xFE != 0xF8 or fields[3] & 1:
        return None
    code, rate = fields[2] >> 4, fields[2] & 15
    length = utf8_length(fields[4])
    if code == 0 or rate == 15 or length is None or fields[3] >> 4 > 10:
        return None
    number = fields[4] & (0x7F if length == 1 else (1 << 7 - length) - 1)
    for byte in fields[5 : 4 + length]:
        number = number << 6 | byte & 0x3F
    at_size = 4 + length
    width = {6: 1, 7: 2}.get(code, 0)
    count = BLOCK_SIZES.get(code) or int.from_bytes(fields[at_size : at_size + width], "big") + 1
    at_crc = at_size + width + EXTRA.get(rate, 0)
    if at_crc >= len(fields) or crc8(fields[:at_crc]) != fields[at_crc]:
        return None
    fixed = int.from_bytes(head[8:10], "big")
    return number if fields[1] & 1 else number * fixed, count


def utf8_length(byte: int) -> int | None:
    """Return the bytes of a number that begins with this one; None if none does."""
    ones = 8 - (byte ^ 0xFF).bit_length()
    return None if ones == 1 or ones == 8 else max(1, ones)
