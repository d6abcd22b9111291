"""Export a model without our operations, by torch.export or to ONNX.

Both files say what they are fed and what comes out, as strings by name (JSON but for the
activation): the extra files of ``torch.export``, the metadata of ONNX.

    audio       settings of the filterbank, the input before normalisation
    activation  what makes probabilities of the logits: softmax or sigmoid
    labels      names of the classes as they are shown, in the order of the logits
    label_ids   their labels, the ids of a table of classes
"""

import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ssast.engine.data.clips import fbank_spec
from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.formats.ast_model import Trunk
from ssast.engine.model.classifier import Classifier, pool
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.settings import Audio
from ssast.kernels.mel import PREEMPHASIS

INPUT, OUTPUT = "fbank", "output"
ONNX_OPSET = 18


class Portable(nn.Module):
    """A model in PyTorch's own operations, which shares the weights of the original.

    It maps log-mel filterbanks [B, T, F] to the logits [B, classes] of a classifier, or to the
    hidden states [B, 2 + N, D] of an encoder.
    """

    def __init__(self, model: Classifier | SpectrogramTransformer):
        super().__init__()
        encoder = model.encoder if isinstance(model, Classifier) else model
        self.trunk = Trunk(encoder)
        del self.trunk.head, self.trunk.head_dist
        self.mean, self.std = encoder.embed.mean, encoder.embed.std
        self.pooling = model.pooling if isinstance(model, Classifier) else None
        self.head = model.head if isinstance(model, Classifier) else None

    def forward(self, fbank: Tensor) -> Tensor:
        """Map filterbanks [B, T, F] before normalisation to logits or hidden states."""
        v, B = self.trunk, fbank.shape[0]  # len() would make it a constant
        image = ((fbank - self.mean) / (2 * self.std)).transpose(1, 2).unsqueeze(1)
        extra = (v.cls_token.expand(B, -1, -1), v.dist_token.expand(B, -1, -1))
        hidden = v.encode(torch.cat((*extra, v.patch_embed(image)), 1) + v.pos_embed)
        if self.head is None or self.pooling is None:
            return hidden
        return self.head(pool(hidden, self.pooling))


def export_program(
    model: Classifier | SpectrogramTransformer, audio: Audio
) -> torch.export.ExportedProgram:
    """Export the model by ``torch.export``, for any number of clips."""
    portable = Portable(model).eval()
    # Two clips: of one, it would take the number for a constant.
    example = torch.zeros(2, audio.num_frames, audio.n_mels)
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(portable, (example,), dynamic_shapes=({0: batch},), strict=False)


def save_program(
    model: Classifier | SpectrogramTransformer,
    path: str | Path,
    audio: Audio,
    labels: Sequence[str] | None = None,
    activation: str | None = None,
    names: Sequence[str] | None = None,
) -> Path:
    """Write a file for ``torch.export.load(path).module()``, usually called .pt2.

    Args:
        model: Model on the CPU, in float32.
        path: Path of the file.
        audio: Settings of its input.
        labels: Labels of the classes, in the order of the logits.
        activation: What makes probabilities of the logits; see
            :data:`~ssast.engine.model.classifier.ACTIVATIONS`.
        names: Display names of the classes; if None, the labels.

    Raises:
        CheckpointError: It cannot be written.
    """
    path = _made(path)
    try:
        with open(path, "wb") as file:
            extra = _metadata(audio, labels, activation, names)
            torch.export.save(export_program(model, audio), file, extra_files=extra)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def save_onnx(
    model: Classifier | SpectrogramTransformer,
    path: str | Path,
    audio: Audio,
    labels: Sequence[str] | None = None,
    activation: str | None = None,
    names: Sequence[str] | None = None,
) -> Path:
    """Write an ONNX file: input ``fbank`` [batch, T, F], output ``output``.

    Args:
        model: Model on the CPU, in float32.
        path: Path of the file; weights above 2 GB go into a second one beside it.
        audio: Settings of its input.
        labels: As for :func:`save_program`.
        activation: Likewise.
        names: Likewise.

    Raises:
        CheckpointError: It cannot be written.
        ConfigError: The packages of the extra ``onnx`` are not installed.
    """
    path = _made(path)
    try:
        import onnxscript  # noqa: F401  # what torch.onnx needs
    except ImportError as error:
        raise ConfigError(
            'ONNX needs the packages onnx and onnxscript: pip install "ssast-engine[onnx]"'
        ) from error
    example = torch.zeros(2, audio.num_frames, audio.n_mels)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the converter, on its own use of PyTorch
        converted = torch.onnx.export(
            Portable(model).eval(),
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=ONNX_OPSET,
            verbose=False,
        )
    assert converted is not None
    converted.model.metadata_props.update(_metadata(audio, labels, activation, names))
    try:
        converted.save(path, external_data=_bytes(model) > 2 * 10**9)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def _metadata(
    audio: Audio,
    labels: Sequence[str] | None,
    activation: str | None,
    names: Sequence[str] | None,
) -> dict[str, str]:
    spec = fbank_spec(audio)
    settings = {
        "sample_rate_hz": spec.sample_rate_hz,
        "n_mels": spec.n_mels,
        "num_frames": spec.num_frames,
        "window": spec.window,
        "hop": spec.hop,
        "n_fft": spec.n_fft,
        "window_type": "hanning",
        "preemphasis": PREEMPHASIS,
        "low_hz": spec.low_hz,
        "high_hz": spec.sample_rate_hz / 2,
        "mean": audio.mean,
        "std": audio.std,
    }
    found = {"audio": json.dumps(settings)}
    if labels is not None:
        shown = labels if names is None else names
        found |= {"labels": json.dumps(list(shown)), "label_ids": json.dumps(list(labels))}
    return found if activation is None else found | {"activation": activation}


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _made(path: str | Path) -> Path:
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
    return path
