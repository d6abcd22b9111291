"""One recording to clips: decode, mix to mono, resample to 16 kHz, cut, write FLAC.

A recording is read in blocks, so a file of many hours costs no more memory than one of a few
seconds. Resampling is soxr's HQ (the aliases of a 44.1 kHz tone above 8 kHz are below -100 dB).

This module imports no torch, and holds no lock of the interpreter where time is spent: libsndfile,
soxr and numpy release it, so threads convert in parallel.
"""

import errno
import hashlib
import io
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

BLOCK_SAMPLES = 2**19  # read at once, of all channels together
LOWEST_HZ, HIGHEST_HZ = 2000, 768_000  # a header that states another rate is damaged
FULL_SCALE = 32767.0


@dataclass(frozen=True)
class Recipe:
    """How recordings become clips.

    Attributes:
        sample_rate_hz: Rate of the clips.
        clip_s: Longest clip; a longer recording is cut into clips of this length.
        min_s: Shortest clip; what is shorter is rejected (the rest of a cut recording is dropped).
        trim_db: Cut off both ends of a clip what is this far below its peak, but for a margin of
            25 ms before and 100 ms after; None keeps the ends.
        level_rms: Scale each clip to this RMS (1 is full scale), its peak at most 0.95; None keeps
            the level, and only scales down a clip that exceeds full scale.
    """

    sample_rate_hz: int = 16000
    clip_s: float = 10.0
    min_s: float = 0.1
    trim_db: float | None = None
    level_rms: float | None = None

    def digest(self) -> str:
        """Identifies the settings in the index: other settings, other clips."""
        return hashlib.blake2b(
            repr(sorted(asdict(self).items())).encode(), digest_size=8
        ).hexdigest()


@dataclass(frozen=True)
class Item:
    """A recording to convert.

    Attributes:
        name: Unique among the items; the clips are named after it.
        data: A file, or the bytes of one, in any format that libsndfile reads.
        folder: Folder below ``flac/`` for its clips.
    """

    name: str
    data: Path | bytes
    folder: str = ""

    def signature(self) -> str:
        """Changes when the recording changes: size and time of a file, or a hash of the bytes.

        Raises:
            OSError: The file cannot be found, or is not a regular file.
        """
        if isinstance(self.data, bytes):
            return hashlib.blake2b(self.data, digest_size=8).hexdigest()
        status = self.data.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise OSError(errno.EINVAL, "not a regular file")
        return f"{status.st_size}-{status.st_mtime_ns}"


@dataclass(frozen=True)
class Clip:
    """A clip that was written.

    Attributes:
        file: Path relative to the output folder.
        name: The item it came from.
        part: Which clip of a recording that was cut, from 0.
        duration_s: Length.
        digest: Hash of the samples, to find exact duplicates.
        num_bytes: Size of the file.
    """

    file: str
    name: str
    part: int
    duration_s: float
    digest: str
    num_bytes: int


class UnusableError(Exception):
    """A recording cannot be used; the message is the reason."""


def name_hash(name: str) -> str:
    """Hash of a name as 32 hexadecimal digits, the same on every machine."""
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def share_of(name: str) -> float:
    """A number in [0, 1) drawn by a name, the same on every machine."""
    return int(name_hash(name)[:13], 16) / 16**13


def clip_stem(name: str) -> str:
    """A file name in plain ASCII for an item: readable, and unique through a hash of the name."""
    plain = re.sub(r"[^A-Za-z0-9.@+-]+", "_", name)[-80:].strip("_.-")
    return f"{plain}_{name_hash(name)[:10]}"


