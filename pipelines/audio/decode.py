"""A recording of any format to blocks of mono samples.

libsndfile decodes; what it cannot read (m4a, wma, webm, ...) is left to ffmpeg, where that is
installed. A recording is read in blocks, so a file of many hours costs no more memory than one of
a few seconds, and one inside a tar archive is read where it lies.

This module imports no torch, and holds no lock of the interpreter where time is spent: libsndfile
and numpy release it, so threads decode in parallel.
"""

import contextlib
import errno
import hashlib
import io
import os
import re
import shutil
import stat
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import soundfile

from ssast.pipelines.audio.headers import HEAD, OGG_PAGE, check_whole
from ssast.pipelines.errors import DataError, UnusableError

BLOCK_SAMPLES = 2**19  # read at once, of all channels together
LOWEST_HZ, HIGHEST_HZ = 2000, 768_000  # a header that states another rate is damaged
MOST_CHANNELS = 1024  # as in libsndfile
SPAN_BUFFER = 2**20  # bytes read at once of a member of an archive
UNRECOGNISED, SYSTEM_ERROR = 1, 2  # error numbers of libsndfile
STREAMED = 1 << 48  # samples that a file claims if it was written without knowing how many
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EMFILE, errno.ENFILE}
AU_FLOAT = 6  # 32 bits, big-endian
FFMPEG_SUFFIXES = frozenset(
    f".{kind}"
    for kind in (
        *("m4a", "m4b", "mp4", "mov", "3gp", "aac", "wma", "asf", "webm", "weba", "mka", "mkv"),
        *("ac3", "eac3", "dts", "ape", "wv", "tta", "tak", "amr", "spx", "ra", "rm", "avi", "flv"),
    )
)


@dataclass(frozen=True, slots=True)
class Span:
    """A file inside a plain archive.

    Attributes:
        path: The archive.
        offset: Where the file begins, in bytes.
        size: Its bytes.
    """

    path: Path
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Item:
    """A recording to convert.

    Attributes:
        name: Unique among the items; the clips are named after it.
        data: A file, a file inside an archive, or the bytes of one.
        folder: Folder below ``flac/`` for its clips, where they become files.
    """

    name: str
    data: Path | Span | bytes
    folder: str = ""

    def signature(self) -> str:
        """Changes when the recording changes: size and time of a file, or a hash of the bytes.

        Raises:
            OSError: The file cannot be found, or is not a regular file.
        """
        if isinstance(self.data, bytes):
            return hashlib.blake2b(self.data, digest_size=8).hexdigest()
        status = (self.data.path if isinstance(self.data, Span) else self.data).stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise OSError(errno.EINVAL, "not a regular file")
        part = f"-{self.data.offset}-{self.data.size}" if isinstance(self.data, Span) else ""
        return f"{status.st_size}-{status.st_mtime_ns}{part}"


class SpanFile(io.RawIOBase):
    """A file inside an archive as a file of its own.

    What calls it from C swallows exceptions, so a failure is kept in ``error`` and looks like the
    end of the file.
    """

    def __init__(self, span: Span) -> None:
        self.span, self.place = span, 0
        self.error: OSError | None = None
        self.descriptor = os.open(span.path, os.O_RDONLY)

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fills the buffer as far as the file goes; returns the bytes read."""
        wanted = min(len(buffer), max(0, self.span.size - self.place))
        part = memoryview(buffer)[:wanted]
        try:
            done = os.preadv(self.descriptor, [part], self.span.offset + self.place)
        except OSError as error:
            self.error = error
            return 0
        self.place += done
        return done

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to another place; returns it."""
        self.place = max(0, offset + (0, self.place, self.span.size)[whence])
        return self.place

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def close(self) -> None:
        """Closes the archive."""
        if not self.closed:
            os.close(self.descriptor)
        super().close()


