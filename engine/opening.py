"""Whatever a path holds: a model of ours, of the published code, or of transformers."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ssast.engine.checkpoint import CheckpointError
from ssast.engine.classifier import Classifier
from ssast.engine.classifier_state import is_classifier, load_classifier
from ssast.engine.config import ConfigError
from ssast.engine.huggingface import import_huggingface
from ssast.engine.model import SpectrogramTransformer
from ssast.engine.objective import MSPM
from ssast.engine.pretrained import load_pretrained
from ssast.engine.published_state import (
    detect_layout,
    load_published,
    load_published_classifier,
    read_published,
)
from ssast.engine.settings import Audio


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
        given = [f"{key}={value}" for key, value in vars(unsaid).items() if value is not None]
        raise ConfigError(f"{path} knows its own settings: leave out {', '.join(given)}")
    if (path / "config.json").is_file():
        model, audio, labels = import_huggingface(path)
        return Opened(model, audio, labels or None)
    if is_classifier(path):
        trained = load_classifier(path)
        return Opened(trained.classifier, trained.config.audio, trained.classes)
    pretrained, config = load_pretrained(path)
    return Opened(pretrained, config.audio)


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
