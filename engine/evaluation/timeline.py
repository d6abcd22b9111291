"""Classify long recordings window by window."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssast.engine.data.clips import fbank_spec
from ssast.engine.errors import ConfigError
from ssast.engine.evaluation.precision import autocast_in, class_logits
from ssast.engine.evaluation.predict import clips_at_once, default_device, find_files, on_device
from ssast.engine.evaluation.probabilities import probabilities, top_classes
from ssast.engine.evaluation.progress import with_progress
from ssast.engine.formats.open import LoadedModel, as_classifier
from ssast.engine.settings import Precision
from ssast.kernels.fbank import FbankSpec, fbank, num_frames
from ssast.kernels.matmul import fast_matmul
from ssast.pipelines.audio.convert import resampled, windows
from ssast.pipelines.audio.decode import Item, read_blocks, unreadable
from ssast.pipelines.clips.columns import PLAIN, TableFormat
from ssast.pipelines.clips.segment import Segment, span_text
from ssast.pipelines.errors import DataError, StorageError, UnusableError
from ssast.pipelines.figures import save_figure, subplots
from ssast.pipelines.files import append
from ssast.pipelines.text import json_line

LONGEST_STEM = 200  # bytes in the name of a figure, before its number and ending
SLICE = 5  # frames that one column of the spectrogram is the mean of


@dataclass(frozen=True)
class Timeline:
    """Probabilities of the classes in each of the n windows of a recording.

    Attributes:
        path: Path of the recording.
        classes: Display names of the C classes.
        starts_s: [n] start of each window in seconds, from the beginning of the recording also
            where only a segment of it is classified.
        ends_s: [n] end of each window in seconds, likewise.
        probabilities: [n, C] probabilities.
        spectrogram: [K, F] mean log-mel of each 50 ms.
        reason: Why the recording could not be read; it then has no windows.
    """

    path: str
    classes: tuple[str, ...]
    starts_s: np.ndarray
    ends_s: np.ndarray
    probabilities: np.ndarray
    spectrogram: np.ndarray
    reason: str | None = None

    def lines(self, top: int) -> Iterator[dict[str, Any]]:
        """Yield each window with its likeliest classes as JSON, or the reason for none."""
        if self.reason is not None:
            yield {"path": self.path, "reason": self.reason}
        for start, end, row in zip(self.starts_s, self.ends_s, self.probabilities, strict=True):
            yield {
                "path": self.path,
                "start_s": round(float(start), 3),
                "end_s": round(float(end), 3),
                "classes": top_classes(row, self.classes, top),
            }


@dataclass(frozen=True)
class Windows:
    """Length of the windows of a recording and hop between them, in samples."""

    length: int
    hop: int

    @classmethod
    def from_seconds(
        cls, spec: FbankSpec, window_s: float | None, hop_s: float | None
    ) -> "Windows":
        """Convert seconds to samples; by default as long as the model's input, overlapping by half.

        Raises:
            ConfigError: A window is longer than the model's input or shorter than one frame, or
                there would be gaps between windows.
        """
        rate = spec.sample_rate_hz
        longest, shortest = spec.num_samples / rate, spec.window / rate
        window_s = longest if window_s is None else window_s
        hop_s = window_s / 2 if hop_s is None else hop_s
        if not shortest <= window_s <= longest:
            raise ConfigError(
                f"--window-s must be between {shortest:g} and {longest:g} s, which is all that the "
                f"model hears at once, got {window_s:g}"
            )
        if not 1 / rate <= hop_s <= window_s:
            raise ConfigError(f"--hop-s must be above 0 and at most {window_s:g}, got {hop_s:g}")
        return cls(round(window_s * rate), round(hop_s * rate))

    def cut(self, path: Any, spec: FbankSpec) -> Iterator[tuple[int, np.ndarray]]:
        """Cut a recording of any format and length into windows; yield each with its first sample.

        The last one ends where the recording ends, and begins earlier for that; only a recording
        shorter than a window makes a shorter one.

        Raises:
            UnusableError: It cannot be read or decoded.
            StorageError: Storage kept failing.
        """
        try:
            item = Item.of(path)
        except OSError as error:
            raise unreadable(error) from error
        except StorageError:
            raise  # the recording is not to blame
        except DataError as error:
            raise UnusableError(str(error)) from error
        sound = read_blocks(item, spec.channel, spec.sample_rate_hz)
        blocks = resampled(sound, spec.sample_rate_hz, item.segment)
        before: np.ndarray | None = None
        for number, window in enumerate(windows(blocks, self.length, self.hop)):
            start = number * self.hop
            if before is not None and len(window) < self.length:
                start += len(window) - self.length
                window = np.concatenate([before[: self.hop], window])[-self.length :]
            yield start, window
            before = window


def timelines(
    model: LoadedModel | str | Path,
    sources: str | Path | Sequence[str | Path],
    window_s: float | None = None,
    hop_s: float | None = None,
    *,
    precision: Precision = "fp32",
    table: TableFormat = PLAIN,
    progress: bool = True,
) -> Iterator[Timeline]:
    """Classify recordings of any length window by window, one recording after the other.

    Args:
        model: A fine-tuned classifier, or the path of one.
        sources: Audio files, folders, manifests.
        window_s: Length of a window in seconds; that of the model's input if None.
        hop_s: Seconds from one window to the next; half a window if None.
        precision: Precision of matmuls and attention; probabilities are float32.
        table: What is set of the format of a manifest.
        progress: Show a progress bar on stderr, if that is a terminal.

    Raises:
        CheckpointError: There is no classifier at the path.
        ConfigError: The windows are too long or have gaps between them.
        DataError: A folder or a manifest is wrong.
    """
    loaded = as_classifier(model)
    cutting = Windows.from_seconds(fbank_spec(loaded.audio), window_s, hop_s)
    paths = find_files(sources, table)
    tracked = with_progress(paths, len(paths), "predict", progress, lambda _: 1)
    return (timeline(loaded, path, cutting, default_device(), precision) for path in tracked)


@fast_matmul()
@torch.inference_mode()
def timeline(
    loaded: LoadedModel,
    path: Any,
    cutting: Windows,
    device: torch.device,
    precision: Precision = "fp32",
) -> Timeline:
    """Classify the windows of a recording, which is read block by block.

    Args:
        loaded: A fine-tuned classifier.
        path: A file, a segment of one, or a clip in a shard.
        cutting: Length and hop of the windows.
        device: Device of the classifier.
        precision: Precision of matmuls and attention.
    """
    audio, classifier = loaded.audio, on_device(loaded.classifier, device)
    spec, num_classes = fbank_spec(audio), loaded.num_classes
    starts: list[int] = []
    ends: list[int] = []
    logits = [np.zeros((0, num_classes))]
    columns: dict[int, tuple[np.ndarray, int]] = {}  # of the spectrogram, of so many frames
    reason = None
    try:
        count = clips_at_once(loaded, device)
        for batch in _batches(cutting.cut(path, spec), spec.window, count):
            lengths = torch.tensor([len(window) for _, window in batch])
            waves = torch.zeros(len(batch), int(lengths.max()))
            for row, (_, window) in zip(waves, batch, strict=True):
                row[: len(window)] = torch.from_numpy(window - window.mean())
            features = fbank(waves.to(device), lengths.to(device), spec)
            frames = num_frames(lengths.to(device), spec)
            with autocast_in(precision, device):
                found = class_logits(classifier, features, frames if audio.ignore_padding else None)
            logits.append(found.double().cpu().numpy())
            for (start, window), rows, held in zip(
                batch, features.cpu().numpy(), frames.tolist(), strict=True
            ):
                starts.append(start)
                ends.append(start + len(window))
                for number, column in _columns(rows[:held], start // spec.hop).items():
                    if number not in columns or columns[number][1] < column[1]:
                        columns[number] = column
    except UnusableError as error:
        reason = str(error)
    if reason is None and not starts:
        reason = f"too short, one window is {spec.window} samples"
    if reason is not None:
        starts, ends, logits, columns = [], [], logits[:1], {}
    begin_s = 0.0
    if isinstance(path, Segment):
        begin_s = path.begin_s
        if reason is not None:  # there is no window to tell which segment it is
            reason = f"segment {span_text(path.begin_s, path.duration_s)}: {reason}"
        path = path.path
    rate = spec.sample_rate_hz
    return Timeline(
        str(path),
        loaded.names,
        begin_s + np.array(starts) / rate,
        begin_s + np.array(ends) / rate,
        probabilities(np.concatenate(logits), loaded.loss),
        np.array([mean for mean, _ in columns.values()]).reshape(-1, audio.n_mels),
        reason,
    )


def _columns(frames: np.ndarray, first: int) -> dict[int, tuple[np.ndarray, int]]:
    """Average each SLICE frames of a window [T, F]; means [F] and frames, by their number in all.

    The first and the last may be of fewer frames.
    """
    numbers, begins = np.unique((first + np.arange(len(frames))) // SLICE, return_index=True)
    sums = np.add.reduceat(frames, begins)
    sizes = np.diff(begins, append=len(frames))
    means = zip(sums / sizes[:, None], sizes.tolist(), strict=True)
    return dict(zip(numbers.tolist(), means, strict=True))


def _batches(
    pieces: Iterator[tuple[int, np.ndarray]], shortest: int, count: int
) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Collect windows in batches of ``count``; one too short for a single frame is left out."""
    batch: list[tuple[int, np.ndarray]] = []
    for start, window in pieces:
        if len(window) >= shortest:
            batch.append((start, window))
        if len(batch) == count:
            yield batch
            batch = []
    if batch:
        yield batch


