"""Look at a data set before training on it: what it holds, what is odd, which settings fit.

Counts and labels are of all clips. Everything that must be heard (levels, silence, clipping) is of
a random draw, decoded in threads.
"""

import contextlib
import math
import os
import random
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ssast.kernels.fbank import FbankSpec, fbank
from ssast.pipelines.audio.convert import resampled
from ssast.pipelines.audio.decode import Item, length_note, length_s, open_item, read_blocks
from ssast.pipelines.audio.encoded import read_clip
from ssast.pipelines.audio.sndfile import open_sound
from ssast.pipelines.clips.columns import PLAIN, TableFormat
from ssast.pipelines.clips.manifest import read_manifest
from ssast.pipelines.clips.overlap import Contents
from ssast.pipelines.clips.remote import is_url
from ssast.pipelines.clips.shards import ClipPath, ClipPaths
from ssast.pipelines.cores import usable_cores
from ssast.pipelines.errors import DataError, UnusableError
from ssast.pipelines.prepare.stats import Stats, measure
from ssast.pipelines.text import shows_progress

LONGEST_S = 300.0  # of a clip are listened to
SILENT_DB = -60.0  # of full scale: a quieter block is silence
BLOCK_S = 0.02  # of sound, whose level is measured
FULL = 0.999  # samples at least as far from 0 are at full scale
COPIES_AMONG = 500_000  # clips, at most, that are compared with each other
SPECTROGRAMS = 24
HIGHEST_FRAMES = 1024  # suggested at most: 10.24 s, as in the published models
FRAME_STEP = 16  # frames of a patch


@dataclass(frozen=True, slots=True)
class Heard:
    """What was found in a clip.

    Attributes:
        clip: The clip.
        seconds: Length in s.
        rate_hz: Sample rate in Hz.
        channels: Number of channels; 0 if only ffmpeg reads the file.
        level_db: RMS in dB of full scale, minus infinity for digital silence.
        peak: Largest absolute sample, 1 at full scale.
        silent: Share of the blocks that are silence.
        clipped: Share of the samples at full scale or beyond.
        note: The length by the header and the true one in s, if they differ by much.
    """

    clip: ClipPath
    seconds: float
    rate_hz: int
    channels: int
    level_db: float
    peak: float
    silent: float
    clipped: float
    note: dict[str, float] | None


@dataclass(frozen=True)
class Look:
    """What a data set holds.

    Attributes:
        source: The data set.
        table: How it is read, where that is set.
        num_clips: All clips.
        heard: Those of the draw that can be used, in the order of the data set.
        bad: The others of the draw, and why.
        counts: Number of clips of each class, the most frequent first; None without labels.
        unlabelled: Clips without a label, where others have one.
        several: Whether some clips have several labels.
        copies: Groups of clips that hold the same; None if there are too many clips to compare.
        stats: Mean and standard deviation of the log-mel.
        names: Labels of the clips in ``spectrograms``.
        spectrograms: Clips of the draw, and the log-mel [T, F] of each, T its own frames.
    """

    source: str
    table: TableFormat
    num_clips: int
    heard: list[Heard]
    bad: list[tuple[ClipPath, str]]
    counts: Counter[str] | None
    unlabelled: int
    several: bool
    copies: list[list[ClipPath]] | None
    stats: Stats
    names: list[tuple[str, ...]]
    spectrograms: list[tuple[ClipPath, np.ndarray]]

    @property
    def num_drawn(self) -> int:
        """Return the number of clips that were listened to."""
        return len(self.heard) + len(self.bad)

    def hours(self) -> float:
        """Estimate the length of all clips in hours."""
        mean_s = float(np.mean([clip.seconds for clip in self.heard]))
        return mean_s * self.num_clips * len(self.heard) / self.num_drawn / 3600


