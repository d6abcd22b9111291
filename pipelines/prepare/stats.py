"""Mean and standard deviation of the log-mel as training will see it, with their uncertainty.

Clips are looked at in a random order, and few thousands of them usually suffice. With s_i the sum
and q_i the sum of squares of the n_i values of clip i, of k clips,

    mean = sum s_i / sum n_i        var = sum q_i / sum n_i - mean^2

are ratios of sums over clips, and the values of one clip are anything but independent. So their
standard errors come from how the clips differ (linearised ratio estimators: Cochran, Sampling
Techniques, 3rd ed., section 6.4), with the correction for k clips out of K:

    se(mean)^2 = (1 - k/K) k/(k-1) sum (s_i - mean n_i)^2 / (sum n_i)^2
    se(var)^2  = (1 - k/K) k/(k-1) sum (q_i - 2 mean s_i + (mean^2 - var) n_i)^2 / (sum n_i)^2
    se(std) = se(var) / (2 std)

They hold for a few hundred clips or more; of 50 clips the intervals are a little too narrow (92 %
instead of 95 % for the standard deviation, in a simulation).
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.clips.columns import PLAIN, TableFormat
from ssast.pipelines.clips.manifest import read_clips
from ssast.pipelines.clips.mix import MixedClips
from ssast.pipelines.clips.shards import ClipPaths
from ssast.pipelines.errors import DataError
from ssast.pipelines.figures import save_figure, subplots
from ssast.pipelines.files import write_atomically
from ssast.pipelines.stream.stream import AudioStream
from ssast.pipelines.text import shows_progress

STATS, PICTURE = "stats.json", "stats.png"  # files of an output folder
NORMAL_95 = 1.959964  # a normal variable is within so many standard deviations with 95 %
LEAST_CLIPS = 256  # before the precision is believed
CHECKED_EVERY = 1.1  # the precision is looked at when there are so many times the clips as before
EDGES = np.linspace(-20.0, 25.0, 226)  # of the histogram; the floor of the log-mel is -15.94


@dataclass(frozen=True)
class Stats:
    """Statistics of the log-mel of a data set.

    Attributes:
        mean: Mean of the log-mel.
        mean_error: Half the width of the 95 % confidence interval of the mean.
        std: Standard deviation of the log-mel.
        std_error: Half the width of its interval.
        num_clips: Clips that were looked at.
        num_total: Clips there are.
        num_rejected: Clips that cannot be used, of those that came up.
        seconds_per_clip: Mean length of the sound in a clip, at most that of the frames.
        padding: Whether the frames after a clip's end were counted.
        num_frames: T, frames of a clip.
        histogram: Values in each bin between :data:`EDGES`; what lies beyond is in the outer bins.
    """

    mean: float
    mean_error: float
    std: float
    std_error: float
    num_clips: int
    num_total: int
    num_rejected: int
    seconds_per_clip: float
    padding: bool
    num_frames: int
    histogram: np.ndarray


def estimate(
    counts: np.ndarray, sums: np.ndarray, squares: np.ndarray, num_total: float
) -> tuple[float, float, float, float]:
    """Estimate mean and standard deviation by the formulas above.

    Args:
        counts: [k] values of each clip.
        sums: [k] their sum.
        squares: [k] the sum of their squares.
        num_total: K, of which these k were drawn; infinite if some may have been drawn again.

    Returns:
        (mean, half of its 95 % interval, std, half of its interval); infinite for a single clip of
        several.
    """
    k, total = len(counts), counts.sum()
    mean = sums.sum() / total
    var = max(0.0, squares.sum() / total - mean**2)
    std = math.sqrt(var)
    if k == num_total:
        return mean, 0.0, std, 0.0
    if k < 2:
        return mean, math.inf, std, math.inf
    factor = NORMAL_95 * math.sqrt((1 - k / num_total) * k / (k - 1)) / total
    of_mean = sums - mean * counts
    of_var = squares - 2 * mean * sums + (mean**2 - var) * counts
    mean_error = factor * math.sqrt(of_mean @ of_mean)
    var_error = factor * math.sqrt(of_var @ of_var)
    return mean, mean_error, std, var_error / (2 * std) if std else 0.0


def measure(
    path: str | Path,
    *,
    clips: ClipPaths | None = None,
    table: TableFormat = PLAIN,
    spec: FbankSpec | None = None,
    padding: bool = True,
    share: float = 1.0,
    max_clips: int | None = None,
    precision: float = 0.005,
    seed: int = 0,
    batch_size: int = 16,
    num_threads: int = 2,
    progress: bool = True,
    tick: Callable[[], None] = lambda: None,
) -> Stats:
    """Measure a data set until the statistics are precise enough.

    Args:
        path: Data set, as ``data.train`` takes it.
        clips: Clips of the data set; all that it lists if None.
        table: What is set of the format of a manifest.
        spec: Filterbank settings; those of the published models by default.
        padding: Count the frames after a clip's end, as the published get_norm_stats does: zeros,
            which the model sees too.
        share: Share of the clips to look at, at most.
        max_clips: Largest number of clips to measure.
        precision: Stop when both intervals are within this share of the standard deviation to
            either side; 0 to look at all.
        seed: Seed of the order of the clips.
        batch_size: Clips at a time.
        num_threads: See :class:`AudioStream`.
        progress: Show a progress bar on stderr, if that is a terminal.
        tick: Called for each batch.

    Raises:
        DataError: A setting is out of range, or no clip can be used.
    """
    for name, value, low, high in (
        ("share", share, 1e-9, 1.0),
        ("max-clips", 1 if max_clips is None else max_clips, 1, math.inf),
        ("precision", precision, 0.0, 1.0),
    ):
        if not low <= value <= high:
            raise DataError(f"--{name} is {value:g}, expected a number in [{low:g}, {high:g}]")
    spec = spec or FbankSpec()
    paths = read_clips(path, table) if clips is None else clips
    wanted = min(math.ceil(share * len(paths)), max_clips or len(paths))
    num_total = math.inf if isinstance(paths, MixedClips) else len(paths)
    found = np.zeros((wanted, 3))  # values, sum and sum of squares of each clip
    frames = np.zeros(wanted)
    histogram = np.zeros(len(EDGES) - 1)
    num_seen = num_rejected = 0
    next_look = float(LEAST_CLIPS)
    seen = 0  # clips of the stream that came up
    with (
        AudioStream(
            paths,
            spec,
            batch_size=min(batch_size, wanted),
            seed=seed,
            device=torch.device("cpu"),
            num_threads=num_threads,
            max_rejected=1.0,
            weights=paths.weights() if isinstance(paths, MixedClips) else None,
        ) as stream,
        tqdm(
            total=wanted, desc="stats", unit=" clips", disable=not shows_progress(progress)
        ) as bar,
    ):
        while seen < wanted:
            batch = next(stream)
            tick()
            here = min(len(batch), wanted - seen)  # the stream is endless, the share is not
            seen += here
            valid = batch.valid[:here]
            num_rejected += int((~valid).sum())
            values = batch.fbank[:here][valid].double()
            lengths = batch.num_frames[:here][valid].double()
            rows = slice(num_seen, num_seen + len(values))
            held = lengths if not padding else torch.full_like(lengths, spec.num_frames)
            found[rows, 0] = held * spec.n_mels
            found[rows, 1] = values.sum((1, 2))  # padded frames are exactly 0
            found[rows, 2] = values.square().sum((1, 2))
            frames[rows] = lengths
            histogram += _binned(values, lengths, padding)
            num_seen += len(values)
            bar.update(here)
            if num_seen >= next_look:
                next_look = CHECKED_EVERY * num_seen
                _, mean_error, std, std_error = _estimated(found[:num_seen], num_total)
                bar.set_postfix_str(f"+- {max(mean_error, std_error) / std:.2%} of std")
                if max(mean_error, std_error) <= precision * std:
                    break
    if not num_seen:
        raise DataError(f"{path}: none of {num_rejected} clips can be used, see ssast data check")
    mean, mean_error, std, std_error = _estimated(found[:num_seen], num_total - num_rejected)
    return Stats(
        mean=mean,
        mean_error=mean_error,
        std=std,
        std_error=std_error,
        num_clips=num_seen,
        num_total=len(paths),
        num_rejected=num_rejected,
        seconds_per_clip=float(frames[:num_seen].mean()) * spec.hop / spec.sample_rate_hz,
        padding=padding,
        num_frames=spec.num_frames,
        histogram=histogram,
    )


def _estimated(found: np.ndarray, num_total: float) -> tuple[float, float, float, float]:
    return estimate(found[:, 0], found[:, 1], found[:, 2], num_total)


def _binned(values: torch.Tensor, lengths: torch.Tensor, padding: bool) -> np.ndarray:
    if not padding:
        times = torch.arange(values.shape[1])
        values = values[times < lengths[:, None]]
    clamped = values.numpy().clip(EDGES[0], EDGES[-1])
    return np.histogram(clamped, EDGES)[0]


def write_stats(stats: Stats, out: Path) -> list[Path]:
    """Write ``stats.json`` and the histogram ``stats.png`` to a folder; return their paths."""
    facts = asdict(stats) | {"histogram": stats.histogram.astype(int).tolist()}
    facts["edges"] = EDGES.round(6).tolist()
    write_atomically(out / STATS, json.dumps(facts, indent=1) + "\n")
    figure, axes = subplots(figsize=(8, 4), layout="tight")
    axes.stairs(stats.histogram / stats.histogram.sum() / np.diff(EDGES), EDGES, fill=True)
    axes.axvline(stats.mean, color="black", label=f"mean {stats.mean:.4f}")
    for sign in (-1, 1):
        label = f"std {stats.std:.4f}" if sign == 1 else None
        place = stats.mean + sign * stats.std
        axes.axvline(place, color="black", linestyle=":", label=label)
    axes.set_yscale("log")
    axes.set_xlabel("log-mel" + (", frames of padding included" if stats.padding else ""))
    axes.set_ylabel("density")
    axes.set_title(f"{stats.num_clips} of {stats.num_total} clips, {stats.num_frames} frames each")
    axes.legend()
    return [out / STATS, save_figure(figure, out / PICTURE)]
