"""Open a file with libsndfile, if it is of a format that is meant to be read with it."""

import io
import os
from typing import IO

import soundfile

from ssast.pipelines.audio.headers import behind_tags
from ssast.pipelines.errors import DataError
from ssast.pipelines.files import open_regular

FORMATS = (  # bytes at the start, and bytes 8 to 11 where they tell as well
    *((b"RIFF", b"WAVE"), (b"RIFX", b"WAVE"), (b"RF64", b"WAVE"), (b"FORM", b"AIFF")),
    *((b"FORM", b"AIFC"), (b"caff", b"desc"), (b".snd", b""), (b"dns.", b""), (b"OggS", b"")),
    *((b"fLaC", b""), (b"NIST_1A\n", b""), (b"Creative Voi", b"")),
    (b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb", b""),
)


class _Sound(soundfile.SoundFile):
    """A sound, of which MP3 is read on from where it is.

    In what can seek, soundfile seeks to the end of each read; and after a seek in MP3 samples are
    wrong for up to 0.4 s, as its frames hold bits of the frames behind them.
    """

    def seekable(self) -> bool:
        """Return whether a seek changes no sample."""
        return not is_mp3(self) and super().seekable()


def is_mp3(sound: soundfile.SoundFile) -> bool:
    """Return whether a sound is MP3, as a file of its own or in a WAV file."""
    return sound.subtype == "MPEG_LAYER_III"


def open_sound(
    source: str | bytes | int | IO[bytes], *, closefd: bool = True
) -> soundfile.SoundFile:
    """Open a path, a file descriptor or an open file with libsndfile.

    Of a format that it does not know by the first bytes, libsndfile guesses by the name, and looks
    for a resource fork: another file in the same folder, or in the working directory.

    Raises:
        DataError: It is of another format.
        RuntimeError: libsndfile cannot open it; see also :class:`soundfile.LibsndfileError`.
        OSError: It cannot be read.
    """
    if isinstance(source, str | bytes):
        with open_regular(source) as file:
            _check(file.fileno())
    else:
        _check(source)
    if not isinstance(source, str | bytes | int):
        source = _Seekable(source)  # type: ignore[assignment]
    return _Sound(source, closefd=closefd)


def _check(file: int | IO[bytes]) -> None:
    def read(at: int, count: int) -> bytes:
        if isinstance(file, int):
            return os.pread(file, count, at)
        file.seek(at)
        return file.read(count)

    _, head = behind_tags(read)
    if not isinstance(file, int):
        file.seek(0)
    is_mpeg = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0
    known = (head.startswith(first) and head[8:].startswith(kind) for first, kind in FORMATS)
    if not is_mpeg and not any(known):
        raise DataError("Format not recognised")


class _Seekable:
    """An open file for libsndfile, which may seek to a place before its start."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.read, self.tell = file, file.read, file.tell
        self.readinto = file.readinto  # type: ignore[attr-defined]

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(max(0, offset) if whence == io.SEEK_SET else offset, whence)
