"""Latent targets: a student predicts what an averaged teacher makes of the patches it cannot see.

    target = LayerNorm(mean over blocks of InstanceNorm(MLP output of the teacher's block))
    loss   = MSE(decoder(student), target) on masked patches + MSE(cls, mean of target)

The teacher is an exponential moving average (EMA) of the student's encoder and sees each clip
once, whole; the student sees the visible patches of several masks of it, its clones. EAT (Chen et
al. 2024) after data2vec 2.0 (Baevski et al. 2023), where the two terms are sums; here both are
means and weigh the same.

A patch embedding of all patches serves all clones: the patches of each are gathered from it.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ssast.engine.config import Config
from ssast.engine.errors import ConfigError
from ssast.engine.model.decoder import Decoder
from ssast.engine.model.encoder import token_mask
from ssast.engine.model.objective import PretrainingModel
from ssast.kernels.fill_masked import fill_masked, noise_rows
from ssast.kernels.masking import Masks, draw_masks, valid_patches
from ssast.kernels.mspm_loss import mse
from ssast.kernels.scatter_tokens import visible_token_ids

NOISE_ROWS = 4096
NOISE_STD = 0.01
"""What the decoder is given for a masked patch: one of so many rows of normal noise, drawn for each
clip, epoch, clone and patch. Published: fresh noise, which a resumed run could not repeat."""

MEASURED = ("targets", "target_valid", "prediction_moments")
"""Outputs of the forward pass that are no losses."""

_EPS = 1e-5  # of both norms of the targets


class Latent(PretrainingModel):
    """The encoder, its averaged teacher, and the decoder that predicts the teacher's states.

    Attributes:
        decoder: From the student's states to predictions; the teacher has none.
    """

    has_teacher = True

    def __init__(self, config: Config):
        super().__init__(config)
        if self.encoder.backbone != "transformer":
            raise ConfigError(
                "objective.kind latent needs model.backbone transformer, whose MLP outputs are its "
                f"targets, got {self.encoder.backbone!r}"
            )
        self.encoder.embed.mask_embed.requires_grad_(False)  # nothing is replaced by it
        D = self.encoder.embed_dim
        self.decoder = Decoder(D, self.objective.decoder_depth, self.grid)
        self.floors = {
            "target_std": self.objective.min_target_std,
            "prediction_std": self.objective.min_prediction_std,
        }
        noise = torch.empty(NOISE_ROWS, D)
        if not noise.is_meta:
            generator = torch.Generator().manual_seed(self.seed)
            noise.copy_(torch.randn(noise.shape, generator=generator) * NOISE_STD)
        self.noise: Tensor
        self.register_buffer("noise", noise, persistent=False)

    def ema_decay(self, steps: int) -> float:
        """Return the decay of the teacher after so many optimizer steps.

        It rises linearly, as ``objective.teacher_decay`` says.
        """
        first, last = self.objective.teacher_decay
        return first + (last - first) * min(1.0, steps / self.objective.teacher_decay_steps)

    def draw_masks(  # type: ignore[override]  # beside masks, rows of noise
        self, clip_ids: Tensor, epochs: Tensor, num_frames: Tensor | None = None
    ) -> list[Masks | Tensor]:
        """Draw the masks of all clones, and what the decoder is given for masked patches.

        Args:
            clip_ids: [B] int64, rows of the clips.
            epochs: [B] int64; a clip has others in each epoch.
            num_frames: [B] int64, valid (unpadded) frames, for ``audio.ignore_padding``.

        Returns:
            Masks of R = B C clones, those of a clip after each other, and [R, N] int64, rows of the
            table of noise.
        """
        C = self.objective.clones
        streams = torch.arange(C, device=clip_ids.device).repeat(len(clip_ids))
        clip_ids, epochs = clip_ids.repeat_interleave(C), epochs.repeat_interleave(C)
        columns = self.encoder.embed.valid_columns(num_frames)
        masks = draw_masks(
            clip_ids,
            epochs,
            seed=self.seed,
            kind=self.objective.mask,
            grid=self.grid,
            num_masked=self.objective.num_masked,
            stream=streams,
            valid_columns=None if columns is None else columns.repeat_interleave(C),
        )
        num_patches = self.grid[0] * self.grid[1]
        rows = noise_rows(
            clip_ids,
            epochs,
            streams,
            seed=self.seed,
            num_patches=num_patches,
            table_rows=len(self.noise),
        )
        return [masks, rows]

    def forward(  # type: ignore[override]
        self, fbank: Tensor, masks: Masks, rows: Tensor
    ) -> dict[str, Tensor]:
        """Return the losses of each clip.

        Args:
            fbank: [B, T, F] log-mel before normalisation.
            masks: Masks of the clones, R = B C.
            rows: [R, N] int64, rows of the table of noise.

        Returns:
            "loss" and its terms "latent_loss" and "cls_loss", [B]; for :meth:`mean_losses`
            "targets", [B, N, D], with padding "target_valid", [B, N] bool, and
            "prediction_moments", [B, 2, D]: means of values and of squares.
        """
        B, C, E = len(fbank), self.objective.clones, self.encoder.num_extra_tokens
        valid = valid_patches(masks)
        own = None if valid is None else valid[::C]  # clones have the padding of their clip
        targets = self.targets(fbank, own)

        tokens, _ = self.encoder.embed_tokens(fbank)
        seen = _of_clones(tokens, visible_token_ids(masks, E))
        padding_mask = token_mask(_first(masks.visible_ids, masks.num_visible), E)
        states = self.encoder.encode_tokens(seen, padding_mask)
        assert isinstance(states, Tensor)
        hidden = fill_masked(states[:, E:], self.noise, rows, masks)
        predictions = self.decoder(hidden, masks.mask_ids, valid)

        latent = mse(_of_clones(targets, masks.mask_ids), predictions, masks.num_masked)
        latent_loss = latent.unflatten(0, (B, C)).mean(1)
        cls = _exact(states[:, :E].mean(1)).unflatten(0, (B, C))
        cls_loss = (cls - _mean(targets, own)).square().mean((1, 2))
        masked = _first(masks.mask_ids, masks.num_masked)
        masked = None if masked is None else masked[::C]
        padding = {} if own is None else {"target_valid": own}
        return {
            "loss": latent_loss + cls_loss,
            "latent_loss": latent_loss,
            "cls_loss": cls_loss,
            "targets": targets,
            **padding,
            # The first clone of each clip is sample enough.
            "prediction_moments": _moments(predictions[::C], masked),
        }

    @torch.no_grad()
    def targets(self, fbank: Tensor, valid: Tensor | None = None) -> Tensor:
        """Compute the latent targets of all patches with the teacher.

        Args:
            fbank: [B, T, F] log-mel before normalisation.
            valid: [B, N] bool, patches that are no padding; all if None.

        Returns:
            [B, N, D], float32 (float64 of a model in float64); anything for padding.
        """
        teacher = self.teacher
        assert teacher is not None
        E = teacher.num_extra_tokens
        tokens, _ = teacher.embed_tokens(fbank)
        _, outputs = teacher.encode_tokens(tokens, token_mask(valid, E), mlp_outputs=True)
        total = torch.zeros((), device=tokens.device)
        for output in outputs:
            total = total + _instance_norm(output[:, E:], valid)
        return functional.layer_norm(total / len(outputs), total.shape[2:], eps=_EPS)

    def mean_losses(self, losses: dict[str, Tensor], valid: Tensor) -> dict[str, Tensor]:
        """Average losses over the valid clips, and measure the spread of targets and predictions.

        Returns:
            The means, and "target_std" and "prediction_std": standard deviations over the patches
            of all valid clips, averaged over channels. They go to 0 where training collapses. And
            "content_std", that of the targets between clips at the same patch: a latent loss as
            high as its square is that of a student which knows nothing but positions.
        """
        means = {name: value for name, value in losses.items() if name not in MEASURED}
        targets, patches = losses["targets"], losses.get("target_valid")
        spread = {
            "target_std": _std(_moments(targets, patches), valid),
            "prediction_std": _std(losses["prediction_moments"], valid),
            "content_std": _content_std(targets, patches, valid),
        }
        return super().mean_losses(means, valid) | spread


def _exact(x: Tensor) -> Tensor:
    """Return a tensor in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _of_clones(rows: Tensor, ids: Tensor) -> Tensor:
    """Gather rows of each clip for its clones: [B, L, D] at the ids [B C, K], to [B C, K, D]."""
    ids = ids.unflatten(0, (len(rows), -1))[..., None].expand(-1, -1, -1, rows.shape[2])
    # Expanded, not indexed by clip: so the backward pass adds up clones in a fixed order.
    return rows[:, None].expand(-1, ids.shape[1], -1, -1).gather(2, ids).flatten(0, 1)


