"""Open the model that a path holds: one of ours, of the published code, or of transformers.

What a path holds is decided here, once, and its weights are read once:

    a folder with config.json       transformers, its own AST or what ``ssast export --to hf`` wrote
    another folder                  a run of ours, one of its checkpoints, or exported weights
    a .safetensors or pickled file  the published code's, pretrained or fine-tuned
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ssast.engine.checkpoints.classifier import build_classifier, model_settings
from ssast.engine.checkpoints.weights import Weights, filled, read_weights
from ssast.engine.config import Config, finetune_settings, from_plain
from ssast.engine.data.labels import class_names
from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.finetune_settings import Finetune
from ssast.engine.formats.exportable import check_choices
from ssast.engine.formats.fetch import local_path
from ssast.engine.formats.huggingface import choose_weights, has_raw_weights, import_huggingface
from ssast.engine.formats.huggingface_config import CONFIG, Loss
from ssast.engine.formats.published import (
    build_pretrained,
    build_published_classifier,
    detect_layout,
    imagenet_heads,
    input_metadata,
    read_published_state,
)
from ssast.engine.model.classifier import Classifier, Pooling
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.model.objective import PretrainingModel, build_objective
from ssast.engine.settings import Audio
from ssast.pipelines.datasets.tables import class_table
from ssast.pipelines.errors import DataError
from ssast.pipelines.text import shown

Origin = Literal["run", "published", "transformers"]
Purpose = Literal["model", "encoder", "pretrained"]  # any whole model, its encoder, with heads

WEIGHTS = {
    "ema": "its averaged weights (EMA) are used, not the raw ones",
    "raw": "its raw weights are used, not the averaged ones (EMA)",
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MissingMetadata:
    """What a published file does not say of its model.

    Files that ``ssast export --to published`` wrote say all of it; what is given here overrides it.
    A run of ours says all of it itself, and a folder of transformers most: ``loss`` and ``labels``
    that are given override those in the folder.
    """

    num_frames: int | None = None
    """Frames of the input of a fine-tuned model."""

    stride: tuple[int, int] | None = None
    """Mel bins and frames between two patches of a fine-tuned model."""

    pooling: Pooling | None = None
    """Mean of the patch tokens, or of cls and dist, in a fine-tuned model; avgtok if None."""

    mean: float | None = None
    """Mean of the filterbanks; that of AudioSet and LibriSpeech if None."""

    std: float | None = None
    """Standard deviation of the filterbanks, likewise."""

    loss: Loss | None = None
    """Loss of a fine-tuned model: one class a clip, or several. If None, as the ``problem_type``
    of a folder of transformers says, else ce."""

    labels: str | Path | None = None
    """A CSV of the classes of a fine-tuned model (index, mid, display_name)."""

    def given(self) -> dict[str, Any]:
        """Return the fields that were given."""
        default = vars(MissingMetadata())
        return {key: value for key, value in vars(self).items() if value != default[key]}


@dataclass(frozen=True)
class LoadedModel:
    """A model on the CPU, with its settings and classes."""

    model: PretrainingModel | Classifier | SpectrogramTransformer
    """Pretrained, fine-tuned, or an encoder without any head."""

    config: Config
    """Configuration of its run, or one that describes a model from elsewhere."""

    path: Path
    origin: Origin

    classes: tuple[str, ...] = ()
    """Labels of a classifier, in the order of its logits; () where they are not known."""

    names: tuple[str, ...] = ()
    """Display names of the classes; the labels where there are no others."""

    step: int | None = None
    """Optimizer steps it was trained for in a run of ours."""

    assumed: tuple[str, ...] = ()
    """Settings ``section.key`` that the file does not say, and that have the published values."""

    weights: Weights | None = None
    """Which weights it has, where there are averaged ones (``train.ema``) beside raw ones."""

    imagenet_heads: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    """What nothing uses of a published file, for another one: ImageNet's heads."""

    @property
    def audio(self) -> Audio:
        """Settings of the model's input."""
        return self.config.audio

    @property
    def encoder(self) -> SpectrogramTransformer:
        """The encoder without any head."""
        return self.model if isinstance(self.model, SpectrogramTransformer) else self.model.encoder

    @property
    def is_classifier(self) -> bool:
        """Whether the model is fine-tuned."""
        return isinstance(self.model, Classifier)

    @property
    def classifier(self) -> Classifier:
        """The model, which must be fine-tuned.

        Raises:
            CheckpointError: It is pretrained.
        """
        if not isinstance(self.model, Classifier):
            raise CheckpointError(
                f"{self.path}: expected a fine-tuned model, found a pretrained one: ssast finetune "
                f"CONFIG --checkpoint {self.path} makes a classifier of it"
            )
        return self.model

    @property
    def loss(self) -> Loss:
        """Loss of a classifier, which its scores follow; ``ce`` where nothing says it.

        Raises:
            ConfigError: The model is pretrained.
        """
        return finetune_settings(self.config).loss

    @property
    def num_classes(self) -> int:
        """Number of classes of a classifier."""
        return len(self.classifier.head[1].weight)  # type: ignore[arg-type]  # a Linear's


