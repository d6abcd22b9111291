"""A stream of filterbank batches from audio files: DALI decodes, bad files do not stop it."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ssast.kernels.fbank import FbankSpec, fbank, num_frames
from ssast.pipelines.clips.order import Weights
from ssast.pipelines.clips.shards import ClipPaths
from ssast.pipelines.errors import DataError
from ssast.pipelines.stream.batch import Batch
from ssast.pipelines.stream.cache import Cache, MemoryCache
from ssast.pipelines.stream.disk_cache import DiskCache
from ssast.pipelines.stream.graph import PREFETCH, FbankThreads, build_pipeline
from ssast.pipelines.stream.rejected import Rejections
from ssast.pipelines.stream.source import CACHED, READ, ClipSource

log = logging.getLogger(__name__)

MAX_RECOVERIES = 4  # decoding errors after which libsndfile decodes every clip


class AudioStream:
    """Endless shuffled batches for training, or passes in manifest order for validation.

    The order of the clips depends on (paths, seed, position) alone: a stream that starts at the
    ``position`` of another one continues it exactly, whatever the batch size and the number of
    ranks; with the same batch size, bit for bit.

    A clip that cannot be read (missing, empty, damaged, NaN, shorter than one window) becomes a
    row of silence with ``valid`` False.

    Args:
        paths: Paths of the clips, in the order of the manifest.
        spec: Filterbank settings.
        batch_size: Batch size B of this rank.
        seed: Seed of the shuffling.
        rank: Rank of this process.
        world_size: Number of ranks.
        start: Position of the stream, over all ranks, to start at.
        epochs: Number of passes in manifest order; the last batch is filled up with invalid clips,
            so that all ranks get equally many batches. None for the endless shuffled stream.
        device: Device of the batches.
        num_threads: Threads of each of reading, decoding and (on a CPU) the filterbank.
        read_ahead: Number of batches of encoded clips to read ahead.
        fbank: Backend of the filterbank. "torch": the kernel of ``ssast.kernels.fbank``, inside the
            DALI pipeline on a CPU, after it on a GPU; "dali": DALI's operators; "auto": "dali" on a
            GPU and "torch" on a CPU, where it is faster.
        max_rejected: Share of rejected clips above which the stream stops with an error, see
            :meth:`~ssast.pipelines.stream.rejected.Counts.too_many`; only those of this rank count.
            1: it never does.
        weights: Sampling weights of the endless stream; all clips are equally frequent without.
        retry_s: Time in s for which reading is tried again while storage fails.
        random_crop: Whether to take a different crop of a longer recording in each epoch, drawn
            from (seed, clip, epoch), instead of its start.
        cache: Cache of filterbanks in memory, which is closed with the stream. Not with
            ``random_crop``.
        cache_folder: Folder for a cache on disk instead, which later runs use as well; see
            :mod:`ssast.pipelines.stream.disk_cache`.
        on_reject: Called with (clip id, path, reason) when a rejected clip first comes up.

    Raises:
        DataError: The manifest is empty or a setting out of range; from ``next``, too many clips
            were rejected.
        StorageError: From ``next``: storage kept failing.
    """

    def __init__(
        self,
        paths: ClipPaths,
        spec: FbankSpec,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        epochs: int | None = None,
        device: torch.device,
        num_threads: int = 2,
        read_ahead: int = 3,
        fbank: Literal["auto", "torch", "dali"] = "auto",
        max_rejected: float = 0.05,
        weights: Weights | None = None,
        retry_s: float = 300.0,
        random_crop: bool = False,
        cache: MemoryCache | None = None,
        cache_folder: str | Path | None = None,
        on_reject: Callable[[int, str, str], None] | None = None,
    ) -> None:
        _check(paths, batch_size, seed, rank, world_size, start, epochs, num_threads, read_ahead)
        if weights is not None and (epochs is not None or len(weights) != len(paths)):
            raise DataError(
                f"{len(weights)} weights for {len(paths)} clips; they are for the endless stream"
            )
        if (cache is not None) + (cache_folder is not None) + random_crop > 1:
            raise DataError(
                "cache, cache_folder and random_crop exclude each other: one place for "
                "filterbanks is enough, and a crop is used once"
            )
        if fbank not in ("auto", "torch", "dali"):
            raise DataError(f"fbank is {fbank!r}, it must be auto, torch or dali")
        self.spec, self.batch_size, self.device = spec, batch_size, device
        self._start, self._stride = start, batch_size * world_size
        self._num_batches: int | None = None
        if epochs is not None:
            left = max(0, epochs * len(paths) - start)
            self._num_batches = -(-left // self._stride)
        self._max_rejected, self._on_reject = max_rejected, on_reject
        self._num_threads = num_threads
        on_gpu = device.type == "cuda"
        self._device_id: int | None = None
        if on_gpu:
            self._device_id = torch.cuda.current_device() if device.index is None else device.index
        if fbank == "auto":
            fbank = "dali" if on_gpu else "torch"
        self._features: FbankThreads | Literal["dali", "waveform"] = "dali"
        if fbank == "torch":
            self._features = (
                "waveform"
                if on_gpu
                else FbankThreads(spec, batch_size=batch_size, num_threads=num_threads)
            )

        self._done = 0  # batches handed out
        self._base = 0  # batches handed out before the pipeline was last built
        self.rejections = Rejections(len(paths), shuffled=epochs is None)
        self._recoveries, self._recovered_at = 0, -1
        self._closed = False
        self._cache: Cache | None = cache
        if cache_folder is not None:
            computed_by = f"{fbank} {device.type}"
            self._cache = DiskCache(Path(cache_folder), paths, spec, computed_by)
        self._source = ClipSource(
            paths,
            spec,
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            start=start,
            epochs=epochs,
            num_threads=num_threads,
            read_ahead=read_ahead,
            weights=weights,
            random_crop=random_crop,
            retry_s=retry_s,
            cache=self._cache,
        )
        self._pipeline = self._build()

    @property
    def position(self) -> int:
        """Position of the stream, over all ranks, after the last batch."""
        return self._start + self._done * self._stride

    @property
    def rejected(self) -> dict[int, tuple[str, str]]:
        """Path and reason of every rejected clip so far, by clip id."""
        return dict(sorted(self.rejections.files.items()))

    def __len__(self) -> int:
        """Return the number of batches of a finite stream, from its start."""
        if self._num_batches is None:
            raise TypeError("a training stream is endless: it has no length")
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed or self._done == self._num_batches:
            raise StopIteration
        while True:
            try:
                features, lengths, labels = self._run()
                break
            except RuntimeError as error:
                self._recover(error)
        _, _, present = self._source.clips(self._done - self._base)
        self._done += 1
        self._account(labels, present)
        return self._batch(features, lengths, labels)

    def close(self) -> None:
        """Stop all threads. A closed stream yields no more batches."""
        if self._closed:
            return
        self._closed = True
        self._pipeline = None  # waits for the batches in flight
        self._source.close()
        if self._cache is not None:
            self._cache.close()
        if isinstance(self._features, FbankThreads):
            self._features.close()

    def __enter__(self) -> "AudioStream":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _build(self) -> Any:
        return build_pipeline(
            self._source,
            self.spec,
            batch_size=self.batch_size,
            num_threads=self._num_threads,
            device_id=self._device_id,
            features=self._features,
        )

    def _run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return DALI's next batch: features, samples [B, 1] and labels [B, 3], both on the CPU.

        On a CPU the features share DALI's memory, which lives as long as the tensor and is never
        overwritten. On a GPU they are copied, since DALI would reuse the memory while queued torch
        kernels still read it; the copy takes a few microseconds.
        """
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        features, lengths, labels = (
            torch.from_dlpack(o.as_tensor()) for o in self._pipeline.run(stream)
        )
        return features if stream is None else features.clone(), lengths, labels

    def _batch(self, features: Tensor, lengths: Tensor, labels: Tensor) -> Batch:
        lengths = lengths[:, 0].long()
        if self._cache is not None:
            features, lengths = self._through_cache(self._cache, features, lengths, labels)
        small = torch.stack([*labels.unbind(1), num_frames(lengths, self.spec), lengths])
        if self.device.type == "cuda":
            small = small.pin_memory().to(self.device, non_blocking=True)
        clip_ids, epochs, valid, frames, lengths = small
        if self._features == "waveform" and self._cache is None:
            features = fbank(features, lengths, self.spec)
        return Batch(features, frames, clip_ids, epochs, valid.bool())

    def _through_cache(
        self, cache: Cache, features: Tensor, lengths: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Insert cached filterbanks into a batch and cache the new ones."""
        if self._features == "waveform":
            features = fbank(features, lengths.to(features.device), self.spec)
        clip_ids, states = labels[:, 0], labels[:, 2]
        kept, new = states == CACHED, states == READ
        cache.put(clip_ids[new].tolist(), features[new.to(features.device)], lengths[new].tolist())
        if kept.any():
            stored, counts = cache.get(clip_ids[kept].tolist())
            stored, known = stored.to(features.device), torch.tensor(counts)
            if kept.all():
                return stored, known
            features, lengths = features.clone(), lengths.clone()
            features[kept.to(features.device)] = stored
            lengths[kept] = known
        return features, lengths

    def _account(self, labels: Tensor, present: np.ndarray) -> None:
        """Count and report the rejected clips of a batch; raise if there are too many."""
        ours, limit = self.rejections, self._max_rejected
        for (clip_id, _, valid), is_present in zip(labels.tolist(), present, strict=True):
            ours.seen += bool(is_present)
            if is_present and not valid:
                ours.rejected += 1
                if clip_id not in ours.files:
                    found = str(self._source.paths[clip_id]), self._source.reasons[clip_id]
                    ours.files[clip_id] = found
                    if self._on_reject is not None:
                        self._on_reject(clip_id, *found)
        if ours.counts.too_many(limit):
            raise DataError(ours.counts.message(limit, ours.examples()))

    def _recover(self, error: RuntimeError) -> None:
        """Rebuild the pipeline after a decoding error, with which DALI drops the whole batch.

        DALI does not name the clip. libsndfile decodes those in flight from now on: it rejects the
        bad one with a reason and passes the others on as samples, the same that DALI decodes. The
        repeated batch can therefore not fail because of a clip.
        """
        if self._recovered_at == self._done:  # it failed again, so no clip is to blame
            raise error
        self._recovered_at = self._done
        self._recoveries += 1
        iteration = self._done - self._base
        for later in range(iteration, iteration + PREFETCH + 1):
            self._source.verify(self._source.clips(later)[0].tolist())
        if self._recoveries == MAX_RECOVERIES:
            log.warning(
                "DALI could not decode %d batches: libsndfile decodes every clip from now on",
                self._recoveries,
            )
            self._source.verify_all()
        self._source.restart(self.position)
        self._base = self._done
        self._pipeline = self._build()


def _check(
    paths: ClipPaths,
    batch_size: int,
    seed: int,
    rank: int,
    world_size: int,
    start: int,
    epochs: int | None,
    num_threads: int,
    read_ahead: int,
) -> None:
    if not paths:
        raise DataError("the manifest holds no clips")
    if not 0 <= rank < world_size:
        raise DataError(f"rank is {rank}, it must be in [0, {world_size}), the number of ranks")
    least = {"batch_size": 1, "seed": 0, "start": 0, "num_threads": 1, "read_ahead": 0}
    given = {
        "batch_size": batch_size,
        "seed": seed,
        "start": start,
        "num_threads": num_threads,
        "read_ahead": read_ahead,
    }
    if epochs is not None:
        given["epochs"], least["epochs"] = epochs, 1
    for name, value in given.items():
        if value < least[name]:
            raise DataError(f"{name} is {value}, it must be at least {least[name]}")
