"""The common API of HEAR 2021, as a module that its tools import.

    python -m hearvalidator.validate ssast.engine.evaluation.hear --model runs/mine

``heareval`` keeps its results under the name of this module and the ``--model-options``. There
{"model_file_path": "runs/mine"} keeps those of models apart, and also takes names and addresses.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from ssast.engine.errors import ConfigError
from ssast.engine.evaluation.features import load_waveforms
from ssast.engine.evaluation.harness import Pooling, WaveformEncoder
from ssast.engine.formats.open import MissingMetadata, open_model

SAMPLE_RATES_HZ = (16000, 22050, 44100, 48000)
"""The sample rates in which HEAR has its recordings."""


class HearModel(WaveformEncoder):
    """A model of HEAR.

    Attributes:
        sample_rate: Sample rate in Hz of the recordings that HEAR gives: that of the model, or
            the next higher of :data:`SAMPLE_RATES_HZ`, from which they are resampled.
        scene_embedding_size: Dimension of a scene embedding.
        timestamp_embedding_size: Dimension of a timestamp embedding.
    """

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        rate = self.spec.sample_rate_hz
        self.sample_rate = min(
            (hz for hz in SAMPLE_RATES_HZ if hz >= rate), default=max(SAMPLE_RATES_HZ)
        )
        self.scene_embedding_size = self.timestamp_embedding_size = self.embed_dim


def load_model(
    model_file_path: str = "",
    pooling: Pooling = "model",
    layer: int | Literal["last"] = "last",
    **metadata: Any,
) -> HearModel:
    """Load a model.

    Args:
        model_file_path: What :func:`~ssast.engine.formats.open.open_model` opens.
        pooling: Of scene embeddings: ``model`` as ``ssast embed``, or ``time``, the mean over time.
        layer: See :class:`~ssast.engine.evaluation.harness.WaveformEncoder`.
        metadata: Fields of :class:`~ssast.engine.formats.open.MissingMetadata`, which a published
            fine-tuned file lacks.

    Raises:
        CheckpointError: There is no model.
        ConfigError: No model is named, or an option is unknown or wrong.
        DataError: The table of classes is wrong.
    """
    if not model_file_path:
        raise ConfigError(
            "model_file_path is not set: give a model, such as --model-options "
            """'{"model_file_path": "runs/mine"}'"""
        )
    known = vars(MissingMetadata())
    for key in metadata:
        if key not in known:
            raise ConfigError(f"{key}: expected pooling, layer or one of {', '.join(known)}")
    given: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in metadata.items()
    }
    loaded = open_model(model_file_path, MissingMetadata(**given))
    return HearModel(loaded, pooling=pooling, layer=layer)


def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """Compute one embedding for each column of patches.

    Args:
        audio: [B, S] float32 in [-1, 1] at ``model.sample_rate``.
        model: What :func:`load_model` returns, on the device of ``audio``.

    Returns:
        Embeddings [B, T', D] float32, and the centres of the columns [B, T'] float32 in ms.

    Raises:
        DataError: The audio has another shape, or is shorter than one frame.
    """
    found = model.frames(_resampled(audio, model))
    stamps = model.timestamps_ms(found.shape[1]).to(found.device)
    return found, stamps.expand(len(found), -1)


def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """Compute one embedding [B, D] float32 for each clip; see :func:`get_timestamp_embeddings`."""
    return model.clips(_resampled(audio, model))


def _resampled(audio: Tensor, model: HearModel) -> Tensor:
    audio = torch.as_tensor(audio)
    if model.sample_rate == model.spec.sample_rate_hz:
        return audio
    return load_waveforms(audio, model.sample_rate, model.spec)
