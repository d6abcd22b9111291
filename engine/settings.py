"""How a setting states its range, and the settings of fine-tuning."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal


def setting(default: Any, low: float = -math.inf, high: float = math.inf) -> Any:
    """A field whose number, or whose numbers, must lie in [low, high]."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """A classifier on top of the encoder, trained on labelled clips."""

    labels: str | None = None
    """A CSV of the classes in their order (index, mid, display_name); the sorted names of the
    training labels if not given."""

    loss: Literal["ce", "bce"] = "ce"
    """Cross entropy for one label a clip, or binary cross entropy for each label by itself."""

    metric: Literal["auto", "accuracy", "map"] = "auto"
    """What the best checkpoint is chosen by, on the held-out clips; auto: accuracy where every clip
    has one label, mean average precision otherwise."""

    pooling: Literal["avgtok", "cls"] = "avgtok"
    """Mean of the patch tokens, or of cls and dist."""

    stride: tuple[int, int] | None = setting(None, 1)
    """Mel bins and frames between two patches; the patch itself, without overlap, if not given."""

    freeze: Literal["none", "encoder"] = "none"
    """``encoder`` trains the head alone: a linear probe."""

    epochs: int = setting(25, 1)
    """Passes over the training clips; goes before ``train.steps``."""

    layer_decay: float = setting(1.0, 0.0, 1.0)
    """Each block learns this much slower than the one above it."""

    head_lr_scale: float = setting(1.0, 0.0)
    """Learning rate of the head, as a multiple of ``optim.lr``."""

    mixup: float = setting(0.0, 0.0, 1.0)
    """Share of the clips that are mixed with another one, in a proportion from Beta(10, 10)."""

    freq_mask: int = setting(0, 0)
    """Widest band of mel bins that SpecAugment hides in a clip."""

    time_mask: int = setting(0, 0)
    """Longest run of frames that SpecAugment hides in a clip."""

    noise: float = setting(0.0, 0.0)
    """Largest amplitude of the uniform noise added to the normalised spectrogram (published:
    0.1)."""

    roll: int = setting(0, 0)
    """Frames, at most, by which a clip is rolled to either side (published: 10)."""

    label_smoothing: float = setting(0.0, 0.0, 1.0)
    balanced: bool = False
    """Draw clips of rare classes more often, as many clips an epoch."""

    average_last: int = setting(0, 0)
    """Weights averaged over the ends of so many last epochs; they are kept if they do better on the
    held-out clips than the best epoch."""

    patience: int | None = setting(None, 1)
    """Epochs without a better metric after which training ends."""

    test: str | None = None
    """A manifest of clips that are looked at once, by the chosen weights, at the end."""

    allow_leakage: bool = False
    """Train although training, held-out and test clips share recordings."""
