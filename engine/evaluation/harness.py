"""A model as evaluation harnesses call it: zero-padded waveforms to features."""

import hashlib
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ssast.engine.data.clips import fbank_spec
from ssast.engine.errors import ConfigError
from ssast.engine.evaluation.features import check_layer, embed_waveforms
from ssast.engine.formats.open import LoadedModel, open_model
from ssast.engine.model.classifier import Classifier
from ssast.kernels.mel import HOP_MS, WINDOW_MS
from ssast.pipelines.errors import DataError

Pooling = Literal["model", "time"]


class WaveformEncoder(nn.Module):
    """An encoder of waveforms of any length; harnesses move it to their device.

    Args:
        model: A loaded model, or what :func:`~ssast.engine.formats.open.open_model` opens.
        pooling: ``model`` pools a clip as ``ssast embed`` does: the mean of the patch tokens, or
            cls and dist of a classifier that was trained so. ``time``: mean over time of the
            features of each column of patches.
        layer: Layer whose hidden states are taken: its number, or ``last``.

    Raises:
        CheckpointError: There is no model.
        ConfigError: The pooling is unknown, or the model has no such layer.
    """

    def __init__(
        self,
        model: LoadedModel | str | Path,
        *,
        pooling: Pooling = "model",
        layer: int | Literal["last"] = "last",
    ):
        super().__init__()
        if pooling not in get_args(Pooling):
            raise ConfigError(f"pooling: expected model or time, found {pooling!r}")
        self.loaded = model if isinstance(model, LoadedModel) else open_model(model)
        self.encoder, self.spec = self.loaded.encoder.eval(), fbank_spec(self.loaded.audio)
        if layer == "all":  # as a file of settings may say
            raise ConfigError("layer: expected one layer, found 'all'")
        check_layer(self.encoder, layer)
        self.pooling, self.layer = pooling, layer

    @property
    def embed_dim(self) -> int:
        """Dimension D of the features."""
        return self.encoder.embed_dim

    @property
    def hop_ms(self) -> int:
        """Time from one column of patches to the next, in ms."""
        return self.encoder.embed.stride[1] * HOP_MS

    def timestamps_ms(self, columns: int) -> Tensor:
        """Return the centres of the first columns of patches, [columns] float32, in ms."""
        width = (self.encoder.embed.patch[1] - 1) * HOP_MS + WINDOW_MS
        return torch.arange(columns, dtype=torch.float32) * self.hop_ms + width / 2

    def frames(self, waves: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Compute the features of each column of patches.

        Args:
            waves: [B, S] float32 in [-1, 1], at the sample rate of the model, zero-padded.
            lengths: [B], valid samples of each waveform; None: all are valid.

        Returns:
            [B, T', D] float32, 0 after the end of each waveform.

        Raises:
            DataError: The waveforms have another shape, or one is shorter than one frame.
        """
        return embed_waveforms(self.loaded, *self._checked(waves, lengths), "frame", self.layer)[0]

    def clips(self, waves: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Compute one vector for each clip, [B, D] float32; see :meth:`frames`."""
        level: Literal["clip", "frame"] = "clip" if self.pooling == "model" else "frame"
        checked = self._checked(waves, lengths)
        found, columns = embed_waveforms(self.loaded, *checked, level, self.layer)
        return found if level == "clip" else found.sum(1) / columns[:, None]

    @property
    def name(self) -> str:
        """Name of the model: of the hub owner and name, else that of its file or folder."""
        path = self.loaded.path
        if path.parent.name == "snapshots":  # of a commit
            return path.parents[1].name.removeprefix("models--").replace("--", "_")
        return path.stem

    def fingerprint(self) -> str:
        """Hash the weights, the settings of the input, pooling and layer to 12 hexadecimal digits.

        Harnesses keep features and scores under the name of a model, and take those that are there.
        """
        model, embed = self.loaded.model, self.encoder.embed
        pooling = model.pooling if isinstance(model, Classifier) else ""
        settings = (self.loaded.audio, embed.patch, embed.stride, pooling, self.pooling, self.layer)
        found = hashlib.sha256(repr(settings).encode())
        for name, tensor in sorted(self.encoder.state_dict().items()):
            if name.endswith("mask_embed"):  # nothing is masked; of a file without it, it is random
                continue
            found.update(f"{name} {list(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
        return found.hexdigest()[:12]

    def _checked(self, waves: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        if waves.ndim != 2 or not waves.is_floating_point():
            raise DataError(
                f"waveforms: expected [B, S] floating-point samples, got {list(waves.shape)} "
                f"{waves.dtype}"
            )
        if lengths is None:
            lengths = torch.full((len(waves),), waves.shape[1], device=waves.device)
        if int(lengths.min()) < self.spec.window:
            raise DataError(
                f"waveform {int(lengths.argmin())} of a batch: {int(lengths.min())} samples at "
                f"{self.spec.sample_rate_hz} Hz, expected at least {self.spec.window}, one frame"
            )
        if not waves.isfinite().all():
            raise DataError("waveforms: hold NaN or infinite samples")
        return waves.float(), lengths
