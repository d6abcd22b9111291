"""Features of waveforms in memory, one vector for each or for each column of patches."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ssast.engine.data.clips import fbank_spec
from ssast.engine.data.waveforms import fbank_windows
from ssast.engine.errors import ConfigError
from ssast.engine.evaluation.precision import autocast_in
from ssast.engine.evaluation.predict import default_device
from ssast.engine.formats.exportable import check_choices
from ssast.engine.formats.open import LoadedModel, open_model
from ssast.engine.model.classifier import Classifier, embed_clips, pool_clips
from ssast.engine.model.embedding import PatchEmbed
from ssast.engine.model.encoder import SpectrogramTransformer, layer_states, time_states
from ssast.engine.settings import Precision
from ssast.kernels.fbank import FbankSpec, num_frames
from ssast.kernels.matmul import fast_matmul
from ssast.pipelines.audio.convert import resampled
from ssast.pipelines.audio.decode import Item, read_blocks
from ssast.pipelines.errors import DataError, UnusableError
from ssast.pipelines.text import one_line

Level = Literal["clip", "frame"]
Layer = int | Literal["last", "all"]
"""Number of a layer, ``last`` or ``all``: 0 is the patch embedding, n the output of the n-th
transformer block; the last layer is taken after the final norm."""


def embed(
    model: LoadedModel | str | Path,
    audio: Tensor | np.ndarray | str | Path,
    sample_rate_hz: int = 16000,
    *,
    level: Level = "clip",
    layer: Layer = "last",
    precision: Precision = "fp32",
) -> Tensor:
    """Compute the features of a waveform, or of a batch of them, of any length.

    What is longer than the input of the model is embedded window by window.

    Args:
        model: A model, or the path of one, which is opened in each call.
        audio: Waveform [S] or waveforms [B, S], floating point in [-1, 1]; or an audio file.
        sample_rate_hz: Sample rate of the waveforms, which are resampled to that of the model. A
            file has its own.
        level: ``clip`` for one vector a waveform, ``frame`` for one a column of patches.
        layer: Layer whose hidden states are taken, see :data:`Layer`.
        precision: Precision of matmuls and attention.

    Returns:
        [D] or [B, D]; with ``frame`` [T', D] or [B, T', D]; with all layers [L, D], [B, L, D],
        [L, T', D] or [B, L, T', D]. float32, on the device of ``audio``.

    Raises:
        CheckpointError: There is no model at the path.
        ConfigError: The model has no such layer, or there is no such level.
        DataError: The file cannot be read, or the waveform has another shape or type, NaN or
            infinite samples, or is shorter than one frame.
    """
    loaded = model if isinstance(model, LoadedModel) else open_model(model)
    device = default_device()
    loaded.encoder.to(device).eval()
    waves = load_waveforms(audio, sample_rate_hz, fbank_spec(loaded.audio))
    batch = waves.reshape(-1, waves.shape[-1]).to(device)
    lengths = torch.full((len(batch),), batch.shape[1], device=device)
    with autocast_in(precision, device):
        found, _ = embed_waveforms(loaded, batch, lengths, level, layer)
    return found.reshape(*waves.shape[:-1], *found.shape[1:]).to(waves.device)


@fast_matmul()
@torch.no_grad()
def embed_waveforms(
    loaded: LoadedModel, waves: Tensor, lengths: Tensor, level: Level, layer: Layer = "last"
) -> tuple[Tensor, Tensor]:
    """Embed waveforms of any length, window by window; each is embedded as if it were alone.

    Args:
        loaded: A model, on the device of the waveforms.
        waves: [B, S] float32 in [-1, 1] at the sample rate of the model, zero-padded; at least one
            frame.
        lengths: [B] int64, valid samples of each waveform, at least one frame.
        level: See :func:`embed`.
        layer: See :func:`embed`.

    Returns:
        [B, D], or [B, T', D] with the columns of S samples and 0 after the end of each waveform;
        with all layers [B, L, D] or [B, L, T', D]; float32. And the number of valid columns [B].

    Raises:
        ConfigError: The model has no such layer.
    """
    embed, spec = loaded.encoder.embed, fbank_spec(loaded.audio)
    hop = embed.grid[1] * embed.stride[1] * spec.hop
    # A window follows where the one before does not hear all frames. Windows share frames where
    # patches overlap, so it may begin before the end of a waveform that needs no further window.
    follows = spec.num_samples + spec.hop - hop
    vectors, counts = [], []
    end = max(waves.shape[1] - follows, 0) + 1
    for number, (fbank, frames) in enumerate(fbank_windows(waves, lengths, spec, hop, end)):
        window, held = embed_batch(loaded, fbank, frames, level, layer)
        if number:
            held = held.where(lengths - number * hop >= follows, 0)
        if level == "frame":
            rest = torch.tensor(num_frames(waves.shape[1] - number * hop, spec))
            valid = torch.arange(window.shape[-2], device=waves.device) < held[:, None]
            window = window.where(_as_rows(valid[..., None], window), 0)
            window = window[..., : int(_columns(embed, rest)), :]
        else:
            window = window * _as_rows(held, window)
        vectors.append(window)
        counts.append(held)
    total = torch.stack(counts).sum(0)
    if level == "frame":
        return torch.cat(vectors, -2).float(), total
    summed = torch.stack(vectors).sum(0)
    return (summed / _as_rows(total, summed)).float(), total


def _as_rows(values: Tensor, vectors: Tensor) -> Tensor:
    """Shape values [B] or [B, T', 1] to stand beside vectors [B, *, D] or [B, *, T', D]."""
    missing = vectors.ndim - values.ndim
    return values.reshape(len(values), *[1] * missing, *values.shape[1:])


def load_waveforms(
    audio: Tensor | np.ndarray | str | Path, sample_rate_hz: int, spec: FbankSpec
) -> Tensor:
    """Return audio as float32 [S] or [B, S] at the sample rate of a model.

    Args:
        audio: See :func:`embed`.
        sample_rate_hz: See :func:`embed`.
        spec: Filterbank settings of the model.

    Raises:
        DataError: See :func:`embed`.
    """
    if isinstance(audio, str | Path):
        try:
            sound = read_blocks(Item(str(audio), Path(audio)), spec.channel)
            blocks = resampled(sound, spec.sample_rate_hz)
            waves = torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *blocks]))
        except UnusableError as error:
            raise DataError(f"{audio}: {error}") from error
        return _checked(waves, spec, str(audio))
    if isinstance(audio, np.ndarray):  # torch takes no other byte order, and no negative strides
        audio = np.ascontiguousarray(audio, audio.dtype.newbyteorder("="))
    try:
        waves = torch.as_tensor(audio).detach()
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(
            f"waveform: expected [S] or [B, S] floating-point samples, got {type(audio).__name__}: "
            f"{one_line(error):.200}"
        ) from error
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
    if waves.ndim == 2 and not len(waves):
        raise DataError(f"{name}: expected one or more waveforms, got {list(waves.shape)}")
    if waves.shape[-1] < spec.window:
        raise DataError(
            f"{name}: {waves.shape[-1]} samples at {spec.sample_rate_hz} Hz, expected at least "
            f"{spec.window}, one frame"
        )
    if not waves.isfinite().all():
        raise DataError(f"{name}: holds NaN or infinite samples")
    return waves


def embed_batch(
    loaded: LoadedModel, fbank: Tensor, frames: Tensor, level: Level, layer: Layer = "last"
) -> tuple[Tensor, Tensor]:
    """Embed a batch of filterbanks.

    Args:
        loaded: A model, on the device of the filterbanks.
        fbank: [B, T, F] log-mel before normalisation.
        frames: [B], valid frames of each clip.
        level: See :func:`embed`.
        layer: See :func:`embed`.

    Returns:
        [B, D], or [B, T', D] with NaN after the end of each clip; with all layers [B, L, D] or
        [B, L, T', D]; float32 at least, also under autocast. And the number of valid columns [B].

    Raises:
        ConfigError: The model has no such layer, or there is no such level.
    """
    pooling = loaded.model.pooling if isinstance(loaded.model, Classifier) else "avgtok"
    return embed_encoder(loaded.encoder, fbank, frames, level, layer, pooling)


def embed_encoder(
    encoder: SpectrogramTransformer,
    fbank: Tensor,
    frames: Tensor,
    level: Level,
    layer: Layer = "last",
    pooling: Literal["avgtok", "cls"] = "avgtok",
) -> tuple[Tensor, Tensor]:
    """Embed a batch of filterbanks by an encoder alone; see :func:`embed_batch`."""
    check_choices(level=(level, Level))
    held = _columns(encoder.embed, frames)
    if level == "clip" and layer == "last":
        return embed_clips(encoder, fbank, pooling, frames), held
    check_layer(encoder, layer)
    states = layer_states(encoder, fbank, frames)
    chosen = states if layer == "all" else [states[-1 if layer == "last" else layer]]
    # Under autocast the patch embedding is rounded: means of it are to be exact.
    chosen = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in chosen]
    if level == "clip":
        vectors = torch.stack([pool_clips(encoder, x, pooling, frames) for x in chosen], 1)
    else:
        vectors = torch.stack([time_states(encoder, x) for x in chosen], 1)
        ended = torch.arange(vectors.shape[2], device=fbank.device) >= held[:, None]
        vectors = vectors.masked_fill(ended[:, None, :, None], torch.nan)
    return vectors if layer == "all" else vectors[:, 0], held


def check_layer(encoder: SpectrogramTransformer, layer: Layer) -> None:
    """Check that an encoder has a layer.

    Raises:
        ConfigError: It has not.
    """
    depth = len(encoder.blocks)
    number = isinstance(layer, int) and not isinstance(layer, bool)
    if layer not in ("last", "all") and not (number and 0 <= layer <= depth):  # type: ignore[operator]
        raise ConfigError(
            f"layer: expected 0 to {depth}, last or all, found {layer!r}: the model has {depth} "
            "transformer blocks, 0 is its patch embedding"
        )


def _columns(embed: PatchEmbed, frames: Tensor) -> Tensor:
    """Return the columns of patches that valid frames [B] fill, at least one."""
    whole = embed.valid_columns(frames)
    if whole is not None:
        return whole
    begun = torch.div(frames + embed.stride[1] - 1, embed.stride[1], rounding_mode="floor")
    return begun.clamp(1, embed.grid[1])
