"""Which samples of a recording a segment is, at the recording's rate and at another one.

A segment that is resampled is decoded with a little sound before and after it, and from a sample at
which both rates have one. So it holds what the whole recording, decoded and resampled, holds there.
"""

import logging
import math
from dataclasses import dataclass, replace

import soundfile

from ssast.pipelines.audio.sndfile import is_mp3
from ssast.pipelines.clips.segment import Segment
from ssast.pipelines.errors import BeyondEndError

log = logging.getLogger(__name__)

MARGIN_S = 0.1  # decoded before and after a segment that is resampled
SHORT_S = 0.05  # beyond the end of a recording that are not reported: times are rounded
BLOCK = 2**20  # samples that are decoded at once where a format cannot seek
_reported = False  # in this process, that a segment was clipped


@dataclass(frozen=True, slots=True)
class Extent:
    """The samples of a segment.

    Attributes:
        first: First sample to decode.
        last: Where to stop decoding; None at the end of the recording.
        skipped: Resampled samples before the segment.
        wanted: Resampled samples of the segment; None for all that follow.
    """

    first: int
    last: int | None
    skipped: int
    wanted: int | None

    def within(self, frames: int) -> "Extent":
        """Return the same of a recording of ``frames`` samples."""
        return replace(self, last=frames if self.last is None else min(self.last, frames))


def extent(segment: Segment, rate_hz: int, out_hz: int) -> Extent:
    """Return the samples at ``rate_hz`` that make those of a segment at ``out_hz``."""
    first = round(segment.begin_s * out_hz)
    if math.isinf(segment.duration_s):
        return _extent(first, None, rate_hz, out_hz)
    last = round((segment.begin_s + segment.duration_s) * out_hz)
    return _extent(first, max(first + 1, last), rate_hz, out_hz)


def cropped(
    segment: Segment, frames: int, rate_hz: int, out_hz: int, most: int, crop: float
) -> Extent:
    """Return the samples of a crop of a segment.

    Args:
        segment: The segment.
        frames: Samples of the recording.
        rate_hz: Sample rate of the recording.
        out_hz: Sample rate of the crop.
        most: Samples of the crop, at most.
        crop: Where the crop starts, as a share in [0, 1) of all possible starts.
    """
    first = round(segment.begin_s * out_hz)
    last = frames * out_hz // rate_hz
    if not math.isinf(segment.duration_s):
        last = min(last, round((segment.begin_s + segment.duration_s) * out_hz))
    last = max(first + 1, last)
    first += int(crop * (max(0, last - first - most) + 1))
    return _extent(first, min(last, first + most), rate_hz, out_hz).within(frames)


def _extent(first: int, last: int | None, rate_hz: int, out_hz: int) -> Extent:
    if rate_hz == out_hz:
        return Extent(first, last, 0, None if last is None else last - first)
    step = rate_hz // math.gcd(rate_hz, out_hz)  # samples between those that both rates have
    margin = MARGIN_S * rate_hz
    start = max(0, int(first * rate_hz / out_hz - margin)) // step * step
    skipped = first - start * out_hz // rate_hz
    if last is None:
        return Extent(start, None, skipped, None)
    return Extent(start, math.ceil(last * rate_hz / out_hz + margin), skipped, last - first)


def missing_s(segment: Segment, frames: int, rate_hz: int) -> float:
    """Return how many seconds of a segment lie beyond the end of a recording; 0 for very few.

    Args:
        segment: The segment.
        frames: Samples of the recording.
        rate_hz: Sample rate of the recording.

    Raises:
        BeyondEndError: All of it does.
    """
    length_s = frames / rate_hz
    if round(segment.begin_s * rate_hz) >= frames:
        raise BeyondEndError(
            f"begins at {segment.begin_s:g} s, beyond the end of the recording, {length_s:g} s"
        )
    if math.isinf(segment.duration_s):
        return 0.0
    beyond_s = segment.begin_s + segment.duration_s - length_s
    return beyond_s if beyond_s > SHORT_S else 0.0


def report_missing(segment: Segment, beyond_s: float) -> None:
    """Log that a segment reaches beyond the end of its recording; the first one as a warning."""
    global _reported
    level = logging.DEBUG if _reported else logging.WARNING
    log.log(
        level,
        "%s: reaches %.2f s beyond the end of the recording: clipped (ssast data check names all "
        "such segments)",
        segment,
        beyond_s,
    )
    _reported = True


def go_to(sound: soundfile.SoundFile, frame: int) -> None:
    """Go to a sample of an open recording: by seeking, or by decoding to there.

    A frame of MP3 needs those before it, of which a second is decoded: from there on samples differ
    by the rounding of float32. GSM 6.10, G.72x and NMS ADPCM cannot seek.
    """
    start = max(0, frame - sound.samplerate) if is_mp3(sound) else frame
    if start and (is_mp3(sound) or sound.seekable()):
        sound.seek(start)
        frame -= start
    while frame > 0:
        frame -= (done := len(sound.read(min(frame, BLOCK), dtype="float32", always_2d=True)))
        if not done:
            return
