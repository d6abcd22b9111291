"""Pretraining from a configuration."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ssast.engine.clips import find_clips
from ssast.engine.config import Config, ConfigError
from ssast.engine.deepspeed_engine import TrainEngine
from ssast.engine.job import Workplace, run_folder
from ssast.engine.loop import Progress, validate
from ssast.engine.objective import MSPM, mean_losses, with_masks
from ssast.engine.optim import build_optimizer
from ssast.engine.run import run_training
from ssast.pipelines.batch import Batch
from ssast.pipelines.shards import ClipPaths


def pretrain(config: Config, *, resume: bool = False) -> int:
    """Run a pretraining, or go on with one.

    Args:
        config: Everything about it; ``run.folder`` must be set, as ``load_config`` does.
        resume: Go on from the latest checkpoint in the run's folder, if there is one.

    Returns:
        0, or the number of the signal that stopped the run after it had saved a checkpoint.

    Raises:
        ConfigError: See :func:`~ssast.engine.run.run_training`, also for the others; or settings
            of a fine-tuning.
        DataError: Wrong manifests, or too many unreadable clips.
        CheckpointError: A checkpoint cannot be written or read.
        TrainingError: Training diverged.
    """
    run_folder(config)  # must be set, before anything is read
    if config.finetune is not None:
        raise ConfigError(
            "this configuration has a section finetune: use ssast finetune, or leave it out"
        )
    train_paths, valid_paths = find_clips(config)
    # What the weights, the masks or the data order depend on must not change on the way.
    fixed = [(s, k) for s in ("audio", "model", "objective") for k in vars(getattr(config, s))]
    return run_training(
        config,
        lambda place: Pretraining(place, train_paths, valid_paths),
        clips=train_paths,
        fixed=[*fixed, ("train", "seed")],
        resume=resume,
    )


class Pretraining:
    """The job of a pretraining run: masks, the losses of MSPM, unlabelled clips."""

    steps_per_epoch = 1
    patience: int | None = None

    def __init__(self, place: Workplace, train_paths: ClipPaths, valid_paths: ClipPaths):
        self.place, self.train_paths, self.valid_paths = place, train_paths, valid_paths
        self.module = MSPM(place.config)
        self.encoder = self.module.encoder
        self.summary = f"{len(train_paths)} training and {len(valid_paths)} held-out clips"

    def optimizer(self) -> torch.optim.Optimizer:
        """See :class:`~ssast.engine.job.Job`, also for the other methods."""
        return build_optimizer(self.module, self.place.config.optim)

    def arguments(self, batch: Batch, *, training: bool) -> tuple[tuple[Any, ...], Tensor]:
        """Masks of their own for each clip and epoch in training; the same ones in validation."""
        if training:
            masks = self.module.draw_masks(batch.clip_ids, batch.epochs, batch.num_frames)
        else:
            masks = self.module.held_out_masks(batch.clip_ids, batch.num_frames)
        return (batch.fbank, *masks), with_masks(batch.valid, masks)

    def means(self, outputs: dict[str, Tensor], valid: Tensor) -> dict[str, Tensor]:
        """The losses of MSPM."""
        return mean_losses(outputs, valid, self.place.config.objective.mse_weight)

    def criterion(self, values: dict[str, float]) -> float:
        """The loss."""
        return values["loss"]

    def score(self, values: dict[str, float]) -> float:
        """The accuracy, as published, or the loss where there is none."""
        return values.get("accuracy", -values["loss"])

    def train_batches(self, start: int) -> AbstractContextManager[Iterator[Batch]]:
        """The endless stream."""
        return self.place.stream(self.train_paths, "train", start=start)

    def validate(self, engine: TrainEngine, progress: Progress) -> dict[str, float]:
        """Mean losses over the held-out clips."""
        with self.place.stream(self.valid_paths, "valid", epochs=1) as batches:
            return validate(engine, batches, self, beat=self.place.beat)

    def tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Nothing to restore."""

    def meta(self) -> dict[str, Any]:
        """None."""
        return {}

    def finish(self, engine: TrainEngine, progress: Progress) -> None:
        """Nothing is left to do."""
