"""The audio spectrogram transformer of SSAST: patch embedding, blocks, norm.

The trunk is DeiT's (Touvron et al. 2021) with its two extra tokens, as in AST (Gong et al. 2021).
Fixed positions, one extra token and post-norm blocks are those of EAT (Chen et al. 2024).
"""

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssast.engine.model.blocks import Block, PostNormBlock, Residual, ResidualNorm
from ssast.engine.model.embedding import PatchEmbed, SharedTokens
from ssast.engine.settings import SIZES, Audio, Model
from ssast.kernels.attention import PaddingMask, make_padding_mask
from ssast.kernels.masking import Masks, no_masks, valid_patches


class SpectrogramTransformer(nn.Module):
    """The encoder: filterbanks [B, T, F] to hidden states [B, E + N, D], extra tokens first.

    Attributes:
        settings: Size, patch and options that it was built from.
        num_extra_tokens: E: 2 (cls and dist) or 1 (cls).
        embed_norm: LayerNorm before the first block; of post-norm alone.
        norm: LayerNorm after the last block; of pre-norm alone.
    """

    backbone = "transformer"  # the model.backbone that it was built by

    def __init__(self, model: Model, audio: Audio, stride: tuple[int, int] | None = None):
        """Initialise the weights.

        Args:
            model: Size, patch and options.
            audio: Number of mel bins and frames of the input, and its normalisation.
            stride: Patch stride in mel bins and frames; no overlap if None.
        """
        super().__init__()
        size = SIZES[model.size]
        self.settings, self.embed_dim = model, size.embed_dim
        self.embed = PatchEmbed(model, stride or model.patch, size.embed_dim, audio)
        self.num_extra_tokens = self.embed.num_extra_tokens
        self.is_post_norm = model.norm == "post"
        self.blocks = nn.ModuleList(
            self.build_block(size.embed_dim, size.num_heads)
            for _ in range(model.depth or size.depth)
        )
        norm = ResidualNorm(size.embed_dim, eps=1e-6)
        self.embed_norm = norm if self.is_post_norm else nn.Identity()
        self.norm = nn.Identity() if self.is_post_norm else norm
        self.activation_checkpoint_every: int | None = None
        """Recompute the activations of every n-th block in the backward pass; None: of no block."""

    def build_block(self, embed_dim: int, num_heads: int) -> nn.Module:
        """Build one block."""
        return (PostNormBlock if self.is_post_norm else Block)(embed_dim, num_heads)

    def forward(
        self, fbank: Tensor, masks: Masks, *, masked_only: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Encode a batch.

        Args:
            fbank: [B, T, F] log-mel before normalisation.
            masks: Masked patches.
            masked_only: Return hidden states of the masked patches alone. The last block then
                computes queries and the MLP for them only; the results are the same.

        Returns:
            Hidden states [B, E + N, D], or with ``masked_only`` those of the masked patches
            [B, M, D], and the normalised masked patches [B, M, P].
        """
        tokens, targets, shared = self.embed(fbank, masks)
        query_ids = masks.mask_ids + self.num_extra_tokens if masked_only else None
        # Only before the first block do masked tokens not depend on the clip.
        first = shared if shared.saves_work and len(self.blocks) > 1 else None
        hidden, _ = self._encode(tokens, self.padding_mask(masks), query_ids, first)
        return hidden, targets

    def embed_tokens(self, fbank: Tensor, num_frames: Tensor | None = None) -> tuple[Tensor, Masks]:
        """Compute the tokens of clips before any block, with positions and nothing masked.

        Args:
            fbank: [B, T, F] log-mel before normalisation.
            num_frames: [B], valid (unpadded) frames; see ``audio.ignore_padding``.

        Returns:
            Tokens [B, E + N, D], and masks that mask nothing and tell which patches are padding.
        """
        masks = self.no_masks(len(fbank), num_frames)
        tokens, _, _ = self.embed(fbank, masks)
        return tokens, masks

    def encode_tokens(
        self,
        tokens: Tensor,
        padding_mask: PaddingMask | None = None,
        *,
        mlp_outputs: bool = False,
        query_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Encode any tokens of :meth:`embed_tokens`: all that comes after the embedding.

        Args:
            tokens: [R, L, D], in each row some tokens of a clip, such as those that are visible.
            padding_mask: Tokens that attention leaves out; none if None.
            mlp_outputs: Return what the MLP of each block adds as well. No block's activations are
                then recomputed in the backward pass.
            query_ids: [R, K], tokens whose hidden states are returned; all if None. The last block
                computes queries and the MLP for them only.

        Returns:
            Hidden states [R, L, D], or [R, K, D] with ``query_ids``; with ``mlp_outputs`` also a
            list of ``depth`` tensors [R, L, D], the last of which is like the hidden states.
        """
        hidden, outputs = self._encode(tokens, padding_mask, query_ids, mlp_outputs=mlp_outputs)
        return (hidden, outputs) if mlp_outputs else hidden

    def _encode(
        self,
        tokens: Tensor,
        padding_mask: PaddingMask | None,
        query_ids: Tensor | None = None,
        shared: SharedTokens | None = None,
        mlp_outputs: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Apply blocks and norm; ``query_ids`` are for the last block, ``shared`` for the first."""
        if shared is not None:
            shared = shared._replace(tokens=self.embed_norm(shared.tokens))
        x, outputs = Residual(self.embed_norm(tokens)), []
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            given: dict[str, Any] = {
                "query_ids": query_ids if i == last else None,
                "shared": shared if i == 0 else None,
                "padding_mask": padding_mask,
            }
            if mlp_outputs:
                x = block(x, **given, mlp_output=True)
                outputs.append(x.mlp_output)
            else:
                x = self._run(i, block, x, **given)
        return (x.total() if self.is_post_norm else self.norm(x)[1]), outputs

    def _run(self, index: int, block: nn.Module, x: Residual, **kwargs: Any) -> Residual:
        """Run a block, with activation checkpointing where it is set."""
        if (
            not self.training
            or not self.activation_checkpoint_every
            or index % self.activation_checkpoint_every
        ):
            return block(x, **kwargs)
        # Of a block, its tokens are kept alone. It has no dropout: no random state to restore.
        tokens = checkpoint(
            block, x.total(), use_reentrant=False, preserve_rng_state=False, **kwargs
        )
        return Residual(tokens)

    def no_masks(self, batch_size: int, num_frames: Tensor | None = None) -> Masks:
        """Return masks with no patch masked; ``num_frames`` [B] are the valid frames of clips."""
        embed = self.embed
        columns = embed.valid_columns(num_frames)
        return no_masks(batch_size, embed.grid, embed.pos_embed.device, columns)

    def padding_mask(self, masks: Masks) -> PaddingMask | None:
        """Return which tokens attention leaves out; None where no clip has padding."""
        return token_mask(valid_patches(masks), self.num_extra_tokens)


def token_mask(valid: Tensor | None, num_extra_tokens: int) -> PaddingMask | None:
    """Return which tokens attention leaves out; None where it leaves out none.

    Args:
        valid: [R, K] bool, False for patches that are padding; None if none are.
        num_extra_tokens: Tokens in front of the patches, which are never padding.
    """
    if valid is None:
        return None
    return make_padding_mask(nn.functional.pad(valid, (num_extra_tokens, 0), value=True))


def layer_states(
    encoder: SpectrogramTransformer, clips: Tensor, lengths: Tensor | None = None
) -> list[Tensor]:
    """Return the hidden states of all layers, with no patch masked.

    Args:
        encoder: The encoder.
        clips: [B, T, F] log-mel before normalisation.
        lengths: [B], valid (unpadded) frames; see ``audio.ignore_padding``.

    Returns:
        ``depth + 1`` tensors [B, E + N, D]: the embeddings, then the output of each block, that of
        the last block after the final norm.
    """
    states = residual_states(encoder, clips, lengths)
    return [*states[:-1], encoder.norm(states[-1])]


def residual_states(
    encoder: SpectrogramTransformer, clips: Tensor, lengths: Tensor | None = None
) -> list[Tensor]:
    """Return the same before the final norm: the embeddings, then the output of each block."""
    tokens, masks = encoder.embed_tokens(clips, lengths)
    padding_mask = encoder.padding_mask(masks)
    states = [encoder.embed_norm(tokens)]
    for block in encoder.blocks:
        states.append(block(states[-1], padding_mask=padding_mask))
    return states


def time_states(encoder: SpectrogramTransformer, hidden: Tensor) -> Tensor:
    """Average hidden states [B, E + N, D] over frequency, to [B, T', D]: one per patch column."""
    return hidden[:, encoder.num_extra_tokens :].unflatten(1, encoder.embed.grid).mean(1)


def stacked_states(encoder: SpectrogramTransformer, hidden: Tensor) -> Tensor:
    """Put the hidden states of a column side by side, [B, E + N, D] to [B, T', rows * D]."""
    tokens = hidden[:, encoder.num_extra_tokens :].unflatten(1, encoder.embed.grid)
    return tokens.transpose(1, 2).flatten(2)