def open_model(
    path: str | Path, metadata: MissingMetadata | None = None, weights: Weights | None = None
) -> LoadedModel:
    """Open the model at a path, whatever kind it is of.

    Args:
        path: Folder of a run of ours, one of its checkpoints or exported weights; a published file;
            a folder of transformers; or what is fetched: a name that ``ssast weights`` lists,
            ``hf:owner/name@revision``, an address.
        metadata: What a published file does not say.
        weights: Averaged weights (``ema``) or those without averaging (``raw``), of a run of ours
            that trained with ``train.ema``; None: the averaged ones, where there are any.

    Raises:
        CheckpointError: There is no model, or it is damaged or unknown, or has no such weights.
        ConfigError: A published fine-tuned model without its ``num_frames`` and ``stride``, or
            metadata of a model that knows its own.
        DataError: The table of classes is wrong, or has another number of classes.
    """
    return _open(path, metadata or MissingMetadata(), weights=weights)


def open_classifier(
    path: str | Path,
    metadata: MissingMetadata | None = None,
    weights: Weights | None = None,
    *,
    named: bool = False,
) -> LoadedModel:
    """Open a fine-tuned classifier; classes without a name are numbered from 0.

    Args:
        path: See :func:`open_model`.
        metadata: See :func:`open_model`.
        weights: See :func:`open_model`.
        named: Whether the classes must have names.

    Raises:
        CheckpointError: See :func:`open_model`; or the model is pretrained.
        ConfigError: See :func:`open_model`; or the classes have no names and must have.
        DataError: See :func:`open_model`.
    """
    loaded = open_model(path, metadata, weights)
    if named and loaded.is_classifier and not loaded.classes:
        raise ConfigError(f"{path} does not name its classes: give --labels, a CSV of them")
    return as_classifier(loaded)


def open_raw(loaded: LoadedModel) -> LoadedModel | None:
    """Open a model with its raw weights beside its averaged ones; None where it has not both.

    Raises:
        CheckpointError: They are damaged.
    """
    if loaded.weights != "ema":
        return None
    return _open(loaded.path, MissingMetadata(), purpose="encoder", weights="raw")


def as_classifier(model: LoadedModel | str | Path) -> LoadedModel:
    """Return a loaded model, or that at a path, as a classifier whose classes all have names.

    Args:
        model: A fine-tuned model, or the path of one; see :func:`open_model`, also for the errors.

    Raises:
        CheckpointError: The model is pretrained.
    """
    loaded = model if isinstance(model, LoadedModel) else open_model(model)
    numbers = tuple(map(str, range(loaded.num_classes)))
    return loaded if loaded.classes else replace(loaded, classes=numbers, names=numbers)


def open_encoder(
    path: str | Path, metadata: MissingMetadata | None = None, weights: Weights | None = None
) -> LoadedModel:
    """Open a model that a fine-tuning begins from: pretrained, or fine-tuned already.

    The head of a classifier does not count.

    Args:
        path: See :func:`open_model`.
        metadata: See :func:`open_model`.
        weights: See :func:`open_model`.

    Raises:
        CheckpointError: See :func:`open_model`.
        ConfigError: See :func:`open_model`.
    """
    return _open(path, metadata or MissingMetadata(), purpose="encoder", weights=weights)


