"""The encoder as an upstream of s3prl and SUPERB: waveforms to the hidden states of all layers.

    from ssast.engine.api import ssast_local  # in a hubconf.py

The names ``ssast_*`` have the setting of SUPERB's own SSAST, :class:`UpstreamExpert` that of the
model. s3prl itself is not needed.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssast.engine.checkpoints.classifier import fill_encoder, model_settings
from ssast.engine.config import section_from_plain
from ssast.engine.data.clips import fbank_spec
from ssast.engine.data.waveforms import fbank_windows
from ssast.engine.errors import ConfigError
from ssast.engine.formats.open import MissingMetadata, open_model
from ssast.engine.model.backbones import build_encoder
from ssast.engine.model.encoder import (
    SpectrogramTransformer,
    layer_states,
    residual_states,
    stacked_states,
    time_states,
)
from ssast.engine.settings import Audio, setting
from ssast.kernels.fbank import fbank
from ssast.kernels.patch_embed import patch_grid
from ssast.pipelines.errors import DataError
from ssast.pipelines.text import YAML_BYTES, one_line, parse_yaml, read_text, shown

SAMPLE_RATE_HZ = 16000  # of all waveforms in s3prl
_SUPERB_WINDOW_S = 1.0
_SUPERB_STRIDE = 10  # in both directions; over time 1 in the frame model


@dataclass(frozen=True, kw_only=True)
class UpstreamSettings:
    """Settings of an upstream; None: those of the model, or of SUPERB with ``superb``."""

    superb: bool = False
    """What SUPERB's published SSAST computes: windows of 1 s, one after the other; stride 10 x 10,
    or 1 frame in the frame model; the patches of a column side by side; silence after the end of a
    clip; the outputs of the blocks, without the embeddings and the final norm. The other settings
    override it."""

    window_secs: float | None = setting(None, 1e-2, 1e4)
    """Length of a window in s (SUPERB: 1 for commands, 6 for emotions, 10 for speakers). The
    position embedding is cut or interpolated to it, as in fine-tuning."""

    stride: tuple[int, int] | None = setting(None, 1)
    """Mel bins and frames between two patches; with ``num_frames`` that of the file."""

    stack: bool | None = None
    """Whether the patches of a column are put side by side, [B, T', rows * D], not averaged."""

    num_frames: int | None = setting(None, 1)
    """Frames of the input of a published fine-tuned file, which does not store them; ``stride``
    is needed too."""

    mean: float | None = None
    """Mean of the filterbanks of a published file; that of AudioSet and LibriSpeech if None."""

    std: float | None = setting(None, 1e-6)
    """Standard deviation of the filterbanks, likewise."""


class UpstreamExpert(nn.Module):
    """An upstream of s3prl.

    Waveforms longer than the window are cut into windows, whose columns of patches follow each
    other without a gap; with ``superb`` the windows do, as in SUPERB.

    Args:
        ckpt: Path or name of a model, see :func:`~ssast.engine.formats.open.open_model`.
        model_config: Path of a YAML file of settings, for s3prl's ``-g``; ``settings`` override it.
        refresh: Whether to download the model again; refused if true.
        settings: Those of :class:`UpstreamSettings`.

    Raises:
        CheckpointError: There is no model.
        ConfigError: An unknown or wrong setting, or a model of another sample rate than 16 kHz.
    """

    def __init__(
        self,
        ckpt: str | Path,
        model_config: str | Path | None = None,
        refresh: bool = False,
        **settings: Any,
    ):
        super().__init__()
        if refresh:
            raise ConfigError(
                f"refresh: {ckpt} is downloaded once; to do it again, remove the file that "
                "`ssast weights` prints"
            )
        chosen = _settings(_read(model_config) | settings)
        metadata = MissingMetadata(
            num_frames=chosen.num_frames,
            stride=chosen.stride if chosen.num_frames else None,
            mean=chosen.mean,
            std=chosen.std,
        )
        loaded = open_model(ckpt, metadata)
        if loaded.audio.sample_rate_hz != SAMPLE_RATE_HZ:
            raise ConfigError(
                f"{ckpt}: its sample rate is {loaded.audio.sample_rate_hz} Hz, expected the "
                f"{SAMPLE_RATE_HZ} Hz of s3prl"
            )
        self.superb = chosen.superb
        self.stack = chosen.superb if chosen.stack is None else chosen.stack
        self.encoder, audio = _resized(loaded.encoder, loaded.audio, chosen)
        self.spec, self.mean = fbank_spec(audio), audio.mean

    def get_downsample_rates(self, key: str | None = None) -> int:
        """Return the samples between two hidden states."""
        return self.encoder.embed.stride[1] * self.spec.hop

    def forward(self, wavs: list[Tensor]) -> dict[str, Any]:
        """Compute the hidden states of waveforms.

        Args:
            wavs: Waveforms [S] float32 in [-1, 1], at 16 kHz.

        Returns:
            "hidden_states": of the tokens and of each block a tensor [B, T', D], or with ``stack``
            [B, T', rows * D]; T' is the number of samples of the longest clip over
            :meth:`get_downsample_rates`, rounded up. "last_hidden_state": the last of them. With
            ``superb`` there are none of the tokens, and T' may be smaller: a window has a column
            less where the patches reach over its end.

        Raises:
            ConfigError: The samples are integers.
        """
        found = next((wav.dtype for wav in wavs if not wav.is_floating_point()), None)
        if found is not None:
            raise ConfigError(f"wavs: expected floating-point samples in [-1, 1], got {found}")
        lengths = torch.tensor([len(wav) for wav in wavs], device=wavs[0].device)
        waves = nn.utils.rnn.pad_sequence([wav.float() for wav in wavs], batch_first=True)
        steps = max(1, -(-waves.shape[1] // self.get_downsample_rates()))
        over_time = stacked_states if self.stack else time_states
        windows = [
            [over_time(self.encoder, state) for state in states]
            for states in self._states(waves, lengths, steps)
        ]
        hidden = [torch.cat(layer, 1)[:, :steps] for layer in zip(*windows, strict=True)]
        return {"hidden_states": hidden, "last_hidden_state": hidden[-1]}

    def _states(self, waves: Tensor, lengths: Tensor, steps: int) -> Iterator[list[Tensor]]:
        """Yield the hidden states [B, E + N, D] of all layers, window by window."""
        if self.superb:
            for clips in self._superb_windows(waves):
                yield residual_states(self.encoder, clips)[1:]
            return
        rate, columns = self.get_downsample_rates(), self.encoder.embed.grid[1]
        cut = fbank_windows(waves, lengths, self.spec, columns * rate, end=steps * rate)
        for clips, frames in cut:
            yield layer_states(self.encoder, clips, frames)

    def _superb_windows(self, waves: Tensor) -> Iterator[Tensor]:
        """Yield filterbanks [B, T, F] of windows that fill up with silence.

        The frames that reach over the end of a window are 0 after normalisation.
        """
        size = self.spec.num_frames * self.spec.hop
        count = max(1, -(-waves.shape[1] // size))
        waves = nn.functional.pad(waves, (0, count * size - waves.shape[1]))
        for part in waves.split(size, 1):
            samples = torch.full((len(part),), size, device=part.device)
            clips = fbank(part.contiguous(), samples, self.spec)
            clips[:, 1 + (size - self.spec.window) // self.spec.hop :] = self.mean
            yield clips


def ssast_local(
    ckpt: str | Path,
    model_config: str | Path | None = None,
    refresh: bool = False,
    **settings: Any,
) -> UpstreamExpert:
    """Return the upstream of a model in the setting of SUPERB; see :class:`UpstreamExpert`."""
    return UpstreamExpert(ckpt, model_config, refresh, **{"superb": True} | settings)


def _named(entry_name: str, weights: str) -> Callable[..., UpstreamExpert]:
    """Return an entry of a hubconf for published weights, which are fetched by name."""

    def entry(
        ckpt: str | Path | None = None,
        model_config: str | Path | None = None,
        refresh: bool = False,
        **settings: Any,
    ) -> UpstreamExpert:
        return ssast_local(ckpt or weights, model_config, refresh, **settings)

    entry.__name__ = entry.__qualname__ = entry_name
    entry.__doc__ = f"Return the upstream of {weights} in the setting of SUPERB."
    return entry


ssast_patch_base = _named("ssast_patch_base", "SSAST-Base-Patch-400")
ssast_patch_small = _named("ssast_patch_small", "SSAST-Small-Patch-400")
ssast_patch_tiny = _named("ssast_patch_tiny", "SSAST-Tiny-Patch-400")
ssast_frame_base = _named("ssast_frame_base", "SSAST-Base-Frame-400")
ssast_frame_tiny = _named("ssast_frame_tiny", "SSAST-Tiny-Frame-400")


def _read(path: str | Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        found = parse_yaml(read_text(Path(path), YAML_BYTES))
    except (OSError, ValueError, DataError) as error:
        raise ConfigError(f"{path}: cannot be read: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected settings of the upstream, found {shown(found)}")
    return found


def _settings(given: Mapping[str, Any]) -> UpstreamSettings:
    chosen = section_from_plain(UpstreamSettings, given, "upstream")
    if chosen.num_frames is not None and chosen.stride is None:
        raise ConfigError("upstream.num_frames of a fine-tuned file: upstream.stride is needed too")
    return chosen


def _resized(
    encoder: SpectrogramTransformer, audio: Audio, chosen: UpstreamSettings
) -> tuple[SpectrogramTransformer, Audio]:
    """Return the encoder for windows and patches of the settings, and its input."""
    patch, stride, window_s = encoder.embed.patch, chosen.stride, chosen.window_secs
    if chosen.superb:
        is_frame = patch[0] == audio.n_mels
        stride = stride or ((patch[0], 1) if is_frame else (_SUPERB_STRIDE, _SUPERB_STRIDE))
        window_s = window_s or _SUPERB_WINDOW_S
    stride = stride or encoder.embed.stride
    hop = SAMPLE_RATE_HZ // 100
    frames = int(window_s * SAMPLE_RATE_HZ / hop) if window_s else audio.num_frames
    if min(patch_grid(audio.n_mels, frames, patch, stride)) < 1:
        raise ConfigError(
            f"upstream.window_secs: a window of {frames} frames of 10 ms, expected at least the "
            f"{patch[1]} of a patch"
        )
    if (stride, frames) == (encoder.embed.stride, audio.num_frames):
        return encoder, audio
    new = Audio(**vars(audio) | {"num_frames": frames})
    resized = build_encoder(model_settings(encoder), new, stride)
    fill_encoder(resized, encoder)
    return resized.eval(), new
