"""Export a model without our operations, by torch.export or to ONNX.

It is fed log-mel filterbanks, or waveforms: then the filterbank is inside. Both files say what they
are fed and what comes out, as strings by name (JSON but for the input and the two last):

    input         fbank or waveform
    audio         settings of the filterbank before normalisation, how clips are padded and cut
    labels        names of the classes as they are shown, in the order of the logits
    label_ids     their labels, the ids of a table of classes
    activation    what makes probabilities of the logits: softmax or sigmoid
    problem_type  the same in the words of transformers

They are the extra files of ``torch.export``, and the metadata of ONNX.
"""

import io
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssast.engine.data.clips import fbank_spec
from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.formats.exportable import check_choices, check_classes, check_exportable
from ssast.engine.formats.huggingface_config import PROBLEM_TYPES, Loss
from ssast.engine.formats.timm_trunk import Trunk
from ssast.engine.model.classifier import ACTIVATIONS, Classifier, pool
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.settings import Audio
from ssast.kernels.fbank import fbank_reference
from ssast.kernels.mel import EPS, PREEMPHASIS, FbankSpec
from ssast.pipelines.files import write_atomically

Input = Literal["fbank", "waveform"]

INPUTS: dict[Input, tuple[str, ...]] = {
    "fbank": ("fbank",),
    "waveform": ("waveform", "num_samples"),
}
"""Names of the inputs of a file, by what it is fed."""

OUTPUT = "output"
ONNX_OPSET = 18


class Portable(nn.Module):
    """A model in PyTorch's own operations, which shares the weights of the original.

    It maps log-mel filterbanks [B, T, F] to the logits [B, classes] of a classifier, or to the
    hidden states [B, E + N, D] of an encoder.
    """

    def __init__(self, model: Classifier | SpectrogramTransformer):
        super().__init__()
        encoder = model.encoder if isinstance(model, Classifier) else model
        self.trunk = Trunk(encoder)
        for unused in ("head", "head_dist")[: encoder.num_extra_tokens]:
            delattr(self.trunk, unused)
        self.mean, self.std = encoder.embed.mean, encoder.embed.std
        self.pooling = model.pooling if isinstance(model, Classifier) else None
        self.head = model.head if isinstance(model, Classifier) else None

    def forward(self, fbank: Tensor) -> Tensor:
        """Map filterbanks [B, T, F] before normalisation to logits or hidden states."""
        v, B = self.trunk, fbank.shape[0]  # len() would make it a constant
        image = ((fbank - self.mean) / (2 * self.std)).transpose(1, 2).unsqueeze(1)
        extra = v.extra_tokens.expand(B, -1, -1)
        hidden = v.encode(torch.cat((extra, v.patch_embed(image)), 1) + v.pos_embed)
        if self.head is None or self.pooling is None:
            return hidden
        return self.head(pool(hidden, self.pooling, v.extra_tokens.shape[1]))


class WaveformPortable(nn.Module):
    """A portable model that is fed waveforms: the filterbank, then the model.

    The filterbank is in float64: a weak band beside a strong one keeps its digits.
    """

    def __init__(self, model: Portable, spec: FbankSpec):
        super().__init__()
        self.model, self.spec = model, spec

    def forward(self, waveform: Tensor, num_samples: Tensor) -> Tensor:
        """Map waveforms [B, S] and the lengths of their clips [B] to logits or hidden states.

        Clips longer than the model's input are cut at the end; what lies beyond a clip's end is
        not heard.
        """
        longest = self.spec.num_samples
        lengths = num_samples.clamp(max=waveform.shape[1])
        padded = nn.functional.pad(waveform, (0, longest))[:, :longest]
        return self.model(fbank_reference(padded.double(), lengths, self.spec).float())


def export_program(
    model: Classifier | SpectrogramTransformer, audio: Audio, fed: Input = "fbank"
) -> torch.export.ExportedProgram:
    """Export the model by ``torch.export``, for any number of clips."""
    module, example, shapes = _traced(model, audio, fed)
    return torch.export.export(module, example, dynamic_shapes=shapes, strict=False)


