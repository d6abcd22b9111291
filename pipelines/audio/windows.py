"""Windows of long recordings as clips: all of equal length, read by seeking."""

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ssast.pipelines.audio.decode import Item, length_s
from ssast.pipelines.clips.listed import FileList
from ssast.pipelines.clips.segment import WHOLE, Files, Segment
from ssast.pipelines.clips.shards import ClipPaths, ShardClip, ShardIndex
from ssast.pipelines.clips.tars import TarIndex
from ssast.pipelines.cores import usable_cores
from ssast.pipelines.errors import DataError


def window_starts(length_s: float, window_s: float, hop_s: float) -> list[float]:
    """Return the starts in s of windows; the last one ends where the recording ends.

    Args:
        length_s: Length of the recording in s; one that is shorter than a window is a window.
        window_s: Length of a window in s.
        hop_s: Time between the starts of two windows in s.
    """
    count = max(0, math.floor((length_s - window_s) / hop_s + 1e-6)) + 1
    starts = [round(number * hop_s, 6) for number in range(count)]
    last = round(max(0.0, length_s - window_s), 6)
    return starts if last - starts[-1] < 1e-3 else [*starts, last]


def lengths_s(paths: Iterable[str]) -> list[float | None]:
    """Return the length of each recording in s by its header; None where that does not tell."""
    with ThreadPoolExecutor(usable_cores()) as threads:
        return list(threads.map(lambda path: length_s(Item.of(path)), paths))


def cut_into_windows(
    clips: ClipPaths, window_s: float, hop_s: float | None = None
) -> tuple[FileList, np.ndarray]:
    """Cut clips into windows; those that are shorter, or cannot be opened, stay as they are.

    Only the headers of the recordings are read.

    Args:
        clips: Files, or segments of them.
        window_s: Length of a window in s.
        hop_s: Time between the starts of two windows in s; None is ``window_s``.

    Returns:
        The windows, in the order of the clips, and the row of the clip that each is of, [n] int64.

    Raises:
        DataError: The clips are prepared, or in archives.
    """
    if isinstance(clips, TarIndex):
        raise DataError(
            f"{clips.tars[0]}: sounds in archives are not cut into windows: ssast data prepare "
            "--clip-s cuts them"
        )
    if isinstance(clips, ShardIndex):
        raise DataError(
            f"{clips.folder}: prepared clips are not cut into windows: ssast data prepare --clip-s "
            "cuts recordings"
        )
    files = clips if isinstance(clips, FileList) else FileList.of(map(_of_file, clips))
    names = list(dict.fromkeys(files.files()))
    known = dict(zip(names, lengths_s(names), strict=True))
    counts: list[int] = []

    def chunks() -> Iterator[Files]:
        for clip in files:
            segment = clip if isinstance(clip, Segment) else Segment(clip, *WHOLE)
            spans = _spans(segment, known[segment.path], window_s, hop_s or window_s)
            counts.append(len(spans))
            yield Files([segment.path] * len(spans), np.array(spans, np.float64))

    windows = FileList.of_chunks(chunks())
    return windows, np.repeat(np.arange(len(counts)), counts)


def _of_file(clip: object) -> str | Segment:
    assert not isinstance(clip, ShardClip), "clips of shards are listed by their index"
    return clip if isinstance(clip, Segment) else str(clip)


def _spans(
    segment: Segment, recording_s: float | None, window_s: float, hop_s: float
) -> list[tuple[float, float]]:
    """Return begin and duration of the windows of a segment in s."""
    own = (segment.begin_s, segment.duration_s)
    if recording_s is None:
        return [own]
    found_s = min(segment.duration_s, recording_s - segment.begin_s)
    if found_s <= window_s:
        return [own]
    return [
        (segment.begin_s + start_s, window_s) for start_s in window_starts(found_s, window_s, hop_s)
    ]
