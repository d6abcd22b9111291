"""Decode recordings of any format to blocks of mono samples.

libsndfile decodes most formats, ffmpeg (where it is installed) the others: m4a, wma, webm, ...
Recordings are read in blocks, so memory does not grow with their length, and members of a tar
archive are read in place. A header that misstates the length is repaired on the way.

This module does not import torch. libsndfile and numpy release the GIL, so threads decode in
parallel.
"""

import contextlib
import errno
import hashlib
import io
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import soundfile

from ssast.kernels.channel import Channel
from ssast.pipelines.audio.extents import extent, go_to, missing_s, report_missing
from ssast.pipelines.audio.ffmpeg import BLOCK_SAMPLES, ffmpeg_blocks, ffmpeg_installed
from ssast.pipelines.audio.headers import (
    FEW_SAMPLES,
    HEAD,
    RATES_HZ,
    Reader,
    Sound,
    foreign_format,
    missing,
)
from ssast.pipelines.audio.lengths import examine
from ssast.pipelines.audio.mpeg import FEW_SAMPLES as FEW_OF_MP3
from ssast.pipelines.audio.parts import Span, SpanFile
from ssast.pipelines.audio.sndfile import open_sound
from ssast.pipelines.clips.folders import FFMPEG_SUFFIXES
from ssast.pipelines.clips.segment import Segment, span_text
from ssast.pipelines.clips.shards import ClipPath, ShardClip
from ssast.pipelines.errors import (
    TRANSIENT,
    BeyondEndError,
    ChainedError,
    DataError,
    UnopenedError,
    UnusableError,
)
from ssast.pipelines.files import open_regular

SPAN_BUFFER = 2**20  # bytes of a read from an archive
SYSTEM_ERROR = 2  # libsndfile's error number
STREAMED = 1 << 48  # a header with so many samples was written before their number was known


@dataclass(frozen=True, slots=True)
class Item:
    """A recording to decode.

    Attributes:
        name: Unique name of the recording; clips are named after it.
        data: Path of the file, part of an archive, or the bytes of the file.
        segment: The part of the recording to decode; None for all of it.
    """

    name: str
    data: Path | Span | bytes
    segment: Segment | None = None

    @staticmethod
    def of(clip: ClipPath) -> "Item":
        """Return the item of a clip, named as in messages.

        Raises:
            OSError: A shard cannot be read.
            DataError: A shard does not hold the clip.
        """
        if isinstance(clip, ShardClip):
            return Item(str(clip), clip.read())
        if isinstance(clip, Segment):
            return Item(clip.path, Path(clip.path), clip)
        return Item(str(clip), Path(clip))

    @property
    def full_name(self) -> str:
        """Name of the recording, with that of its segment."""
        part = self.segment
        return self.name + ("" if part is None else span_text(part.begin_s, part.duration_s))

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
        if self.segment is not None:
            part += f"-{self.segment.begin_s!r}-{self.segment.duration_s!r}"
        return f"{status.st_size}-{status.st_mtime_ns}{part}"


def read_blocks(
    item: Item, channel: Channel = "mean", out_hz: int | None = None
) -> Iterator[tuple[np.ndarray, int]]:
    """Decode a recording to mono, block by block.

    Args:
        item: The recording, or a segment of it.
        channel: See :func:`downmix`.
        out_hz: Rate to which a segment will be resampled: then there is sound before and after it,
            see :func:`~ssast.pipelines.audio.extents.extent`.

    Yields:
        Samples [S] float32 and the sample rate in Hz.

    Raises:
        UnusableError: It cannot be decoded to its end, is truncated, or holds NaN or infinite
            samples.
    """
    try:
        yield from to_mono(sndfile_blocks(item, out_hz), channel)
        return
    except UnopenedError as caught:
        unopened = caught
    by_ffmpeg = unopened.foreign or suffix(item.name) in FFMPEG_SUFFIXES
    if not by_ffmpeg and not ffmpeg_installed():
        raise unopened
    with contextlib.closing(ffmpeg_blocks(item.data)) as decoded:  # ends ffmpeg, in any case
        blocks = to_mono(_within(decoded, item.segment, out_hz), channel)
        try:
            first = next(blocks, None)
            if first is None:
                raise UnusableError("holds no samples")
        except UnusableError as error:
            if by_ffmpeg:
                raise
            raise unopened from error  # that ffmpeg failed as well says nothing more
        except OSError as error:
            raise unreadable(error) from error
        yield first
        yield from blocks


