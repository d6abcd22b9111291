"""Read and write published checkpoints: names, shapes, files.

The published code stores the state dict of a DataParallel model: ``module.v.*`` for the trunk with
timm's names, ``module.cpredlayer.*`` and ``module.gpredlayer.*`` for the two heads of pretraining,
``module.mlp_head.*`` for a fine-tuned classifier, and two integers, ``p_input_fdim`` and
``p_input_tdim``, in a pretrained model alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ssast.engine.checkpoints.weights import check_complete, check_tensors, sketch
from ssast.engine.config import (
    Config,
    from_plain,
    masked_patches,
    section_from_plain,
    to_plain,
)
from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.formats.exportable import check_whole
from ssast.engine.formats.weight_files import read_state, write_state
from ssast.engine.model.backbones import check_transformer
from ssast.engine.model.classifier import Classifier
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.model.objective import MSPM
from ssast.engine.objective_settings import published_share
from ssast.engine.settings import EXTRA_TOKENS, MOST_FRAMES, SIZES, Audio, Model
from ssast.kernels.patch_embed import patch_grid
from ssast.pipelines.text import shown

# Ours -> published, without its "module."; the first prefix that fits counts.
_PREFIXES = {
    "encoder.embed.weight": "v.patch_embed.proj.weight",
    "encoder.embed.bias": "v.patch_embed.proj.bias",
    "encoder.embed.mask_embed": "mask_embed",
    "encoder.embed.": "v.",  # cls_token, dist_token, pos_embed
    "encoder.": "v.",  # blocks, norm
    "discriminative_head.": "cpredlayer.",
    "generative_head.": "gpredlayer.",
    "head.": "mlp_head.",
}
IMAGENET_CLASSES = 1000
IMAGENET_HEADS = ("v.head.", "v.head_dist.")  # no part of SSAST uses them
# They, and what the shapes say as well.
_IGNORED = (*IMAGENET_HEADS, "p_input_fdim", "p_input_tdim")
# A fine-tuned model of the published code has none.
_MASK_EMBED = "encoder.embed.mask_embed"


Kind = TypeVar("Kind", MSPM, Classifier)


@dataclass(frozen=True)
class Layout:
    """The settings of a model that the shapes of its published state dict tell."""

    size: Literal["tiny", "small", "base", "large", "huge", "giant"]
    depth: int
    patch: tuple[int, int]
    """Mel bins and frames."""

    num_patches: int
    input: tuple[int, int] | None
    """Mel bins and frames of a pretrained model's input; None for a fine-tuned model."""

    num_classes: int | None
    """Number of classes of a fine-tuned model."""

    extra_tokens: str = "cls_dist"
    """Tokens before those of the patches: cls and dist, or cls alone (base_nokd)."""

    @property
    def model(self) -> dict[str, Any]:
        """The section ``model`` of a configuration."""
        depth = None if self.depth == SIZES[self.size].depth else self.depth
        return {
            "size": self.size,
            "patch": list(self.patch),
            "depth": depth,
            "extra_tokens": self.extra_tokens,
        }


def published_name(name: str) -> str:
    """Translate the name of one of our parameters to the published one, without ``module.``."""
    for ours, theirs in _PREFIXES.items():
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    raise KeyError(name)


def from_published(
    state: dict[str, Tensor], names: list[str], source: str | Path = "state dict"
) -> dict[str, Tensor]:
    """Translate the weights of a published state dict to our names.

    Args:
        state: Published state dict, with or without ``module.`` before the names.
        names: Names of our parameters.
        source: Where it is from, for messages.

    Raises:
        CheckpointError: One is missing. What the state dict holds beyond them is logged.
    """
    given = {name.removeprefix("module."): value for name, value in state.items()}
    wanted = {published_name(name): name for name in names}
    names = [name for name in given if not name.startswith(_IGNORED)]
    check_complete(wanted, names, source)
    return {ours: given[theirs] for theirs, ours in wanted.items()}


def to_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Translate our state dict to that of the published code's DataParallel model."""
    return {f"module.{published_name(name)}": value for name, value in state.items()}