def read_blocks(item: Item, *, whole: bool = False) -> Iterator[tuple[np.ndarray, int]]:
    """Decodes a recording to mono, block by block.

    Args:
        item: The recording.
        whole: Do not accept a WAV or Ogg file that was cut off. (To libsndfile that is no error:
            what is there counts.)

    Yields:
        ([S] float32 samples, sample rate in Hz).

    Raises:
        UnusableError: It cannot be decoded to its end, or holds NaN or infinite samples.
    """
    if suffix(item.name) in FFMPEG_SUFFIXES and not isinstance(item.data, bytes):
        yield from finite(ffmpeg_blocks(item.data))
        return
    try:
        yield from finite(sndfile_blocks(item, whole))
    except UnusableError as error:
        unrecognised = getattr(error.__cause__, "code", None) == UNRECOGNISED
        if not unrecognised or isinstance(item.data, bytes) or not ffmpeg_installed():
            raise
        blocks = finite(ffmpeg_blocks(item.data))
        try:
            first = next(blocks, None)
        except UnusableError:
            first = None
        if first is None:
            raise
        yield first
        yield from blocks


def suffix(name: str) -> str:
    """The ending of a file's name, with its dot, in small letters."""
    return os.path.splitext(name)[1].lower()


def finite(blocks: Iterator[tuple[np.ndarray, int]]) -> Iterator[tuple[np.ndarray, int]]:
    """Mixes [S, channels] blocks to mono, and refuses what is no sound.

    Raises:
        UnusableError: An absurd sample rate, NaN or infinite samples.
    """
    for block, rate_hz in blocks:
        if not LOWEST_HZ <= rate_hz <= HIGHEST_HZ:
            raise UnusableError(f"states a sample rate of {rate_hz} Hz")
        mono = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)
        if not np.isfinite(mono).all():
            raise UnusableError("holds NaN or infinite samples")
        if len(mono):
            yield mono, rate_hz


