"""The audio spectrogram transformer of SSAST: patch embedding, blocks, norm.

The trunk is DeiT's (Touvron et al. 2021) with its two extra tokens, as in AST (Gong et al. 2021):
pre-norm blocks, LayerNorm with eps 1e-6, exact GELU, MLP ratio 4, no dropout.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssast.engine.settings import SIZES, Audio, Model
from ssast.kernels.add_norm import add_norm
from ssast.kernels.attention import PaddingMask, attention, make_padding_mask
from ssast.kernels.linear import linear_chunks, linear_gelu
from ssast.kernels.masking import Masks, no_masks, valid_patches
from ssast.kernels.patch_embed import patch_embed, patch_grid, take
from ssast.kernels.scatter_tokens import scatter_tokens, visible_token_ids

NUM_EXTRA_TOKENS = 2  # cls and dist


class SharedTokens(NamedTuple):
    """Tokens that all clips share: before the first block, a masked patch is its position alone."""

    tokens: Tensor  # [N, D], mask embedding plus position embedding of each patch
    masks: Masks

    @property
    def saves_work(self) -> bool:
        """Whether the batch has more masked patches than there are shared tokens."""
        return self.masks.mask_ids.numel() > len(self.tokens)


class Residual(NamedTuple):
    """The residual stream [B, L, D], and what the next LayerNorm adds to it first."""

    x: Tensor
    update: tuple[Tensor, Tensor] | None = None  # of a ResidualLinear

    def total(self) -> Tensor:
        """Add the update."""
        if self.update is None:
            return self.x
        product, bias = self.update
        return self.x + (product + bias)


def _kept(module: nn.Module, update: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return an update of a module that lasts longer than the module's parameters.

    The bias is used outside of the module, and FSDP frees parameters in a hook after the forward
    pass.
    """
    product, bias = update
    return (product, bias.clone()) if module._forward_hooks else update


