"""Recordings inside the archives of games."""

import io
import re
import struct
import wave
import zipfile
from collections.abc import Iterator
from pathlib import Path

from ssast.pipelines.clips.folders import AUDIO_SUFFIXES
from ssast.pipelines.errors import DataError

ARCHIVES = frozenset({".1c", ".pk3", ".wad"})


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the recordings of an archive, in its order: (name, bytes of an audio file).

    Raises:
        DataError: The archive is damaged.
    """
    try:
        if path.suffix == ".pk3":
            yield from zip_members(path)
        elif path.suffix == ".wad":
            yield from wad_members(path.read_bytes())
        elif path.name == "queen.1c":
            yield from queen_members(path.read_bytes())
    except (zipfile.BadZipFile, struct.error) as error:
        raise DataError(f"{path}: damaged archive: {error}") from error


def zip_members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the audio files of a zip archive (``.pk3``: Quake III and its kin)."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if Path(name).suffix.lower() in AUDIO_SUFFIXES:
                yield name, archive.read(name)


def wad_members(archive: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the digital sounds (``DS*``) of a Doom WAD, as WAV files.

    The archive opens with its kind (4 bytes), the number of lumps and the offset of their table
    (4 bytes each, little endian) of 16 byte entries: offset, size, name padded with zeros (8).
    A sound is its kind (2 bytes, 3), rate (2), number of samples (4) and unsigned 8 bit samples, of
    which the first and the last 16 are padding.
    """
    number, table = struct.unpack_from("<II", archive, 4)
    for entry in range(number):
        offset, size, padded = struct.unpack_from("<II8s", archive, table + 16 * entry)
        name = padded.split(b"\0")[0].decode("ascii", "replace")
        if not name.startswith("DS") or size <= 40:
            continue
        kind, rate_hz, count = struct.unpack_from("<HHI", archive, offset)
        if kind == 3:
            buffer = io.BytesIO()
            with wave.open(buffer, "wb") as sound:
                sound.setparams((1, 1, rate_hz, 0, "NONE", ""))
                sound.writeframes(archive[offset + 24 : offset + 8 + count - 16])
            yield name, buffer.getvalue()


def queen_members(archive: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the speech of Flight of the Amazon Queen: MP3 members (``*.SB``) of its archive.

    The archive opens with a 15 byte header and a table of 21 byte entries: name padded with zeros
    (12 bytes), bundle (1), offset (4, big endian), size (4). The table ends where no name stands.
    """
    place = 15
    while re.fullmatch(rb"[0-9A-Z_.$ ~\x00-]{12}", archive[place : place + 12]):
        name = archive[place : place + 12].rstrip(b"\0").decode("ascii")
        offset, size = struct.unpack(">II", archive[place + 13 : place + 21])
        place += 21
        if name.endswith(".SB"):
            yield name, archive[offset : offset + size]
