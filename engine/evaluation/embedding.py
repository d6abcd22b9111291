"""Write embeddings of recordings, one vector for each clip or for each column of patches."""

import csv
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ssast.engine.errors import ConfigError
from ssast.engine.evaluation.cut_clips import CutClips
from ssast.engine.evaluation.features import Layer, Level, check_layer, embed_batch
from ssast.engine.evaluation.precision import autocast_in
from ssast.engine.evaluation.predict import clips_at_once, default_device, one_pass
from ssast.engine.evaluation.progress import with_progress
from ssast.engine.formats.exportable import check_choices
from ssast.engine.formats.open import LoadedModel, open_model
from ssast.engine.settings import Precision
from ssast.kernels.matmul import fast_matmul
from ssast.pipelines.clips.columns import PLAIN, TableFormat
from ssast.pipelines.clips.manifest import clip_columns, holds_clips, read_clips
from ssast.pipelines.clips.remote import as_path
from ssast.pipelines.clips.segment import Segment
from ssast.pipelines.clips.shards import ClipPaths
from ssast.pipelines.errors import DataError, data_error
from ssast.pipelines.files import check_new, replacing
from ssast.pipelines.text import NAME_BYTES


@dataclass(frozen=True)
class WrittenEmbeddings:
    """The files that :func:`embed_recordings` has written."""

    path: Path
    shape: tuple[int, ...]
    listing: Path
    """The CSV that lists the rows; the same file where that holds the paths itself."""

    rejected: dict[str, str]
    """Reasons why clips could not be read, by path; their rows are NaN, or null."""

    num_read: int
    """Clips that could be read, of all that have a row."""


class RowWriter(Protocol):
    """A writer of embeddings, batch by batch in the order of the clips."""

    def put(self, first: int, vectors: np.ndarray, held: np.ndarray) -> None:
        """Write [B, *] float32 of the clips from ``first`` on, and their valid columns [B]."""
        ...

    def close(self) -> None:
        """Finish the file."""
        ...


class NumpyWriter:
    """A writer of a float32 array, NaN where there is no sound."""

    def __init__(self, path: Path, shape: tuple[int, ...]):
        self._rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        # Else a disk that fills up later ends the process by a signal, without a word.
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)

    def put(self, first: int, vectors: np.ndarray, held: np.ndarray) -> None:
        """See :class:`RowWriter`."""
        vectors[held == 0] = np.nan
        self._rows[first : first + len(vectors)] = vectors

    def close(self) -> None:
        """See :class:`RowWriter`."""
        self._rows.flush()