def sndfile_blocks(item: Item, whole: bool) -> Iterator[tuple[np.ndarray, int]]:
    """Blocks of [S, channels] float32, decoded by libsndfile; see :func:`read_blocks`."""
    with contextlib.ExitStack() as stack:
        try:
            source, span, head = opened(item, stack, whole)
            with soundfile.SoundFile(source) as sound:
                block_frames = max(1, BLOCK_SAMPLES // sound.channels)
                num_read = 0
                while True:
                    block = sound.read(block_frames, dtype="float32", always_2d=True)
                    if span is not None and span.error is not None:
                        raise span.error
                    # Also of an empty one the rate is looked at, so the last block goes out too.
                    yield block, sound.samplerate
                    num_read += len(block)
                    if not len(block):
                        break
                # Of an MP3 file without a table of contents the length is a guess.
                known = sound.format != "MP3" or b"Xing" in head or b"Info" in head
                if whole and known and num_read < sound.frames < STREAMED:
                    raise UnusableError(f"truncated: {num_read} of {sound.frames} samples")
        except soundfile.LibsndfileError as error:
            why = f"cannot be decoded: {error.error_string.rstrip('.')}"
            raise UnusableError(why, passing=error.code == SYSTEM_ERROR) from error
        except OSError as error:
            why = f"cannot be read: {error.strerror}"
            raise UnusableError(why, passing=error.errno in PASSING) from error
        except DataError as error:
            raise UnusableError(str(error)) from error
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:  # an absurd header
            raise UnusableError(f"cannot be decoded: {error}") from error


def opened(
    item: Item, stack: contextlib.ExitStack, whole: bool
) -> tuple[bytes | IO[bytes], SpanFile | None, bytes]:
    """What libsndfile shall read, the part of an archive behind it, and its first bytes.

    The part is None if there is no archive, and no bytes are given if it need not be whole.

    Raises:
        OSError: The file cannot be opened.
        DataError: It was cut off, and must be whole.
    """
    span, head = None, b""
    file: IO[bytes]
    if isinstance(item.data, Span):
        span = SpanFile(item.data)
        file = stack.enter_context(io.BufferedReader(span, SPAN_BUFFER))
    elif isinstance(item.data, bytes):
        file = io.BytesIO(item.data)
    else:  # libsndfile calls all that can go wrong a system error: open it here to know better
        file = stack.enter_context(io.BufferedReader(io.FileIO(item.data)))
    if whole:
        head = file.read(HEAD)
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            raise DataError("empty file")
        file.seek(max(0, size - OGG_PAGE))
        check_whole(head, file.read(), size)
        file.seek(0)
    # As bytes: a name need not be valid text.
    return (os.fsencode(item.data) if isinstance(item.data, Path) else file), span, head


def length_s(item: Item) -> float | None:
    """Length of a recording in seconds, as its header says; None if libsndfile cannot read it."""
    with contextlib.ExitStack() as stack:
        try:
            source, _, _ = opened(item, stack, False)
            with soundfile.SoundFile(source) as sound:
                return sound.frames / sound.samplerate
        except (RuntimeError, ValueError, OSError, ArithmeticError):
            return None


def ffmpeg_installed() -> bool:
    """Whether there is an ffmpeg to call."""
    return shutil.which("ffmpeg") is not None


def ffmpeg_blocks(data: Path | Span) -> Iterator[tuple[np.ndarray, int]]:
    """Blocks of [S, channels] float32, decoded by ffmpeg at the recording's own rate.

    Raises:
        UnusableError: ffmpeg is not installed, or cannot decode the recording to its end.
    """
    program = shutil.which("ffmpeg")
    if program is None:
        raise UnusableError("libsndfile cannot decode it: install ffmpeg to read this format")
    path = data.path if isinstance(data, Span) else data
    try:
        io.FileIO(path).close()
    except OSError as error:
        why = f"cannot be read: {error.strerror}"
        raise UnusableError(why, passing=error.errno in PASSING) from error
    if isinstance(data, Span):
        url = f"subfile,,start,{data.offset},end,{data.offset + data.size},,:"
        url += os.path.abspath(path)
    else:
        url = f"file:{os.path.abspath(path)}"
    # A playlist in disguise shall not fetch anything; a damaged frame is an error, not a gap.
    reading = ("-nostdin", "-v", "error", "-xerror", "-protocol_whitelist", "file,subfile")
    writing = ("-map", "0:a:0", "-c:a", "pcm_f32be", "-f", "au", "pipe:1")
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            [program, *reading, "-i", url, *writing],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
        )
        assert process.stdout is not None
        try:
            failure = None
            try:
                yield from au_blocks(process.stdout)
            except UnusableError as error:
                failure = error
                process.stdout.close()  # what still writes shall end
            if process.wait() or failure:
                complaints.seek(0)
                lines = complaints.read().decode(errors="replace").strip().splitlines()
                why = str(lines[-1] if lines else failure or f"status {process.returncode}")
                why = re.sub(r"\[[^]]*\] *", "", why).strip()  # names and addresses of its parts
                raise UnusableError(f"cannot be decoded by ffmpeg: {why}")
        finally:
            process.kill()
            process.stdout.close()
            process.wait()


def au_blocks(stream: IO[bytes]) -> Iterator[tuple[np.ndarray, int]]:
    """Blocks of [S, channels] float32 out of an AU stream of floats.

    Raises:
        UnusableError: It is none, or ends in the middle of a sample.
    """
    header = stream.read(24)
    if len(header) < 24 or header[:4] != b".snd":
        raise UnusableError("gave no sound")
    start, _, encoding, rate_hz, channels = struct.unpack(">5I", header[4:])
    if encoding != AU_FLOAT or start < 24 or not 0 < channels <= MOST_CHANNELS:
        raise UnusableError("gave no sound")
    stream.read(start - 24)
    frame_bytes = 4 * channels
    block_bytes = max(1, BLOCK_SAMPLES // channels) * frame_bytes
    while data := stream.read(block_bytes):
        if len(data) % frame_bytes:
            raise UnusableError("broke off")
        yield np.frombuffer(data, ">f4").astype(np.float32).reshape(-1, channels), rate_hz
