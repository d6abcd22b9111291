"""Embeddings of recordings, one vector for each clip or for each column of patches."""

import csv
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ssast.engine.classifier import Classifier, embed_clips
from ssast.engine.clips import fbank_spec
from ssast.engine.opening import Opened
from ssast.engine.upstream import layer_states, over_time
from ssast.pipelines.batch import DataError
from ssast.pipelines.dali import AudioStream
from ssast.pipelines.manifest import read_manifest
from ssast.pipelines.shards import ClipPaths

Level = Literal["clip", "frame"]


@dataclass(frozen=True)
class Embedded:
    """What :func:`embed_recordings` has written."""

    path: Path
    shape: tuple[int, ...]
    listing: Path
    rejected: dict[str, str]
    """Clips that could not be read, with the reasons; their rows are NaN."""


@torch.no_grad()
def embed_recordings(
    opened: Opened,
    source: str | Path,
    out: str | Path,
    *,
    level: Level = "clip",
    batch_size: int = 16,
) -> Embedded:
    """Write the embeddings of recordings as a float32 array, and a list of its rows beside it.

    Args:
        opened: The model.
        source: A manifest, a folder, or one audio file. Row i is its i-th clip.
        out: A .npy file. ``clip``: [clips, D], the model's pooled hidden states over what holds
            sound. ``frame``: [clips, T', D], the mean over the rows of each column of patches; NaN
            after a clip's end. Beside it ``out`` with .csv lists row, path, and columns that hold
            sound, 0 where a clip could not be read.
        level: ``clip`` or ``frame``.
        batch_size: Clips at once.

    Raises:
        DataError: The source is wrong, none of its first clips can be read, or ``out`` is no .npy
            file or cannot be written.
    """
    out = Path(out)
    if out.suffix != ".npy":
        raise DataError(f"{out}: expected a name that ends in .npy")
    paths = _paths(Path(source))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = opened.encoder.to(device).eval()
    columns = encoder.embed.grid[1]
    shape: tuple[int, ...] = (len(paths), encoder.embed_dim)
    if level == "frame":
        shape = (len(paths), columns, encoder.embed_dim)
    rejected: dict[str, str] = {}
    counts = np.zeros(len(paths), dtype=np.int64)
    temporary, listing = out.with_name(f".tmp-{out.name}"), out.with_suffix(".csv")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        rows = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
        with AudioStream(
            paths,
            fbank_spec(opened.audio),
            batch_size=min(batch_size, len(paths)),
            epochs=1,
            device=device,
            max_rejected=1.0,
            on_reject=lambda clip, path, reason: rejected.update({path: reason}),
        ) as batches:
            for batch in batches:
                ids = batch.clip_ids.cpu().numpy()
                vectors, held = _embed(opened, batch.fbank, batch.num_frames, level)
                valid = batch.valid.cpu().numpy()
                rows[ids[valid]] = vectors.float().cpu().numpy()[valid]
                counts[ids[valid]] = held.cpu().numpy()[valid]
        rows[counts == 0] = np.nan
        rows.flush()
        os.replace(temporary, out)
        with open(listing, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("row", "path", "columns"))
            writer.writerows(
                (i, path, n) for i, (path, n) in enumerate(zip(paths, counts, strict=True))
            )
    except DataError as error:
        if not rejected:
            raise
        path, reason = next(iter(rejected.items()))
        raise DataError(
            f"{source}: none of the first {len(rejected)} clips can be read: {path}: {reason}"
        ) from error
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return Embedded(out, shape, listing, rejected)


def _embed(
    opened: Opened, fbank: Tensor, num_frames: Tensor, level: Level
) -> tuple[Tensor, Tensor]:
    """Vectors, and the columns of patches that hold sound, [B]."""
    encoder = opened.encoder
    embed = encoder.embed
    starts = torch.arange(embed.grid[1], device=fbank.device) * embed.stride[1]
    sound = starts < num_frames.clamp(min=1)[:, None]  # [B, T']
    whole = embed.real_columns(num_frames)
    if whole is not None:
        sound = torch.arange(embed.grid[1], device=fbank.device) < whole[:, None]
    if level == "frame":
        states = over_time(encoder, layer_states(encoder, fbank, num_frames)[-1])
        return states.masked_fill(~sound[..., None], torch.nan), sound.sum(1)
    pooling = opened.model.pooling if isinstance(opened.model, Classifier) else "avgtok"
    return embed_clips(encoder, fbank, pooling, num_frames), sound.sum(1)


def _paths(source: Path) -> ClipPaths:
    if source.is_file() and source.suffix.lower() not in (".json", ".csv"):
        return (str(source),)
    return read_manifest(source).paths
