"""Read clips as encoded bytes that DALI decodes exactly: mono, at the sample rate of the model.

Short mono FLAC and PCM WAV files at this rate are passed on unchanged. Everything else that
libsndfile reads (mp3, Ogg, Opus, AIFF, float WAV, ...) is decoded here, downmixed, resampled with
soxr (DALI resamples without an anti-aliasing filter) and passed on as a float WAV file. Only the
crop that the filterbank needs is decoded.
"""

import contextlib
import io
import math
import os
import struct
from io import FileIO
from pathlib import Path
from typing import IO

import numpy as np
import soxr

from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.audio.decode import STREAMED, downmix, reader, reason
from ssast.pipelines.audio.extents import Extent, cropped, go_to, missing_s, report_missing
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
from ssast.pipelines.clips.retry import Retry
from ssast.pipelines.clips.segment import Segment
from ssast.pipelines.clips.shards import ClipPath, ShardClip
from ssast.pipelines.errors import BeyondEndError, DataError
from ssast.pipelines.files import open_regular

LOUDEST = 1e9  # full scale is 1; the power of larger samples in a float file overflows
TAIL_S = 0.1  # decoded after the crop, so that the resampler's edge effect is outside of it
RETRY_S = 0.5  # for which a clip is tried again, where nothing else is said


def wav_bytes(samples: np.ndarray, rate_hz: int) -> np.ndarray:
    """Encode samples [S] float32 as a mono float WAV file, [44 + 4 S] uint8."""
    size = 4 * len(samples)
    header = b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt "
    header += struct.pack("<IHHIIHH", 16, 3, 1, rate_hz, 4 * rate_hz, 4, 32)
    header += b"data" + struct.pack("<I", size)
    return np.concatenate([np.frombuffer(header, np.uint8), samples.astype("<f4").view(np.uint8)])


def silence(spec: FbankSpec) -> np.ndarray:
    """Return the WAV file that replaces an unreadable clip: one sample, no frame; [48] uint8."""
    return wav_bytes(np.zeros(1, np.float32), spec.sample_rate_hz)


def plain_samples(sound: Sound | None, spec: FbankSpec) -> int | None:
    """Return the number of samples of a file that DALI can decode unchanged.

    Args:
        sound: What is known of the file.
        spec: Filterbank settings.

    Returns:
        Samples of a mono FLAC or PCM WAV file at the sample rate of ``spec``; None for every other
        file, and for one with an unusual header.
    """
    if sound is None or not sound.plain:
        return None
    if sound.channels != 1 or sound.rate_hz != spec.sample_rate_hz:
        return None
    # A header may claim anything, and a decoder allocates what it claims.
    most = 4 * max(spec.num_samples, spec.sample_rate_hz)
    return sound.found if 0 < sound.found <= most else None


def decode(
    file: int | str | IO[bytes], spec: FbankSpec, crop: float = 0.0, segment: Segment | None = None
) -> np.ndarray:
    """Decode a crop with libsndfile, to mono at the sample rate of ``spec``.

    Args:
        file: An open file descriptor (it stays open), a path, or an open file.
        spec: Filterbank settings.
        crop: Where the crop starts in a longer recording, as a share in [0, 1) of all possible
            starts. Formats that can seek are not decoded before it.
        segment: The segment of which the crop is taken; None for the whole recording.

    Returns:
        Samples [S] float32, S at most ``spec.num_samples``.

    Raises:
        DataError: The file cannot be decoded, is truncated, or holds no finite audio.
    """
    try:
        with open_sound(file, closefd=False) as sound:
            rate_hz, frames = sound.samplerate, sound.frames
            if not RATES_HZ[0] <= rate_hz <= RATES_HZ[1]:
                raise DataError(f"sample rate of {rate_hz} Hz")
            if frames >= STREAMED:
                raise DataError(
                    "written as a stream, without its length: ssast data prepare converts it"
                )
            part = _extent(segment, frames, rate_hz, spec, crop)
            wanted = (part.last or frames) - part.first
            go_to(sound, part.first)
            samples = sound.read(wanted, dtype="float32", always_2d=True)
            few = FEW_OF_MP3 if sound.format == "MP3" else FEW_SAMPLES
    except BeyondEndError:
        raise
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise DataError(f"cannot be decoded: {reason(error)}") from error
    if missing(wanted, len(samples), few):
        raise DataError(f"truncated: {part.first + len(samples)} of {frames} samples")
    samples = downmix(samples, spec.channel)
    if len(samples) and not float(np.abs(samples).max()) < LOUDEST:  # NaN fails every comparison
        raise DataError("holds samples that are NaN, infinite or absurdly large")
    if rate_hz != spec.sample_rate_hz and len(samples):
        samples = soxr.resample(samples, rate_hz, spec.sample_rate_hz, quality="HQ")
    end = part.skipped + (part.wanted or spec.num_samples)
    return np.ascontiguousarray(samples[part.skipped : end], dtype=np.float32)


