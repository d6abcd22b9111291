"""One optimizer step of the toy module on clips of which some are not valid."""

from types import SimpleNamespace

import torch
from toy import BATCH, build_engine, build_toy, clips

from ssast.engine.train.step import train_step

LR, BETA = 1e-2, 0.9  # of the toy's Adam


def losses_of(outputs, targets):
    """Losses of each clip, [B]."""
    return (outputs["logits"] - targets).square().mean((1, 2)) + 0.1 * outputs["loss"]


class ToyTask:
    """A regression whose batches hold a target for each clip."""

    def inputs(self, batch, *, training):
        self.targets = batch.targets
        return (batch.inputs,), batch.valid

    def means(self, outputs, valid):
        losses = losses_of(outputs, self.targets.to(outputs["logits"].dtype))
        weights = valid / valid.sum().clamp(min=1)
        return {"loss": (losses.where(valid, 0) * weights).sum()}


def micro_batches(world, accumulate, broken):
    """The micro-batches of a rank; a broken clip is silence."""
    x, y = clips(0)
    valid = torch.ones(BATCH, dtype=torch.bool)
    valid[list(broken)] = False
    x[~valid] = 0
    mine = slice(world.rank, None, world.world_size)
    parts = (t[mine].chunk(accumulate) for t in (x, y, valid, torch.arange(BATCH)))
    for inputs, targets, good, rows in zip(*parts, strict=True):
        yield SimpleNamespace(inputs=inputs, targets=targets, valid=good, clip_ids=rows)


def one_step(world, stage, precision, accumulate, broken, clip=None, offload="none"):
    """Return the gradient that Adam was given, its norm, the logged means and what changed."""
    engine = build_engine(
        world, stage=stage, precision=precision, accumulate=accumulate, clip=clip, offload=offload
    )
    before, _ = engine.state()
    taken = iter(micro_batches(world, accumulate, broken))
    updated, parts = train_step(ToyTask(), engine, taken, LR)
    after, adam_step = engine.state()
    norm = float(engine.grad_norm)
    engine.close()
    first = "exp_avg/"
    gradient = {n.removeprefix(first): t / (1 - BETA) for n, t in after.items() if first in n}
    changed = [n for n in before if "buffer" not in n and not torch.equal(before[n], after[n])]
    losses = [(part.means["loss"].item(), int(part.valid.sum())) for part in parts]
    return {
        "updated": updated,
        "adam_step": adam_step,
        "gradient": gradient,
        "norm": norm,
        "losses": losses,
        "changed": changed,
    }


def expected_gradient(broken):
    """Gradient of the mean over the valid clips as one batch, in float64, and that mean."""
    module = build_toy().double()
    x, y = (t.double() for t in clips(0))
    rows = [row for row in range(BATCH) if row not in broken]
    loss = losses_of_double(module, x[rows], y[rows]).mean()
    loss.backward()
    gradient = {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
    return gradient, loss.item()


def losses_of_double(module, x, y):
    """Losses of each clip without the module's rounding of its logits to float32."""
    x = module.embed(x)
    for block in module.blocks:
        x = x + torch.nn.functional.gelu(block(module.norm(x)))
    logits = module.head(x + module.scale * module.frozen(x))
    return losses_of({"logits": logits, "loss": logits.square().mean((1, 2))}, y)
