"""Features of waveforms in memory, one vector for each or for each column of patches."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ssast.engine.data.clips import fbank_spec
from ssast.engine.data.waveforms import fbank_windows
from ssast.engine.evaluation.predict import default_device
from ssast.engine.formats.open import LoadedModel, open_model
from ssast.engine.model.classifier import Classifier, embed_clips
from ssast.engine.model.encoder import layer_states, time_states
from ssast.kernels.fbank import FbankSpec
from ssast.kernels.matmul import fast_matmul
from ssast.pipelines.audio.convert import resampled
from ssast.pipelines.audio.decode import Item, read_blocks
from ssast.pipelines.errors import DataError, UnusableError

Level = Literal["clip", "frame"]


@fast_matmul()
@torch.no_grad()
def embed(
    model: LoadedModel | str | Path,
    audio: Tensor | np.ndarray | str | Path,
    sample_rate_hz: int = 16000,
    *,
    level: Level = "clip",
) -> Tensor:
    """Compute the features of a waveform, or of a batch of them, of any length.

    What is longer than the input of the model is embedded window by window.

    Args:
        model: A model, or the path of one, which is opened in each call.
        audio: Waveform [S] or waveforms [B, S], floating point in [-1, 1]; or an audio file.
        sample_rate_hz: Sample rate of the waveforms, which are resampled to that of the model. A
            file has its own.
        level: ``clip`` for one vector a waveform, ``frame`` for one a column of patches.

    Returns:
        [D] or [B, D]; with ``frame`` [T', D] or [B, T', D]; float32, on the device of ``audio``.

    Raises:
        CheckpointError: There is no model at the path.
        DataError: The file cannot be read, or the waveform has another shape or type, NaN or
            infinite samples, or is shorter than one frame.
    """
    loaded = model if isinstance(model, LoadedModel) else open_model(model)
    spec, device = fbank_spec(loaded.audio), default_device()
    encoder = loaded.encoder.to(device).eval()
    waves = _waveforms(audio, sample_rate_hz, spec)
    batch = waves.reshape(-1, waves.shape[-1]).to(device)
    lengths = torch.full((len(batch),), batch.shape[1], device=device)
    hop = encoder.embed.grid[1] * encoder.embed.stride[1] * spec.hop
    vectors, counts = [], []
    # A rest that is too short for a frame makes no window.
    for fbank, frames in fbank_windows(batch, lengths, spec, hop, batch.shape[1] - spec.window + 1):
        window, held = embed_batch(loaded, fbank, frames, level)
        count = int(held[0])  # the same in all, which are equally long
        vectors.append(window[:, :count] if level == "frame" else window * count)
        counts.append(count)
    found = torch.cat(vectors, 1) if level == "frame" else torch.stack(vectors).sum(0) / sum(counts)
    return found.reshape(*waves.shape[:-1], *found.shape[1:]).float().to(waves.device)


def _waveforms(
    audio: Tensor | np.ndarray | str | Path, sample_rate_hz: int, spec: FbankSpec
) -> Tensor:
    """Return the audio as float32 [S] or [B, S] at the model's sample rate."""
    if isinstance(audio, str | Path):
        try:
            blocks = resampled(read_blocks(Item(str(audio), Path(audio))), spec.sample_rate_hz)
            waves = torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *blocks]))
        except UnusableError as error:
            raise DataError(f"{audio}: {error}") from error
        return _checked(waves, spec, str(audio))
    waves = torch.as_tensor(audio)
    if waves.ndim not in (1, 2) or not waves.is_floating_point():
        raise DataError(
            f"waveform: expected [S] or [B, S] floating-point samples, got {list(waves.shape)} "
            f"{waves.dtype}"
        )
    if sample_rate_hz < 1:
        raise DataError(f"sample_rate_hz: expected a positive number, got {sample_rate_hz}")
    waves = waves.float()
    if sample_rate_hz != spec.sample_rate_hz and waves.numel():
        rows = waves.reshape(-1, waves.shape[-1]).cpu().numpy()
        new = [
            np.concatenate([*resampled([(r, sample_rate_hz)], spec.sample_rate_hz)]) for r in rows
        ]
        waves = torch.from_numpy(np.stack(new)).reshape(*waves.shape[:-1], -1).to(waves.device)
    return _checked(waves, spec, "waveform")


def _checked(waves: Tensor, spec: FbankSpec, name: str) -> Tensor:
    if not waves.numel() or waves.shape[-1] < spec.window:
        raise DataError(
            f"{name}: {waves.shape[-1]} samples at {spec.sample_rate_hz} Hz, expected at least "
            f"{spec.window}, one frame"
        )
    if not waves.isfinite().all():
        raise DataError(f"{name}: holds NaN or infinite samples")
    return waves


def embed_batch(
    loaded: LoadedModel, fbank: Tensor, num_frames: Tensor, level: Level
) -> tuple[Tensor, Tensor]:
    """Embed a batch of filterbanks.

    Args:
        loaded: A model, on the device of the filterbanks.
        fbank: [B, T, F] log-mel before normalisation.
        num_frames: [B], valid frames of each clip.
        level: See :func:`embed`.

    Returns:
        [B, D], or [B, T', D] with NaN after the end of each clip; and the number of valid
        columns [B].
    """
    encoder = loaded.encoder
    embed = encoder.embed
    starts = torch.arange(embed.grid[1], device=fbank.device) * embed.stride[1]
    sound = starts < num_frames.clamp(min=1)[:, None]  # [B, T']
    whole = embed.valid_columns(num_frames)
    if whole is not None:
        sound = torch.arange(embed.grid[1], device=fbank.device) < whole[:, None]
    if level == "frame":
        states = time_states(encoder, layer_states(encoder, fbank, num_frames)[-1])
        return states.masked_fill(~sound[..., None], torch.nan), sound.sum(1)
    pooling = loaded.model.pooling if isinstance(loaded.model, Classifier) else "avgtok"
    return embed_clips(encoder, fbank, pooling, num_frames), sound.sum(1)