def _traced(
    model: Classifier | SpectrogramTransformer, audio: Audio, fed: Input
) -> tuple[nn.Module, tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """Return what is traced: the module, an example of its inputs, their dynamic shapes."""
    spec, portable = fbank_spec(audio), Portable(model).eval()
    batch = torch.export.Dim("batch", min=1)
    # Two clips: of one, it would take the number for a constant.
    if fed == "fbank":
        example = (torch.zeros(2, audio.num_frames, audio.n_mels),)
        return portable, example, ({0: batch},)
    samples = torch.export.Dim("samples", min=1)
    waves = torch.zeros(2, spec.num_samples + 1), torch.full((2,), spec.num_samples)
    return WaveformPortable(portable, spec).eval(), waves, ({0: batch, 1: samples}, {0: batch})


def save_program(
    model: Classifier | SpectrogramTransformer,
    path: str | Path,
    audio: Audio,
    labels: Sequence[str] | None = None,
    loss: Loss | None = None,
    names: Sequence[str] | None = None,
    *,
    fed: Input = "fbank",
) -> Path:
    """Write a file for ``torch.export.load(path).module()``, usually called .pt2.

    Args:
        model: Model on the CPU, in float32.
        path: Path of the file.
        audio: Settings of its input.
        labels: Labels of the classes, in the order of the logits.
        loss: Loss that a classifier was trained with, which says what makes probabilities of the
            logits.
        names: Display names of the classes; if None, the labels.
        fed: What the file is fed: ``fbank`` [B, T, F], log-mel filterbanks before normalisation; or
            ``waveform`` [B, S], at ``audio.sample_rate_hz`` in [-1, 1], and ``num_samples`` [B]
            int64, the samples of each clip.

    Raises:
        CheckpointError: It cannot be written.
        ConfigError: The model is wrapped or changed, the audio is not its own, labels or names do
            not fit the classes, or there is no such loss or input.
    """
    extra = _metadata(model, audio, labels, loss, names, fed)
    path = _made(path)
    content = io.BytesIO()  # PyTorch's writer ends the process where a disk is full
    torch.export.save(export_program(model, audio, fed), content, extra_files=extra)
    try:
        write_atomically(path, content.getvalue())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path


def save_onnx(
    model: Classifier | SpectrogramTransformer,
    path: str | Path,
    audio: Audio,
    labels: Sequence[str] | None = None,
    loss: Loss | None = None,
    names: Sequence[str] | None = None,
    *,
    fed: Input = "fbank",
) -> Path:
    """Write an ONNX file, whose output is called ``output``.

    Args:
        model: Model on the CPU, in float32.
        path: Path of the file; weights above 2 GB go into a second one beside it.
        audio: Settings of its input.
        labels: As for :func:`save_program`.
        loss: Likewise.
        names: Likewise.
        fed: Likewise; the inputs have these names.

    Raises:
        CheckpointError: It cannot be written.
        ConfigError: See :func:`save_program`; or the packages of the extra ``onnx`` are not
            installed.
    """
    extra = _metadata(model, audio, labels, loss, names, fed)
    path = _made(path)
    try:
        import onnxscript  # noqa: F401  # what torch.onnx needs
    except ImportError as error:
        raise ConfigError(
            'ONNX needs the packages onnx and onnxscript: pip install "ssast-engine[onnx]"'
        ) from error
    module, example, shapes = _traced(model, audio, fed)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the converter, on its own use of PyTorch
        converted = torch.onnx.export(
            module,
            example,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=INPUTS[fed],
            output_names=[OUTPUT],
            opset_version=ONNX_OPSET,
            verbose=False,
        )
    assert converted is not None
    converted.model.metadata_props.update(extra)
    try:
        converted.save(path, external_data=_bytes(model) > 2 * 10**9)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def _metadata(
    model: Classifier | SpectrogramTransformer,
    audio: Audio,
    labels: Sequence[str] | None,
    loss: Loss | None,
    names: Sequence[str] | None,
    fed: Input,
) -> dict[str, str]:
    check_exportable(model, audio, "an exported program")
    check_choices(loss=(loss, Loss), fed=(fed, Input))
    spec = fbank_spec(audio)
    settings = {
        "sample_rate_hz": spec.sample_rate_hz,
        "channel": spec.channel,
        "n_mels": spec.n_mels,
        "num_frames": spec.num_frames,
        "num_samples": spec.num_samples,
        "window": spec.window,
        "hop": spec.hop,
        "n_fft": spec.n_fft,
        "snip_edges": True,
        "window_type": "hanning",
        "preemphasis": PREEMPHASIS,
        "low_hz": spec.low_hz,
        "high_hz": spec.sample_rate_hz / 2,
        "mel_floor": EPS,
        "mean": audio.mean,
        "std": audio.std,
        "truncation_side": "right",
        "padding_side": "right",
        "padding_value": 0.0,
    }
    found = {"input": fed, "audio": json.dumps(settings)}
    if labels is not None and isinstance(model, Classifier):
        ids, shown = check_classes(model, labels, names)
        found |= {"labels": json.dumps(shown), "label_ids": json.dumps(ids)}
    if loss is not None:
        found |= {"activation": ACTIVATIONS[loss], "problem_type": PROBLEM_TYPES[loss]}
    return found


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _made(path: str | Path) -> Path:
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
    return path