def _first(ids: Tensor, count: Tensor | None) -> Tensor | None:
    """Return which of the ids [R, K] are valid, the first ``count`` [R] of each row."""
    if count is None:
        return None
    return torch.arange(ids.shape[1], device=ids.device) < count[:, None]


def _mean(x: Tensor, valid: Tensor | None) -> Tensor:
    """Average [B, L, D] over tokens, those that are valid, to [B, 1, D]."""
    if valid is None:
        return x.mean(1, keepdim=True)
    count = valid.sum(1).clamp(min=1)[:, None, None]
    return x.masked_fill(~valid[..., None], 0).sum(1, keepdim=True) / count


def _instance_norm(x: Tensor, valid: Tensor | None) -> Tensor:
    """Normalise each channel of [B, L, D] over the tokens of a clip, those that are valid."""
    x = _exact(x)
    x = x - _mean(x, valid)
    return x * (_mean(x.square(), valid) + _EPS).rsqrt()


@torch.no_grad()
def _moments(x: Tensor, valid: Tensor | None) -> Tensor:
    """Return means over the tokens of [B, L, D], of values and of squares, [B, 2, D]."""
    x = _exact(x)
    return torch.cat((_mean(x, valid), _mean(x.square(), valid)), 1)


def _std(moments: Tensor, valid: Tensor) -> Tensor:
    """Return the mean over channels of the standard deviation over valid clips, of [B, 2, D]."""
    sums = moments.masked_fill(~valid[:, None, None], 0).sum(0)
    mean, square = (sums / valid.sum().clamp(min=1)).unbind()
    return (square - mean.square()).clamp(min=0).sqrt().mean()


@torch.no_grad()
def _content_std(targets: Tensor, patches: Tensor | None, valid: Tensor) -> Tensor:
    """Return the standard deviation of [B, N, D] over clips at the same patch.

    The variance is pooled over patches, and its root averaged over channels.

    Args:
        targets: [B, N, D].
        patches: [B, N] bool, those that are no padding; all if None.
        valid: [B] bool, the clips that count.
    """
    counted = valid[:, None] if patches is None else valid[:, None] & patches
    counted = counted.expand(targets.shape[:2])[..., None]
    number = counted.sum(0)
    x = targets.masked_fill(~counted, 0)
    x = (x - x.sum(0) / number.clamp(min=1)).masked_fill(~counted, 0)
    free = (number - 1).clamp(min=0).sum().clamp(min=1)
    return (x.square().sum((0, 1)) / free).sqrt().mean()
