"""Whatever a path holds: a model of ours, of the published code, or of transformers."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ssast.engine.checkpoints.classifier import CHOSEN, Trained, load_classifier, model_of
from ssast.engine.checkpoints.pretrained import find_checkpoint, load_pretrained
from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.config import Config
from ssast.engine.data.labels import class_names
from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.formats.huggingface import import_huggingface
from ssast.engine.formats.published import (
    detect_layout,
    load_published,
    load_published_classifier,
    read_published,
)
from ssast.engine.model.classifier import Classifier
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.model.objective import MSPM
from ssast.engine.settings import Audio, Finetune
from ssast.pipelines.datasets.tables import class_table
from ssast.pipelines.errors import DataError


@dataclass(frozen=True)
class Unsaid:
    """What a published file does not say of its model; other files say it themselves."""

    num_frames: int | None = None
    """Of the input of a fine-tuned model."""

    stride: tuple[int, int] | None = None
    """Of a fine-tuned model, in mel bins and frames."""

    pooling: Literal["avgtok", "cls"] = "avgtok"
    mean: float | None = None
    std: float | None = None
    loss: Literal["ce", "bce"] | None = None
    """Of a fine-tuned model, of a folder of transformers as well: one class a clip, or several; ce
    if not given."""


@dataclass(frozen=True)
class Opened:
    """A model on the CPU, the settings of its input, and the names of its classes if known."""

    model: MSPM | Classifier | SpectrogramTransformer
    audio: Audio
    labels: tuple[str, ...] | None = None

    @property
    def encoder(self) -> SpectrogramTransformer:
        """Without any head."""
        return self.model if isinstance(self.model, SpectrogramTransformer) else self.model.encoder

    @property
    def useful(self) -> Classifier | SpectrogramTransformer:
        """Without the heads of pretraining."""
        return self.model if isinstance(self.model, Classifier) else self.encoder


def open_model(path: str | Path, unsaid: Unsaid | None = None) -> Opened:
    """The model at a path.

    Args:
        path: The folder of a run of ours or one of its checkpoints, a published file, or a folder
            of transformers.
        unsaid: For a published file.

    Raises:
        CheckpointError: There is none, or it is damaged or unknown.
        ConfigError: A published fine-tuned model without its ``num_frames`` and ``stride``, or
            these with a model that knows them.
    """
    path, unsaid = Path(path), unsaid or Unsaid()
    if path.is_file():
        return _open_published(path, unsaid)
    if not path.is_dir():
        raise CheckpointError(f"{path}: expected a run, a checkpoint or a model, found nothing")
    if unsaid != Unsaid():
        default = vars(Unsaid())
        given = [f"{key}={value}" for key, value in vars(unsaid).items() if value != default[key]]
        raise ConfigError(f"{path} knows its own settings: leave out {', '.join(given)}")
    if (path / "config.json").is_file():
        model, audio, labels = import_huggingface(path)
        return Opened(model, audio, labels or None)
    if is_classifier(path):
        trained = load_classifier(path)
        return Opened(trained.classifier, trained.config.audio, trained.classes)
    pretrained, config = load_pretrained(path)
    return Opened(pretrained, config.audio)


def open_classifier(
    path: str | Path,
    unsaid: Unsaid | None = None,
    labels: str | Path | None = None,
    *,
    named: bool = False,
) -> Trained:
    """The fine-tuned classifier at a path.

    Args:
        path: As for :func:`open_model`.
        unsaid: For a published file.
        labels: A CSV of the classes (index, mid, display_name), where the model does not name
            them. Without it they are numbers from 0.
        named: The classes must have names.

    Raises:
        CheckpointError: There is none, it is of a pretraining, or damaged.
        ConfigError: See :func:`open_model`; or labels for a model that knows its own, or no names.
        DataError: The table is wrong, or of another number of classes.
    """
    path, unsaid = Path(path), unsaid or Unsaid()
    elsewhere = path.is_file() or (path / "config.json").is_file()
    if not elsewhere:
        if unsaid != Unsaid() or labels is not None:
            raise ConfigError(f"{path} knows its own settings and labels: leave them out")
        return load_classifier(path)
    opened = open_model(path, unsaid if path.is_file() else replace(unsaid, loss=None))
    if not isinstance(opened.model, Classifier):
        raise CheckpointError(
            f"{path}: expected a fine-tuned model, found a pretrained one: ssast finetune CONFIG "
            f"--checkpoint {path} makes a classifier of it"
        )
    num_classes = len(opened.model.head[1].weight)  # type: ignore[arg-type]  # a Linear's
    classes = opened.labels or tuple(map(str, range(num_classes)))
    if labels is not None:
        classes = tuple(class_table(Path(labels)))
    elif named and opened.labels is None:
        raise ConfigError(f"{path} does not name its classes: give --labels, a CSV of them")
    if len(classes) != num_classes:
        raise DataError(f"{labels}: {len(classes)} classes, expected the {num_classes} of {path}")
    settings = Finetune(
        stride=opened.encoder.embed.stride, pooling=opened.model.pooling, loss=unsaid.loss or "ce"
    )
    config = Config(model=model_of(opened.encoder), audio=opened.audio, finetune=settings)
    return Trained(opened.model, classes, config, class_names(classes, labels))


def _open_published(path: Path, unsaid: Unsaid) -> Opened:
    given = {"mean": unsaid.mean, "std": unsaid.std}
    audio: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    layout = detect_layout(read_published(path), path)
    if layout.num_classes is None:
        if unsaid.num_frames is not None or unsaid.stride is not None:
            raise ConfigError(f"{path} is pretrained and knows its frames and its stride")
        model, config = load_published(path, **audio)
        return Opened(model, config.audio)
    if unsaid.num_frames is None or unsaid.stride is None:
        raise ConfigError(
            f"{path} is fine-tuned and says neither how many frames its input has nor its stride: "
            "give --frames and --stride, such as --frames 1024 --stride 10 10"
        )
    classifier = load_published_classifier(
        path,
        num_frames=unsaid.num_frames,
        stride=unsaid.stride,
        pooling=unsaid.pooling,
        **audio,
    )
    return Opened(classifier, replace(Audio(num_frames=unsaid.num_frames), **audio))


def load_initial(path: str | Path) -> tuple[SpectrogramTransformer, Config]:
    """A pretrained encoder, and the model and the audio that it is for.

    Args:
        path: A run, one of its checkpoints, a published file, or a folder of transformers, with or
            without a head, which is then left out.

    Raises:
        CheckpointError: There is none, or it is of a fine-tuned model.
    """
    path = Path(path)
    if path.is_file():
        model, config = load_published(path)
        return model.encoder, config
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    if (path / "config.json").is_file():
        found, audio, _ = import_huggingface(path)
        encoder = found.encoder if isinstance(found, Classifier) else found
        settings = Finetune(stride=encoder.embed.stride)
        return encoder, Config(model=model_of(encoder), audio=audio, finetune=settings)
    if is_classifier(path):
        raise CheckpointError(f"{path}: expected a pretrained model, found a fine-tuned one")
    model, config = load_pretrained(path)
    return model.encoder, config


def is_classifier(path: str | Path) -> bool:
    """Whether this is a fine-tuned model: a run, one of its checkpoints, or a published file."""
    path = Path(path)
    if path.is_file():
        return detect_layout(read_published(path), path).num_classes is not None
    if not path.is_dir():
        return False
    if (path / "config.json").is_file():
        return isinstance(import_huggingface(path)[0], Classifier)
    if (path / CHOSEN).is_dir():
        return True
    _, meta = Checkpoints.load(find_checkpoint(path), check=False)
    return "classes" in meta