def load_pretrained(path: str | Path) -> tuple[PretrainingModel, Config]:
    """Load a pretrained model with its pretraining heads, on the CPU, and its configuration.

    The encoder alone is ``model.encoder``; :class:`~ssast.engine.model.classifier.Classifier` puts
    a classifier on top of it.

    Args:
        path: See :func:`open_model`.

    Raises:
        CheckpointError: See :func:`open_model`; or the model is fine-tuned, or an encoder alone.
    """
    loaded = _open(path, MissingMetadata(), purpose="pretrained")
    if not isinstance(loaded.model, PretrainingModel):
        raise CheckpointError(f"{path}: expected a model with its pretraining heads, found none")
    return loaded.model, loaded.config


def published_metadata(loaded: LoadedModel) -> dict[str, Any]:
    """Return what a published file does not say of a model, to be stored in it all the same."""
    found = input_metadata(loaded.model, loaded.audio)
    if loaded.is_classifier:
        found |= {"loss": loaded.loss, "classes": list(loaded.classes), "names": list(loaded.names)}
    return found


def _open(
    source: str | Path,
    metadata: MissingMetadata,
    purpose: Purpose = "model",
    weights: Weights | None = None,
) -> LoadedModel:
    path = local_path(source)
    check_choices(weights=(weights, Weights), pooling=(metadata.pooling, Pooling))
    check_choices(loss=(metadata.loss, Loss))
    has_raw = has_raw_weights(path)
    if weights == "ema" and (path.is_file() or (path / CONFIG).is_file()) and not has_raw:
        raise CheckpointError(f"{path}: has one kind of weights, no averaged ones (EMA) beside raw")
    if path.is_file():
        return _open_published(path, metadata, purpose)
    if not path.is_dir():
        where = "" if path.is_absolute() else f" in the working directory {Path.cwd()}"
        raise CheckpointError(
            f"{path}: expected a run, a checkpoint or a model, found nothing{where}; "
            "ssast weights lists what has a name"
        )
    if (path / CONFIG).is_file():
        return _open_transformers(path, metadata, choose_weights(path, weights))
    loaded = _open_run(path, metadata, weights)
    if loaded.weights is not None and purpose != "encoder":
        _log.warning("%s: %s", path, WEIGHTS[loaded.weights])
    if purpose == "pretrained" and loaded.is_classifier:
        raise CheckpointError(f"{path}: expected a pretrained model, found a fine-tuned one")
    return loaded


def _open_run(path: Path, metadata: MissingMetadata, choice: Weights | None) -> LoadedModel:
    _check_known(path, metadata)
    weights, meta, kind = read_weights(path, choice)
    classes = _texts(meta.get("classes", []), path)
    names = _texts(meta.get("names", list(classes)), path)
    if not isinstance(meta.get("step"), int) or len(names) != len(classes):
        raise CheckpointError(f"{path}: its metadata is damaged: {shown(meta)}")
    try:
        config = from_plain(meta.get("config", {}))
        if classes:
            finetune_settings(config)
    except ConfigError as error:
        raise CheckpointError(f"{path}: its settings are damaged: {error}") from error

    def build() -> PretrainingModel | Classifier:
        return build_classifier(config, len(classes)) if classes else build_objective(config)

    model = filled(build, weights, path)
    step = meta["step"]
    return LoadedModel(model.eval(), config, path, "run", classes, names, step, weights=kind)


def _texts(found: Any, path: Path) -> tuple[str, ...]:
    """Return a list of texts in the metadata of a file."""
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise CheckpointError(f"{path}: expected names of classes, found {shown(found)}")
    return tuple(found)


def _open_transformers(path: Path, metadata: MissingMetadata, kind: Weights | None) -> LoadedModel:
    _check_known(path, replace(metadata, loss=None, labels=None))
    found = import_huggingface(path, kind == "raw")
    given = replace(metadata, loss=metadata.loss or found.loss)
    config = _describe(found.model, found.audio, given)
    loaded = LoadedModel(found.model, config, path, "transformers", found.labels, found.names)
    return _with_labels(replace(loaded, weights=kind), metadata.labels)


