"""Folders for Hugging Face transformers, out and in; written and read without transformers.

A patch model that pools cls and dist is exactly transformers' AST: its folder names the stock
classes. What AST has not (frame patches, the mean of the patch tokens, fixed positions, one extra
token, post-norm blocks) goes into a folder with its own small model file (modeling_ssast.py), to be
loaded with ``trust_remote_code=True``.

In a stock folder all LayerNorms have one epsilon, the encoder's 1e-6; our head has 1e-5, as
published. That changes its logits by 4.5e-6 / variance of the pooled hidden states, relatively.
"""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor, nn

from ssast.engine.checkpoints.store import read_safetensors, save_tensors
from ssast.engine.checkpoints.weights import Weights, check_names, check_tensors, sketch
from ssast.engine.config import finetune_settings
from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.formats.exportable import check_choices, check_classes, check_exportable
from ssast.engine.formats.huggingface_config import (
    CONFIG,
    OWN,
    REMOTE_CODE,
    STOCK,
    Loss,
    class_config,
    find_classes,
    find_epsilons,
    find_loss,
    find_settings,
    model_config,
)
from ssast.engine.formats.weight_files import describe_foreign
from ssast.engine.model.classifier import Classifier
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.settings import Audio
from ssast.pipelines.text import parse_json, read_text, shown

_PREPROCESSOR, _WEIGHTS = "preprocessor_config.json", "model.safetensors"
_INDEX = "model.safetensors.index.json"
RAW_WEIGHTS = "model.non_ema.safetensors"  # of transformers' variant "non_ema"
_SAMPLE_RATE_HZ = 16000  # transformers' feature extractor has a window of 400 samples

# Ours -> names in an AST file, of everything but qkv, which AST stores as three.
_NAMES = {
    r"embed\.(weight|bias)": r"embeddings.patch_embeddings.projection.\1",
    r"embed\.cls_token": "embeddings.cls_token",
    r"embed\.dist_token": "embeddings.distillation_token",
    r"embed\.pos_embed": "embeddings.position_embeddings",
    r"blocks\.(\d+)\.norm1\.(.+)": r"encoder.layer.\1.layernorm_before.\2",
    r"blocks\.(\d+)\.norm2\.(.+)": r"encoder.layer.\1.layernorm_after.\2",
    r"blocks\.(\d+)\.attn\.proj\.(.+)": r"encoder.layer.\1.attention.output.dense.\2",
    r"blocks\.(\d+)\.mlp\.fc1\.(.+)": r"encoder.layer.\1.intermediate.dense.\2",
    r"blocks\.(\d+)\.mlp\.fc2\.(.+)": r"encoder.layer.\1.output.dense.\2",
    r"norm\.(.+)": r"layernorm.\1",
}
_QKV = re.compile(r"blocks\.(\d+)\.attn\.qkv\.(.+)")
_HEAD = {"head.0.": "classifier.layernorm.", "head.1.": "classifier.dense."}
_PREFIX = "audio_spectrogram_transformer."
_MASK_EMBED = "embed.mask_embed"  # of pretraining alone


class Imported(NamedTuple):
    """What a folder of transformers holds."""

    model: Classifier | SpectrogramTransformer
    """On the CPU; an encoder where the folder holds no head."""

    audio: Audio
    """Settings of its input."""

    labels: tuple[str, ...]
    """Labels of the classes, in the order of the logits; () of an encoder."""

    names: tuple[str, ...]
    """Display names of the classes, likewise; the labels where there are no others."""

    loss: Loss | None
    """Loss that the folder's ``problem_type`` stands for; None if it names none."""


