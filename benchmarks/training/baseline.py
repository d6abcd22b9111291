"""The published training steps, written anew in plain PyTorch: what ours are measured against.

    step = pass with mask 1, InfoNCE; pass with mask 2, MSE; backward of InfoNCE + 10 MSE; Adam
    step = pass over overlapping patches, binary cross entropy; backward; Adam     (fine-tuning)

It does what the published code does, in fp32 and in the same places: masks drawn by a Python loop
for each clip, every patch projected and the masked ones blended away, attention with its
probabilities in memory, and a Python loop over the clips for gathering, heads and losses. The
names of its parameters are the published ones.
"""

import random

import torch
from torch import Tensor, nn

from ssast.engine.api import published_name
from ssast.engine.config import Config
from ssast.engine.model.classifier import Classifier
from ssast.engine.model.objective import MSPM
from ssast.engine.settings import SIZES


def draw_published_mask(rows: int, columns: int, num_masked: int) -> list[int]:
    """Draw the ids of the cluster mask of one clip from Python's generator."""
    N, side = rows * columns, random.randrange(3) + 3
    ids: list[int] = []
    while len(set(ids)) <= num_masked:
        start = random.randrange(N)
        for i in range(side):
            for j in range(side):
                candidate = start + columns * i + j
                if 0 < candidate < N:
                    ids.append(candidate)
    return sorted(set(ids))[:num_masked]


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend over [B, H, L, D_h], with the probabilities in memory."""
    scores = (q @ k.transpose(2, 3)) * q.shape[3] ** -0.5
    return scores.softmax(-1) @ v


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads, self.attend = num_heads, explicit_attention
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, L, D] to the same shape."""
        B, L, D = x.shape
        qkv = self.qkv(x).reshape(B, L, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(B, L, D))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, 4 * embed_dim)
        self.fc2 = nn.Linear(4 * embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, L, D] to the same shape."""
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = Mlp(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _PatchEmbed(nn.Module):
    def __init__(self, patch: tuple[int, int], stride: tuple[int, int], embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(1, embed_dim, patch, stride=stride)


class _Trunk(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        size, N = SIZES[config.model.size], config.grid[0] * config.grid[1]
        D = size.embed_dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, N + 2, D))
        stride = (config.finetune and config.finetune.stride) or config.model.patch
        self.patch_embed = _PatchEmbed(config.model.patch, stride, D)
        depth = config.model.depth or size.depth
        self.blocks = nn.ModuleList(_Block(D, size.num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(D, eps=1e-6)

    def encode(self, tokens: Tensor) -> Tensor:
        """Return hidden states [B, 2 + N, D] of the tokens of the patches [B, N, D]."""
        cls_token = self.cls_token.expand(len(tokens), -1, -1)
        dist_token = self.dist_token.expand(len(tokens), -1, -1)
        hidden = torch.cat((cls_token, dist_token, tokens), dim=1) + self.pos_embed
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)


class Baseline(nn.Module):
    """The published model; takes its weights from one of ours."""

    def __init__(self, config: Config, weights: MSPM):
        super().__init__()
        D = SIZES[config.model.size].embed_dim
        patch = config.model.patch
        P = patch[0] * patch[1]
        self.grid, self.num_masked = config.grid, config.objective.num_masked
        self.unfold = nn.Unfold(patch, stride=patch)
        self.v = _Trunk(config)
        self.mask_embed = nn.Parameter(torch.zeros(1, 1, D))
        self.cpredlayer = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, P))
        self.gpredlayer = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, P))
        self.to(next(weights.parameters()).dtype)
        state = weights.state_dict()
        self.load_state_dict({published_name(name): state[name] for name in state})

    def draw_masks(self, batch_size: int) -> Tensor:
        """Draw a new mask for each clip, [B, M] int64."""
        masks = torch.empty(batch_size, self.num_masked, dtype=torch.int64)
        for i in range(batch_size):
            masks[i] = torch.tensor(draw_published_mask(*self.grid, self.num_masked))
        return masks.to(self.mask_embed.device)

    def encode(self, x: Tensor, mask_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden states [B, 2 + N, D] and masked patches [B, M, P] of x [B, T, F]."""
        B = len(x)
        image = x.unsqueeze(1).transpose(2, 3)
        patches = self.unfold(image).transpose(1, 2)
        tokens = self.v.patch_embed.proj(image).flatten(2).transpose(1, 2)
        targets = x.new_empty(B, mask_ids.shape[1], patches.shape[2])
        kept = torch.ones_like(tokens, requires_grad=False)
        for i in range(B):
            targets[i] = patches[i, mask_ids[i], :].clone().detach()
            kept[i, mask_ids[i], :] = 0
        mask_tokens = self.mask_embed.expand(B, tokens.shape[1], -1)
        tokens = tokens * kept + (1 - kept) * mask_tokens
        return self.v.encode(tokens), targets

    def discriminative_pass(
        self, x: Tensor, mask_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return InfoNCE and its accuracy, means over the batch, from a pass of its own."""
        mask_ids = self.draw_masks(len(x)) if mask_ids is None else mask_ids
        return self.discriminative_loss(*self.encode(x, mask_ids), mask_ids)

    def discriminative_loss(
        self, hidden: Tensor, targets: Tensor, mask_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return InfoNCE and its accuracy from what :meth:`encode` gives."""
        B, M = mask_ids.shape
        predictions = torch.empty_like(targets)
        for i in range(B):
            predictions[i] = self.cpredlayer(hidden[i, mask_ids[i] + 2, :])
        nce, correct = hidden.new_zeros(()), hidden.new_zeros(())
        for i in range(B):
            scores = targets[i] @ predictions[i].transpose(0, 1)
            correct += (scores.softmax(-1).argmax(0) == torch.arange(M, device=scores.device)).sum()
            nce += scores.log_softmax(-1).diag().sum()
        return -nce / (B * M), correct / (B * M)

    def generative_pass(self, x: Tensor, mask_ids: Tensor | None = None) -> Tensor:
        """Return the reconstruction loss, mean over the batch, from a pass of its own."""
        mask_ids = self.draw_masks(len(x)) if mask_ids is None else mask_ids
        return self.generative_loss(*self.encode(x, mask_ids), mask_ids)

    def generative_loss(self, hidden: Tensor, targets: Tensor, mask_ids: Tensor) -> Tensor:
        """Return the reconstruction loss from what :meth:`encode` gives."""
        predictions = torch.empty_like(targets)
        for i in range(len(hidden)):
            predictions[i] = self.gpredlayer(hidden[i, mask_ids[i] + 2, :])
        return torch.mean((predictions - targets) ** 2)

    def losses(
        self, x: Tensor, first: Tensor | None = None, second: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the joint loss and its parts.

        Args:
            x: [B, T, F] normalised filterbanks.
            first: [B, M] masked ids of the contrastive pass; drawn if None.
            second: [B, M] masked ids of the generative pass; drawn if None.
        """
        nce, accuracy = self.discriminative_pass(x, first)
        mse = self.generative_pass(x, second)
        losses = {"infonce_loss": nce, "mse_loss": mse, "pretext_accuracy": accuracy}
        return {"loss": nce + 10 * mse, **losses}


class ClassifierBaseline(nn.Module):
    """The published classifier; takes its weights from one of ours."""

    def __init__(self, config: Config, weights: Classifier):
        super().__init__()
        D = SIZES[config.model.size].embed_dim
        self.v = _Trunk(config)
        num_classes = len(weights.head[1].weight)  # type: ignore[arg-type]  # a Linear's
        self.mlp_head = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, num_classes))
        state = {n: t for n, t in weights.state_dict().items() if not n.endswith("mask_embed")}
        self.load_state_dict({published_name(name): state[name] for name in state})

    def losses(self, x: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The loss of normalised filterbanks [B, T, F] with targets [B, C], from the mean token."""
        tokens = self.v.patch_embed.proj(x.unsqueeze(1).transpose(2, 3))
        hidden = self.v.encode(tokens.flatten(2).transpose(1, 2))
        logits = self.mlp_head(hidden[:, 2:].mean(1))
        return {"loss": nn.functional.binary_cross_entropy_with_logits(logits, targets)}


def published_optimizer(model: nn.Module, lr: float = 1e-4) -> torch.optim.Adam:
    """Build Adam as the published recipe calls it."""
    return torch.optim.Adam(model.parameters(), lr, betas=(0.95, 0.999), weight_decay=5e-7)


def train_step(
    model: Baseline | ClassifierBaseline,
    optimizer: torch.optim.Optimizer,
    *batch: Tensor,
    bf16: bool = False,
) -> dict[str, Tensor]:
    """Take one published step; masks are drawn inside.

    Args:
        model: The published model.
        optimizer: Its optimizer.
        batch: Normalised filterbanks [B, T, F], of a classifier also targets [B, C].
        bf16: Compute in bf16 by autocast; the published code does so in fp16.
    """
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=bf16):
        losses = model.losses(*batch)
    optimizer.zero_grad()
    losses["loss"].backward()
    optimizer.step()
    return losses