def read_published(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict in a file, ``.safetensors`` or a pickle of tensors alone.

    Returns:
        Tensors on the CPU by published name, without ``module.``.

    Raises:
        CheckpointError: No such file, damaged, or it holds anything but tensors. No code in the
            file is ever run.
    """
    state, _ = read_published_state(path)
    return state


def read_published_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a state dict as :func:`read_published`, and the metadata that we stored in the file."""
    state, metadata = read_state(Path(path))
    return {name.removeprefix("module."): value for name, value in state.items()}, metadata


def detect_layout(state: dict[str, Tensor], source: str | Path = "state dict") -> Layout:
    """Detect the model of a state dict, as :func:`read_published` returns it.

    Raises:
        CheckpointError: It is no SSAST, or its shapes contradict each other.
    """
    needed = ("v.patch_embed.proj.weight", "v.pos_embed", "v.blocks.0.norm1.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        hint = ""
        if any(name.endswith("embed.mask_embed") for name in state):
            hint = "; a state dict of ours says nothing of its settings: export_huggingface and "
            hint += "ssast export write whole models"
        raise CheckpointError(f"{source}: no SSAST model: missing {missing}{hint}")
    projection, pos_embed = state["v.patch_embed.proj.weight"], state["v.pos_embed"]
    is_patch = projection.ndim == 4 and projection.shape[1] == 1 and projection.numel() > 0
    if not is_patch or pos_embed.ndim != 3:
        raise CheckpointError(
            f"{source}: expected v.patch_embed.proj.weight [D, 1, f, t] and v.pos_embed "
            f"[1, E + N, D], found {list(projection.shape)} and {list(pos_embed.shape)}"
        )
    width = projection.shape[0]
    sizes = {size.embed_dim: name for name, size in SIZES.items()}
    if width not in sizes:
        known = ", ".join(f"{w} ({name})" for w, name in sizes.items())
        raise CheckpointError(f"{source}: its width is {width}, expected one of {known}")
    patch = (projection.shape[2], projection.shape[3])
    extra_tokens = "cls_dist" if "v.dist_token" in state else "cls"
    num_patches = pos_embed.shape[1] - EXTRA_TOKENS[extra_tokens]
    given = None
    if "p_input_fdim" in state and "p_input_tdim" in state:
        sizes_given = [state["p_input_fdim"], state["p_input_tdim"]]
        if any(size.numel() != 1 or not 1 <= float(size) <= MOST_FRAMES for size in sizes_given):
            raise CheckpointError(f"{source}: p_input_fdim and p_input_tdim are no sizes")
        given = (int(sizes_given[0]), int(sizes_given[1]))
        rows, columns = patch_grid(*given, patch, patch)
        if rows * columns != num_patches:
            raise CheckpointError(
                f"{source}: {given[0]} x {given[1]} inputs make {rows} x {columns} patches, "
                f"but v.pos_embed has {num_patches}"
            )
    blocks = {name.split(".")[2] for name in state if name.startswith("v.blocks.")}
    depth = len(blocks)
    if blocks != set(map(str, range(depth))):
        raise CheckpointError(f"{source}: its blocks are not numbered from 0: {shown(blocks)}")
    head = state.get("mlp_head.1.weight")
    if head is not None and head.ndim != 2:
        raise CheckpointError(f"{source}: mlp_head.1.weight has the shape {list(head.shape)}")
    return Layout(
        size=sizes[width],  # type: ignore[arg-type]  # the keys of SIZES
        depth=depth,
        patch=patch,
        num_patches=num_patches,
        input=given,
        num_classes=None if head is None else len(head),
        extra_tokens=extra_tokens,
    )


def load_published(path: str | Path, **audio: Any) -> tuple[MSPM, Config]:
    """Load a published pretrained model, on the CPU, and the configuration that describes it.

    Args:
        path: Path of the file.
        audio: Settings of :class:`~ssast.engine.settings.Audio` that the file does not hold:
            ``mean`` and ``std`` of its data, where they are not AudioSet's and LibriSpeech's.

    Raises:
        CheckpointError: See :func:`read_published` and :func:`detect_layout`; a fine-tuned model;
            missing names.
    """
    state = read_published(path)
    return build_pretrained(state, detect_layout(state, path), path, **audio)


def build_pretrained(
    state: dict[str, Tensor], layout: Layout, source: str | Path, **audio: Any
) -> tuple[MSPM, Config]:
    """Build a pretrained model from a published state dict; see :func:`load_published`.

    Args:
        state: State dict as :func:`read_published` returns it.
        layout: Its layout.
        source: Where it is from, for messages.
        audio: See :func:`load_published`.
    """
    if layout.input is None:
        kind = "it lacks p_input_fdim and p_input_tdim"
        if layout.num_classes is not None:
            kind = f"it is fine-tuned, for {layout.num_classes} classes"
        raise CheckpointError(f"{source}: expected a pretrained model, but {kind}")
    n_mels, num_frames = layout.input
    config = from_plain(
        {
            "model": layout.model,
            "audio": {**audio, "n_mels": n_mels, "num_frames": num_frames},
            "objective": {
                "num_masked": masked_patches(published_share("joint"), layout.num_patches),
                "mask": "random" if layout.patch[0] == n_mels else "official",
            },
        }
    )
    return _filled(lambda: MSPM(config), state, source).eval(), config


def load_published_classifier(
    path: str | Path,
    *,
    num_frames: int,
    stride: tuple[int, int],
    pooling: Literal["avgtok", "cls"] = "avgtok",
    n_mels: int = 128,
    **audio: Any,
) -> Classifier:
    """Load a published fine-tuned model, on the CPU, whose file lacks these settings.

    Args:
        path: Path of the file.
        num_frames: Frames of its input.
        stride: Mel bins and frames between two patches.
        pooling: ``avgtok`` or ``cls``.
        n_mels: Mel bins of its input.
        audio: Further settings of :class:`~ssast.engine.settings.Audio`, such as ``mean``, ``std``.

    Raises:
        CheckpointError: See :func:`read_published` and :func:`detect_layout`; a pretrained model;
            missing names; frames and stride that make another number of patches.
    """
    state = read_published(path)
    return build_published_classifier(
        state,
        detect_layout(state, path),
        path,
        audio=Audio(n_mels=n_mels, num_frames=num_frames, **audio),
        stride=stride,
        pooling=pooling,
    )


def build_published_classifier(
    state: dict[str, Tensor],
    layout: Layout,
    source: str | Path,
    *,
    audio: Audio,
    stride: tuple[int, int],
    pooling: Literal["avgtok", "cls"],
) -> Classifier:
    """Build a classifier from a published state dict; see :func:`load_published_classifier`.

    Args:
        state: State dict as :func:`read_published` returns it.
        layout: Its layout.
        source: Where it is from, for messages.
        audio: Settings of its input.
        stride: Mel bins and frames between two patches.
        pooling: ``avgtok`` or ``cls``.
    """
    if layout.num_classes is None:
        raise CheckpointError(f"{source}: expected a fine-tuned model, found no mlp_head")
    n_mels, num_frames = audio.n_mels, audio.num_frames
    rows, columns = patch_grid(n_mels, num_frames, layout.patch, stride)
    if rows * columns != layout.num_patches:
        raise CheckpointError(
            f"{source}: {n_mels} mel bins x {num_frames} frames with stride {list(stride)} make "
            f"{rows} x {columns} = {rows * columns} patches, but v.pos_embed has "
            f"{layout.num_patches}"
        )
    model = section_from_plain(Model, layout.model, "model")
    num_classes = layout.num_classes

    def build() -> Classifier:
        return Classifier(SpectrogramTransformer(model, audio, stride), num_classes, pooling)

    return _filled(build, state, source).eval()


def imagenet_heads(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of ImageNet's heads in a state dict of :func:`read_published`."""
    return {name: value for name, value in state.items() if name.startswith(IMAGENET_HEADS)}


def published_state(
    model: MSPM | Classifier,
    audio: Audio | None = None,
    heads: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the state dict that the published code stores of a model, on the CPU, in float32.

    It loads there with ``strict=True``.

    Args:
        model: A pretrained or fine-tuned model.
        audio: Settings of a pretrained model's input, for its size; that of its whole patches if
            None.
        heads: ImageNet's heads, which nothing uses, to be stored as they are: see
            :func:`imagenet_heads`. What they lack is zeros.

    Raises:
        ConfigError: The patches of a pretrained model overlap, or it has another backbone,
            objective, positions or norms, or one extra token and is not base.
    """
    if not isinstance(model, MSPM | Classifier):
        raise ConfigError(
            f"the published format holds the heads of SSAST alone, got {type(model).__name__}"
        )
    _check_options(model.encoder)
    if isinstance(model, Classifier):
        check_whole(model, "the published format")
    state = {n: p.detach().to("cpu", torch.float32) for n, p in model.state_dict().items()}
    width = model.encoder.embed_dim
    published = {}
    if isinstance(model, Classifier):
        del state[_MASK_EMBED]
    else:
        embed = model.encoder.embed
        rows, columns = embed.grid
        if embed.stride != embed.patch:
            raise ConfigError(f"pretrained patches may not overlap, got stride {embed.stride}")
        size = (rows * embed.patch[0], columns * embed.patch[1])
        n_mels, num_frames = size if audio is None else (audio.n_mels, audio.num_frames)
        published["module.p_input_fdim"] = torch.tensor(n_mels)
        published["module.p_input_tdim"] = torch.tensor(num_frames)
    for head in ("head", "head_dist")[: model.encoder.num_extra_tokens]:
        published[f"module.v.{head}.weight"] = torch.zeros(IMAGENET_CLASSES, width)
        published[f"module.v.{head}.bias"] = torch.zeros(IMAGENET_CLASSES)
    published |= {f"module.{name}": value for name, value in (heads or {}).items()}
    return {**published, **to_published(state)}


def input_metadata(model: nn.Module, audio: Audio) -> dict[str, Any]:
    """Return what the published format does not hold of a model's input and its pooling."""
    found: dict[str, Any] = {"audio": to_plain(audio)}
    if isinstance(model, Classifier):
        found |= {"pooling": model.pooling, "stride": list(model.encoder.embed.stride)}
    return found


def save_published(
    model: MSPM | Classifier,
    path: str | Path,
    audio: Audio | None = None,
    metadata: Mapping[str, Any] | None = None,
    heads: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a file that the published code, and :func:`read_published`, read.

    Args:
        model: See :func:`published_state`.
        path: Path of the file, whose folder is created if need be.
        audio: See :func:`published_state`.
        metadata: What the published format does not hold, for our reader; the published code does
            not see it: all of it from :func:`~ssast.engine.formats.open.published_metadata`. If
            None, and ``audio`` is given: that, and the stride and pooling of a classifier, whose
            classes and loss are then not stored.
        heads: See :func:`published_state`.

    Raises:
        CheckpointError: It cannot be written.
        ConfigError: See :func:`published_state`; or the name is that of another format.
    """
    if Path(path).suffix == ".safetensors":
        raise ConfigError(f"{path}: the published format is a file of PyTorch: name it .pth")
    state = published_state(model, audio, heads)
    if metadata is None and audio is not None:
        metadata = input_metadata(model, audio)
    write_state(state, Path(path), metadata)


def _check_options(encoder: SpectrogramTransformer) -> None:
    """Check that the published code has such a model."""
    check_transformer(encoder, "the published format")
    for key in ("positions", "norm"):
        found, usual = getattr(encoder.settings, key), getattr(Model, key)
        if found != usual:
            raise ConfigError(
                f"the published format holds models of model.{key} {usual} alone, got {found!r}"
            )
    if encoder.settings.extra_tokens == "cls" and encoder.settings.size != "base":
        raise ConfigError(
            "the published format holds models of model.extra_tokens cls in size base alone "
            f"(base_nokd), got {encoder.settings.size!r}"
        )


def _filled(build: Callable[[], Kind], state: dict[str, Tensor], path: str | Path) -> Kind:
    """Return the model that ``build`` makes, with the weights of a published state dict."""
    model = sketch(build, path)
    names = list(model.state_dict())
    if isinstance(model, Classifier):
        names.remove(_MASK_EMBED)
    weights = from_published(state, names, path)
    check_tensors(model, weights, path)
    model = build()
    model.load_state_dict(weights, strict=False)  # but for the mask, every name was checked
    return model
