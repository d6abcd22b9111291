"""The audio spectrogram transformer of SSAST: patch embedding, blocks, norm.

The trunk is DeiT's (Touvron et al. 2021) with its two extra tokens, as in AST (Gong et al. 2021):
pre-norm blocks, LayerNorm with eps 1e-6, exact GELU, MLP ratio 4, no dropout.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssast.engine.settings import SIZES, Audio, Model
from ssast.kernels.attention import PaddingMask, attention, make_padding_mask
from ssast.kernels.masking import Masks, no_masks, valid_patches
from ssast.kernels.patch_embed import patch_embed, patch_grid, take
from ssast.kernels.scatter_tokens import scatter_tokens, visible_token_ids

NUM_EXTRA_TOKENS = 2  # cls and dist


class SharedTokens(NamedTuple):
    """Tokens that all clips share: those of the masked patches, before the first block."""

    tokens: Tensor  # [N, D], the token of each patch where it is masked
    masks: Masks

    @property
    def worthwhile(self) -> bool:
        """Whether a batch has more masked patches than there are shared tokens."""
        return self.masks.mask_ids.numel() > len(self.tokens)


class PatchEmbed(nn.Module):
    """Filterbanks [B, T, F] to tokens [B, 2 + N, D] and the masked patches [B, M, P]."""

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
        """What the patches are cut from, [B, T, F]."""
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
        masked = self.mask_embed[0] + self.pos_embed[0, NUM_EXTRA_TOKENS:]
        return tokens, targets, SharedTokens(masked, masks)


class QueryKeyValue(nn.Linear):
    """The three projections of an attention as one linear layer, a third of its rows for each."""

    def forward(  # type: ignore[override]  # three results where Linear has one
        self, x: Tensor, queries: Tensor | None = None, shared: SharedTokens | None = None
    ) -> tuple[Tensor, ...]:
        """Queries [B, K, D] of the tokens ``queries``, those of x if None; keys and values of x.

        With ``shared``, x holds the other tokens alone, and the results are for all tokens.
        """
        if shared is not None:
            visible, masked = super().forward(x), super().forward(shared.tokens)
            return scatter_tokens(visible, masked, shared.masks).chunk(3, 2)
        if queries is None:
            return super().forward(x).chunk(3, 2)
        D = self.in_features
        q = nn.functional.linear(queries, self.weight[:D], self.bias[:D])
        return q, *nn.functional.linear(x, self.weight[D:], self.bias[D:]).chunk(2, 2)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = QueryKeyValue(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(
        self,
        x: Tensor,
        queries: Tensor | None = None,
        shared: SharedTokens | None = None,
        padding_mask: PaddingMask | None = None,
    ) -> Tensor:
        """[B, L, D] to [B, L, D], or to [B, K, D] where only some of the tokens ask."""
        q, k, v = (t.unflatten(2, (self.num_heads, -1)) for t in self.qkv(x, queries, shared))
        return self.proj(attention(q, k, v, padding_mask).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, 4 * embed_dim)
        self.fc2 = nn.Linear(4 * embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = Mlp(embed_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        x: Tensor,
        wanted: Tensor | None = None,
        shared: SharedTokens | None = None,
        padding_mask: PaddingMask | None = None,
    ) -> Tensor:
        """[B, L, D] to [B, L, D], or to the tokens ``wanted`` [B, K] alone: [B, K, D].

        Tokens in ``shared`` are normalised and projected once for all clips. Tokens that
        ``padding_mask`` marks as padding are not attended to.
        """
        queries = None
        if shared is not None:
            y = self.norm1(take(x, visible_token_ids(shared.masks, NUM_EXTRA_TOKENS)))
            shared = shared._replace(tokens=self.norm1(shared.tokens))
        else:
            y = self.norm1(x)
        if wanted is not None:  # the others are needed as keys and values only
            x, queries = take(x, wanted), take(y, wanted)
        x = x + self.attn(y, queries, shared, padding_mask)
        return x + self.mlp(self.norm2(x))


class SpectrogramTransformer(nn.Module):
    """The encoder: filterbanks [B, T, F] to hidden states [B, 2 + N, D], cls and dist first."""

    def __init__(self, model: Model, audio: Audio, stride: tuple[int, int] | None = None):
        """Build it with fresh weights.

        Args:
            model: Size and patch.
            audio: Number of mel bins and frames of the input, and its normalisation.
            stride: Mel bins and frames between two patches; the patch itself (no overlap) if None.
        """
        super().__init__()
        size = SIZES[model.size]
        self.embed_dim = size.embed_dim
        self.embed = PatchEmbed(model.patch, stride or model.patch, size.embed_dim, audio)
        self.blocks = nn.ModuleList(
            Block(size.embed_dim, size.num_heads) for _ in range(model.depth or size.depth)
        )
        self.norm = nn.LayerNorm(size.embed_dim, eps=1e-6)
        self.activation_checkpoint_every: int | None = None
        """Every so many blocks, the inside of one is computed again in the backward pass."""

    def forward(
        self, fbank: Tensor, masks: Masks, *, masked_only: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Encode a batch.

        Args:
            fbank: [B, T, F] log-mel before normalisation.
            masks: Which patches are hidden.
            masked_only: The hidden states of the other tokens are not wanted; the last block then
                leaves out what only they would have needed. The numbers are the same.

        Returns:
            Hidden states [B, 2 + N, D], or with ``masked_only`` those of the masked patches
            [B, M, D], and the normalised masked patches [B, M, P].
        """
        x, targets, shared = self.embed(fbank, masks)
        padding_mask = token_padding_mask(masks)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            wanted = masks.mask_ids + NUM_EXTRA_TOKENS if masked_only and i == last else None
            first = shared if i == 0 and i < last and shared.worthwhile else None
            x = self._run(i, block, x, wanted=wanted, shared=first, padding_mask=padding_mask)
        return self.norm(x), targets

    def _run(self, index: int, block: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
        """The output of a block, with or without keeping what its backward pass needs."""
        if (
            not self.training
            or not self.activation_checkpoint_every
            or index % self.activation_checkpoint_every
        ):
            return block(x, **kwargs)
        # Nothing in a block is random.
        return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, **kwargs)

    def no_masks(self, batch_size: int, num_frames: Tensor | None = None) -> Masks:
        """Nothing hidden, as in fine-tuning; ``num_frames`` [B] tells where padding begins."""
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
    """Position embedding for another patch grid.

    Each axis is cut around its centre where the new grid is shorter and interpolated (bilinear)
    where it is longer; the extra tokens keep theirs. As in the published fine-tuning.

    Args:
        pos_embed: [1, 2 + N, D].
        old: Rows and columns it was made for.
        new: Rows and columns wanted.

    Returns:
        [1, 2 + N', D].
    """
    extra, image = pos_embed[:, :NUM_EXTRA_TOKENS], pos_embed[:, NUM_EXTRA_TOKENS:]
    image = image.transpose(1, 2).unflatten(2, old)  # [1, D, rows, columns]
    for axis in (3, 2):  # time first, as published
        wanted, have = new[axis - 2], image.shape[axis]
        if wanted < have:
            image = image.narrow(axis, have // 2 - wanted // 2, wanted)
        elif wanted > have:
            size = (image.shape[2], wanted) if axis == 3 else (wanted, image.shape[3])
            image = nn.functional.interpolate(
                image, size=size, mode="bilinear", align_corners=False
            )
    return torch.cat((extra, image.flatten(2).transpose(1, 2)), 1)


def layer_states(
    encoder: SpectrogramTransformer, clips: Tensor, lengths: Tensor | None = None
) -> list[Tensor]:
    """Hidden states of every layer, with nothing masked.

    Args:
        encoder: Of the clips.
        clips: [B, T, F] log-mel before normalisation.
        lengths: [B], frames that hold sound; see ``audio.ignore_padding``.

    Returns:
        Tokens before the first block, and after each block, the last after the final norm:
        ``depth + 1`` tensors [B, 2 + N, D].
    """
    masks = encoder.no_masks(len(clips), lengths)
    padding_mask = token_padding_mask(masks)
    x, _, _ = encoder.embed(clips, masks)
    states = [x]
    for block in encoder.blocks:
        states.append(block(states[-1], padding_mask=padding_mask))
    return [*states[:-1], encoder.norm(states[-1])]


def over_time(encoder: SpectrogramTransformer, hidden: Tensor) -> Tensor:
    """One vector for each column of patches, [B, T', D]: the mean over its rows.

    Args:
        encoder: Which made the states.
        hidden: [B, 2 + N, D].
    """
    return hidden[:, NUM_EXTRA_TOKENS:].unflatten(1, encoder.embed.grid).mean(1)
