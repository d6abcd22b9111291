"""Training steps of both tasks on noise, with everything that a configuration can turn on."""

import tempfile
from pathlib import Path

import finetune_runs
import runs
import torch
from tape import TapeTools

from ssast.engine.config import load_config
from ssast.engine.planning.synthetic import SyntheticContext, noise, synthetic_task
from ssast.engine.train import execution
from ssast.engine.train.building import build_engine
from ssast.engine.train.step import train_step

AUGMENTED = finetune_runs.AUGMENTED | {"finetune__class_weights": "balanced"}


def configure(finetune=False, **changed):
    """The configuration of a small task."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.yaml"
        path.write_text("finetune: {}" if finetune else "{}")
        given = runs.overrides(**changed)
        if finetune:
            given = finetune_runs.overrides(**AUGMENTED | changed)
        return load_config(path, given)


def build(world, finetune=False, **changed):
    """The task of a configuration and its engine, with the same weights each time."""
    config = configure(finetune, **changed)
    torch.manual_seed(0)
    batch_size = config.train.batch_size // config.train.accumulation_steps // world.world_size
    task = synthetic_task(SyntheticContext(config, world, fbank=noise(config, batch_size)))
    return task, build_engine(task)


def train(task, engine, batches, steps=3):
    """What the module gave in each micro-batch, and the state after the steps."""
    outputs = []
    for _ in range(steps):
        updated, parts = train_step(task, engine, batches, 1e-3)
        assert updated
        outputs += [{n: v.tolist() for n, v in part.outputs.items()} for part in parts]
    return outputs, engine.state()[0]


def choose(world, full):
    """The execution that is chosen where the memory of one rank is full, and why."""
    tools, before = TapeTools(free_bytes=0 if world.rank == full else 1 << 40), execution.tools_of
    execution.tools_of = lambda device: tools
    try:
        task, engine = build(world)
        found, _ = execution.start_execution(task, task.context.batches(), steps=1)
        engine.close()
    finally:
        execution.tools_of = before
    return found.mode, list(found.rejected.values())
