"""What can be exported: a whole model, with the settings and the classes that it was made for."""

from collections.abc import Sequence
from typing import Any, get_args

import torch

from ssast.engine.checkpoints.classifier import model_settings
from ssast.engine.errors import ConfigError
from ssast.engine.model.backbones import check_transformer
from ssast.engine.model.classifier import Classifier
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.settings import Audio
from ssast.kernels.patch_embed import patch_grid


def check_exportable(model: Any, audio: Audio, format_name: str) -> None:
    """Check that a format can hold a model, and that the audio is the model's.

    Raises:
        ConfigError: The model is wrapped, pruned, of another kind or of another backbone; or the
            settings of the audio are not those of its patch embedding.
    """
    if not isinstance(model, Classifier | SpectrogramTransformer):
        raise ConfigError(
            f"{format_name}: expected a Classifier or a SpectrogramTransformer, got "
            f"{type(model).__name__}: give the module inside (DataParallel's .module, a compiled "
            "one's ._orig_mod) or the .encoder of a pretrained model"
        )
    encoder = model.encoder if isinstance(model, Classifier) else model
    if not isinstance(encoder, SpectrogramTransformer):
        raise ConfigError(
            f"{format_name}: expected a SpectrogramTransformer as .encoder, got "
            f"{type(encoder).__name__}: give the module inside"
        )
    check_transformer(encoder, format_name)
    _check_audio(encoder, audio)
    check_whole(model, format_name)


def _check_audio(encoder: SpectrogramTransformer, audio: Audio) -> None:
    embed = encoder.embed
    grid = patch_grid(audio.n_mels, audio.num_frames, embed.patch, embed.stride)
    for key, given, own in (
        ("patches of audio.n_mels and audio.num_frames", grid, embed.grid),
        ("audio.mean", audio.mean, embed.mean),
        ("audio.std", audio.std, embed.std),
        ("audio.ignore_padding", audio.ignore_padding, embed.ignore_padding),
    ):
        if given != own:
            raise ConfigError(f"{key}: expected {own}, as the model was made for, got {given}")


def check_whole(model: Classifier | SpectrogramTransformer, format_name: str) -> None:
    """Check that a model has the weights that it was built with.

    Raises:
        ConfigError: It is compiled or pruned in part, or has modules of another kind.
    """
    encoder = model.encoder if isinstance(model, Classifier) else model
    embed = encoder.embed
    n_mels, num_frames = (
        size + step * (count - 1)
        for size, step, count in zip(embed.patch, embed.stride, embed.grid, strict=True)
    )
    audio = Audio(n_mels=n_mels, num_frames=num_frames)
    with torch.device("meta"):
        plain: torch.nn.Module = SpectrogramTransformer(
            model_settings(encoder), audio, embed.stride
        )
        if isinstance(model, Classifier):
            plain = Classifier(plain, 1, model.pooling)  # type: ignore[arg-type]  # it is one
    expected, found = set(plain.state_dict()), set(model.state_dict())
    if found != expected:
        first = min(found ^ expected)
        raise ConfigError(
            f"{format_name}: {'unexpected' if first in found else 'missing'} weights {first!r}: "
            "expected a model whose modules are neither compiled, pruned nor replaced"
        )


def check_classes(
    model: Classifier, labels: Sequence[Any] | None, names: Sequence[Any] | None
) -> tuple[list[str], list[str]]:
    """Return the labels and names of the classes of a model as text.

    Labels that are not given are numbered; names that are not given are the labels.

    Raises:
        ConfigError: They do not fit the classes.
    """
    num_classes = len(model.head[1].weight)  # type: ignore[arg-type]  # a Linear's
    labels = [f"LABEL_{i}" for i in range(num_classes)] if labels is None else labels
    texts = [str(label) for label in labels]
    shown = texts if names is None else [str(name) for name in names]
    for key, given in (("labels", texts), ("names", shown)):
        if len(given) != num_classes or len(set(given)) != num_classes:
            raise ConfigError(
                f"{key}: expected {num_classes} different names, got {len(given)}, "
                f"{len(set(given))} of them different"
            )
    return texts, shown


def check_choices(**choices: tuple[Any, Any]) -> None:
    """Check values, each given with the Literal that it must be of; None leaves it open.

    Raises:
        ConfigError: One is none of those.
    """
    for name, (given, kind) in choices.items():
        known = get_args(kind)
        if given is not None and given not in known:
            raise ConfigError(f"{name}: expected {' or '.join(known)}, got {given!r}")
