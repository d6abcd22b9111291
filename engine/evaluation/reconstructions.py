"""Pictures of a run: its curves, and held-out spectrograms as the model completes them."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssast.engine.data.clips import find_clips
from ssast.engine.evaluation.predict import one_pass
from ssast.engine.formats.open import load_pretrained
from ssast.engine.model.objective import MSPM
from ssast.engine.monitoring.curves import draw_curves
from ssast.engine.settings import Audio
from ssast.kernels.masking import Masks
from ssast.kernels.patch_embed import cut_patches, join_patches
from ssast.pipelines.errors import DataError
from ssast.pipelines.figures import save_figure, subplots
from ssast.pipelines.stream.batch import Batch

_log = logging.getLogger(__name__)


def visualize(run: str | Path, num_clips: int = 4) -> list[Path]:
    """Draw the curves of a run, and reconstructions of clips from its held-out split.

    Args:
        run: Folder of the run.
        num_clips: Number of clips, evenly drawn; all if there are fewer.

    Returns:
        Paths of the pictures.

    Raises:
        CheckpointError: The run has no whole checkpoint.
        DataError: The held-out clips cannot be found or read.
    """
    run = Path(run)
    model, config = load_pretrained(run)
    pictures = [draw_curves(run)]
    if isinstance(model, MSPM) and config.objective.kind != "discriminative":
        paths = find_clips(config)[1]
        count = min(num_clips, len(paths))
        chosen = [paths[i * len(paths) // count] for i in range(count)]
        batch = _read(chosen, config.audio)
        titles = [Path(str(chosen[i])).name for i in batch.clip_ids.tolist()]
        pictures.append(draw_reconstructions(model, batch, run / "reconstructions.png", titles))
    return pictures


def _read(paths: Sequence[Any], audio: Audio) -> Batch:
    """Read clips in a batch without those that cannot be read, which are logged.

    Raises:
        DataError: None can be read.
    """
    device, problems = torch.device("cpu"), []
    with one_pass(
        paths,
        audio,
        device,
        batch_size=len(paths),
        on_reject=lambda _, path, reason: problems.append(f"{path}: {reason}"),
    ) as batches:
        batch = next(batches)
    if not batch.valid.any():
        raise DataError(
            f"none of the {len(paths)} held-out clips to be drawn can be read: {problems[0]}"
        )
    for problem in problems:
        _log.warning("cannot be drawn: %s", problem)
    return Batch(**{name: values[batch.valid] for name, values in vars(batch).items()})


@torch.inference_mode()
def draw_reconstructions(model: MSPM, batch: Batch, path: Path, titles: Sequence[str]) -> Path:
    """Draw original, masked and reconstructed spectrograms, one clip a row.

    Args:
        model: Model in evaluation mode, with a trained generative head.
        batch: A few clips.
        path: Path of the PNG file.
        titles: Title of each clip.
    """
    masks = model.held_out_masks(batch.clip_ids, batch.num_frames)[-1]
    original = model.encoder.embed.normalise(batch.fbank)
    hidden, completed = complete(model, batch.fbank, masks)
    figure, axes = subplots(
        len(titles),
        3,
        figsize=(13, 2.5 * len(titles)),
        layout="tight",
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    counts = [masks.mask_ids.shape[1]] * len(titles)
    if masks.num_masked is not None:  # fewer of clips with padding
        counts = masks.num_masked.tolist()
    style = {"origin": "lower", "aspect": "auto", "cmap": "magma"}
    for row, title in enumerate(titles):
        end = max(int(batch.num_frames[row]), 1)
        low, high = original[row, :end].quantile(0.01).item(), original[row, :end].max().item()
        shown = (
            (title if len(title) < 40 else f"...{title[-36:]}", original[row]),
            (f"{counts[row]} patches hidden", hidden[row]),
            ("completed by the model", completed[row]),
        )
        for axis, (text, image) in zip(axes[row], shown, strict=True):
            axis.imshow(image.T.numpy(), vmin=low, vmax=high, **style)
            axis.axvspan(end - 0.5, len(image) - 0.5, color="white")  # padding
            axis.set_facecolor("lightgrey")
            axis.set_title(text, fontsize=9)
        axes[row, 0].set_ylabel("mel bin", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("frame (10 ms)", fontsize=9)
    return save_figure(figure, path)


def complete(model: MSPM, fbank: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
    """Reconstruct the masked patches of spectrograms.

    Returns:
        Normalised spectrograms [B, T', F'] with the masked patches NaN, and with them predicted;
        T' and F' are as many frames and mel bins as whole patches cover.
    """
    embed = model.encoder.embed
    patches = cut_patches(embed.normalise(fbank), embed.patch, embed.stride)
    ids = masks.mask_ids[..., None].expand(-1, -1, patches.shape[2])
    predicted = model.reconstruct(fbank, masks)
    hidden = patches.scatter(1, ids, torch.full_like(predicted, torch.nan))
    completed = patches.scatter(1, ids, predicted)
    grid = model.grid
    return join_patches(hidden, grid, embed.patch), join_patches(completed, grid, embed.patch)
