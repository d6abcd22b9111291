"""Build classifiers, fill them with pretrained weights, and save them in run folders."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.checkpoints.weights import CHOSEN, EMA, WEIGHT
from ssast.engine.config import Config, finetune_settings, to_plain
from ssast.engine.model.backbones import build_encoder
from ssast.engine.model.classifier import Classifier
from ssast.engine.model.embedding import resize_pos_embed
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.settings import SIZES, Model

Kind = TypeVar("Kind", bound=Classifier)


def model_settings(encoder: SpectrogramTransformer) -> Model:
    """Return the model settings that an encoder was built from."""
    settings, depth = encoder.settings, len(encoder.blocks)
    usual = depth == SIZES[settings.size].depth
    return replace(settings, depth=None if usual else depth, backbone=encoder.backbone)


def build_classifier(
    config: Config,
    num_classes: int,
    kind: type[Kind] = Classifier,  # type: ignore[assignment]
) -> Kind:
    """Build the classifier of a configuration with fresh weights.

    Nothing is masked in it, so its mask embedding is frozen; with ``finetune.freeze`` the whole
    encoder is.

    Args:
        config: Configuration with a section ``finetune``.
        num_classes: Number of classes.
        kind: Class of the classifier.
    """
    settings = finetune_settings(config)
    encoder = build_encoder(config.model, config.audio, settings.stride)
    classifier = kind(encoder, num_classes, settings.pooling)
    encoder.embed.mask_embed.requires_grad_(False)
    if settings.freeze == "encoder":
        encoder.requires_grad_(False)
    return classifier


@torch.no_grad()
def fill_encoder(encoder: SpectrogramTransformer, pretrained: SpectrogramTransformer) -> None:
    """Copy pretrained weights into an encoder.

    A learned position embedding is cut or interpolated to the encoder's patch grid.
    """
    weights = {name: value.clone() for name, value in pretrained.state_dict().items()}
    old, new = pretrained.embed.grid, encoder.embed.grid
    if "embed.pos_embed" in weights and old != new:
        # Interpolated in float32, as the published numbers were.
        positions = weights["embed.pos_embed"]
        resized = resize_pos_embed(positions.float(), old, new, pretrained.num_extra_tokens)
        weights["embed.pos_embed"] = resized.to(positions.dtype)
    encoder.load_state_dict(weights)


def save_chosen(
    run: Path,
    tensors: dict[str, Tensor],
    *,
    step: int,
    config: Config,
    classes: Sequence[str],
    facts: dict[str, Any],
) -> Path:
    """Save the chosen weights of a fine-tuning run.

    Args:
        run: Run folder.
        tensors: A checkpoint's tensors, of which the weights are saved, raw and averaged.
        step: Optimizer steps of the run.
        config: Configuration of the run.
        classes: Labels, in the order of the logits.
        facts: Further metadata, as JSON holds it.

    Returns:
        The folder of the weights.
    """
    weights = {n: value for n, value in tensors.items() if n.startswith((WEIGHT, EMA))}
    meta = {"config": to_plain(config), "classes": list(classes), **facts}
    return Checkpoints(run / CHOSEN, keep=1).save(weights, meta, step=step)
