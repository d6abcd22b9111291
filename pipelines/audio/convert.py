"""Convert a recording to clips: resample to 16 kHz, cut, normalise the level, encode.

soxr resamples at its quality HQ: aliases of tones above 8 kHz are below -100 dB. It works block by
block and releases the GIL, like the decoder.
"""

import hashlib
import io
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import numpy as np
import soundfile
import soxr

from ssast.kernels.channel import Channel
from ssast.pipelines.audio.decode import Item, length_note, read_blocks
from ssast.pipelines.audio.extents import extent
from ssast.pipelines.clips.segment import Segment
from ssast.pipelines.errors import UnusableError

Codec = Literal["flac", "wav", "float"]  # of 16 bit integers, but for 32 bit float in WAV

FULL_SCALE = 32767.0


@dataclass(frozen=True)
class Recipe:
    """Settings of the conversion from recordings to clips.

    Attributes:
        sample_rate_hz: Sample rate of the clips.
        clip_s: Longest clip in s; a longer recording is cut into clips of this length.
        min_s: Shortest clip in s; a shorter recording is rejected, a shorter remainder is dropped.
        trim_db: Trim both ends of a clip where they are this far below its peak, except 25 ms
            before and 100 ms after the rest; None does not trim.
        level_rms: RMS that each clip is scaled to (1 is full scale), its peak at most 0.95; None
            keeps the level, except that a clip beyond full scale is scaled down to it.
        hop_s: Time between the starts of two clips of a recording; None is ``clip_s``, so that they
            neither overlap nor leave gaps.
        channel: See :func:`~ssast.pipelines.audio.decode.downmix`.
        is_float: Keep samples as float32, also beyond full scale, in place of int16.
    """

    sample_rate_hz: int = 16000
    clip_s: float = 10.0
    min_s: float = 0.1
    trim_db: float | None = None
    level_rms: float | None = None
    hop_s: float | None = None
    channel: Channel = "mean"
    is_float: bool = False

    def digest(self) -> str:
        """Return a hash of the settings."""
        settings = asdict(self)
        if settings["hop_s"] is None:  # added later: unset, it must not change the hash
            del settings["hop_s"]
        if settings["channel"] == "mean":  # likewise
            del settings["channel"]
        if not settings["is_float"]:  # likewise
            del settings["is_float"]
        return hashlib.blake2b(repr(sorted(settings.items())).encode(), digest_size=8).hexdigest()


def name_hash(name: str) -> str:
    """Hash a name to 32 hexadecimal digits, the same on every machine."""
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def clip_stem(name: str, longest: int = 80) -> str:
    """Return an ASCII file name for a recording, readable and made unique by a hash.

    Args:
        name: Name of the recording.
        longest: Number of characters of the name to keep, from its end; the hash adds 11.
    """
    plain = re.sub(r"[^A-Za-z0-9.@+-]+", "_", name)[-longest:].strip("_.-")
    return f"{plain}_{name_hash(name)[:10]}"


def resampled(
    blocks: Iterable[tuple[np.ndarray, int]], rate_hz: int, segment: Segment | None = None
) -> Iterator[np.ndarray]:
    """Resample blocks of samples [S] float32 at any rate to ``rate_hz``.

    Args:
        blocks: Blocks and their sample rate, of one recording.
        rate_hz: Sample rate in Hz.
        segment: The segment to keep, of blocks that were read for it at this rate.
    """
    blocks = iter(blocks)
    first = next(blocks, None)
    if first is None:
        return
    found = _resampled(itertools.chain([first], blocks), rate_hz)
    if segment is None:
        yield from found
    else:
        part = extent(segment, first[1], rate_hz)
        yield from trimmed(found, part.skipped, part.wanted)


def _resampled(blocks: Iterable[tuple[np.ndarray, int]], rate_hz: int) -> Iterator[np.ndarray]:
    resampler: soxr.ResampleStream | None = None
    for block, source_hz in blocks:
        if source_hz == rate_hz:
            yield block
            continue
        if resampler is None:
            resampler = soxr.ResampleStream(source_hz, rate_hz, 1, dtype="float32", quality="HQ")
        yield resampler.resample_chunk(block)
    if resampler is not None:
        yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def trimmed(blocks: Iterable[np.ndarray], skipped: int, wanted: int | None) -> Iterator[np.ndarray]:
    """Leave out the first samples of a signal that comes in blocks, and what is too much of it."""
    done, end = 0, None if wanted is None else skipped + wanted
    for block in blocks:
        last = len(block) if end is None else max(0, end - done)
        part = block[max(0, skipped - done) : last]
        done += len(block)
        if len(part):
            yield part


