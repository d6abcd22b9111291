"""All that a checkpoint holds of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.config import from_plain, to_plain
from ssast.engine.parallel.deepspeed_engine import TrainEngine
from ssast.engine.parallel.ranks import World, broadcast_object, run_on_main
from ssast.engine.train.inputs import changed, changed_settings, versions
from ssast.engine.train.optim import Plateau
from ssast.engine.train.task import Progress, Task


class TrainState:
    """Weights and optimizer, the task's own state, progress, and the random number generator.

    Args:
        task: What is trained.
        engine: Holds the task's module and its optimizer.
        clips: Number and fingerprint of the training clips.
        inputs: Fingerprints of what else is trained on, see :mod:`ssast.engine.train.inputs`.

    Attributes:
        changes: Names of what has changed since the checkpoint that was restored, and may.
        restored: The checkpoint that was restored last, if any.
        best: Its criterion, if no checkpoint before it had a lower one.
        notes: Lines for the log: what it lacks, or has and is not used.
    """

    def __init__(
        self,
        task: Task,
        engine: TrainEngine,
        clips: Mapping[str, int | str],
        inputs: Mapping[str, str],
    ):
        self.task, self.engine, self.clips, self.inputs = task, engine, clips, inputs
        self.progress = Progress()
        self.changes: list[str] = []
        self.restored: Path | None = None
        self.best: float | None = None
        self.notes: list[str] = []

    def gather(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors (on rank 0) and the JSON values of a checkpoint. Collective."""
        tensors, adam_step = self.engine.state()
        own_tensors, own_meta = self.task.state()
        progress = vars(self.progress) | {"plateau": dict(vars(self.progress.plateau))}
        meta = {
            "progress": progress,
            "adam_step": adam_step,
            "precision": self.task.context.precision,
            "clips": self.clips,
            "inputs": self.inputs,
            "versions": versions(),
            "config": to_plain(self.task.context.config),
        }
        return {**tensors, "rng/cpu": torch.get_rng_state(), **own_tensors}, {**meta, **own_meta}

    def restore(self, path: Path) -> None:
        """Take up the state of a checkpoint. Collective."""
        # Rank 0 alone reads: other machines need not see its disk.
        world = self.engine.world
        tensors: dict[str, Tensor] = {}
        meta: dict[str, Any] = {}
        rng = torch.get_rng_state()

        def read() -> None:
            nonlocal tensors, meta, rng
            tensors, meta = Checkpoints.load(path, check=False)
            rng = tensors["rng/cpu"].clone()

        run_on_main(read, world)
        meta, rng = broadcast_object((meta, rng), world)
        self.task.load_state(tensors, meta)
        averaged = self.engine.load_state(tensors, meta["adam_step"])
        self.notes = _average_notes(averaged, kept=self.engine.averages)
        torch.set_rng_state(rng)
        now = versions()
        before = meta.get("versions", now)  # an older checkpoint does not know
        self.changes = changed(meta.get("inputs", self.inputs), self.inputs)
        self.changes += [f"{n} ({before.get(n)}, now {now.get(n)})" for n in changed(before, now)]
        self.changes += changed_settings(from_plain(meta["config"]), self.task.context.config)
        self.restored, self.best = path, meta.get("best")
        plateau = Plateau(**meta["progress"].pop("plateau"))
        vars(self.progress).update(meta["progress"], plateau=plateau)
        seed_rank(self.task.context.config.train.seed, self.progress.step, world)


def _average_notes(stored: bool, *, kept: bool) -> list[str]:
    if kept and not stored:
        return ["train.ema: the average begins from the weights of the checkpoint, which has none"]
    if stored and not kept:
        return ["train.ema is null: the averaged weights of the checkpoint are dropped"]
    return []


def seed_rank(seed: int, step: int, world: World) -> None:
    """Give the random numbers of PyTorch that no checkpoint stores a seed of their own.

    A checkpoint has the state of rank 0's CPU. They are for modules of others, with dropout: ours
    draw by clip.
    """
    own = int(np.random.SeedSequence([seed, step, world.rank]).generate_state(1, np.uint64)[0] >> 1)
    if world.rank > 0:
        torch.manual_seed(own)
    elif world.device.type == "cuda":
        torch.cuda.manual_seed(own)
