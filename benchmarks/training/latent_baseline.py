"""The published step of latent targets (EAT), written anew in plain PyTorch: what ours is timed by.

    step = student on 16 masks of each clip, decoder, teacher, two MSE losses; backward; clipping;
           AdamW; moving average of the encoder's weights

It does what the published code does, in fp32 and in the same places: masks trimmed and filled by a
Python loop over all clones, every token repeated for each clone before the visible ones are
gathered, attention with its probabilities in memory, a decoder on [B, D, rows, columns] whose last
layer predicts all patches, and Python loops over the weights in AdamW and the average. Only the
weights of the losses are ours: two means that weigh the same.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssast.benchmarks.training.baseline import Attention, Mlp
from ssast.engine.config import Config
from ssast.engine.model.latent import Latent
from ssast.engine.settings import SIZES, Optim
from ssast.kernels.masking import Masks

BLOCK = 5
ADJUST = 0.07  # added to the share of visible patches, as blocks overlap
NOISE_STD = 0.01
GROUPS = 16


def draw_latent_masks(rows: int, columns: int, num_visible: int, count: int) -> Tensor:
    """Draw inverse block masks with PyTorch's generator.

    Args:
        rows: Rows of the grid of patches.
        columns: Its columns.
        num_visible: Number of visible patches of each mask.
        count: R, number of masks.

    Returns:
        [R, N] float32, 1 where a patch is masked.
    """
    N = rows * columns
    visible = torch.zeros(count, rows, columns)
    num_centres = int(N * (num_visible / N + ADJUST) / BLOCK**2)
    visible.view(count, N).scatter_(1, torch.randint(N, (count, num_centres)), 1)
    clip, row, column = visible.nonzero(as_tuple=True)
    for i in range(BLOCK):
        for j in range(BLOCK):
            below = (row + i - BLOCK // 2).clamp(0, rows - 1)
            beside = (column + j - BLOCK // 2).clamp(0, columns - 1)
            visible[clip, below, beside] = 1
    visible = visible.view(count, N)
    found = visible.sum(1)
    for i in range(count):
        if found[i] > num_visible:
            visible[i][torch.multinomial(visible[i], int(found[i] - num_visible))] = 0
        elif found[i] < num_visible:
            visible[i][torch.multinomial(1 - visible[i], int(num_visible - found[i]))] = 1
    return 1 - visible


def own_masks(model: Latent, masks: Masks, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return masks and noise of our model for :meth:`LatentBaseline.losses`.

    Args:
        model: Our model.
        masks: Masks of R clones.
        rows: [R, N] int64, rows of its table of noise.
    """
    masked = torch.zeros(rows.shape, device=rows.device).scatter(1, masks.mask_ids, 1)
    return masked, model.noise[rows]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probabilities = ((q * q.shape[3] ** -0.5) @ k.transpose(2, 3)).softmax(-1, torch.float32)
    return probabilities.to(v.dtype) @ v


