"""Transformer blocks of SSAST, pre-norm as in DeiT or post-norm as in BERT and EAT.

LayerNorm with eps 1e-6, exact GELU, MLP ratio 4, no dropout.

    pre-norm:   x = x + attention(norm1(x));   x = x + mlp(norm2(x))
    post-norm:  x = norm1(x + attention(x));   x = norm2(x + mlp(x))
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssast.engine.model.embedding import SharedTokens
from ssast.kernels.add_norm import add_norm
from ssast.kernels.attention import PaddingMask, attention
from ssast.kernels.linear import linear_chunks, linear_gelu
from ssast.kernels.patch_embed import take
from ssast.kernels.scatter_tokens import scatter_tokens


class Residual(NamedTuple):
    """The residual stream [B, L, D], and what the next LayerNorm adds to it first."""

    x: Tensor
    update: tuple[Tensor, Tensor] | None = None  # of a ResidualLinear
    mlp_output: Tensor | None = None  # [B, L, D] of the last block, where it was asked for

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
            return self._normalise(x)
        if x.update is None:
            return x.x, self._normalise(x.x)
        return add_norm(x.x, *x.update, self.weight, self.bias, self.eps)

    def _normalise(self, x: Tensor) -> Tensor:
        if not x.is_cpu or {x.dtype, self.weight.dtype} != {torch.bfloat16}:
            return super().forward(x)
        # In bf16 on a CPU, PyTorch sums the gradients of weight and bias over all rows in bf16.
        vectors = self.weight.float(), self.bias.float()
        y = nn.functional.layer_norm(x.float(), self.normalized_shape, *vectors, self.eps)
        return y.to(x.dtype)


class ResidualLinear(nn.Linear):
    """The last linear layer of a residual branch, which leaves its bias to the LayerNorm."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Map [B, L, D'] to the product with the weight [B, L, D], and return the bias [D]."""
        return _kept(self, (nn.functional.linear(x, self.weight), self.bias))


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
        mlp_output: bool = False,
    ) -> Tensor | Residual:
        """Apply the block.

        Args:
            x: Tokens [B, L, D], or a residual stream.
            query_ids: [B, K], tokens whose outputs are computed; all if None.
            shared: Tokens of x that are normalised and projected once for all clips.
            padding_mask: Tokens that attention leaves out; none if None.
            mlp_output: Let the residual stream hold the output of the MLP as well.

        Returns:
            [B, L, D], or [B, K, D] with ``query_ids``; a residual stream if x is one.
        """
        stream = Residual(x) if isinstance(x, Tensor) else x
        stream, (product, bias) = self._updated(stream, query_ids, shared, padding_mask)
        if mlp_output:
            stream = stream._replace(mlp_output=product + bias)
        return stream.total() if isinstance(x, Tensor) else stream

    def _updated(
        self,
        stream: Residual,
        query_ids: Tensor | None,
        shared: SharedTokens | None,
        padding_mask: PaddingMask | None,
    ) -> tuple[Residual, tuple[Tensor, Tensor]]:
        """Return the stream after the block, and what the MLP added to it."""
        queries = None
        if shared is not None:  # before the first block: there is no update yet
            x = stream.x
            y = self.norm1(take(x, shared.visible_token_ids()))
            shared = shared._replace(tokens=self.norm1(shared.tokens))
        else:
            x, y = self.norm1(stream)
        if query_ids is not None:  # the other tokens are needed as keys and values only
            x, queries = take(x, query_ids), take(y, query_ids)
        x, y = self.norm2(Residual(x, self.attn(y, queries, shared, padding_mask)))
        update = _kept(self, self.mlp(y))
        return Residual(x, update), update


class PostNormBlock(Block):
    """One post-norm transformer block."""

    def _updated(
        self,
        stream: Residual,
        query_ids: Tensor | None,
        shared: SharedTokens | None,
        padding_mask: PaddingMask | None,
    ) -> tuple[Residual, tuple[Tensor, Tensor]]:
        x = stream.total()
        queries = None if query_ids is None else take(x, query_ids)
        y = x if shared is None else take(x, shared.visible_token_ids())
        x = x if queries is None else queries
        _, x = self.norm1(Residual(x, self.attn(y, queries, shared, padding_mask)))
        update = self.mlp(x)
        _, x = self.norm2(Residual(x, update))
        return Residual(x), update