class ResidualNorm(nn.LayerNorm):
    """LayerNorm of tokens, or of a residual stream that is to be updated."""

    def forward(  # type: ignore[override]  # a residual stream has two results
        self, x: Tensor | Residual
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise tokens [B, L, D]; of a residual stream return its total and that normalised."""
        if isinstance(x, Tensor):
            return super().forward(x)
        if x.update is None:
            return x.x, super().forward(x.x)
        return add_norm(x.x, *x.update, self.weight, self.bias, self.eps)


class ResidualLinear(nn.Linear):
    """The last linear layer of a residual branch, which leaves its bias to the LayerNorm."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Map [B, L, D'] to the product with the weight [B, L, D], and return the bias [D]."""
        return _kept(self, (nn.functional.linear(x, self.weight), self.bias))


class PatchEmbed(nn.Module):
    """Patch embedding: filterbanks [B, T, F] to tokens [B, 2 + N, D] and targets [B, M, P]."""

    def __init__(
        self, patch: tuple[int, int], stride: tuple[int, int], embed_dim: int, audio: Audio
    ):
        super().__init__()
        self.patch, self.stride, self.mean, self.std = patch, stride, audio.mean, audio.std
        self.ignore_padding = audio.ignore_padding
        self.grid = patch_grid(audio.n_mels, audio.num_frames, patch, stride)
        projection = nn.Conv2d(1, embed_dim, patch)  # for its initialisation and shape
        self.weight, self.bias = projection.weight, projection.bias
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.mask_embed = nn.Parameter(torch.zeros(1, 1, embed_dim))
        num_tokens = NUM_EXTRA_TOKENS + self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, embed_dim))
        for parameter in (self.cls_token, self.dist_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        if not self.mask_embed.is_meta:  # where this draw would import torch's compiler: a second
            nn.init.xavier_normal_(self.mask_embed)

    def valid_columns(self, num_frames: Tensor | None) -> Tensor | None:
        """Columns of patches that lie whole in the sound, [B], at least one.

        None where padding counts as sound, or where no length is given.
        """
        if num_frames is None or not self.ignore_padding:
            return None
        whole = torch.div(num_frames - self.patch[1], self.stride[1], rounding_mode="floor") + 1
        return whole.clamp(1, self.grid[1])

    def normalise(self, fbank: Tensor) -> Tensor:
        """Normalise filterbanks [B, T, F]; patches are cut from the result."""
        return (fbank - self.mean) / (2 * self.std)

    def forward(self, fbank: Tensor, masks: Masks) -> tuple[Tensor, Tensor, SharedTokens]:
        """Return tokens and targets (see :func:`patch_embed`), and the shared tokens."""
        assert self.bias is not None
        tokens, targets = patch_embed(
            fbank,
            self.weight,
            self.bias,
            self.mask_embed.flatten(),
            self.pos_embed,
            torch.cat((self.cls_token, self.dist_token), 1),
            masks,
            mean=self.mean,
            std=self.std,
            stride=self.stride,
        )
        masked = (self.mask_embed + self.pos_embed[:, NUM_EXTRA_TOKENS:]).squeeze(0)
        return tokens, targets, SharedTokens(masked, masks)


class QueryKeyValue(nn.Linear):
    """The query, key and value projections as one linear layer."""

    def forward(  # type: ignore[override]  # three results where Linear has one
        self, x: Tensor, queries: Tensor | None = None, shared: SharedTokens | None = None
    ) -> tuple[Tensor, ...]:
        """Project to queries, keys and values.

        Args:
            x: Tokens [B, L, D]; with ``shared``, those that are not masked.
            queries: Tokens [B, K, D] to project to queries; x if None.
            shared: The masked tokens, projected once and copied into every clip.

        Returns:
            Queries [B, K, D] or [B, L, D], keys and values [B, L, D] of all tokens.
        """
        if shared is not None:
            visible, masked = super().forward(x), super().forward(shared.tokens)
            return scatter_tokens(visible, masked, shared.masks).chunk(3, 2)
        if queries is None:
            return linear_chunks(x, self.weight, self.bias, 3)
        widths = [self.in_features, 2 * self.in_features]
        (w_q, w_kv), (b_q, b_kv) = self.weight.split(widths), self.bias.split(widths)
        return nn.functional.linear(queries, w_q, b_q), *linear_chunks(x, w_kv, b_kv, 2)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = QueryKeyValue(embed_dim, 3 * embed_dim)
        self.proj = ResidualLinear(embed_dim, embed_dim)

    def forward(
        self,
        x: Tensor,
        queries: Tensor | None = None,
        shared: SharedTokens | None = None,
        padding_mask: PaddingMask | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Map tokens [B, L, D] to an update [B, L, D] and its bias, or [B, K, D] of ``queries``."""
        q, k, v = (t.unflatten(2, (self.num_heads, -1)) for t in self.qkv(x, queries, shared))
        return _kept(self, self.proj(attention(q, k, v, padding_mask).flatten(2)))


class GeluLinear(nn.Linear):
    """A linear layer and a GELU."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D']."""
        return linear_gelu(x, self.weight, self.bias)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.fc1 = GeluLinear(embed_dim, 4 * embed_dim)
        self.fc2 = ResidualLinear(4 * embed_dim, embed_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map tokens [B, L, D] to an update [B, L, D] and its bias."""
        return _kept(self, self.fc2(self.fc1(x)))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.norm1 = ResidualNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, num_heads)
        self.norm2 = ResidualNorm(embed_dim, eps=1e-6)
        self.mlp = Mlp(embed_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        x: Tensor | Residual,
        query_ids: Tensor | None = None,
        shared: SharedTokens | None = None,
        padding_mask: PaddingMask | None = None,
    ) -> Tensor | Residual:
        """Apply the block.

        Args:
            x: Tokens [B, L, D], or a residual stream.
            query_ids: [B, K], tokens whose outputs are computed; all if None.
            shared: Tokens of x that are normalised and projected once for all clips.
            padding_mask: Tokens that attention leaves out; none if None.

        Returns:
            [B, L, D], or [B, K, D] with ``query_ids``; a residual stream if x is one.
        """
        stream = Residual(x) if isinstance(x, Tensor) else x
        stream = self._updated(stream, query_ids, shared, padding_mask)
        return stream.total() if isinstance(x, Tensor) else stream

    def _updated(
        self,
        stream: Residual,
        query_ids: Tensor | None,
        shared: SharedTokens | None,
        padding_mask: PaddingMask | None,
    ) -> Residual:
        queries = None
        if shared is not None:  # before the first block: there is no update yet
            x = stream.x
            y = self.norm1(take(x, visible_token_ids(shared.masks, NUM_EXTRA_TOKENS)))
            shared = shared._replace(tokens=self.norm1(shared.tokens))
        else:
            x, y = self.norm1(stream)
        if query_ids is not None:  # the other tokens are needed as keys and values only
            x, queries = take(x, query_ids), take(y, query_ids)
        x, y = self.norm2(Residual(x, self.attn(y, queries, shared, padding_mask)))
        return Residual(x, _kept(self, self.mlp(y)))


class SpectrogramTransformer(nn.Module):
    """The encoder: filterbanks [B, T, F] to hidden states [B, 2 + N, D], cls and dist first."""

    backbone = "transformer"  # the model.backbone that it was built by

    def __init__(self, model: Model, audio: Audio, stride: tuple[int, int] | None = None):
        """Initialise the weights.

        Args:
            model: Size and patch.
            audio: Number of mel bins and frames of the input, and its normalisation.
            stride: Patch stride in mel bins and frames; no overlap if None.
        """
        super().__init__()
        size = SIZES[model.size]
        self.embed_dim = size.embed_dim
        self.embed = PatchEmbed(model.patch, stride or model.patch, size.embed_dim, audio)
        self.blocks = nn.ModuleList(
            self.build_block(size.embed_dim, size.num_heads)
            for _ in range(model.depth or size.depth)
        )
        self.norm = ResidualNorm(size.embed_dim, eps=1e-6)
        self.activation_checkpoint_every: int | None = None
        """Recompute the activations of every n-th block in the backward pass; None: of no block."""

    def build_block(self, embed_dim: int, num_heads: int) -> nn.Module:
        """Build one block."""
        return Block(embed_dim, num_heads)

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
            Hidden states [B, 2 + N, D], or with ``masked_only`` those of the masked patches
            [B, M, D], and the normalised masked patches [B, M, P].
        """
        tokens, targets, shared = self.embed(fbank, masks)
        x, padding_mask = Residual(tokens), token_padding_mask(masks)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            query_ids = masks.mask_ids + NUM_EXTRA_TOKENS if masked_only and i == last else None
            # Only before the first block do masked tokens not depend on the clip.
            first = shared if i == 0 and i < last and shared.saves_work else None
            x = self._run(i, block, x, query_ids=query_ids, shared=first, padding_mask=padding_mask)
        return self.norm(x)[1], targets

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


def token_padding_mask(masks: Masks) -> PaddingMask | None:
    """Return which tokens attention leaves out; None where no clip has padding."""
    valid = valid_patches(masks)
    if valid is None:
        return None
    return make_padding_mask(nn.functional.pad(valid, (NUM_EXTRA_TOKENS, 0), value=True))


def resize_pos_embed(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Adapt the position embedding to another patch grid, as the published fine-tuning does.

    An axis is cropped around its centre where the new grid is shorter and interpolated (bilinear)
    where it is longer; the extra tokens keep their embeddings.

    Args:
        pos_embed: Position embedding [1, 2 + N, D].
        old: Rows and columns of its grid.
        new: Rows and columns of the new grid.

    Returns:
        [1, 2 + N', D].
    """
    extra, image = pos_embed[:, :NUM_EXTRA_TOKENS], pos_embed[:, NUM_EXTRA_TOKENS:]
    image = image.transpose(1, 2).unflatten(2, old)  # [1, D, rows, columns]
    for axis in (3, 2):  # time first, as published
        length, found = new[axis - 2], image.shape[axis]
        if length < found:
            image = image.narrow(axis, found // 2 - length // 2, length)
        elif length > found:
            size = (image.shape[2], length) if axis == 3 else (length, image.shape[3])
            image = nn.functional.interpolate(
                image, size=size, mode="bilinear", align_corners=False
            )
    return torch.cat((extra, image.flatten(2).transpose(1, 2)), 1)


def layer_states(
    encoder: SpectrogramTransformer, clips: Tensor, lengths: Tensor | None = None
) -> list[Tensor]:
    """Return the hidden states of all layers, with no patch masked.

    Args:
        encoder: The encoder.
        clips: [B, T, F] log-mel before normalisation.
        lengths: [B], valid (unpadded) frames; see ``audio.ignore_padding``.

    Returns:
        ``depth + 1`` tensors [B, 2 + N, D]: the embeddings, then the output of each block, that of
        the last block after the final norm.
    """
    states = residual_states(encoder, clips, lengths)
    return [*states[:-1], encoder.norm(states[-1])]


def residual_states(
    encoder: SpectrogramTransformer, clips: Tensor, lengths: Tensor | None = None
) -> list[Tensor]:
    """Return the same before the final norm: the embeddings, then the output of each block."""
    masks = encoder.no_masks(len(clips), lengths)
    padding_mask = token_padding_mask(masks)
    x, _, _ = encoder.embed(clips, masks)
    states = [x]
    for block in encoder.blocks:
        states.append(block(states[-1], padding_mask=padding_mask))
    return states


def time_states(encoder: SpectrogramTransformer, hidden: Tensor) -> Tensor:
    """Average hidden states [B, 2 + N, D] over frequency, to [B, T', D]: one per patch column."""
    return hidden[:, NUM_EXTRA_TOKENS:].unflatten(1, encoder.embed.grid).mean(1)


def stacked_states(encoder: SpectrogramTransformer, hidden: Tensor) -> Tensor:
    """Put the hidden states of a column side by side, [B, 2 + N, D] to [B, T', rows * D]."""
    tokens = hidden[:, NUM_EXTRA_TOKENS:].unflatten(1, encoder.embed.grid)
    return tokens.transpose(1, 2).flatten(2)
