"""Headers of audio files: what they state, how they are repaired, which formats they tell."""

from collections.abc import Callable
from dataclasses import dataclass

from ssast.pipelines.errors import ChainedError, DataError

Reader = Callable[[int, int], bytes]  # offset and number of bytes -> these bytes, fewer at the end

HEAD = 65536  # bytes at the start of a file that hold its header
ID3_HEADER = 10  # bytes in front of a tag
OGG_PAGE = 65307  # bytes of the largest page of an Ogg file
FEW_SAMPLES = 64  # may be missing: more than the 44 bytes of a header that was counted as sound
MISSING_SHARE = 0.01  # of the samples, that may be missing as well
RATES_HZ = (1000, 1_000_000)  # other sample rates mean a damaged header
FOREIGN = (  # what ffmpeg reads and libsndfile does not: offset, bytes there, name of the format
    (4, b"ftyp", "MP4 or M4A"),
    (0, b"\x1a\x45\xdf\xa3", "Matroska or WebM"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "WMA"),
    (0, b"#!AMR", "AMR"),
    (28, b"\x7fFLAC", "FLAC in Ogg"),
    (28, b"Speex", "Speex"),
    (0, b"\x0b\x77", "AC-3"),
    (0, b"MAC ", "Monkey's Audio"),
    (0, b"wvpk", "WavPack"),
    (0, b"TTA1", "TTA"),
    (0, b"tBaK", "TAK"),
    (0, b".RMF", "RealMedia"),
    (0, b".ra\xfd", "RealAudio"),
    (0, b"FLV\x01", "FLV"),
    (8, b"AVI ", "AVI"),
    (0, b"\x7f\xfe\x80\x01", "DTS"),
)


@dataclass(frozen=True, slots=True)
class Repair:
    """A file with another header: ``header``, followed by the bytes from ``start`` to ``end``."""

    header: bytes
    start: int
    end: int

    def applied(self, data: bytes) -> bytes:
        """Return the repaired file, given all of the original."""
        return self.header + data[self.start : self.end]


@dataclass(frozen=True, slots=True)
class Sound:
    """What a file holds.

    Attributes:
        rate_hz: Sample rate in Hz.
        channels: Number of channels.
        stated: Samples per channel by the header; None if it states none.
        found: Samples per channel by the length of the file or by its frames; 0 if the samples are
            of a codec whose size tells nothing.
        plain: Whether DALI decodes the file exactly, once repaired: native FLAC, or integer PCM in
            a RIFF file.
        repair: How to make the header state what was found; None where it does.
    """

    rate_hz: int
    channels: int
    stated: int | None
    found: int
    plain: bool = False
    repair: Repair | None = None

    def note(self) -> dict[str, float] | None:
        """Return the stated length and the true one in s, if they differ by much."""
        if not self.rate_hz or not self.found or self.stated is None:
            return None
        if not differs(self.stated, self.found):
            return None
        return {
            "stated_s": round(self.stated / self.rate_hz, 3),
            "found_s": round(self.found / self.rate_hz, 3),
        }


def differs(stated: int, found: int, few: int = FEW_SAMPLES) -> bool:
    """Return whether two lengths differ by more than a few samples and more than 1 %."""
    off = abs(stated - found)
    return off > few and off > MISSING_SHARE * max(stated, found)


def missing(stated: int, found: int, few: int = FEW_SAMPLES) -> bool:
    """Return whether so much is missing that the file is truncated."""
    return found < stated and differs(stated, found, few)


def without_tags(read: Reader, size: int) -> int:
    """Return where a file ends if tags after its sound (ID3v1, APE) are left out."""
    tail = read(max(0, size - 128), 128)
    if len(tail) == 128 and tail[:3] == b"TAG":
        size -= 128
    foot = read(max(0, size - 32), 32)
    if len(foot) == 32 and foot[:8] == b"APETAGEX":
        length = int.from_bytes(foot[12:16], "little") + (32 if foot[23] & 0x80 else 0)
        size -= min(length, size)
    return size


def behind_tags(read: Reader) -> tuple[int, bytes]:
    """Return where a file begins behind its ID3v2 tags, and its first 16 bytes there."""
    start, head = 0, read(0, 16)
    while head[:3] == b"ID3" and len(head) >= ID3_HEADER:  # with cover art of any size
        length = 0
        for byte in head[6:10]:
            length = length << 7 | byte & 0x7F
        start += ID3_HEADER + length + (10 if head[5] & 0x10 else 0)
        head = read(start, 16)
    return start, head


def foreign_format(head: bytes) -> str | None:
    """Return the name of a format that ffmpeg reads and libsndfile does not, by its first bytes."""
    for at, magic, name in FOREIGN:
        if head[at : at + len(magic)] == magic:
            return name
    if len(head) > 2 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        return "AAC"
    return None


def check_ogg(read: Reader, size: int) -> None:
    """Check that an Ogg file is one whole stream: libsndfile does not report what it leaves out.

    Args:
        read: Reads bytes of the file.
        size: Size of the file in bytes.

    Raises:
        ChainedError: Other streams follow the first, as in recordings of a radio station.
        DataError: It ends in the middle of a page.
    """
    tail = read(max(0, size - OGG_PAGE), OGG_PAGE)
    page = tail[tail.rfind(b"OggS") :]
    # Byte 26 is the number of segments; their lengths follow it, then the segments themselves.
    segments = page[27 : 27 + page[26]] if len(page) > 26 else b""
    if len(page) < 27 or len(page) < 27 + page[26] or len(page) - 27 - page[26] < sum(segments):
        raise DataError("truncated: ends in the middle of an Ogg page")
    first = _first_streams(read)
    if first and page[14:18] not in first:
        raise ChainedError(
            "several Ogg streams one behind the other: ssast data prepare decodes them, with ffmpeg"
        )


def _first_streams(read: Reader) -> set[bytes]:
    """Return the numbers of the streams that begin at the start of an Ogg file (RFC 3533)."""
    numbers: set[bytes] = set()
    at = 0
    while True:
        page = read(at, 27 + 255)
        if page[:4] != b"OggS" or len(page) < 27 or not page[5] & 2:  # it begins no stream
            return numbers
        numbers.add(page[14:18])
        at += 27 + page[26] + sum(page[27 : 27 + page[26]])
