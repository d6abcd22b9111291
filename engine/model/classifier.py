"""Classification head on the encoder: mean pooling, LayerNorm, Linear."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssast.engine.data.token_dropping import KeptPatches
from ssast.engine.model.encoder import SpectrogramTransformer, token_mask
from ssast.kernels.autocast import autocast_off
from ssast.kernels.patch_embed import take

Pooling = Literal["avgtok", "cls"]

ACTIVATIONS = {"ce": "softmax", "bce": "sigmoid"}
"""What makes probabilities of the logits of a classifier, by the loss it was trained with."""


def pool(hidden: Tensor, pooling: Pooling, num_extra_tokens: int) -> Tensor:
    """Pool hidden states [B, E + N, D] to one vector per clip, [B, D].

    ``avgtok`` is the mean of the patch tokens (published default), ``cls`` that of the extra
    tokens: cls and dist, or cls alone.
    """
    if pooling == "avgtok":
        return hidden[:, num_extra_tokens:].mean(1)
    return hidden[:, :num_extra_tokens].mean(1)


class Classifier(nn.Module):
    """Encoder, pooling and linear head: filterbanks [B, T, F] to logits [B, C]."""

    def __init__(
        self,
        encoder: SpectrogramTransformer,
        num_classes: int,
        pooling: Pooling = "avgtok",
    ):
        super().__init__()
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling: expected avgtok or cls, got {pooling!r}")
        self.encoder, self.pooling = encoder, pooling
        self.head = nn.Sequential(
            nn.LayerNorm(encoder.embed_dim), nn.Linear(encoder.embed_dim, num_classes)
        )

    def forward(self, fbank: Tensor, num_frames: Tensor | None = None) -> Tensor:
        """Return the logits [B, C] of log-mel filterbanks [B, T, F] before normalisation.

        ``num_frames`` [B] are the valid (unpadded) frames; see :func:`embed_clips`.
        """
        return self.head(embed_clips(self.encoder, fbank, self.pooling, num_frames))


def embed_clips(
    encoder: SpectrogramTransformer,
    fbank: Tensor,
    pooling: Pooling = "avgtok",
    num_frames: Tensor | None = None,
) -> Tensor:
    """Compute one embedding per clip, with no patch masked.

    Args:
        encoder: The encoder.
        fbank: [B, T, F] log-mel before normalisation.
        pooling: See :func:`pool`.
        num_frames: [B], valid (unpadded) frames; the mean leaves out patches of padding. None: all
            frames are valid.

    Returns:
        Embeddings [B, D], under autocast float32.
    """
    if pooling == "cls" and _can_skip_patches(encoder):
        tokens, masks = encoder.embed_tokens(fbank, num_frames)
        ids = torch.arange(encoder.num_extra_tokens, device=fbank.device).expand(len(fbank), -1)
        hidden = encoder.encode_tokens(tokens, encoder.padding_mask(masks), query_ids=ids)
        assert isinstance(hidden, Tensor)
        return hidden.mean(1)
    hidden, _ = encoder(fbank, encoder.no_masks(len(fbank), num_frames))
    return pool_clips(encoder, hidden, pooling, num_frames)


def _weights(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weights of a mean over the valid entries of each row, [B, n]."""
    flags = valid.to(torch.promote_types(dtype, torch.float32))
    return (flags / flags.sum(1, keepdim=True)).to(dtype)


def embed_kept(
    encoder: SpectrogramTransformer,
    fbank: Tensor,
    kept: KeptPatches,
    pooling: Pooling = "avgtok",
) -> Tensor:
    """Compute one embedding per clip from some of its patches alone, [B, D].

    Args:
        encoder: The encoder.
        fbank: [B, T, F] log-mel before normalisation.
        kept: The patches, without padding.
        pooling: See :func:`pool`; the mean is that of the kept patches.
    """
    E, valid = encoder.num_extra_tokens, kept.valid()
    tokens, _ = encoder.embed_tokens(fbank)
    tokens = torch.cat((tokens[:, :E], take(tokens[:, E:], kept.ids)), 1)
    hidden = encoder.encode_tokens(tokens, token_mask(valid, E))
    assert isinstance(hidden, Tensor)
    if pooling == "cls" or valid is None:
        return pool(hidden, pooling, E)
    weights = _weights(valid, hidden.dtype)
    with autocast_off(hidden.device.type):  # a mean, not a matmul
        return torch.einsum("bkd,bk->bd", hidden[:, E:], weights)


def _can_skip_patches(encoder: SpectrogramTransformer) -> bool:
    """Return whether the last block may compute the extra tokens alone: all that ``cls`` needs."""
    own_blocks = encoder.backbone != "transformer"
    return not (own_blocks or torch.is_grad_enabled() or torch.compiler.is_exporting())


def pool_clips(
    encoder: SpectrogramTransformer,
    hidden: Tensor,
    pooling: Pooling = "avgtok",
    num_frames: Tensor | None = None,
) -> Tensor:
    """Pool hidden states [B, E + N, D] of any layer to [B, D]; see :func:`embed_clips`."""
    if pooling == "cls" or num_frames is None:
        return pool(hidden, pooling, encoder.num_extra_tokens)
    rows, columns = encoder.embed.grid
    positions = torch.arange(columns, device=hidden.device)
    whole = encoder.embed.valid_columns(num_frames)
    if whole is not None:
        valid = positions < whole[:, None]  # [B, columns]
    else:
        valid = positions * encoder.embed.stride[1] < num_frames.clamp(min=1)[:, None]
    weights = _weights(valid, hidden.dtype)
    tokens = hidden[:, encoder.num_extra_tokens :].unflatten(1, (rows, columns))
    with autocast_off(tokens.device.type):  # a mean, not a matmul
        return torch.einsum("brcd,bc->bd", tokens, weights) / rows


class LossClassifier(Classifier):
    """A classifier that returns the loss of each clip, for training."""

    loss: str = "ce"
    label_smoothing: float = 0.0
    class_weights: Tensor | None  # [C]

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.register_buffer("class_weights", None, persistent=False)

    def forward(  # type: ignore[override]  # filterbanks and targets to losses
        self,
        fbank: Tensor,
        targets: Tensor,
        num_frames: Tensor | None = None,
        kept: KeptPatches | None = None,
    ) -> dict[str, Tensor]:
        """Return the losses of filterbanks [B, T, F] for targets [B, C] in [0, 1].

        Label smoothing and class weights apply in training mode only.

        Args:
            fbank: [B, T, F] log-mel before normalisation.
            targets: [B, C].
            num_frames: [B], valid (unpadded) frames; see :func:`embed_clips`.
            kept: The patches that are computed; all that are no padding if None.

        Returns:
            "loss" and "accuracy" (0 or 1: the prediction is the target's largest class), [B];
            "logits" [B, C].
        """
        if kept is None:
            logits = super().forward(fbank, num_frames).float()
        else:
            logits = self.head(embed_kept(self.encoder, fbank, kept, self.pooling)).float()
        smoothing = self.label_smoothing if self.training else 0.0
        weights = self.class_weights if self.training else None
        if self.loss == "ce":
            loss = functional.cross_entropy(
                logits, targets, weights, reduction="none", label_smoothing=smoothing
            )
        else:
            soft = targets * (1 - smoothing) + smoothing / 2
            losses = functional.binary_cross_entropy_with_logits(
                logits, soft, pos_weight=weights, reduction="none"
            )
            loss = losses.mean(1)
        accuracy = (logits.argmax(1) == targets.argmax(1)).float()
        return {"loss": loss, "accuracy": accuracy, "logits": logits}