def suffix(name: str) -> str:
    """Return the extension of a file name in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def downmix(samples: np.ndarray, channel: Channel) -> np.ndarray:
    """Return the waveform [S] of samples [S, channels].

    Args:
        samples: Samples of all channels.
        channel: ``mean`` of all channels, or the first (``left``, as in the published code) or the
            second (``right``). A recording of one channel is that one, whatever is asked for.
    """
    if samples.shape[1] == 1:
        return samples[:, 0]
    return samples.mean(axis=1) if channel == "mean" else samples[:, int(channel == "right")]


def to_mono(
    blocks: Iterator[tuple[np.ndarray, int]], channel: Channel = "mean"
) -> Iterator[tuple[np.ndarray, int]]:
    """Make waveforms of [S, channels] blocks, see :func:`downmix`, and drop empty blocks.

    Raises:
        UnusableError: The sample rate is out of range, or a sample is NaN or infinite.
    """
    for block, rate_hz in blocks:
        if not RATES_HZ[0] <= rate_hz <= RATES_HZ[1]:
            raise UnusableError(f"states a sample rate of {rate_hz} Hz")
        mono = downmix(block, channel)
        if not np.isfinite(mono).all():
            raise UnusableError("holds NaN or infinite samples")
        if len(mono):
            yield mono, rate_hz


def _within(
    blocks: Iterator[tuple[np.ndarray, int]], segment: Segment | None, out_hz: int | None
) -> Iterator[tuple[np.ndarray, int]]:
    """Leave out what is before and after a segment, of a recording that is decoded from its start.

    A segment that the recording has too little of is reported.

    Raises:
        UnusableError: The recording ends before the segment begins.
    """
    if segment is None:
        yield from blocks
        return
    done, rate_hz = 0, 0
    for block, rate_hz in blocks:
        part = extent(segment, rate_hz, out_hz or rate_hz)
        end = len(block) if part.last is None else max(0, part.last - done)
        yield block[max(0, part.first - done) : end], rate_hz
        done += len(block)
        if part.last is not None and done >= part.last:
            return
    try:
        beyond_s = missing_s(segment, done, rate_hz) if rate_hz else 0
    except BeyondEndError as error:
        raise UnusableError(str(error)) from error
    if beyond_s:
        report_missing(segment, beyond_s)


def sndfile_blocks(item: Item, out_hz: int | None = None) -> Iterator[tuple[np.ndarray, int]]:
    """Decode blocks of [S, channels] float32 with libsndfile; see :func:`read_blocks`.

    Raises:
        UnopenedError: libsndfile does not know the format, finds its header damaged, or would read
            a part of it.
    """
    with contextlib.ExitStack() as stack:
        try:
            source, span, known, is_foreign = open_item(item, stack)
            try:
                sound = stack.enter_context(open_sound(source))
            except (RuntimeError, ValueError, TypeError, OverflowError) as error:
                if span is not None and span.error is not None:
                    raise span.error from error
                if getattr(error, "code", None) == SYSTEM_ERROR:
                    raise
                raise UnopenedError(f"cannot be decoded: {reason(error)}", is_foreign) from error
            block_frames = max(1, BLOCK_SAMPLES // sound.channels)
            num_read, last = 0, STREAMED
            if item.segment is not None:
                missing_s(item.segment, sound.frames, sound.samplerate)
                part = extent(item.segment, sound.samplerate, out_hz or sound.samplerate)
                go_to(sound, part.first)
                num_read, last = part.first, STREAMED if part.last is None else part.last
            while True:
                wanted = min(block_frames, last - num_read)
                block = sound.read(wanted, dtype="float32", always_2d=True)
                if span is not None and span.error is not None:
                    raise span.error
                # The empty last block as well: without samples the rate must still be checked.
                yield block, sound.samplerate
                num_read += len(block)
                if not len(block):
                    break
            is_mp3 = sound.format == "MP3"
            if num_read >= last:
                return
            if is_mp3 and known is None:
                return  # of the free format: its length is an estimate
            few = FEW_OF_MP3 if is_mp3 else FEW_SAMPLES
            if sound.frames < STREAMED and missing(sound.frames, num_read, few):
                raise UnusableError(f"truncated: {num_read} of {sound.frames} samples")
        except soundfile.LibsndfileError as error:
            transient = error.code == SYSTEM_ERROR
            raise UnusableError(
                f"cannot be decoded: {reason(error)}", transient=transient
            ) from error
        except OSError as error:
            raise unreadable(error) from error
        except ChainedError as error:
            raise UnopenedError(str(error), foreign=True) from error
        except DataError as error:
            raise UnusableError(str(error)) from error
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:  # a damaged header
            raise UnusableError(f"cannot be decoded: {error}") from error


def reason(error: Exception) -> str:
    """Return libsndfile's message in one line, without soundfile's prefix."""
    text = getattr(error, "error_string", None) or str(error)
    return " ".join(text.split()).rstrip(".")


def unreadable(error: OSError) -> UnusableError:
    """Return the error for a file that the system does not read."""
    why = f"cannot be read: {error.strerror}"
    return UnusableError(why, transient=error.errno in TRANSIENT)


def reader(descriptor: int, offset: int, size: int) -> Reader:
    """Return a reader of ``size`` bytes of an open file from ``offset`` on."""

    def read(at: int, count: int) -> bytes:
        if at >= size:  # a header may lead anywhere, further than the system counts
            return b""
        return os.pread(descriptor, min(count, size - at), offset + at)

    return read


def examine_item(item: Item) -> tuple[Sound | None, bytes]:
    """Examine the length of a recording.

    Returns:
        What :func:`examine` finds, and the first :data:`HEAD` bytes of the file.

    Raises:
        OSError: The file cannot be read.
        DataError: It is empty or truncated.
    """
    with contextlib.ExitStack() as stack:
        read: Reader
        if isinstance(item.data, bytes):
            data = item.data
            read, size = (lambda at, count: data[at : at + count]), len(data)
        else:
            path = item.data.path if isinstance(item.data, Span) else item.data
            file = stack.enter_context(open_regular(path))
            offset, size = 0, os.fstat(file.fileno()).st_size
            if isinstance(item.data, Span):
                offset, size = item.data.offset, item.data.size
            read = reader(file.fileno(), offset, size)
        if size == 0:
            raise DataError("empty file")
        return examine(read, size), read(0, HEAD)


def open_item(
    item: Item, stack: contextlib.ExitStack
) -> tuple[bytes | IO[bytes], SpanFile | None, Sound | None, bool]:
    """Open a recording for libsndfile, with a header that states its length.

    Args:
        item: The recording.
        stack: Closes the file.

    Returns:
        What libsndfile reads: a path or an open file; the raw file behind it, if there is one; what
        is known of the recording's length; whether it is of a format that only ffmpeg reads.

    Raises:
        OSError: The file cannot be read.
        DataError: The file is empty or truncated.
    """
    known, head = examine_item(item)
    repair = None if known is None else known.repair
    is_foreign = foreign_format(head) is not None
    if isinstance(item.data, bytes):
        data = item.data if repair is None else repair.applied(item.data)
        return io.BytesIO(data), None, known, is_foreign
    if isinstance(item.data, Path) and repair is None:
        # bytes, since a path need not be valid UTF-8
        return os.fsencode(item.data), None, known, is_foreign
    span = item.data if isinstance(item.data, Span) else Span(item.data, 0, 0)
    header = b""
    if repair is not None:
        header = repair.header
        span = Span(span.path, span.offset + repair.start, repair.end - repair.start)
    raw = SpanFile(span, header)
    return stack.enter_context(io.BufferedReader(raw, SPAN_BUFFER)), raw, known, is_foreign


def length_s(item: Item) -> float | None:
    """Return the length in seconds, without decoding; None if libsndfile cannot read it."""
    with contextlib.ExitStack() as stack:
        try:
            source, _, _, _ = open_item(item, stack)
            with open_sound(source) as sound:
                length = sound.frames / sound.samplerate
                if item.segment is None:
                    return length
                return max(0.0, min(item.segment.duration_s, length - item.segment.begin_s))
        except (RuntimeError, ValueError, OSError, ArithmeticError, TypeError):
            return None


def length_note(item: Item) -> dict[str, float] | None:
    """Return the length by the header or of the segment, and the true one, if they differ by much.

    Both are in s.
    """
    if item.segment is not None:
        return _segment_note(item, item.segment)
    try:
        known, _ = examine_item(item)
    except (OSError, DataError):
        return None
    return None if known is None else known.note()


def _segment_note(item: Item, segment: Segment) -> dict[str, float] | None:
    """Return the length of a segment and what the recording has of it, in s, if that is less."""
    with contextlib.ExitStack() as stack:
        try:
            source, _, _, _ = open_item(item, stack)
            sound = stack.enter_context(open_sound(source))
            beyond_s = missing_s(segment, sound.frames, sound.samplerate)
        except (RuntimeError, ValueError, OSError, ArithmeticError, TypeError, DataError):
            return None
    if not beyond_s:
        return None
    stated_s = segment.duration_s
    return {"stated_s": round(stated_s, 3), "found_s": round(stated_s - beyond_s, 3)}