def look_at(
    path: str | Path,
    *,
    table: TableFormat = PLAIN,
    max_clips: int = 2000,
    seed: int = 0,
    jobs: int | None = None,
    progress: bool = True,
) -> Look:
    """Look at a data set.

    Args:
        path: Data set, as ``data.train`` takes it.
        table: How a manifest is read, where that is set.
        max_clips: Clips to listen to, at most.
        seed: Seed of their draw.
        jobs: Threads; the usable cores by default.
        progress: Show a progress bar on stderr, if that is a terminal.

    Raises:
        DataError: A setting is out of range, the list of clips cannot be read, or no clip can be
            used.
    """
    for name, value in (("max-clips", max_clips), ("jobs", 1 if jobs is None else jobs)):
        if value < 1:
            raise DataError(f"--{name} is {value}, expected at least 1")
    jobs = jobs or usable_cores()
    manifest = read_manifest(path, table=table)
    clips, labels = manifest.paths, manifest.labels
    rng = random.Random(seed)
    rows = sorted(rng.sample(range(len(clips)), min(max_clips, len(clips))))
    heard, bad = listen([clips[row] for row in rows], jobs, progress)
    if not heard:
        first, why = bad[0]
        raise DataError(f"{path}: none of {len(bad)} clips can be used; the first: {first}: {why}")
    spec = FbankSpec(num_frames=suggested_frames(heard))
    stats = measure(
        path,
        clips=clips,
        spec=spec,
        max_clips=max_clips,
        precision=0.01,
        seed=seed,
        num_threads=jobs,
        progress=progress,
    )
    label_of = {} if labels is None else {str(clips[row]): labels[row] for row in rows}
    shown = rng.sample(heard, min(SPECTROGRAMS, len(heard)))
    counts = None if labels is None else Counter(name for given in labels for name in given)
    return Look(
        source=str(path),
        table=table,
        num_clips=len(clips),
        heard=heard,
        bad=bad,
        counts=counts and Counter(dict(counts.most_common())),
        unlabelled=sum(not given for given in labels or ()),
        several=any(len(given) > 1 for given in labels or ()),
        copies=copies_among(clips),
        stats=stats,
        names=[label_of.get(str(one.clip), ()) for one in shown],
        spectrograms=[(one.clip, spectrogram(one.clip, spec)) for one in shown],
    )


def listen(
    clips: Sequence[ClipPath], jobs: int, progress: bool = True
) -> tuple[list[Heard], list[tuple[ClipPath, str]]]:
    """Decode clips in threads.

    Returns:
        What was found in the clips that can be used, and the others with the reason.
    """
    heard, bad = [], []
    with (
        tqdm(
            total=len(clips),
            desc="look",
            unit=" clips",
            disable=not shows_progress(progress),
        ) as bar,
        ThreadPoolExecutor(jobs, "look") as pool,
    ):
        for clip, found in zip(clips, pool.map(_listened, clips), strict=True):
            if isinstance(found, Heard):
                heard.append(found)
            else:
                bad.append((clip, found))
            bar.update(1)
    return heard, bad


def _listened(clip: ClipPath) -> Heard | str:
    try:
        return listened(clip)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except (DataError, UnusableError) as error:
        return str(error)