def read_blocks(item: Item) -> Iterator[tuple[np.ndarray, int]]:
    """Decodes a recording to mono, block by block.

    Args:
        item: The recording.

    Yields:
        ([S] float32 samples, sample rate in Hz).

    Raises:
        UnusableError: It cannot be decoded to its end, or holds NaN or infinite samples. (A WAV
            or Ogg file that was cut off is not an error to libsndfile: what is there counts.)
    """
    source = io.BytesIO(item.data) if isinstance(item.data, bytes) else os.fspath(item.data)
    try:
        if isinstance(source, str):
            open(source, "rb").close()  # libsndfile calls all that can go wrong a system error
        with soundfile.SoundFile(source) as sound:
            if not LOWEST_HZ <= sound.samplerate <= HIGHEST_HZ:
                raise UnusableError(f"states a sample rate of {sound.samplerate} Hz")
            block_frames = max(1, BLOCK_SAMPLES // sound.channels)
            while len(block := sound.read(block_frames, dtype="float32", always_2d=True)):
                mono = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)
                if not np.isfinite(mono).all():
                    raise UnusableError("holds NaN or infinite samples")
                yield mono, sound.samplerate
    except soundfile.LibsndfileError as error:
        raise UnusableError(f"cannot be decoded: {error.error_string.rstrip('.')}") from error
    except OSError as error:
        raise UnusableError(f"cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:  # an absurd header
        raise UnusableError(f"cannot be decoded: {error}") from error


def resampled(item: Item, rate_hz: int) -> Iterator[np.ndarray]:
    """Blocks of [S] float32 samples at ``rate_hz``; see :func:`read_blocks` for what is raised."""
    resampler: soxr.ResampleStream | None = None
    for block, source_hz in read_blocks(item):
        if source_hz == rate_hz:
            yield block
            continue
        if resampler is None:
            resampler = soxr.ResampleStream(source_hz, rate_hz, 1, dtype="float32", quality="HQ")
        yield resampler.resample_chunk(block)
    if resampler is not None:
        yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def windows(blocks: Iterator[np.ndarray], num_samples: int) -> Iterator[np.ndarray]:
    """Regroups blocks into windows of ``num_samples``; the last one is what is left."""
    pending: list[np.ndarray] = []
    held = 0
    for block in blocks:
        pending.append(block)
        held += len(block)
        while held >= num_samples:
            joined = np.concatenate(pending)
            yield joined[:num_samples]
            pending = [joined[num_samples:]]
            held = len(pending[0])
    if held:
        yield np.concatenate(pending)


def polished(samples: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Trims, levels and rounds a clip.

    Args:
        samples: [S] float32.
        recipe: The settings.

    Returns:
        [S'] int16.

    Raises:
        UnusableError: It is too short, or holds nothing but silence.
    """
    rate = recipe.sample_rate_hz
    peak = float(np.abs(samples).max(initial=0.0))
    if len(samples) and peak < 0.5 / FULL_SCALE:
        raise UnusableError("holds nothing but silence")
    if recipe.trim_db is not None and len(samples):
        loud = np.flatnonzero(np.abs(samples) >= peak * 10 ** (-recipe.trim_db / 20))
        samples = samples[max(0, loud[0] - rate // 40) : loud[-1] + rate // 10]
    if len(samples) < max(1, recipe.min_s * rate):
        raise UnusableError(
            f"too short: {len(samples) / rate:.3f} s of sound, at least {recipe.min_s:g} s needed"
        )
    gain = 1.0 if peak <= 1.0 else 1.0 / peak
    if recipe.level_rms is not None:
        rms = float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))
        gain = min(recipe.level_rms / rms, 0.95 / peak)
    return np.rint(samples * np.float32(gain * FULL_SCALE)).astype(np.int16)


def write_flac(path: Path, samples: np.ndarray, rate_hz: int) -> int:
    """Writes a FLAC file in one move: it is there in full or not at all.

    Args:
        path: Where to; its folder exists.
        samples: [S] int16.
        rate_hz: Sample rate.

    Returns:
        Size in bytes.

    Raises:
        OSError: The disk is full, or the folder cannot be written to.
    """
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate_hz, format="FLAC", subtype="PCM_16")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(buffer.getbuffer())
    os.replace(temporary, path)
    return buffer.getbuffer().nbytes


def convert(item: Item, out: Path, recipe: Recipe) -> list[Clip]:
    """Writes the clips of one recording to ``out/flac``.

    Args:
        item: The recording.
        out: Output folder; the folder of the item's clips exists.
        recipe: The settings.

    Returns:
        The clips, at least one.

    Raises:
        UnusableError: Nothing of the recording can be used, or it breaks off with an error; clips
            that were written before that point are removed.
        OSError: A clip cannot be written.
    """
    clips: list[Clip] = []
    unusable: UnusableError | None = None
    stem = "/".join(filter(None, ("flac", item.folder, clip_stem(item.name))))
    blocks = resampled(item, recipe.sample_rate_hz)
    num_samples = round(recipe.clip_s * recipe.sample_rate_hz)
    try:
        for part, window in enumerate(windows(blocks, num_samples)):
            try:
                samples = polished(window, recipe)
            except UnusableError as error:  # a pause, or the short rest: the other parts are fine
                unusable = unusable or error
                continue
            file = f"{stem}-{part:05d}.flac" if part else f"{stem}.flac"
            clips.append(
                Clip(
                    file=file,
                    name=item.name,
                    part=part,
                    duration_s=round(len(samples) / recipe.sample_rate_hz, 4),
                    digest=hashlib.blake2b(samples.tobytes(), digest_size=16).hexdigest(),
                    num_bytes=write_flac(out / file, samples, recipe.sample_rate_hz),
                )
            )
        if not clips:
            raise unusable or UnusableError("holds no samples")
    except UnusableError:
        for clip in clips:
            (out / clip.file).unlink(missing_ok=True)
        raise
    return clips