def export_huggingface(
    model: Classifier | SpectrogramTransformer,
    folder: str | Path,
    audio: Audio,
    labels: Sequence[str] | None = None,
    loss: Loss | None = None,
    names: Sequence[str] | None = None,
    raw: Classifier | SpectrogramTransformer | None = None,
) -> Path:
    """Write a folder for ``from_pretrained``: configuration, feature extractor, weights.

    Args:
        model: A classifier, or an encoder alone.
        folder: Output folder, created if need be.
        audio: Settings of the model's input.
        labels: Labels of the classes, in the order of the logits.
        loss: Loss that a classifier was trained with, for ``problem_type``: transformers takes the
            softmax of ``ce`` and the sigmoid of ``bce``. None leaves it out.
        names: Display names of the classes, for ``id2label``; then the labels stand in
            ``label_ids``, by these names. If None, the labels are the names.
        raw: The same model with its raw weights, where the first has averaged ones; written beside
            them, for ``from_pretrained(..., variant="non_ema")``.

    Returns:
        The folder.

    Raises:
        ConfigError: The model is wrapped or changed, audio that is not its own or not at 16 kHz,
            labels or names that do not fit the classes, or no such loss.
        CheckpointError: The folder cannot be written.
    """
    folder = Path(folder)
    check_exportable(model, audio, "a folder of transformers")
    if raw is not None:
        check_exportable(raw, audio, "a folder of transformers")
    check_choices(loss=(loss, Loss))
    if audio.sample_rate_hz != _SAMPLE_RATE_HZ:
        raise ConfigError(
            f"audio.sample_rate_hz is {audio.sample_rate_hz}, the feature extractor of "
            f"transformers works at {_SAMPLE_RATE_HZ}"
        )
    config = model_config(model, audio)
    if isinstance(model, Classifier):
        config |= class_config(*check_classes(model, labels, names), loss)
    convert = _stock_state if config["model_type"] == STOCK else _own_state
    # The names of the feature extractor's settings are transformers'.
    preprocessor = {
        "channel": audio.channel,  # ours
        "feature_extractor_type": "ASTFeatureExtractor",
        "do_normalize": True,
        "feature_size": 1,
        "max_length": audio.num_frames,
        "mean": audio.mean,
        "num_mel_bins": audio.n_mels,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
        "sampling_rate": audio.sample_rate_hz,
        "std": audio.std,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in ((CONFIG, config), (_PREPROCESSOR, preprocessor)):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_tensors(convert(model), folder / _WEIGHTS, {"format": "pt"})
        if raw is None:
            (folder / RAW_WEIGHTS).unlink(missing_ok=True)  # of an earlier export
        else:
            save_tensors(convert(raw), folder / RAW_WEIGHTS, {"format": "pt"})
        if config["model_type"] == OWN:
            shutil.copyfile(REMOTE_CODE, folder / REMOTE_CODE.name)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error
    return folder


def has_raw_weights(folder: Path) -> bool:
    """Return whether a folder has raw weights, beside averaged ones or alone."""
    return (folder / RAW_WEIGHTS).is_file()


def choose_weights(folder: Path, weights: Weights | None) -> Weights | None:
    """Return which weights of a folder are taken: those asked for, else the average if it is there.

    None where the folder has no raw weights, so that there is nothing to choose.
    """
    if not has_raw_weights(folder):
        return None
    averaged = any((folder / name).is_file() for name in (_WEIGHTS, _INDEX))
    return weights or ("ema" if averaged else "raw")


def import_huggingface(folder: str | Path, raw: bool = False) -> Imported:
    """Load the model in a folder that transformers' AST or :func:`export_huggingface` has saved.

    Args:
        folder: The folder.
        raw: Take the raw weights, which a folder may have beside averaged ones.

    Returns:
        The model and what the folder says of it. The epsilons of its LayerNorms are the folder's.

    Raises:
        CheckpointError: A file is missing or damaged, or the model is none that we can hold, such
            as a regression.
    """
    folder = Path(folder)
    config, preprocessor = (_read_json(folder / name) for name in (CONFIG, _PREPROCESSOR))
    kind = config.get("model_type")
    if kind not in (STOCK, OWN):
        raise CheckpointError(f"{folder / CONFIG}: model_type is {shown(kind)}, expected {STOCK!r}")
    state: dict[str, Tensor] = {}
    for weights in [folder / RAW_WEIGHTS] if raw else _weight_files(folder):
        if (foreign := describe_foreign(weights)) is not None:
            raise CheckpointError(f"{weights}: {foreign}")
        try:
            state |= read_safetensors(weights)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{weights}: cannot be read: {error}") from error
    has_head = any(name.startswith(("classifier.", "head.")) for name in state)
    settings = find_settings(config, preprocessor, folder)
    eps, head_eps = find_epsilons(config, folder)
    num_classes, loss = 0, None
    if has_head:
        loss = find_loss(config, folder)
        head = state.get("classifier.dense.weight" if kind == STOCK else "head.1.weight")
        if head is None or head.ndim != 2:
            raise CheckpointError(f"{folder / _WEIGHTS}: missing the weights of the classes")
        num_classes = len(head)
    finetune = finetune_settings(settings)

    def build() -> Classifier | SpectrogramTransformer:
        encoder = SpectrogramTransformer(settings.model, settings.audio, finetune.stride)
        for module in encoder.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = eps
        if not num_classes:
            return encoder
        classifier = Classifier(encoder, num_classes, finetune.pooling)
        classifier.head[0].eps = head_eps  # type: ignore[assignment]  # a LayerNorm's
        return classifier

    model = _filled(build, state, kind == STOCK, folder / _WEIGHTS)
    labels, names = find_classes(config, num_classes, folder)
    return Imported(model.eval(), settings.audio, labels, names, loss)


def _weight_files(folder: Path) -> list[Path]:
    """Return the file of the weights; the shards where transformers has made several of it."""
    index = folder / _INDEX
    if not index.is_file() or (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(
        isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name)
        for name in shards.values()
    ):
        raise CheckpointError(
            f"{index}: weight_map is {shown(shards)}, expected files .safetensors of this folder"
        )
    return [folder / name for name in sorted(set(shards.values()))]


def _to_stock(name: str) -> tuple[str, ...]:
    """Translate the name of a parameter of our encoder to AST's; of qkv, to three."""
    qkv = _QKV.fullmatch(name)
    if qkv is not None:
        number, rest = qkv.groups()
        before = f"encoder.layer.{number}.attention.attention"
        return tuple(f"{before}.{part}.{rest}" for part in ("query", "key", "value"))
    for pattern, theirs in _NAMES.items():
        match = re.fullmatch(pattern, name)
        if match is not None:
            return (match.expand(theirs),)
    raise KeyError(name)


def _own_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of modeling_ssast.py, whose names are ours."""
    return {
        name: value.detach().to("cpu", torch.float32).contiguous()
        for name, value in model.state_dict().items()
        if not name.endswith(_MASK_EMBED)
    }


def _stock_state(model: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, value in _own_state(model).items():
        names = _stock_names(name, isinstance(model, Classifier))
        parts = value.chunk(len(names))
        # Cloned: safetensors refuses tensors that share memory.
        state |= {n: part.clone() for n, part in zip(names, parts, strict=True)}
    return state


def _stock_names(name: str, in_classifier: bool) -> tuple[str, ...]:
    for ours, theirs in _HEAD.items():
        if name.startswith(ours):
            return (theirs + name[len(ours) :],)
    names = _to_stock(name.removeprefix("encoder."))
    return tuple(_PREFIX + n for n in names) if in_classifier else names


def _filled(
    build: Callable[[], Classifier | SpectrogramTransformer],
    state: dict[str, Tensor],
    stock: bool,
    source: Path,
) -> Classifier | SpectrogramTransformer:
    """Return the model that ``build`` makes, with the weights of a folder."""
    model = sketch(build, source)
    in_classifier = isinstance(model, Classifier)
    parts_of = {
        name: _stock_names(name, in_classifier) if stock else (name,)
        for name in model.state_dict()
        if not name.endswith(_MASK_EMBED)
    }
    check_names((part for parts in parts_of.values() for part in parts), sorted(state), source)
    try:
        weights = {
            name: torch.cat([state[part] for part in parts]) if len(parts) > 1 else state[parts[0]]
            for name, parts in parts_of.items()
        }
    except RuntimeError as error:  # parts of qkv of different shapes
        raise CheckpointError(f"{source}: shapes that do not fit: {error}") from error
    check_tensors(model, weights, source)
    model = build()
    model.load_state_dict(weights, strict=False)  # but for the mask, every name was checked
    return model


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
