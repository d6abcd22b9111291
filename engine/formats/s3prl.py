"""The encoder as an upstream of s3prl and SUPERB: waveforms to the hidden states of all layers.

    from ssast.engine.api import UpstreamExpert

    def ssast_local(ckpt, *args, **kwargs):  # in a hubconf.py
        return UpstreamExpert(ckpt, **kwargs)

s3prl itself is not needed.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssast.engine.data.clips import fbank_spec
from ssast.engine.data.waveforms import fbank_windows
from ssast.engine.formats.open import open_model
from ssast.engine.model.encoder import layer_states, time_states


class UpstreamExpert(nn.Module):
    """An upstream of s3prl.

    Waveforms longer than the input of the model are cut into windows, whose columns of patches
    follow each other without a gap.

    Args:
        ckpt: Path of a model, see :func:`~ssast.engine.formats.open.open_model`.
        settings: Settings of s3prl; not used.

    Raises:
        CheckpointError: There is no model.
    """

    def __init__(self, ckpt: str | Path, *args: Any, **settings: Any):
        super().__init__()
        loaded = open_model(ckpt)
        self.encoder, self.spec = loaded.encoder, fbank_spec(loaded.audio)

    def get_downsample_rates(self, key: str | None = None) -> int:
        """Return the samples between two hidden states."""
        return self.encoder.embed.stride[1] * self.spec.hop

    def forward(self, wavs: list[Tensor]) -> dict[str, Any]:
        """Compute the hidden states of waveforms.

        Args:
            wavs: Waveforms [S] float32 in [-1, 1], at the sample rate of the model.

        Returns:
            "hidden_states": of the tokens and of each block a tensor [B, T', D], where T' is the
            number of samples of the longest clip over :meth:`get_downsample_rates`, at least 1;
            "last_hidden_state": the last of them.
        """
        rate, columns = self.get_downsample_rates(), self.encoder.embed.grid[1]
        lengths = torch.tensor([len(wav) for wav in wavs], device=wavs[0].device)
        waves = nn.utils.rnn.pad_sequence([wav.float() for wav in wavs], batch_first=True)
        steps = max(1, waves.shape[1] // rate)
        cut = fbank_windows(waves, lengths, self.spec, columns * rate, end=steps * rate)
        windows = []
        for clips, frames in cut:
            states = layer_states(self.encoder, clips, frames)
            windows.append([time_states(self.encoder, state) for state in states])
        hidden = [torch.cat(layer, 1)[:, :steps] for layer in zip(*windows, strict=True)]
        return {"hidden_states": hidden, "last_hidden_state": hidden[-1]}
