"""The encoder that X-ARES evaluates.

    # mine_encoder.py: python -m xares.run mine_encoder.py tasks/esc50_task.py
    from functools import partial

    from ssast.engine import api

    MineEncoder = partial(api.XaresEncoder, "runs/mine")

X-ARES takes the only name in the file that ends in ``Encoder``; it itself is not needed here.
"""

import re
import sys
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ssast.engine.errors import ConfigError
from ssast.engine.evaluation.harness import WaveformEncoder
from ssast.engine.formats.open import LoadedModel
from ssast.pipelines.text import one_line


class XaresEncoder(WaveformEncoder):
    """An encoder of X-ARES: waveforms [B, S] to features [B, T', D].

    X-ARES keeps features and scores under the name of the class and does not compute them again.
    So each encoder has a class of its own, which is named by the model and a hash of its weights.

    Args:
        model: A loaded model, or what :func:`~ssast.engine.formats.open.open_model` opens.
        layer: Layer whose hidden states are taken: its number, or ``last``.

    Attributes:
        sampling_rate: Sample rate of the model in Hz; X-ARES resamples to it.
        output_dim: Dimension D of the features.
        hop_size_in_ms: Time from one column of patches to the next.

    Raises:
        CheckpointError: There is no model.
        ConfigError: The model has no such layer; or X-ARES cannot decode audio here: it would
            leave out all clips.
    """

    def __init__(self, model: LoadedModel | str | Path, *, layer: int | Literal["last"] = "last"):
        super().__init__(model, layer=layer)
        if "xares" in sys.modules:
            check_decoding()
        self.sampling_rate, self.output_dim = self.spec.sample_rate_hz, self.embed_dim
        self.hop_size_in_ms = self.hop_ms
        stem = re.sub(r"\W+", "_", self.name, flags=re.ASCII)
        name = f"{stem}_{self.fingerprint()}_Encoder"
        self.__class__ = type(name, (type(self),), {"__doc__": self.__doc__})

    def forward(self, audio: Tensor) -> Tensor:
        """Compute the features of a batch.

        X-ARES does not say where a clip of a batch ends: zeros at the end count as padding, and
        the features after a clip's end are 0.

        Args:
            audio: [B, S] float32 in [-1, 1], zero-padded.

        Returns:
            [B, T', D] float32.

        Raises:
            DataError: The waveforms have another shape or are shorter than one frame.
        """
        ends = torch.arange(1, audio.shape[-1] + 1, device=audio.device) * (audio != 0)
        longest = torch.full((), audio.shape[-1], device=audio.device)
        lengths = ends.amax(-1).clamp(min=self.spec.window).minimum(longest)
        return self.frames(audio, lengths)


def check_decoding() -> None:
    """Decode a sound as X-ARES does.

    Raises:
        ConfigError: It cannot be decoded. X-ARES leaves out such clips: its features are empty.
    """
    import soundfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.wav"
        soundfile.write(path, np.zeros(1600, np.float32), 16000)
        try:
            import torchaudio

            torchaudio.load(str(path))
        except Exception as error:  # of torchaudio, torchcodec, FFmpeg or the loader of libraries
            raise ConfigError(
                "X-ARES decodes audio by torchaudio, which cannot here, and would leave out all "
                f"clips: install torchcodec and FFmpeg: {one_line(error):.200}"
            ) from error
