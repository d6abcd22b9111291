"""The encoder as an upstream of s3prl and SUPERB: waveforms to the hidden states of all layers.

    from ssast.engine.upstream import UpstreamExpert

    def ssast_local(ckpt, *args, **kwargs):  # in a hubconf.py
        return UpstreamExpert(ckpt, **kwargs)

s3prl itself is not needed.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssast.engine.clips import fbank_spec
from ssast.engine.model import NUM_EXTRA_TOKENS, SpectrogramTransformer
from ssast.engine.opening import open_model
from ssast.kernels.attention import real_keys
from ssast.kernels.fbank import fbank, num_frames
from ssast.kernels.masking import real_patches


def layer_states(
    encoder: SpectrogramTransformer, clips: Tensor, lengths: Tensor | None = None
) -> list[Tensor]:
    """Hidden states of every layer, with nothing masked.

    Args:
        encoder: Of the clips.
        clips: [B, T, F] log-mel before normalisation.
        lengths: [B], frames that hold sound; see ``audio.ignore_padding``.

    Returns:
        Tokens before the first block, and after each block, the last after the final norm:
        ``depth + 1`` tensors [B, 2 + N, D].
    """
    masks = encoder.no_masks(len(clips), lengths)
    real = real_patches(masks)
    keys = None
    if real is not None:
        keys = real_keys(nn.functional.pad(real, (NUM_EXTRA_TOKENS, 0), value=True))
    x, _, _ = encoder.embed(clips, masks)
    states = [x]
    for block in encoder.blocks:
        states.append(block(states[-1], keys=keys))
    return [*states[:-1], encoder.norm(states[-1])]


def over_time(encoder: SpectrogramTransformer, hidden: Tensor) -> Tensor:
    """One vector for each column of patches, [B, T', D]: the mean over its rows.

    Args:
        encoder: Which made the states.
        hidden: [B, 2 + N, D].
    """
    return hidden[:, NUM_EXTRA_TOKENS:].unflatten(1, encoder.embed.grid).mean(1)


class UpstreamExpert(nn.Module):
    """What s3prl calls an upstream.

    Waveforms longer than the input of the model are cut into windows, whose columns of patches
    follow each other without a gap.

    Args:
        ckpt: What :func:`~ssast.engine.opening.open_model` opens.
        settings: s3prl's own; not used.

    Raises:
        CheckpointError: There is no model.
    """

    def __init__(self, ckpt: str | Path, *args: Any, **settings: Any):
        super().__init__()
        opened = open_model(ckpt)
        self.encoder, self.spec = opened.encoder, fbank_spec(opened.audio)

    def get_downsample_rates(self, key: str | None = None) -> int:
        """Samples between two hidden states."""
        return self.encoder.embed.stride[1] * self.spec.hop

    def forward(self, wavs: list[Tensor]) -> dict[str, Any]:
        """Hidden states of waveforms.

        Args:
            wavs: Of each clip [S] float32 in [-1, 1] at the sample rate of the model.

        Returns:
            "hidden_states": of the tokens and of each block a tensor [B, T', D], where T' is the
            number of samples of the longest clip over :meth:`get_downsample_rates`, at least 1;
            "last_hidden_state": the last of them.
        """
        rate, columns = self.get_downsample_rates(), self.encoder.embed.grid[1]
        lengths = torch.tensor([len(wav) for wav in wavs], device=wavs[0].device)
        centred = [wav.float() - wav.float().mean() for wav in wavs]
        waves = nn.utils.rnn.pad_sequence(centred, batch_first=True)
        steps = max(1, waves.shape[1] // rate)
        windows = []
        for start in range(0, steps * rate, columns * rate):
            part = waves[:, start : start + self.spec.num_samples]
            samples = (lengths - start).clamp(0, part.shape[1])
            clips = fbank(part.contiguous(), samples, self.spec)
            frames = num_frames(samples, self.spec)
            states = layer_states(self.encoder, clips, frames)
            windows.append([over_time(self.encoder, state) for state in states])
        hidden = [torch.cat(layer, 1)[:, :steps] for layer in zip(*windows, strict=True)]
        return {"hidden_states": hidden, "last_hidden_state": hidden[-1]}