class TimelineWriter:
    """A writer of windows.jsonl and of a figure of each recording, one after the other.

    Attributes:
        written: Paths of the files so far.
    """

    def __init__(self, folder: Path, top: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._top = folder, top
        self.written = [folder / "windows.jsonl"]
        self.written[0].write_bytes(b"")

    def put(self, found: Timeline) -> None:
        """Write all of a recording; a command that is killed leaves whole lines."""
        append(self.written[0], b"".join(map(json_line, found.lines(self._top))))
        if found.reason is not None:
            return
        stem = os.fsdecode(os.fsencode(Path(found.path).stem)[:LONGEST_STEM])
        path, number = self._folder / f"{stem}.png", 1
        while path in self.written:
            number += 1
            path = self._folder / f"{stem}-{number}.png"
        draw_timeline(path, found)
        self.written.append(path)


def draw_timeline(path: Path, found: Timeline, max_classes: int = 10) -> None:
    """Draw the spectrogram of a recording, and under it the probabilities over time.

    Args:
        path: Path of the PNG file.
        found: Timeline with windows.
        max_classes: Number of classes that are shown, by their highest probability.
    """
    peaks = found.probabilities.max(0)
    shown = np.argsort(-peaks, kind="stable")[:max_classes]
    start_s, end_s = float(found.starts_s[0]), float(found.ends_s[-1])
    centres = (found.starts_s + found.ends_s) / 2
    edges = np.concatenate([found.starts_s[:1], (centres[1:] + centres[:-1]) / 2, [end_s]])
    figure, (above, below) = subplots(
        2,
        1,
        sharex=True,
        figsize=(11, 3 + 0.28 * len(shown)),
        height_ratios=(2, 0.28 * len(shown) + 0.4),
    )
    if len(found.spectrogram):
        above.imshow(
            found.spectrogram.T,
            origin="lower",
            aspect="auto",
            cmap="magma",
            extent=(start_s, end_s, 0, found.spectrogram.shape[1]),
            vmin=np.percentile(found.spectrogram, 5),
        )
    above.set_ylabel("mel bin")
    above.set_title(Path(found.path).name, fontsize=10)
    rows = np.arange(len(shown) + 1) - 0.5
    image = below.pcolormesh(
        edges, rows, found.probabilities[:, shown].T, cmap="Blues", vmin=0, vmax=1
    )
    below.set_yticks(rows[1:] - 0.5, [found.classes[i] for i in shown], fontsize=8)
    below.invert_yaxis()
    below.set_xlim(start_s, end_s)
    below.set_xlabel("s")
    figure.colorbar(image, ax=below, label="probability")
    save_figure(figure, path)
