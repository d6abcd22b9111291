"""The job of a pretraining run."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ssast.engine.model.objective import MSPM, mean_losses, with_masks
from ssast.engine.parallel.deepspeed_engine import TrainEngine
from ssast.engine.train.job import Workplace
from ssast.engine.train.loop import Progress, validate
from ssast.engine.train.optim import build_optimizer
from ssast.pipelines.clips.shards import ClipPaths
from ssast.pipelines.stream.batch import Batch


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
        """See :class:`~ssast.engine.train.job.Job`, also for the other methods."""
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
        """Return the pretext accuracy, as published, or minus the loss where there is none."""
        return values.get("pretext_accuracy", -values["loss"])

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