def windows(
    blocks: Iterator[np.ndarray], num_samples: int, hop: int | None = None
) -> Iterator[np.ndarray]:
    """Cut a signal that comes in blocks into windows.

    Args:
        blocks: Blocks [S] of any length.
        num_samples: Samples of a window.
        hop: Samples between the starts of two windows; as many as a window has by default.

    Yields:
        Windows [num_samples], and a shorter one at the end if there are samples in no other.
    """
    hop = hop or num_samples
    pending: list[np.ndarray] = []
    held = 0  # samples since the start of the next window; negative: samples before it, to skip
    seen = 0  # samples among them that were in an earlier window
    for block in blocks:
        skipped = min(len(block), max(0, -held))
        held += len(block)
        pending.append(block[skipped:])
        if held < num_samples:
            continue
        joined = np.concatenate(pending)
        start = 0
        while held >= num_samples:
            yield joined[start : start + num_samples]
            start += hop
            held -= hop
        seen = max(0, num_samples - hop)
        pending = [joined[start:]]
    if held > seen:
        yield np.concatenate(pending)


def normalised(samples: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Trim a clip [S] float32, scale it and round it to [S'] int16, or keep it as float32.

    Raises:
        UnusableError: It is too short, or holds nothing but silence.
    """
    rate = recipe.sample_rate_hz
    peak = float(np.abs(samples).max(initial=0.0))
    if len(samples) and (peak < 0.5 / FULL_SCALE if not recipe.is_float else peak == 0):
        raise UnusableError("holds nothing but silence")
    if recipe.trim_db is not None and len(samples):
        loud = np.flatnonzero(np.abs(samples) >= peak * 10 ** (-recipe.trim_db / 20))
        samples = samples[max(0, loud[0] - rate // 40) : loud[-1] + rate // 10]
    if len(samples) < max(1, recipe.min_s * rate):
        raise UnusableError(
            f"too short: {len(samples) / rate:.3f} s of sound, at least {recipe.min_s:g} s needed"
        )
    gain = 1.0 if peak <= 1.0 or recipe.is_float else 1.0 / peak
    if recipe.level_rms is not None:
        rms = float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))
        gain = min(recipe.level_rms / rms, 0.95 / peak)
    if recipe.is_float:
        return samples * np.float32(gain)
    return np.rint(samples * np.float32(gain * FULL_SCALE)).astype(np.int16)


def encode(samples: np.ndarray, rate_hz: int, codec: Codec = "flac") -> memoryview:
    """Encode samples [S] int16, of float shards float32, as a FLAC or WAV file in memory."""
    buffer = io.BytesIO()
    kind, subtype = ("WAV", "FLOAT") if codec == "float" else (codec.upper(), "PCM_16")
    soundfile.write(buffer, samples, rate_hz, format=kind, subtype=subtype)
    return buffer.getbuffer()


class SampleDigest:
    """A hash of samples that come in blocks, to find exact duplicates."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, samples: np.ndarray) -> "SampleDigest":
        """Add samples [S] int16, or float32 of a float shard."""
        self._hash.update(samples.tobytes())
        return self

    def text(self) -> str:
        """Return the hash of all samples so far, 32 hexadecimal digits."""
        return self._hash.hexdigest()


class Part(NamedTuple):
    """A clip of a recording, not yet encoded.

    Attributes:
        number: Number of the clip in its recording, from 0.
        samples: Samples [S] int16 or float32 at the sample rate of the recipe.
        source_hz: Sample rate of the recording.
        lengths: With the first clip: the recording's length by its header and the true one, if they
            differ by much; see :func:`length_note`.
        peak: Largest absolute sample before scaling, if that is beyond full scale, 1.
        left_out_s: Seconds of the windows before it that cannot be used, of the last clip also of
            those behind it.
    """

    number: int
    samples: np.ndarray
    source_hz: int
    lengths: dict[str, float] | None = None
    peak: float | None = None
    left_out_s: float = 0.0


def cut(item: Item, recipe: Recipe) -> Iterator[Part]:
    """Decode a recording from its start to its end and cut it into clips.

    Raises:
        UnusableError: No clip can be used, or decoding fails on the way; then the clips yielded so
            far must not be used either.
    """
    blocks = read_blocks(item, recipe.channel, recipe.sample_rate_hz)
    first = next(blocks, None)
    if first is None:
        raise UnusableError("holds no samples")
    unusable: UnusableError | None = None
    held: Part | None = None
    left_out_s = 0.0
    num_samples = round(recipe.clip_s * recipe.sample_rate_hz)
    hop = None if recipe.hop_s is None else round(recipe.hop_s * recipe.sample_rate_hz)
    blocks = itertools.chain([first], blocks)
    sound = resampled(blocks, recipe.sample_rate_hz, item.segment)
    for number, window in enumerate(windows(sound, num_samples, hop)):
        try:
            samples = normalised(window, recipe)
        except UnusableError as error:  # silence or a short remainder: the other clips are fine
            unusable = unusable or error
            left_out_s += len(window) / recipe.sample_rate_hz
            continue
        lengths = length_note(item) if held is None else None
        if held is not None:
            yield held
        peak = float(np.abs(window).max())
        held = Part(number, samples, first[1], lengths, peak if peak > 1 else None, left_out_s)
        left_out_s = 0.0
    if held is None:
        raise unusable or UnusableError("holds no samples")
    yield held._replace(left_out_s=held.left_out_s + left_out_s)
