"""The transformer of the published model, module by module as timm has it.

Scripts hook its modules, replace them and take them apart, so each of them computes what it does
there: ``blocks[i].attn.qkv`` returns [B, L, 3 D], ``attn_drop`` sees the attention map. Attention
itself is the project's, where nobody looks at the map.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ssast.engine.formats.published import IMAGENET_CLASSES
from ssast.engine.model.blocks import Block as EncoderBlock
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.settings import Audio, Model
from ssast.kernels.attention import attention

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class PatchEmbed(nn.Module):
    """Patch embedding: images [B, 1, F, T] to tokens [B, N, D]."""

    def __init__(self, projection: nn.Conv2d, num_patches: int):
        super().__init__()
        self.proj, self.num_patches = projection, num_patches

    def forward(self, image: Tensor) -> Tensor:
        """Embed [B, 1, F, T] to [B, N, D]; gradients flow to the image."""
        return self.proj(image).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention, with a dropout of rate 0 that sees the attention map."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads, self.scale = num_heads, (embed_dim // num_heads) ** -0.5
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, L, D] to an update [B, L, D].

        ``attn_drop`` is called, with the map [B, heads, L, L], if it has hooks or was replaced or
        drops: elsewhere the map need not exist.
        """
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).unbind(2)  # [B, L, heads, d]
        if _is_used(self.attn_drop):
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            scores = (q @ k.transpose(2, 3)) * self.scale
            out = (self.attn_drop(scores.softmax(3)) @ v).transpose(1, 2)
        else:
            out = attention(q, k, v)
        return self.proj_drop(self.proj(out.flatten(2)))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.fc1, self.act = nn.Linear(embed_dim, 4 * embed_dim), nn.GELU()
        self.fc2, self.drop = nn.Linear(4 * embed_dim, embed_dim), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, L, D] to an update [B, L, D]."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Block(nn.Module):
    """One transformer block: pre-norm, as timm's.

    Args:
        block: Block of the encoder, whose parameters it shares.
    """

    def __init__(self, block: EncoderBlock):
        super().__init__()
        width, heads = block.attn.proj.out_features, block.attn.num_heads
        with torch.device("meta"):  # parameters are those of the other block
            self.norm1 = nn.LayerNorm(width, eps=block.norm1.eps)
            self.attn, self.drop_path = Attention(width, heads), nn.Identity()
            self.norm2, self.mlp = nn.LayerNorm(width, eps=block.norm2.eps), Mlp(width)
        for name, parameter in block.named_parameters():
            path, _, last = name.rpartition(".")
            setattr(self.get_submodule(path), last, parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, L, D] to [B, L, D]."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PostNormBlock(Block):
    """One transformer block: post-norm."""

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, L, D] to [B, L, D]."""
        x = self.norm1(x + self.drop_path(self.attn(x)))
        return self.norm2(x + self.drop_path(self.mlp(x)))


class Trunk(nn.Module):
    """The transformer with timm's names and ImageNet's heads, which nothing uses.

    Args:
        encoder: Encoder whose parameters are shared.
    """

    pos_embed: Tensor

    def __init__(self, encoder: SpectrogramTransformer):
        super().__init__()
        embed, width = encoder.embed, encoder.embed_dim
        self.embed_dim = self.num_features = width
        projection = nn.Conv2d(1, width, embed.patch, stride=embed.stride)
        projection.weight, projection.bias = embed.weight, embed.bias
        self.patch_embed = PatchEmbed(projection, embed.grid[0] * embed.grid[1])
        self.cls_token = embed.cls_token
        if isinstance(embed.pos_embed, nn.Parameter):
            self.pos_embed = embed.pos_embed
        else:
            self.register_buffer("pos_embed", embed.pos_embed, persistent=False)
        if embed.dist_token is not None:
            self.dist_token = embed.dist_token
        self.pos_drop = nn.Dropout(0.0)
        self.norm_pre = _plain(encoder.embed_norm)
        block = PostNormBlock if encoder.is_post_norm else Block
        self.blocks = nn.ModuleList(block(b) for b in encoder.blocks)  # type: ignore[arg-type]
        self.norm = _plain(encoder.norm)
        self.head = nn.Linear(width, IMAGENET_CLASSES)
        if embed.dist_token is not None:
            self.head_dist = nn.Linear(width, IMAGENET_CLASSES)

    @property
    def extra_tokens(self) -> Tensor:
        """[1, E, D]: cls, and dist if there is one."""
        if hasattr(self, "dist_token"):
            return torch.cat((self.cls_token, self.dist_token), 1)
        return self.cls_token

    def encode(self, tokens: Tensor) -> Tensor:
        """Encode tokens that have their positions to hidden states [B, E + N, D]."""
        tokens = self.norm_pre(self.pos_drop(tokens))
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


def build_trunk(
    size: Any,
    depth: int | None,
    patch: tuple[int, int],
    stride: tuple[int, int],
    shape: tuple[int, int],
    extra_tokens: Any,
) -> Trunk:
    """Build a trunk with fresh weights.

    Args:
        size: Size of the model.
        depth: Number of blocks; that of the size if None.
        patch: Mel bins and frames of a patch.
        stride: Mel bins and frames between two patches.
        shape: Mel bins and frames of the input.
        extra_tokens: As ``model.extra_tokens``.
    """
    model = Model(size=size, patch=patch, depth=depth, extra_tokens=extra_tokens)
    audio = Audio(n_mels=shape[0], num_frames=shape[1])
    return Trunk(SpectrogramTransformer(model, audio, stride))


def _plain(norm: nn.Module) -> nn.Module:
    """Return a LayerNorm of PyTorch that shares the parameters of one of the encoder."""
    if not isinstance(norm, nn.LayerNorm):
        return nn.Identity()
    plain = nn.LayerNorm(norm.normalized_shape, eps=norm.eps)
    plain.weight, plain.bias = norm.weight, norm.bias
    return plain


def _is_used(dropout: nn.Module) -> bool:
    """Return whether anything depends on a call of a dropout."""
    if type(dropout) is not nn.Dropout or "forward" in vars(dropout):
        return True
    if dropout.p > 0 and dropout.training:
        return True
    return any(getattr(dropout, hooks) for hooks in _HOOKS)
