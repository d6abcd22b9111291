"""Lengths of recordings by their headers and by their samples, found without decoding.

A header may state any length: recorders that were switched off leave 0, streams leave the largest
number, sizes of 4 GiB and more wrap around, MP3 files without a table state none. Where the samples
are there, they count: :func:`examine` returns a header that tells the truth, which a decoder is
given in place of the one in the file. Where a share of the samples is missing, the file is
truncated.
"""

from ssast.pipelines.audio.chunks import examine_chunks
from ssast.pipelines.audio.flac import examine_flac
from ssast.pipelines.audio.headers import (
    ID3_HEADER,
    Reader,
    Sound,
    behind_tags,
    check_ogg,
)
from ssast.pipelines.audio.mpeg import examine_mp3


def examine(read: Reader, size: int) -> Sound | None:
    """Find out how long a WAV, RF64, W64, AIFF, CAF, AU, FLAC or MP3 file is, without decoding.

    Args:
        read: Reads bytes of the file.
        size: Size of the file in bytes.

    Returns:
        The sound; None for any other file, and for one with an unusual or damaged header: the
        decoder will tell.

    Raises:
        ChainedError: It is of several Ogg streams, one behind the other.
        DataError: The file is truncated, which libsndfile does not always report.
    """
    start, head = behind_tags(read)
    if head[:4] == b"fLaC":
        return examine_flac(read, start, size)
    if start and head[:1] != b"\xff":  # the tag lies about its size, or something follows it
        found = examine_mp3(read, ID3_HEADER, size, True)
        if found is not None:
            return found
    if start or head[:1] == b"\xff":
        return examine_mp3(read, start, size)
    if head[:4] == b"OggS":
        check_ogg(read, size)
    return examine_chunks(read, size, head)
