"""Objectives, and ours: masked spectrogram patch modelling: mask, encode, two heads, losses.

    joint = InfoNCE + 10 MSE                                SSAST, equation 3 and published code

The paper computes both terms on one mask and one forward pass, which is the default; its published
code runs a whole forward pass with a mask of its own for each (``two_pass``).
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ssast.engine.config import Config
from ssast.engine.errors import ConfigError
from ssast.engine.model.backbones import build_encoder
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.registry import OBJECTIVES
from ssast.kernels.masking import Masks, draw_masks
from ssast.kernels.mspm_loss import info_nce, mse


class PretrainingModel(nn.Module):
    """An encoder with what pretrains it: the base of every objective.

    A subclass adds its heads in ``__init__(config)``, and in :meth:`forward` returns losses.

    Attributes:
        has_teacher: Whether it predicts what a teacher computes: the encoder with averaged weights.
        ema_decay: Decay of the average by the number of optimizer steps taken before, where it is
            not that of ``train.ema``: a method of the subclass.
        encoder: The encoder, built by ``model.backbone``.
        floors: Values of :meth:`mean_losses` that show a collapse when they stay below a value:
            "x_std" below ``objective.min_x_std``.
    """

    has_teacher: bool = False
    ema_decay: Callable[[int], float] | None = None
    floors: Mapping[str, float] = MappingProxyType({})

    def __init__(self, config: Config):
        super().__init__()
        self._teacher = list[SpectrogramTransformer]()  # in a list: no part of this module
        self.objective = config.objective
        self.seed = config.train.seed
        self.grid = config.grid
        self.encoder = build_encoder(config.model, config.audio)

    @property
    def teacher(self) -> SpectrogramTransformer | None:
        """The encoder with averaged weights, if there is to be one.

        In training a copy of the encoder that the engine keeps up to date, in evaluation mode and
        without gradients; it is no submodule. Elsewhere the encoder itself: a checkpoint is opened
        with its averaged weights.
        """
        if not self.has_teacher:
            return None
        return self._teacher[0] if self._teacher else self.encoder

    def build_teacher(self) -> SpectrogramTransformer | None:
        """Make the teacher a copy of the encoder, if there is to be one, and return it."""
        if not self.has_teacher:
            return None
        self._teacher = [copy.deepcopy(self.encoder).requires_grad_(False).eval()]
        return self._teacher[0]

    def draw_masks(
        self, clip_ids: Tensor, epochs: Tensor, num_frames: Tensor | None = None
    ) -> list[Masks]:
        """Draw the masks of each forward pass.

        Args:
            clip_ids: [B] int64, rows of the clips.
            epochs: [B] int64; a clip has another mask in each epoch.
            num_frames: [B] int64, valid (unpadded) frames, for ``audio.ignore_padding``.
        """
        valid_columns = self.encoder.embed.valid_columns(num_frames)
        return [
            draw_masks(
                clip_ids,
                epochs,
                seed=self.seed,
                kind=self.objective.mask,
                grid=self.grid,
                num_masked=self.objective.num_masked,
                stream=stream,
                valid_columns=valid_columns,
            )
            for stream in range(2 if self.objective.two_pass else 1)
        ]

    def held_out_masks(self, clip_ids: Tensor, num_frames: Tensor | None = None) -> list[Masks]:
        """Draw the masks of a validation, which are always the same: those of epoch -1."""
        return self.draw_masks(clip_ids, torch.full_like(clip_ids, -1), num_frames)

    def forward(self, fbank: Tensor, *masks: Masks) -> dict[str, Tensor]:
        """Return losses and other values of each clip, each [B]; one is "loss".

        Args:
            fbank: [B, T, F] log-mel before normalisation.
            masks: What :meth:`draw_masks` returned.
        """
        raise NotImplementedError

    def mean_losses(self, losses: dict[str, Tensor], valid: Tensor) -> dict[str, Tensor]:
        """Average what :meth:`forward` returned over the valid clips; "loss" is minimised.

        Args:
            losses: Values per clip, each [B].
            valid: [B] bool; other clips are ignored.

        Raises:
            ConfigError: None of them is "loss".
        """
        if "loss" not in losses:
            raise ConfigError(
                f"objective.kind {self.objective.kind!r}: expected a value loss of each clip, got "
                f"{', '.join(losses) or 'none'}"
            )
        return clip_means(losses, valid)


def build_objective(config: Config) -> PretrainingModel:
    """Build the model that ``objective.kind`` names, with fresh weights.

    Raises:
        ConfigError: It is not known, or is no PretrainingModel.
    """
    found = OBJECTIVES.load(config.objective.kind)
    if not (isinstance(found, type) and issubclass(found, PretrainingModel)):
        raise ConfigError(
            f"objective.kind {config.objective.kind!r}: expected a subclass of PretrainingModel, "
            f"got {found!r}"
        )
    return found(config)


class MSPM(PretrainingModel):
    """The encoder with the heads and losses of masked spectrogram patch modelling."""

    def __init__(self, config: Config):
        super().__init__(config)
        D, P = self.encoder.embed_dim, config.model.patch[0] * config.model.patch[1]
        self.discriminative_head = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, P))
        self.generative_head = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, P))
        # A head that the objective does not use has no gradient: keep it out of the optimizer.
        self.discriminative_head.requires_grad_(config.objective.kind != "generative")
        self.generative_head.requires_grad_(config.objective.kind != "discriminative")

    def forward(self, fbank: Tensor, *masks: Masks) -> dict[str, Tensor]:
        """Return the losses of each clip.

        Args:
            fbank: [B, T, F] log-mel before normalisation.
            masks: Masks of the forward pass; with ``two_pass`` a second set, for the MSE loss.

        Returns:
            Those of "infonce_loss", "pretext_accuracy" and "mse_loss" that the objective has,
            each [B]; and beside the accuracy "pretext_chance", that of a random choice among the
            masked patches of a clip.
        """
        kind, losses = self.objective.kind, {}
        states, targets = self.encoder(fbank, masks[0], masked_only=True)
        if kind != "generative":
            predictions = self.discriminative_head(states)
            losses["infonce_loss"], losses["pretext_accuracy"] = info_nce(
                targets, predictions, self.objective.softmax_axis, masks[0].num_masked
            )
            losses["pretext_chance"] = _chance(masks[0], losses["pretext_accuracy"])
        if len(masks) > 1:
            states, targets = self.encoder(fbank, masks[1], masked_only=True)
        if kind != "discriminative":
            losses["mse_loss"] = mse(targets, self.generative_head(states), masks[-1].num_masked)
        return losses

    def reconstruct(self, fbank: Tensor, masks: Masks) -> Tensor:
        """Reconstruct the masked patches, normalised, [B, M, P]."""
        states, _ = self.encoder(fbank, masks, masked_only=True)
        return self.generative_head(states)

    def mean_losses(self, losses: dict[str, Tensor], valid: Tensor) -> dict[str, Tensor]:
        """See :func:`mean_losses`."""
        return mean_losses(losses, valid, self.objective.mse_weight)


def _chance(masks: Masks, like: Tensor) -> Tensor:
    """Return one over the number of masked patches of each clip, [B]."""
    if masks.num_masked is None:
        return torch.full_like(like, 1 / masks.mask_ids.shape[1])
    return masks.num_masked.clamp(min=1).to(like.dtype).reciprocal()


def with_masks(valid: Tensor, masks: Sequence[Masks]) -> Tensor:
    """Return which valid clips [B] bool have masked patches; a very short clip may have none.

    Masks of several clones of a clip have as many masked patches each.
    """
    num_masked = masks[0].num_masked
    return valid if num_masked is None else valid & (num_masked.view(len(valid), -1)[:, 0] > 0)


def clip_means(values: dict[str, Tensor], valid: Tensor) -> dict[str, Tensor]:
    """Average values per clip, each [B], over the valid clips; 0 where no clip is valid."""
    weights = valid / valid.sum().clamp(min=1)
    # Filled, not multiplied by 0: an ignored clip may hold an infinity. All at once: few launches.
    rows = torch.stack(list(values.values())).masked_fill(valid.logical_not(), 0)
    return dict(zip(values, (rows * weights).sum(1).unbind(), strict=True))


def mean_losses(losses: dict[str, Tensor], valid: Tensor, mse_weight: float) -> dict[str, Tensor]:
    """Average losses over the valid clips of a batch.

    Args:
        losses: Losses per clip, from :meth:`MSPM.forward`.
        valid: [B] bool; other clips are ignored.
        mse_weight: Weight of the MSE loss in the joint loss.

    Returns:
        Scalars: the same losses and "loss", to be minimised; all 0 where no clip is valid.
    """
    means = clip_means(losses, valid)
    if "infonce_loss" in means and "mse_loss" in means:
        loss = means["infonce_loss"] + mse_weight * means["mse_loss"]
    else:
        loss = means["infonce_loss"] if "infonce_loss" in means else means["mse_loss"]
    return {"loss": loss, **means}