def _extent(
    segment: Segment | None, frames: int, rate_hz: int, spec: FbankSpec, crop: float
) -> Extent:
    """Return the samples of a crop of a recording, or of a segment of it."""
    if segment is not None:
        beyond_s = missing_s(segment, frames, rate_hz)
        if beyond_s:
            report_missing(segment, beyond_s)
        return cropped(segment, frames, rate_hz, spec.sample_rate_hz, spec.num_samples, crop)
    needed_s = spec.num_samples / spec.sample_rate_hz
    start = int(crop * (max(0, frames - math.ceil(needed_s * rate_hz)) + 1))
    tail_s = 0.0 if rate_hz == spec.sample_rate_hz else TAIL_S
    wanted = math.ceil((needed_s + tail_s) * rate_hz)
    return Extent(start, start + min(frames - start, wanted), 0, spec.num_samples)


def read_clip(
    path: ClipPath,
    spec: FbankSpec,
    *,
    verify: bool = False,
    crop: float = 0.0,
    retry: Retry | None = None,
) -> np.ndarray:
    """Read a clip as an encoded file for DALI.

    Args:
        path: An audio file, a segment of one, or a clip in a shard.
        spec: Filterbank settings.
        verify: Whether to decode the clip here in any case, so that DALI cannot fail on it.
        crop: Where the crop of a clip longer than ``spec`` starts, see :func:`decode`.
        retry: For how long reading is tried again while storage fails; half a second if None.

    Returns:
        A mono FLAC or WAV file [n] uint8 at the sample rate of ``spec``, at least one window long.

    Raises:
        DataError: The clip cannot be read or decoded, or is too short.
        StorageError: Storage kept failing, so that nothing is known of the clip.
    """
    try:
        retry = Retry(RETRY_S) if retry is None else retry
        return retry.call(lambda: _read(path, spec, verify, crop), path)
    except OSError as error:
        raise DataError(error.strerror or str(error)) from error


def _read(path: ClipPath, spec: FbankSpec, verify: bool, crop: float) -> np.ndarray:
    if isinstance(path, ShardClip):
        data = path.read()
        return _checked(data, len(data), None, spec, verify, crop)
    segment = path if isinstance(path, Segment) else None
    with open_regular(path.path if isinstance(path, Segment) else path) as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise DataError("empty file")
        # The whole file if it can be a clip with 32 bit samples and a long header.
        data = file.readall() if size <= 4 * spec.num_samples + HEAD else file.read(HEAD)
        file.seek(0)
        try:
            return _checked(data, size, file, spec, verify, crop, segment)
        except BeyondEndError:  # the file is fine
            raise
        except DataError:
            read_through(file)  # libsndfile takes storage that fails for a damaged file
            raise


def read_through(file: io.RawIOBase) -> None:
    """Read a file from its start to its end.

    Raises:
        OSError: Storage fails.
    """
    file.seek(0)
    while file.read(2**20):
        pass


def _checked(
    data: bytes,
    size: int,
    file: FileIO | None,
    spec: FbankSpec,
    verify: bool,
    crop: float,
    segment: Segment | None = None,
) -> np.ndarray:
    """Return the file, of which ``data`` is the first part, or decode it; see `read_clip`."""
    is_whole = len(data) == size
    read: Reader
    if is_whole or file is None:
        read = lambda at, count: data[at : at + count]  # noqa: E731
    else:
        read = reader(file.fileno(), 0, size)
    sound = examine(read, size)
    repair = None if sound is None else sound.repair
    if repair is not None and is_whole:
        data = repair.applied(data)
    num_samples = plain_samples(sound, spec)
    is_cropped = crop > 0 and (num_samples or 0) > spec.num_samples
    is_plain = num_samples is not None and not (is_cropped or verify)
    if is_plain and is_whole and segment is None:
        return _long_enough(num_samples or 0, spec, np.frombuffer(data, np.uint8))
    with contextlib.ExitStack() as stack:
        source: int | IO[bytes]
        if is_whole or file is None:
            source = io.BytesIO(data)
        elif repair is None:
            source = file.fileno()
        else:
            span = Span(Path(file.name), repair.start, repair.end - repair.start)
            raw = SpanFile(span, repair.header)
            source = stack.enter_context(io.BufferedReader(raw, HEAD))
        try:
            samples = decode(source, spec, crop, segment)
        except DataError as error:
            name = foreign_format(data)
            if name is None:
                raise
            raise DataError(
                f"cannot be decoded: {name}: ssast data prepare converts it with ffmpeg"
            ) from error
    return _long_enough(len(samples), spec, wav_bytes(samples, spec.sample_rate_hz))


def _long_enough(num_samples: int, spec: FbankSpec, encoded: np.ndarray) -> np.ndarray:
    if num_samples < spec.window:
        raise DataError(f"too short: {num_samples} samples, one window is {spec.window}")
    return encoded