class _Block(nn.Module):
    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.attn = Attention(embed_dim, num_heads)
        self.attn.attend = _attend
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = Mlp(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output and that of the MLP."""
        x = self.norm1(x + self.attn(x))
        output = self.mlp(x)
        return self.norm2(x + output), output


class _Encoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        size = SIZES[config.model.size]
        D, N = size.embed_dim, config.grid[0] * config.grid[1]
        self.embed = nn.Conv2d(1, D, config.model.patch, config.model.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.register_buffer("pos_embed", torch.zeros(1, N, D))
        self.embed_norm = nn.LayerNorm(D, eps=1e-6)
        depth = config.model.depth or size.depth
        self.blocks = nn.ModuleList(_Block(D, size.num_heads) for _ in range(depth))

    def load(self, weights: nn.Module) -> None:
        """Take the weights of one of our encoders."""
        state = {
            name.replace("embed.cls_token", "cls_token"): value
            for name, value in weights.state_dict().items()
            if name != "embed.mask_embed"
        }
        positions = weights.get_submodule("embed").get_buffer("pos_embed")[:, 1:]
        self.load_state_dict({**state, "pos_embed": positions})

    def tokens(self, x: Tensor) -> Tensor:
        """Embed normalised filterbanks [B, T, F], to [B, N, D]."""
        tokens = self.embed(x.unsqueeze(1).transpose(2, 3)).flatten(2).transpose(1, 2)
        return tokens + self.pos_embed

    def encode(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the hidden states of tokens [R, L, D] with CLS, and the MLP outputs."""
        x = torch.cat((self.cls_token.expand(len(tokens), -1, -1), tokens), 1)
        x, outputs = self.embed_norm(x), []
        for block in self.blocks:
            x, output = block(x)
            outputs.append(output)
        return x, outputs


class _DecoderLayer(nn.Module):
    def __init__(self, embed_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(embed_dim, embed_dim, 3, padding=1, groups=GROUPS)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).transpose(1, 3)
        return functional.gelu(functional.layer_norm(y, y.shape[3:]).transpose(1, 3)) + x


class _Decoder(nn.Module):
    def __init__(self, embed_dim: int, depth: int, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.layers = nn.ModuleList(_DecoderLayer(embed_dim) for _ in range(depth))
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        R, N, D = x.shape
        x = x.transpose(1, 2).reshape(R, D, *self.grid)
        for layer in self.layers:
            x = layer(x)
        return self.proj(x.reshape(R, D, N).transpose(1, 2))


class LatentBaseline(nn.Module):
    """The published model; takes its weights, also those of the teacher, from one of ours."""

    def __init__(self, config: Config, weights: Latent):
        super().__init__()
        teacher = weights.teacher
        assert teacher is not None
        D, objective = weights.encoder.embed_dim, config.objective
        self.grid, self.clones = config.grid, objective.clones
        self.num_visible = config.grid[0] * config.grid[1] - objective.num_masked
        self.ema_decay, self.steps = weights.ema_decay, 0
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(D, objective.decoder_depth, config.grid)
        self.to(next(weights.parameters()).dtype)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        self.encoder.load(weights.encoder)
        self.decoder.load_state_dict(weights.decoder.state_dict())
        self.teacher.load(teacher)

    def losses(
        self, x: Tensor, masked: Tensor | None = None, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the loss, its two terms, and the deviations of targets and predictions.

        Args:
            x: [B, T, F] normalised filterbanks.
            masked: [R, N], 1 where a patch is masked, the clones of a clip after each other; drawn
                if None.
            noise: [R, N, D], what the decoder is given for masked patches; drawn if None.
        """
        tokens = self.encoder.tokens(x).repeat_interleave(self.clones, 0)
        R, N, D = tokens.shape
        if masked is None:
            masked = draw_latent_masks(*self.grid, self.num_visible, R).to(x.device)
        masked = masked.to(torch.uint8)
        shuffled = masked.argsort(1)
        restored = shuffled.argsort(1)[..., None].expand(-1, -1, D)
        visible = shuffled[:, : N - int(masked[0].sum()), None].expand(-1, -1, D)
        states, _ = self.encoder.encode(tokens.gather(1, visible))

        if noise is None:
            fill = states.new_empty(R, N - visible.shape[1], D).normal_(0, NOISE_STD)
        else:
            fill = noise.gather(1, shuffled[:, visible.shape[1] :, None].expand(-1, -1, D))
        predictions = self.decoder(torch.cat((states[:, 1:], fill), 1).gather(1, restored))

        targets = self.targets(x)
        cls_target = targets.mean(1).repeat_interleave(self.clones, 0)
        wanted = targets.repeat_interleave(self.clones, 0)[masked.bool()]
        predicted = predictions[masked.bool()]
        latent = functional.mse_loss(predicted.float(), wanted, reduction="none").mean()
        cls = functional.mse_loss(states[:, 0].float(), cls_target, reduction="none").mean()
        return {
            "loss": latent + cls,
            "latent_loss": latent,
            "cls_loss": cls,
            "target_std": _deviation(wanted),
            "prediction_std": _deviation(predicted),
        }

    @torch.no_grad()
    def targets(self, x: Tensor) -> Tensor:
        """Return the targets of all patches of normalised filterbanks [B, T, F], [B, N, D]."""
        _, outputs = self.teacher.encode(self.teacher.tokens(x))
        layers = [
            functional.instance_norm(output[:, 1:].transpose(1, 2).float()).transpose(1, 2)
            for output in outputs
        ]
        mean = layers[0]
        for layer in layers[1:]:
            mean.add_(layer)
        return functional.layer_norm(mean.div_(len(layers)), mean.shape[2:])

    def optimizer(self, optim: Optim) -> torch.optim.AdamW:
        """Build AdamW, one weight after the other, which decays matrices alone."""
        trained = [p for p in self.parameters() if p.requires_grad]
        # The published rule: biases and whatever has one dimension; the CLS token is decayed.
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": optim.weight_decay},
            {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            groups, optim.lr, optim.betas, optim.eps, foreach=False, fused=False
        )

    @torch.no_grad()
    def average(self) -> None:
        """Move the teacher's weights towards the encoder's, after an optimizer step."""
        decay, self.steps = self.ema_decay(self.steps), self.steps + 1
        for ours, theirs in zip(self.encoder.parameters(), self.teacher.parameters(), strict=True):
            theirs.mul_(decay).add_(ours, alpha=1 - decay)


@torch.no_grad()
def _deviation(rows: Tensor) -> Tensor:
    return (rows.float().var(0) + 1e-6).sqrt().mean()


def latent_step(
    model: LatentBaseline,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    *,
    max_grad_norm: float = 4.0,
    bf16: bool = False,
) -> dict[str, Tensor]:
    """Take one published step; masks and noise are drawn inside.

    Args:
        model: The published model.
        optimizer: Its optimizer.
        x: [B, T, F] normalised filterbanks.
        max_grad_norm: Norm to which gradients are clipped.
        bf16: Compute in bf16 by autocast.
    """
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        losses = model.losses(x)
    optimizer.zero_grad()
    losses["loss"].backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    model.average()
    return losses
