"""A small module with everything that sharding can get wrong, and its training."""

from functools import partial

import torch
from torch import nn

from ssast.engine.parallel.deepspeed_engine import TrainEngine
from ssast.engine.train.optim import ema_decay

BATCH = 8
DECAY = partial(ema_decay, ema=0.3)


@torch.library.custom_op("tests::embed", mutates_args=())
def embed(x: torch.Tensor, weight: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    return x @ weight.t() + token


@embed.register_fake
def _(x, weight, token):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    return grad @ weight, grad.flatten(0, -2).t() @ x.flatten(0, -2), grad.flatten(0, -2).sum(0)


embed.register_autograd(_backward, setup_context=_save)


class Embed(nn.Module):
    """A custom operation on the module's own parameters, not through a layer's forward."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, features) * 0.1)
        self.token = nn.Parameter(torch.randn(width) * 0.1)

    def forward(self, x):
        return torch.ops.tests.embed(x, self.weight, self.token)


class Toy(nn.Module):
    """Odd sizes that no number of ranks divides, a frozen layer and both kinds of buffers."""

    def __init__(self, width: int = 13):
        super().__init__()
        self.embed = Embed(7, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.head = nn.Linear(width, 3)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, x):
        if self.training:
            self.seen += 1
        x = self.embed(x.to(self.embed.weight.dtype))
        for block in self.blocks:
            x = x + nn.functional.gelu(block(self.norm(x)))
        logits = self.head(x + self.scale.to(x.dtype) * self.frozen(x)).float()
        return {"logits": logits, "loss": logits.square().mean((1, 2))}


def build_toy(seed: int = 0) -> Toy:
    torch.manual_seed(seed)
    return Toy()


def build_adam(module: nn.Module, **settings) -> torch.optim.Optimizer:
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), **{"fused": True, **settings})


def clips(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole batch of a step: [B, 5, 7] and targets [B, 5, 3]."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(BATCH, 5, 7, generator=generator)
    return x, torch.randn(BATCH, 5, 3, generator=generator)


def lr_at(step: int) -> float:
    return 1e-2 * min(1.0, (step + 1) / 3)


def build_engine(
    world,
    *,
    seed=0,
    stage=1,
    precision="fp32",
    accumulate=1,
    clip=1.0,
    offload="none",
    reduce_dtype="auto",
    averages=False,
    **adam,
):
    module = build_toy(seed).to(world.device)
    return TrainEngine(
        module,
        build_adam(module, **adam),
        world=world,
        batch_size=BATCH // world.world_size // accumulate,
        accumulate=accumulate,
        zero_stage=stage,
        precision=precision,
        max_grad_norm=clip,
        offload=offload,
        reduce_dtype=reduce_dtype,
        ema_decay=DECAY if averages else None,
    )


def loss_of(outputs, targets):
    return (outputs["logits"] - targets).square().mean() + 0.1 * outputs["loss"].mean()


def train(engine, steps, *, poison: int | None = None) -> list[float]:
    """Trains over these steps; the loss of each over all ranks, weighed in float64.

    Args:
        engine: of any world; each rank takes its clips of the same batches.
        steps: numbers of the steps.
        poison: the step in which the last rank's loss is not a number.
    """
    from ssast.engine.parallel.ranks import reduce_sum

    world, losses = engine.world, []
    for step in steps:
        x, y = (t[world.rank :: world.world_size].to(world.device) for t in clips(step))
        total = 0.0
        for xs, ys in zip(x.chunk(engine.accumulate), y.chunk(engine.accumulate), strict=True):
            loss = loss_of(engine(xs), ys)
            if step == poison and world.rank == world.world_size - 1:
                loss = loss * torch.nan
            engine.backward(loss)
            engine.step(lr_at(step))
            total += loss.item() / engine.accumulate
        losses.append(reduce_sum([total], world)[0] / world.world_size)
    return losses