class ParquetWriter:
    """A writer of a table of path, columns and embedding, null where a clip could not be read.

    Where clips are segments, it has their begin and duration in s after the path.

    An embedding is a list of D numbers; at the level ``frame`` a list of such lists, one for each
    valid column; of all layers a list of these, one for each layer.

    Raises:
        ConfigError: pyarrow is not installed.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], paths: ClipPaths, level: Level = "clip"):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ConfigError(
                'Parquet needs the package pyarrow: pip install "ssast-engine[parquet]"'
            ) from error
        self._arrow, self._paths, self._level = pyarrow, paths, level
        self._type = pyarrow.list_(pyarrow.float32(), shape[-1])
        for _ in shape[2:]:
            self._type = pyarrow.list_(self._type)
        self._times = _time_columns(paths)
        fields = [("path", pyarrow.string()), *((name, pyarrow.float64()) for name in self._times)]
        fields += [("columns", pyarrow.int32()), ("embedding", self._type)]
        self._schema = pyarrow.schema(fields)
        self._writer = pyarrow.parquet.ParquetWriter(path, self._schema)

    def put(self, first: int, vectors: np.ndarray, held: np.ndarray) -> None:
        """See :class:`RowWriter`."""
        clips = [clip_columns(self._paths[first + row]) for row in range(len(vectors))]
        # A name need not be valid text; Parquet's strings must: other bytes are escaped.
        names = [clip["wav"].encode(errors="backslashreplace").decode() for clip in clips]
        times = [[clip.get(name) for clip in clips] for name in self._times]
        if self._level == "frame":
            rows = [row[..., :count, :] for row, count in zip(vectors, held, strict=True)]
        else:
            rows = list(vectors)
        embeddings = [
            _as_list(row) if count else None for row, count in zip(rows, held, strict=True)
        ]
        columns = [names, *times, held.astype(np.int32)]
        columns.append(self._arrow.array(embeddings, self._type))
        self._writer.write_batch(self._arrow.record_batch(columns, schema=self._schema))

    def close(self) -> None:
        """See :class:`RowWriter`."""
        self._writer.close()


def _as_list(array: np.ndarray) -> Any:
    """Return an array [*, D] as lists, down to its vectors."""
    return array if array.ndim == 1 else [_as_list(part) for part in array]


@fast_matmul()
@torch.no_grad()
def embed_recordings(
    model: LoadedModel | str | Path,
    source: str | Path,
    out: str | Path,
    *,
    level: Level = "clip",
    layer: Layer = "last",
    batch_size: int | None = None,
    precision: Precision = "fp32",
    table: TableFormat = PLAIN,
    progress: bool = True,
) -> WrittenEmbeddings:
    """Write the embeddings of recordings.

    Only the beginning of a clip longer than the input is used; a warning says of how many.

    Args:
        model: Any model, or the path of one.
        source: A manifest, a folder, or one audio file. Row i is its i-th clip.
        out: A .npy file for a float32 array. ``clip``: [clips, D], the model's pooled hidden states
            over its valid columns. ``frame``: [clips, T', D], the mean over the rows of each column
            of patches; NaN after a clip's end. With all layers [clips, L, D] or
            [clips, L, T', D]. Beside it ``out`` with .csv lists row, path (of segments with begin
            and duration in s), and valid columns, 0 where a clip could not be read. Or a .parquet
            file, which holds all of that; see :class:`ParquetWriter`. Both are manifests of these
            clips, but for those in shards and archives.
        level: ``clip`` or ``frame``.
        layer: Layer whose hidden states are taken, see
            :data:`~ssast.engine.evaluation.features.Layer`.
        batch_size: Clips at once; None: as many as suit the device.
        precision: Precision of matmuls and attention; embeddings are float32.
        table: What is set of the format of a manifest.
        progress: Show a progress bar on stderr, if that is a terminal.

    Raises:
        CheckpointError: There is no model at the path.
        ConfigError: A package for the format is missing, the model has no such layer, or there is
            no such level.
        DataError: The source is wrong, none of its clips can be read, or ``out`` has another
            ending, exists already or cannot be written.
    """
    check_choices(level=(level, Level))
    out = Path(out)
    if out.suffix not in (".npy", ".parquet"):
        raise DataError(f"{out}: expected a name that ends in .npy or .parquet")
    loaded = model if isinstance(model, LoadedModel) else open_model(model)
    check_layer(loaded.encoder, layer)
    listing = out.with_suffix(".csv") if out.suffix == ".npy" else out
    check_new([out, listing], [source])
    paths = _paths(source, table)
    device = default_device()
    encoder = loaded.encoder.to(device).eval()
    layers = (len(encoder.blocks) + 1,) if layer == "all" else ()
    columns = (encoder.embed.grid[1],) if level == "frame" else ()
    shape = (len(paths), *layers, *columns, encoder.embed_dim)
    rejected: dict[str, str] = {}
    counts = np.zeros(len(paths), dtype=np.int64)
    cut = CutClips(paths, loaded.audio)
    try:
        with (
            autocast_in(precision, device),
            replacing(out) as temporary,
            one_pass(
                paths,
                loaded.audio,
                device,
                batch_size=batch_size or clips_at_once(loaded, device),
                on_reject=lambda clip, path, reason: rejected.update({path: reason}),
            ) as batches,
        ):
            rows: RowWriter
            if out.suffix == ".npy":
                rows = NumpyWriter(temporary, shape)
            else:
                rows = ParquetWriter(temporary, shape, paths, level)
            tracked = with_progress(batches, len(paths), "embed", progress)
            for number, batch in enumerate(tracked):
                first = number * len(batch)
                count = min(len(batch), len(paths) - first)  # the last batch is filled up
                fbank, frames = batch.fbank[:count], batch.num_frames[:count]
                vectors, held = embed_batch(loaded, fbank, frames, level, layer)
                held = held.where(batch.valid[:count], 0)
                counts[first : first + count] = held.cpu().numpy()
                rows.put(first, vectors.cpu().numpy(), counts[first : first + count])
                cut.add(batch)
            rows.close()
            if not counts.any():
                path, reason = next(iter(rejected.items()))
                raise DataError(
                    f"{source}: none of its {len(paths)} clips can be read: {path}: {reason}"
                )
        if listing != out:
            _write_listing(listing, paths, counts)
    except OSError as error:
        what = f"{out}: cannot be written: {error.strerror or error}"
        raise data_error(error, what) from error
    cut.warn()
    return WrittenEmbeddings(out, shape, listing, rejected, int((counts > 0).sum()))


def _write_listing(path: Path, paths: ClipPaths, counts: np.ndarray) -> None:
    times = _time_columns(paths)
    with (
        replacing(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors=NAME_BYTES) as file,
    ):
        writer = csv.writer(file)
        writer.writerow(("row", "path", *times, "columns"))
        for row, (clip, count) in enumerate(zip(paths, counts, strict=True)):
            entry = clip_columns(clip)
            writer.writerow((row, entry["wav"], *map(entry.get, times), count))


def _time_columns(paths: ClipPaths) -> tuple[str, ...]:
    """Return the columns of a manifest that segments need beside their path, if there are some."""
    return ("begin", "duration") if any(isinstance(clip, Segment) for clip in paths) else ()


def _paths(source: str | Path, table: TableFormat) -> ClipPaths:
    if not holds_clips(source) and (path := as_path(source)).is_file():
        return (str(path),)
    return read_clips(source, table)
