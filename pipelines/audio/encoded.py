"""One clip of a manifest as bytes that DALI decodes exactly: mono, at the wanted rate.

Small FLAC and PCM WAV files that are so already are handed on as they lie on the disk. All the
rest, whatever libsndfile reads (mp3, Ogg, Opus, AIFF, float WAV, ...), is decoded here, averaged
to mono, resampled with soxr (DALI resamples without an anti-alias filter) and handed on as a float
WAV. Of a long recording only the part that the filterbank looks at is decoded.
"""

import io
import math
import os
import stat
import struct
import time

import numpy as np
import soundfile
import soxr

from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.audio.decode import PASSING, STREAMED
from ssast.pipelines.audio.headers import HEAD, wav_header
from ssast.pipelines.clips.shards import ClipPath, ShardClip
from ssast.pipelines.errors import DataError

LOUDEST = 1e9  # full scale is 1; a float file beyond this is no sound (and its power overflows)
RATES_HZ = (1000, 1_000_000)
TAIL_S = 0.1  # sound after the part that counts, so that the resampler's edge lies outside of it
PAUSES_S = (0.05, 0.5)  # before reading again after an error that may pass


def wav_bytes(samples: np.ndarray, rate_hz: int) -> np.ndarray:
    """A mono WAV file of float samples.

    Args:
        samples: [S] float32.
        rate_hz: Sample rate.

    Returns:
        [44 + 4 S] uint8, the file.
    """
    size = 4 * len(samples)
    header = b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt "
    header += struct.pack("<IHHIIHH", 16, 3, 1, rate_hz, 4 * rate_hz, 4, 32)
    header += b"data" + struct.pack("<I", size)
    return np.concatenate([np.frombuffer(header, np.uint8), samples.astype("<f4").view(np.uint8)])


def silence(spec: FbankSpec) -> np.ndarray:
    """The stand-in for a clip that cannot be read: one sample, no frame. [48] uint8."""
    return wav_bytes(np.zeros(1, np.float32), spec.sample_rate_hz)


def plain_samples(data: bytes, size: int, spec: FbankSpec) -> int | None:
    """How long a file is that DALI can decode as it is.

    Args:
        data: The file, or the first part of it.
        size: Bytes of the whole file.
        spec: Filterbank settings.

    Returns:
        The number of samples of a mono FLAC or PCM WAV file at the wanted rate; None for every
        other file, and for one with an unusual header.

    Raises:
        DataError: For a WAV file that ends before its samples do. (libsndfile would shorten it
            without a word.)
    """
    if data[:4] == b"fLaC" and len(data) >= 42 and data[4] & 0x7F == 0:
        rate_hz = int.from_bytes(data[18:21], "big") >> 4
        channels = (data[20] >> 1 & 7) + 1
        samples = int.from_bytes(data[21:26], "big") & (1 << 36) - 1
    elif data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        rate_hz, channels, samples = wav_header(data, size)
    else:
        return None
    if channels != 1 or rate_hz != spec.sample_rate_hz:
        return None
    # A header may claim anything, and a decoder allocates what it claims.
    return samples if 0 < samples <= 4 * max(spec.num_samples, spec.sample_rate_hz) else None


def decode(file: int | str | io.BytesIO, spec: FbankSpec, place: float = 0.0) -> np.ndarray:
    """Decode with libsndfile: mono, at the wanted rate, the part that the filterbank looks at.

    Args:
        file: An open file descriptor, which stays open, a path, or a file in memory.
        spec: Filterbank settings.
        place: Of that part in a longer recording, in [0, 1): 0 is its beginning. What lies before
            it is not decoded where the format knows how to seek.

    Returns:
        [S] float32, S at most ``spec.num_samples``.

    Raises:
        DataError: The reason why this is no usable sound.
    """
    try:
        with soundfile.SoundFile(file, closefd=False) as sound:
            rate_hz, frames = sound.samplerate, sound.frames
            if not RATES_HZ[0] <= rate_hz <= RATES_HZ[1]:
                raise DataError(f"sample rate of {rate_hz} Hz")
            if frames >= STREAMED:
                raise DataError("written as a stream, without its length: convert it once more")
            same = rate_hz == spec.sample_rate_hz
            needed_s = spec.num_samples / spec.sample_rate_hz
            start = int(place * (max(0, frames - math.ceil(needed_s * rate_hz)) + 1))
            wanted = math.ceil((needed_s + (0.0 if same else TAIL_S)) * rate_hz)
            wanted = min(frames - start, wanted)
            if start:
                sound.seek(start)
            samples = sound.read(wanted, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise DataError(f"cannot be decoded: {_last_part(error)}") from error
    if len(samples) < wanted:
        raise DataError(f"truncated: {start + len(samples)} of {frames} samples")
    samples = samples.mean(axis=1) if samples.shape[1] > 1 else samples[:, 0]
    if len(samples) and not float(np.abs(samples).max()) < LOUDEST:  # true for NaN as well
        raise DataError("holds samples that are NaN, infinite or absurdly large")
    if not same and len(samples):
        samples = soxr.resample(samples, rate_hz, spec.sample_rate_hz, quality="HQ")
    return np.ascontiguousarray(samples[: spec.num_samples], dtype=np.float32)


def _last_part(error: soundfile.SoundFileError) -> str:
    """What libsndfile says, without the name of the file object that soundfile puts before it."""
    text = getattr(error, "error_string", None) or str(error)
    return " ".join(text.split()).rstrip(".")


def read_clip(
    path: ClipPath, spec: FbankSpec, *, trust: bool = True, place: float = 0.0
) -> np.ndarray:
    """The bytes of a clip, ready for DALI.

    Args:
        path: An audio file, or a clip in a shard.
        spec: Filterbank settings.
        trust: Hand on what looks well as it is; False: decode it here to be sure.
        place: Which part of a recording that is longer than ``spec``, see :func:`decode`.

    Returns:
        [n] uint8: a mono FLAC or WAV file at the wanted rate, of at least one window of sound.

    Raises:
        DataError: The reason why there is no usable sound in the file.
    """
    for pause_s in (*PAUSES_S, None):
        try:
            return _read(path, spec, trust, place)
        except OSError as error:
            if pause_s is None or error.errno not in PASSING:
                raise DataError(error.strerror or str(error)) from error
        time.sleep(pause_s)
    raise AssertionError("the last attempt returns or raises")


def _read(path: ClipPath, spec: FbankSpec, trust: bool, place: float) -> np.ndarray:
    if isinstance(path, ShardClip):
        data = path.read()
        return _checked(data, len(data), io.BytesIO(data), spec, trust, place)
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
        raise DataError("not a regular file")
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise DataError("empty file")
        # All of it if it is as short as a clip is, with 32 bit samples and a long header.
        data = file.readall() if size <= 4 * spec.num_samples + HEAD else file.read(HEAD)
        file.seek(0)
        return _checked(data, size, file.fileno(), spec, trust, place)


def _checked(
    data: bytes, size: int, file: int | io.BytesIO, spec: FbankSpec, trust: bool, place: float
) -> np.ndarray:
    """The file, of which ``data`` is the first part, or what it decodes to; see `read_clip`."""
    num_samples = plain_samples(data, size, spec)
    crop = place > 0 and (num_samples or 0) > spec.num_samples
    if num_samples is None or len(data) < size or not trust or crop:
        decoded = decode(file, spec, place)
        num_samples = len(decoded)
        data = b""
    if num_samples < spec.window:
        raise DataError(f"too short: {num_samples} samples, one window is {spec.window}")
    return np.frombuffer(data, np.uint8) if data else wav_bytes(decoded, spec.sample_rate_hz)
