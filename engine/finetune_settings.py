"""Settings of fine-tuning: every key with its default, its range and its meaning.

The docstrings below the fields are what the settings page of the documentation shows.
"""

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from ssast.engine.errors import ConfigError
from ssast.engine.settings import setting

Number = TypeVar("Number", int, Any)  # or a tensor of integers


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Supervised fine-tuning: a classification head on the encoder, trained on labelled clips."""

    checkpoint: str | None = None
    """Pretrained weights: a published checkpoint or a pretraining run; null: from scratch."""

    folds: str | None = None
    """Cross-validation, one run per fold: a folder with train_1.json, eval_1.json, train_2.json,
    ..., as `ssast data manifests` writes for ESC-50 and IEMOCAP. Where a recipe sets it,
    `data.train` on the command line takes precedence."""

    fold_role: Literal["test", "valid"] = "test"
    """Role of a fold's eval manifest: test set (validation clips are then held out from the
    training clips, see `data.valid_share`), or validation set, on which the best epoch is
    chosen."""

    labels: str | None = None
    """A CSV of the classes in order (index, mid, display_name); null: the sorted labels of the
    training clips."""

    loss: Literal["ce", "bce"] = "ce"
    """Cross entropy for one label per clip, or binary cross entropy for multi-label clips."""

    class_weights: str = "none"
    """Weights of the classes in the loss: `none`, `balanced` (inverse to the number of clips of
    the class, as in scikit-learn), or a text file with one number per class. With bce they weigh
    the positive terms only."""

    metric: str = "auto"
    """Validation metric that selects the best checkpoint: `accuracy`, `map` (mean average
    precision), or the name of a metric of your own, the higher the better. auto: accuracy for
    single-label clips, else map."""

    pooling: Literal["avgtok", "cls"] = "avgtok"
    """Input of the head: mean of the patch tokens, or mean of the extra tokens (cls and
    distillation, or cls alone)."""

    stride: tuple[int, int] | None = setting(None, 1)
    """Patch stride in mel bins and frames; null: patches do not overlap."""

    freeze: Literal["none", "encoder"] = "none"
    """`encoder` trains only the head (linear probing)."""

    epochs: int = setting(25, 1)
    """Number of epochs; replaces `train.steps`."""

    layer_decay: float = setting(1.0, 0.0, 1.0)
    """Layer-wise learning-rate decay: the factor from each transformer block to the one below.
    From scratch, that of a recipe counts as 1."""

    head_lr_scale: float = setting(1.0, 0.0)
    """Learning rate of the head relative to `optim.lr`."""

    mixup: float = setting(0.0, 0.0, 1.0)
    """Fraction of the clips mixed with another clip; mixup coefficients are from Beta(10, 10)."""

    freq_mask: float = setting(0, 0)
    """SpecAugment: maximum width of the frequency mask in mel bins; a share of them below 1."""

    time_mask: float = setting(0, 0)
    """SpecAugment: maximum width of the time mask in frames; a share of the input below 1. With
    `audio.ignore_padding` it lies in the clip's own frames, and a share is of these."""

    noise: float = setting(0.0, 0.0)
    """Maximum amplitude of uniform noise added to the normalised features (published: 0.1)."""

    roll: int = setting(0, 0)
    """Maximum shift in frames of a clip, which wraps around (published: 10)."""

    drop_tokens: float = setting(0.0, 0.0, 0.99)
    """Token dropping (Patchout): share of the patches of a clip that are left out in training, of
    those that `drop_columns` and `drop_rows` leave, others in each epoch. The encoder computes the
    rest alone; evaluation uses all."""

    drop_columns: int = setting(0, 0)
    """Structured token dropping: number of columns (time) of patches that are left out in training
    (PaSST: 40); of a clip that ends early in proportion, with `audio.ignore_padding`."""

    drop_rows: int = setting(0, 0)
    """Number of rows (frequency) of patches that are left out in training (PaSST: 4)."""

    label_smoothing: float = setting(0.0, 0.0, 1.0)
    """Label smoothing of the loss."""

    balanced_sampling: bool = False
    """Draw clips of rare classes more often; the length of an epoch stays."""

    average_last_epochs: int = setting(0, 0)
    """Weight averaging over this many last epochs; the averaged weights are kept if they are better
    on the validation clips than the best epoch."""

    patience: int | None = setting(None, 1)
    """Early stopping: epochs without improvement of the metric before training ends."""

    test: str | None = None
    """A manifest of test clips, evaluated once at the end with the selected weights."""

    allow_leakage: bool = False
    """Train even if training, validation and test clips share recordings."""

    @property
    def drops(self) -> bool:
        """Whether patches are dropped in training."""
        return bool(self.drop_tokens or self.drop_columns or self.drop_rows)

    def check_grid(self, rows: int, columns: int) -> None:
        """Check that patches of a grid are left.

        Raises:
            ConfigError: All rows or all columns are dropped.
        """
        for name, dropped, there in (
            ("rows", self.drop_rows, rows),
            ("columns", self.drop_columns, columns),
        ):
            if dropped >= there:
                raise ConfigError(
                    f"finetune.drop_{name} must leave some of the {rows} x {columns} patches: at "
                    f"most {there - 1}, got {dropped}"
                )

    def kept_columns(self, own: Number, columns: int) -> Number:
        """Return how many of a clip's ``own`` columns of patches are kept in training.

        Args:
            own: Columns before the padding, at least one.
            columns: All columns of the grid.
        """
        return own - self.drop_columns * own // columns

    def kept_patches(self, rows: int, own: Number, columns: int) -> Number:
        """Return how many patches of a clip are kept in training; see :meth:`kept_columns`."""
        left = (rows - self.drop_rows) * self.kept_columns(own, columns)
        return left - left * round(self.drop_tokens * 10**6) // 10**6
