"""Decode recordings of any format to blocks of mono samples.

libsndfile decodes most formats, ffmpeg (where it is installed) the others: m4a, wma, webm, ...
Recordings are read in blocks, so memory does not grow with their length, and members of a tar
archive are read in place.

This module does not import torch. libsndfile and numpy release the GIL, so threads decode in
parallel.
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
from ssast.pipelines.clips.retry import TRANSIENT
from ssast.pipelines.errors import DataError, UnusableError

BLOCK_SAMPLES = 2**19  # of all channels together
LOWEST_HZ, HIGHEST_HZ = 2000, 768_000  # other sample rates mean a damaged header
MOST_CHANNELS = 1024  # libsndfile's limit
SPAN_BUFFER = 2**20  # bytes of a read from an archive
UNRECOGNISED, SYSTEM_ERROR = 1, 2  # libsndfile's error numbers
STREAMED = 1 << 48  # a header with so many samples was written before their number was known
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
    """A file inside an uncompressed archive.

    Attributes:
        path: Path of the archive.
        offset: First byte of the file in the archive.
        size: Size of the file in bytes.
    """

    path: Path
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Item:
    """A recording to decode.

    Attributes:
        name: Unique name; clips are named after it.
        data: Path of the file, part of an archive, or the bytes of the file.
    """

    name: str
    data: Path | Span | bytes

    def signature(self) -> str:
        """Return a string that changes with the recording: size and mtime, or a hash of its bytes.

        Raises:
            OSError: The file does not exist or is not a regular file.
        """
        if isinstance(self.data, bytes):
            return hashlib.blake2b(self.data, digest_size=8).hexdigest()
        status = (self.data.path if isinstance(self.data, Span) else self.data).stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise OSError(errno.EINVAL, "not a regular file")
        part = f"-{self.data.offset}-{self.data.size}" if isinstance(self.data, Span) else ""
        return f"{status.st_size}-{status.st_mtime_ns}{part}"


class SpanFile(io.RawIOBase):
    """A raw file object for part of an archive.

    libsndfile calls it from C and would swallow exceptions: a failed read looks like the end of the
    file, and its exception is kept in ``error``.
    """

    def __init__(self, span: Span) -> None:
        self.span, self.position = span, 0
        self.error: OSError | None = None
        self.descriptor = os.open(span.path, os.O_RDONLY)

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Read into the buffer; return the number of bytes, 0 at the end of the file."""
        wanted = min(len(buffer), max(0, self.span.size - self.position))
        part = memoryview(buffer)[:wanted]
        try:
            done = os.preadv(self.descriptor, [part], self.span.offset + self.position)
        except OSError as error:
            self.error = error
            return 0
        self.position += done
        return done

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Change the position in the file; return the new one."""
        self.position = max(0, offset + (0, self.position, self.span.size)[whence])
        return self.position

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def close(self) -> None:
        """Close the archive."""
        if not self.closed:
            os.close(self.descriptor)
        super().close()


def read_blocks(item: Item, *, whole: bool = False) -> Iterator[tuple[np.ndarray, int]]:
    """Decode a recording to mono, block by block.

    Args:
        item: The recording.
        whole: Whether to reject a truncated WAV or Ogg file, which libsndfile accepts.

    Yields:
        Samples [S] float32 and the sample rate in Hz.

    Raises:
        UnusableError: It cannot be decoded to its end, or holds NaN or infinite samples.
    """
    if suffix(item.name) in FFMPEG_SUFFIXES and not isinstance(item.data, bytes):
        yield from to_mono(ffmpeg_blocks(item.data))
        return
    try:
        yield from to_mono(sndfile_blocks(item, whole))
    except UnusableError as error:
        # libsndfile raises this one before it yields anything, so ffmpeg can start over.
        unrecognised = getattr(error.__cause__, "code", None) == UNRECOGNISED
        if not unrecognised or isinstance(item.data, bytes) or not ffmpeg_installed():
            raise
        blocks = to_mono(ffmpeg_blocks(item.data))
        try:
            first = next(blocks, None)
        except UnusableError:
            first = None
        if first is None:
            raise  # libsndfile's error: that ffmpeg failed as well says nothing more
        yield first
        yield from blocks


def suffix(name: str) -> str:
    """Return the extension of a file name in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def to_mono(blocks: Iterator[tuple[np.ndarray, int]]) -> Iterator[tuple[np.ndarray, int]]:
    """Average the channels of [S, channels] blocks, and drop empty blocks.

    Raises:
        UnusableError: The sample rate is out of range, or a sample is NaN or infinite.
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
    """Decode blocks of [S, channels] float32 with libsndfile; see :func:`read_blocks`."""
    with contextlib.ExitStack() as stack:
        try:
            source, span, head = open_item(item, stack, whole)
            with soundfile.SoundFile(source) as sound:
                block_frames = max(1, BLOCK_SAMPLES // sound.channels)
                num_read = 0
                while True:
                    block = sound.read(block_frames, dtype="float32", always_2d=True)
                    if span is not None and span.error is not None:
                        raise span.error
                    # The empty last block as well: without samples the rate must still be checked.
                    yield block, sound.samplerate
                    num_read += len(block)
                    if not len(block):
                        break
                # The length of an MP3 file without a Xing header is an estimate.
                known = sound.format != "MP3" or b"Xing" in head or b"Info" in head
                if whole and known and num_read < sound.frames < STREAMED:
                    raise UnusableError(f"truncated: {num_read} of {sound.frames} samples")
        except soundfile.LibsndfileError as error:
            why = f"cannot be decoded: {error.error_string.rstrip('.')}"
            raise UnusableError(why, transient=error.code == SYSTEM_ERROR) from error
        except OSError as error:
            why = f"cannot be read: {error.strerror}"
            raise UnusableError(why, transient=error.errno in TRANSIENT) from error
        except DataError as error:
            raise UnusableError(str(error)) from error
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:  # a damaged header
            raise UnusableError(f"cannot be decoded: {error}") from error


def open_item(
    item: Item, stack: contextlib.ExitStack, whole: bool
) -> tuple[bytes | IO[bytes], SpanFile | None, bytes]:
    """Open a recording for libsndfile.

    Args:
        item: The recording.
        stack: Closes the file.
        whole: Whether to reject a truncated WAV or Ogg file.

    Returns:
        What libsndfile reads: a path or an open file; the archive behind it, if there is one; with
        ``whole`` the first :data:`HEAD` bytes, otherwise none.

    Raises:
        OSError: The file cannot be opened.
        DataError: With ``whole``, the file is empty or truncated.
    """
    span, head = None, b""
    file: IO[bytes]
    if isinstance(item.data, Span):
        span = SpanFile(item.data)
        file = stack.enter_context(io.BufferedReader(span, SPAN_BUFFER))
    elif isinstance(item.data, bytes):
        file = io.BytesIO(item.data)
    else:  # opened here, as libsndfile reports every reason as "System error"
        file = stack.enter_context(io.BufferedReader(io.FileIO(item.data)))
    if whole:
        head = file.read(HEAD)
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            raise DataError("empty file")
        file.seek(max(0, size - OGG_PAGE))
        check_whole(head, file.read(), size)
        file.seek(0)
    # bytes, since a path need not be valid UTF-8
    return (os.fsencode(item.data) if isinstance(item.data, Path) else file), span, head


def length_s(item: Item) -> float | None:
    """Return the length in seconds from the header; None if libsndfile cannot read it."""
    with contextlib.ExitStack() as stack:
        try:
            source, _, _ = open_item(item, stack, False)
            with soundfile.SoundFile(source) as sound:
                return sound.frames / sound.samplerate
        except (RuntimeError, ValueError, OSError, ArithmeticError):
            return None


def ffmpeg_installed() -> bool:
    """Return whether there is an ffmpeg program."""
    return shutil.which("ffmpeg") is not None


def ffmpeg_blocks(data: Path | Span) -> Iterator[tuple[np.ndarray, int]]:
    """Decode blocks of [S, channels] float32 with ffmpeg, at the recording's sample rate.

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
        raise UnusableError(why, transient=error.errno in TRANSIENT) from error
    if isinstance(data, Span):
        url = f"subfile,,start,{data.offset},end,{data.offset + data.size},,:"
        url += os.path.abspath(path)
    else:
        url = f"file:{os.path.abspath(path)}"
    # A playlist with an audio suffix must not fetch URLs. -xerror: a damaged frame is an error.
    reading = ("-nostdin", "-v", "error", "-xerror", "-protocol_whitelist", "file,subfile")
    writing = ("-map", "0:a:0", "-c:a", "pcm_f32be", "-f", "au", "pipe:1")
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [program, *reading, "-i", url, *writing],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        assert process.stdout is not None
        try:
            failure = None
            try:
                yield from au_blocks(process.stdout)
            except UnusableError as error:
                failure = error
                process.stdout.close()  # ends an ffmpeg that is still writing
            if process.wait() or failure:
                errors.seek(0)
                lines = errors.read().decode(errors="replace").strip().splitlines()
                why = str(lines[-1] if lines else failure or f"status {process.returncode}")
                why = re.sub(r"\[[^]]*\] *", "", why).strip()  # names and addresses of its modules
                raise UnusableError(f"cannot be decoded by ffmpeg: {why}")
        finally:
            process.kill()
            process.stdout.close()
            process.wait()


def au_blocks(stream: IO[bytes]) -> Iterator[tuple[np.ndarray, int]]:
    """Read blocks of [S, channels] float32 from an AU stream of 32 bit floats.

    Raises:
        UnusableError: The stream has another format, or ends in the middle of a sample.
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
