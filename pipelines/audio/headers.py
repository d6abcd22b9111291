"""Headers of audio files, read without decoding."""

import struct

from ssast.pipelines.errors import DataError

UNKNOWN_LENGTH = 0x7FFF0000  # bytes of samples, or more, in the header of a streamed WAV file
HEAD = 65536  # bytes at the start of a file that hold its header
OGG_PAGE = 65307  # bytes of the largest page of an Ogg file


def wav_header(data: bytes, size: int) -> tuple[int, int, int]:
    """Read the header of a WAV file.

    Args:
        data: The file, or the first part of it.
        size: Size of the whole file in bytes.

    Returns:
        Sample rate in Hz, channels and samples per channel; 0 samples if it is not integer PCM.

    Raises:
        DataError: The file is truncated. libsndfile would silently return fewer samples.
    """
    rate_hz = channels = frame_bytes = 0
    at = 12
    while at + 8 <= len(data):
        name, (length,) = data[at : at + 4], struct.unpack_from("<I", data, at + 4)
        at += 8
        if name == b"data":
            if size - at < length < UNKNOWN_LENGTH:
                raise DataError(f"truncated: {size - at} of {length} bytes of samples")
            return rate_hz, channels, length // frame_bytes if frame_bytes else 0
        if name == b"fmt " and length >= 16 and at + 16 <= len(data):
            kind, channels, rate_hz, _, frame_bytes, bits = struct.unpack_from("<HHIIHH", data, at)
            if kind != 1 or bits not in (8, 16, 24, 32) or frame_bytes != channels * bits // 8:
                frame_bytes = 0
        at += length + length % 2
    return 0, 0, 0


def check_whole(head: bytes, tail: bytes, size: int) -> None:
    """Check that a WAV or Ogg file is not truncated, which libsndfile does not report.

    Args:
        head: The first :data:`HEAD` bytes of the file, or all of it.
        tail: The last :data:`OGG_PAGE` bytes, or all of it.
        size: Size of the whole file in bytes.

    Raises:
        DataError: A WAV file ends before its samples do, or an Ogg file in the middle of a page.
    """
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        wav_header(head, size)
    elif head[:4] == b"OggS":
        page = tail[tail.rfind(b"OggS") :]
        # Byte 26 is the number of segments; their lengths follow it, then the segments themselves.
        segments = page[27 : 27 + page[26]] if len(page) > 26 else b""
        if len(page) < 27 or len(page) < 27 + page[26] or len(page) - 27 - page[26] < sum(segments):
            raise DataError("truncated: ends in the middle of an Ogg page")
