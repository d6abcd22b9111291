"""One recording to clips: resample to 16 kHz, cut, level, encode.

Resampling is soxr's HQ (the aliases of a 44.1 kHz tone above 8 kHz are below -100 dB). It goes
block by block, like the decoding, and like that it lets other threads work.
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

from ssast.pipelines.audio.decode import Item, read_blocks
from ssast.pipelines.errors import UnusableError

Codec = Literal["flac", "wav"]

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
        hop_s: From the beginning of a clip to that of the next one of the same recording; None:
            ``clip_s``, so that they neither overlap nor leave gaps.
        whole: Reject a recording that was cut off, also where the decoder does not mind.
    """

    sample_rate_hz: int = 16000
    clip_s: float = 10.0
    min_s: float = 0.1
    trim_db: float | None = None
    level_rms: float | None = None
    hop_s: float | None = None
    whole: bool = False

    def digest(self) -> str:
        """Identifies the settings in the index: other settings, other clips."""
        settings = asdict(self)
        for name in ("hop_s", "whole"):  # unset, they leave the clips of older data sets valid
            if not settings[name]:
                del settings[name]
        return hashlib.blake2b(repr(sorted(settings.items())).encode(), digest_size=8).hexdigest()


def name_hash(name: str) -> str:
    """Hash of a name as 32 hexadecimal digits, the same on every machine."""
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def clip_stem(name: str, longest: int = 80) -> str:
    """A file name in plain ASCII for an item: readable, and unique through a hash of the name.

    Args:
        name: Of the item.
        longest: Characters of the name that are kept, the last ones; the hash adds 11.
    """
    plain = re.sub(r"[^A-Za-z0-9.@+-]+", "_", name)[-longest:].strip("_.-")
    return f"{plain}_{name_hash(name)[:10]}"


def resampled(blocks: Iterable[tuple[np.ndarray, int]], rate_hz: int) -> Iterator[np.ndarray]:
    """Blocks of [S] float32 samples at ``rate_hz``, of blocks at the recording's own rate."""
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


def windows(
    blocks: Iterator[np.ndarray], num_samples: int, hop: int | None = None
) -> Iterator[np.ndarray]:
    """Regroups blocks into windows.

    Args:
        blocks: [S] each.
        num_samples: Length of a window.
        hop: From the beginning of a window to that of the next; as long as a window by default.

    Yields:
        [num_samples] each; and at the end a shorter one, if samples are left that were in none.
    """
    hop = hop or num_samples
    pending: list[np.ndarray] = []
    held = 0  # samples from the next window's beginning on; negative: still to be left out
    seen = 0  # of those, how many were in an earlier window
    for block in blocks:
        left_out = min(len(block), max(0, -held))
        held += len(block)
        pending.append(block[left_out:])
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


def encode(samples: np.ndarray, rate_hz: int, codec: Codec = "flac") -> memoryview:
    """A FLAC or WAV file of [S] int16 samples, in memory."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate_hz, format=codec.upper(), subtype="PCM_16")
    return buffer.getbuffer()


def sample_digest(samples: np.ndarray) -> str:
    """Hash of [S] int16 samples, to find exact duplicates."""
    return hashlib.blake2b(samples.tobytes(), digest_size=16).hexdigest()


class Part(NamedTuple):
    """A clip of a recording, not yet encoded.

    Attributes:
        number: Which one, from 0.
        samples: [S] int16 at the recipe's rate.
        source_hz: Rate of the recording.
    """

    number: int
    samples: np.ndarray
    source_hz: int


def cut(item: Item, recipe: Recipe) -> Iterator[Part]:
    """Decodes a recording once, from its beginning to its end, and cuts it into clips.

    Raises:
        UnusableError: Nothing of the recording can be used, or it breaks off with an error; then
            what was yielded before must not be used either.
    """
    blocks = read_blocks(item, whole=recipe.whole)
    first = next(blocks, None)
    if first is None:
        raise UnusableError("holds no samples")
    unusable: UnusableError | None = None
    some = False
    num_samples = round(recipe.clip_s * recipe.sample_rate_hz)
    hop = None if recipe.hop_s is None else round(recipe.hop_s * recipe.sample_rate_hz)
    sound = resampled(itertools.chain([first], blocks), recipe.sample_rate_hz)
    for number, window in enumerate(windows(sound, num_samples, hop)):
        try:
            samples = polished(window, recipe)
        except UnusableError as error:  # a pause, or the short rest: the other parts are fine
            unusable = unusable or error
            continue
        some = True
        yield Part(number, samples, first[1])
    if not some:
        raise unusable or UnusableError("holds no samples")