def listened(clip: ClipPath) -> Heard:
    """Decode a clip.

    Raises:
        OSError: It cannot be read.
        DataError: Training cannot use it.
        UnusableError: It cannot be decoded, or holds no samples.
    """
    read_clip(clip, FbankSpec())  # what training will say of it, at 16 kHz
    item = Item.of(clip)
    count, squares, peak, full, rate_hz = 0, 0.0, 0.0, 0, 0
    levels: list[np.ndarray] = []
    for block, rate_hz in read_blocks(item):
        count += len(block)
        squares += float(np.square(block, dtype=np.float64).sum())
        peak = max(peak, float(np.abs(block).max(initial=0.0)))
        full += int((np.abs(block) >= FULL).sum())
        size = max(1, round(BLOCK_S * rate_hz))
        whole = block[: len(block) // size * size].reshape(-1, size)
        levels.append(np.sqrt(np.square(whole, dtype=np.float64).mean(1)))
        if count >= LONGEST_S * rate_hz:
            break
    if not count:
        raise UnusableError("holds no samples")
    seconds = count / rate_hz
    if seconds >= LONGEST_S:
        seconds = length_s(item) or seconds
    loud = np.concatenate(levels)
    rms = math.sqrt(squares / count)
    return Heard(
        clip,
        seconds,
        rate_hz,
        num_channels(item),
        20 * math.log10(rms) if rms else -math.inf,
        peak,
        float((loud < 10 ** (SILENT_DB / 20)).mean()) if len(loud) else float(not rms),
        full / count,
        None if item.segment is not None else length_note(item),
    )


def num_channels(item: Item) -> int:
    """Return the number of channels of a recording; 0 if libsndfile cannot open it."""
    with contextlib.ExitStack() as stack:
        try:
            source, _, _, _ = open_item(item, stack)
            with open_sound(source) as sound:
                return sound.channels
        except (RuntimeError, ValueError, OSError, TypeError):
            return 0


def copies_among(clips: ClipPaths) -> list[list[ClipPath]] | None:
    """Return groups of clips that hold the same, see :class:`Contents`; None if there are many."""
    return None if len(clips) > COPIES_AMONG else Contents().repeats(clips)


def spectrogram(clip: ClipPath, spec: FbankSpec) -> np.ndarray:
    """Return the log-mel of the start of a clip, [T, F] float32, T at most that of ``spec``."""
    item, rate_hz = Item.of(clip), spec.sample_rate_hz
    parts: list[np.ndarray] = []
    blocks = read_blocks(item, spec.channel, rate_hz)
    for block in resampled(blocks, rate_hz, item.segment):
        parts.append(block)
        if sum(map(len, parts)) >= spec.num_samples:
            break
    samples = np.concatenate([*parts, np.zeros(0, np.float32)])[: spec.num_samples]
    found = fbank(torch.from_numpy(samples)[None], torch.tensor([len(samples)]), spec)[0].numpy()
    frames = max(1, 1 + (len(samples) - spec.window) // spec.hop)
    return found[: min(frames, spec.num_frames)]


def suggested_frames(heard: Sequence[Heard]) -> int:
    """Return frames that hold 95 % of the clips whole: a multiple of 16, at most 1024."""
    seconds = float(np.quantile([clip.seconds for clip in heard], 0.95, method="higher"))
    frames = math.ceil(100 * seconds / FRAME_STEP) * FRAME_STEP
    return max(2 * FRAME_STEP, min(HIGHEST_FRAMES, frames))


def suggested_share(num_clips: int) -> float:
    """Return the share to hold out: a tenth, but no more than 2,000 clips; at least a thousandth.

    The accuracy on 2,000 clips has a standard error of about 1 %.
    """
    return float(f"{max(0.001, min(0.1, 2000 / num_clips)):.2g}")


def suggestions(look: Look) -> dict[str, dict[str, Any]]:
    """Return the settings that fit a data set, by section."""
    source = look.source if is_url(look.source) else os.path.abspath(look.source)
    found: dict[str, dict[str, Any]] = {
        "audio": {
            "num_frames": look.stats.num_frames,
            "mean": round(float(look.stats.mean), 4),
            "std": round(float(look.stats.std), 4),
        },
        "data": {"train": source, "valid_share": suggested_share(look.num_clips)},
    }
    table = asdict(look.table)
    found["data"] |= {key: value for key, value in table.items() if value}
    if look.counts:
        most, least = max(look.counts.values()), min(look.counts.values())
        several = look.several or look.unlabelled > 0  # ce wants one label of each clip
        found["finetune"] = {
            "loss": "bce" if several else "ce",
            "metric": "map" if several else "accuracy",
            "class_weights": "balanced" if most >= 3 * least else "none",
        }
    return found
