"""The task of a pretraining run."""

from typing import Any

from torch import Tensor

from ssast.engine.data.clips import describe_clips, draw_valid
from ssast.engine.model.objective import MSPM, mean_losses, with_masks
from ssast.engine.parallel.deepspeed_engine import TrainEngine
from ssast.engine.train.step import evaluate
from ssast.engine.train.task import RunContext, Task
from ssast.pipelines.clips.shards import ClipPaths
from ssast.pipelines.stream.batch import Batch


class Pretraining(Task):
    """Masked spectrogram patch modelling of unlabelled clips.

    Args:
        context: What the run offers.
        train_paths: The training clips.
        held_out: The held-out clips, of which ``data.valid_clips`` are validated on.
    """

    module: MSPM

    def __init__(self, context: RunContext, train_paths: ClipPaths, held_out: ClipPaths):
        module = MSPM(context.config)
        self.valid_paths = draw_valid(context.config, held_out)
        self.num_valid = len(self.valid_paths)
        summary = describe_clips(len(train_paths), self.num_valid, len(held_out))
        super().__init__(context, module, module.encoder, train_paths, summary)

    def inputs(self, batch: Batch, *, training: bool) -> tuple[tuple[Any, ...], Tensor]:
        """Draw masks: in training others for each clip and epoch, in validation the same ones."""
        if training:
            masks = self.module.draw_masks(batch.clip_ids, batch.epochs, batch.num_frames)
        else:
            masks = self.module.held_out_masks(batch.clip_ids, batch.num_frames)
        return (batch.fbank, *masks), with_masks(batch.valid, masks)

    def means(self, outputs: dict[str, Tensor], valid: Tensor) -> dict[str, Tensor]:
        """Return the losses of MSPM, the joint loss among them."""
        return mean_losses(outputs, valid, self.context.config.objective.mse_weight)

    def score(self, values: dict[str, float]) -> float:
        """Return the pretext accuracy, as published, or the negative loss where there is none."""
        return values.get("pretext_accuracy", -values["loss"])

    def validate(self, engine: TrainEngine, step: int) -> dict[str, float]:
        """Return mean losses of the held-out clips. Collective."""
        with self.context.stream(self.valid_paths, "valid", epochs=1) as batches:
            values = evaluate(self, engine, batches)
        self.context.check_rejected("valid")
        return values
