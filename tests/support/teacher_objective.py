"""A small objective with a teacher: the student predicts what the averaged encoder gives."""

import noise_runs
import torch
from torch import nn

from ssast.engine.model.objective import PretrainingModel
from ssast.engine.parallel.ranks import reduce_sum
from ssast.engine.registry import OBJECTIVES

KIND = "teacher_objective"


class Follow(PretrainingModel):
    """Predicts the hidden states of the masked patches, of the clip as the teacher hears it."""

    has_teacher = True

    def __init__(self, config):
        super().__init__(config)
        self.head = nn.Linear(self.encoder.embed_dim, self.encoder.embed_dim)

    def ema_decay(self, steps):
        """Rise from 0.5 to 0.9 over 4 steps."""
        return min(0.5 + 0.1 * steps, 0.9)

    def forward(self, fbank, *masks):
        states, _ = self.encoder(fbank, masks[0], masked_only=True)
        with torch.no_grad():
            targets, _ = self.teacher(fbank, masks[0], masked_only=True)
        return {"loss": (self.head(states) - targets).float().square().mean((1, 2))}


class Silent(Follow):
    """Leaves the decay to train.ema."""

    ema_decay = None


OBJECTIVES.register(KIND, Follow)
OBJECTIVES.register(f"{KIND}.silent", Silent)


def taught(world, stage):
    """The teacher and the mean losses after some steps; each rank has the same two clips."""
    changed = {"train__zero_stage": stage, "train__batch_size": 2 * world.world_size}
    task, engine = noise_runs.build(world, objective__kind=KIND, **changed)
    outputs, _ = noise_runs.train(task, engine, task.context.batches())
    teacher = {name: p.cpu().clone() for name, p in task.teacher.named_parameters()}
    engine.close()
    return teacher, [reduce_sum(part["loss"], world)[0] / world.world_size for part in outputs]