def _open_published(path: Path, metadata: MissingMetadata, purpose: Purpose) -> LoadedModel:
    state, stored = read_published_state(path)
    layout = detect_layout(state, path)
    if not isinstance(stored.get("audio", {}), dict):
        raise CheckpointError(f"{path}: its metadata is damaged: {shown(stored)}")
    audio = dict(stored.get("audio", {}))
    given = {"mean": metadata.mean, "std": metadata.std, "num_frames": metadata.num_frames}
    audio |= {key: value for key, value in given.items() if value is not None}
    keys = ("sample_rate_hz", "channel", "mean", "std", "ignore_padding")
    assumed = tuple(f"audio.{key}" for key in keys if key not in audio)
    if layout.num_classes is None or purpose == "pretrained":
        why = "is pretrained, knows its frames and stride and has no pooling, loss or labels"
        _check_known(path, replace(metadata, mean=None, std=None), why)
        model, config = build_pretrained(state, layout, path, **audio)
        heads = imagenet_heads(state)
        return LoadedModel(model, config, path, "published", assumed=assumed, imagenet_heads=heads)
    stride = metadata.stride or stored.get("stride")
    if "num_frames" not in audio or stride is None:
        raise ConfigError(
            f"{path} is fine-tuned and says neither how many frames its input has nor its stride: "
            "give --frames and --stride, such as --frames 1024 --stride 10 10"
        )
    finetune = {
        "stride": list(stride) if isinstance(stride, tuple) else stride,
        "pooling": metadata.pooling or stored.get("pooling", "avgtok"),
        "loss": metadata.loss or stored.get("loss", "ce"),
    }
    settings = from_plain({"audio": audio, "model": layout.model, "finetune": finetune})
    chosen = finetune_settings(settings)
    assert chosen.stride is not None
    classifier = build_published_classifier(
        state, layout, path, audio=settings.audio, stride=chosen.stride, pooling=chosen.pooling
    )
    if purpose == "model":
        _report_statistics(path, settings.audio, metadata, stored)
    config = _describe(classifier, settings.audio, replace(metadata, loss=chosen.loss))
    classes, names = (_texts(stored.get(key, []), path) for key in ("classes", "names"))
    if len(classes) != layout.num_classes:
        classes = names = ()
    loaded = LoadedModel(
        classifier,
        config,
        path,
        "published",
        classes,
        names or classes,
        assumed=assumed,
        imagenet_heads=imagenet_heads(state),
    )
    return _with_labels(loaded, metadata.labels)


def _report_statistics(
    path: Path, audio: Audio, metadata: MissingMetadata, stored: Mapping[str, Any]
) -> None:
    """Say which mean and std a fine-tuned file is used with, unless both were given."""
    if metadata.mean is not None and metadata.std is not None:
        return
    if stored.get("audio"):
        text = "%s: mean %g and std %g of the input, as stored in the file"
    else:
        text = (
            "%s: the file has no mean and std of its input, mean %g and std %g are assumed (those "
            "of AudioSet, where not given): set --mean and --std if it was trained with others"
        )
    _log.warning(text, path, audio.mean, audio.std)


def _with_labels(loaded: LoadedModel, labels: str | Path | None) -> LoadedModel:
    """Take the classes of a model from a table, if there is one."""
    if labels is None:
        return loaded
    classes = tuple(class_table(Path(labels)))
    if len(classes) != loaded.num_classes:
        raise DataError(
            f"{labels}: {len(classes)} classes, expected the {loaded.num_classes} of {loaded.path}"
        )
    return replace(loaded, classes=classes, names=class_names(classes, labels))


def _check_known(
    path: Path, metadata: MissingMetadata, why: str = "knows its own settings and labels"
) -> None:
    """Refuse metadata of a model that knows its own."""
    if given := metadata.given():
        shown = ", ".join(f"{key}={value}" for key, value in given.items())
        raise ConfigError(f"{path} {why}: leave out {shown}")


def _describe(
    model: Classifier | SpectrogramTransformer, audio: Audio, metadata: MissingMetadata
) -> Config:
    """Return a configuration that describes a model from elsewhere."""
    encoder = model.encoder if isinstance(model, Classifier) else model
    pooling = model.pooling if isinstance(model, Classifier) else "avgtok"
    settings = Finetune(stride=encoder.embed.stride, pooling=pooling, loss=metadata.loss or "ce")
    return Config(model=model_settings(encoder), audio=audio, finetune=settings)
