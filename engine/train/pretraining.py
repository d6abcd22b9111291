"""The task of a pretraining run."""

from typing import Any

from torch import Tensor, nn

from ssast.engine.checkpoints.classifier import fill_encoder
from ssast.engine.data.clips import describe_clips, draw_valid
from ssast.engine.formats.open import LoadedModel
from ssast.engine.model.classifier import Classifier
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.model.objective import PretrainingModel, build_objective, with_masks
from ssast.engine.parallel.deepspeed_engine import TrainEngine
from ssast.engine.train.step import evaluate
from ssast.engine.train.task import RunContext, Task
from ssast.pipelines.clips.shards import ClipPaths
from ssast.pipelines.stream.batch import Batch


def continue_from(
    module: PretrainingModel, pretrained: PretrainingModel | Classifier | SpectrogramTransformer
) -> str:
    """Copy the weights of a model into one to be pretrained; return what was taken.

    Args:
        module: Model with fresh weights, of the same size and patch.
        pretrained: Model whose encoder is taken, and its pretraining heads, if it has the same.
    """
    encoder = pretrained if isinstance(pretrained, SpectrogramTransformer) else pretrained.encoder
    fill_encoder(module.encoder, encoder)
    taken = ["encoder"]
    own, theirs = _heads(module), _heads(pretrained)
    if own and {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in theirs.items()}:
        module.load_state_dict(theirs, strict=False)
        taken += ["heads"]
    else:
        taken += ["fresh heads"]
    old, new = encoder.embed.grid, module.encoder.embed.grid
    if old != new:
        how = "recomputed" if module.encoder.settings.positions == "sincos" else "resized"
        resized = f"position embedding {how} from {old[0]} x {old[1]} to {new[0]} x {new[1]}"
        taken += [resized]
    return ", ".join(taken)


def _heads(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a model without those of its encoder."""
    if not isinstance(model, PretrainingModel):
        return {}
    return {n: t for n, t in model.state_dict().items() if not n.startswith("encoder.")}


class Pretraining(Task):
    """Masked spectrogram patch modelling of unlabelled clips.

    Args:
        context: What the run offers.
        train_paths: The training clips.
        held_out: The held-out clips, of which ``data.valid_clips`` are validated on.
        pretrained: Model that pretraining continues from; None: from scratch.
    """

    module: PretrainingModel

    def __init__(
        self,
        context: RunContext,
        train_paths: ClipPaths,
        held_out: ClipPaths,
        pretrained: LoadedModel | None = None,
    ):
        module = build_objective(context.config)
        self.valid_paths = draw_valid(context.config, held_out)
        self.num_valid = len(self.valid_paths)
        summary = describe_clips(len(train_paths), self.num_valid, len(held_out))
        if pretrained is not None:
            taken = continue_from(module, pretrained.model)
            summary += f", continued from {pretrained.path} ({taken})"
        elif context.config.train.checkpoint is None:
            summary += ", from scratch"
        super().__init__(context, module, module.encoder, train_paths, summary)
        self.teacher, self.ema_decay = module.build_teacher(), module.ema_decay
        self.floors = module.floors

    def inputs(self, batch: Batch, *, training: bool) -> tuple[tuple[Any, ...], Tensor]:
        """Draw masks: in training others for each clip and epoch, in validation the same ones."""
        if training:
            masks = self.module.draw_masks(batch.clip_ids, batch.epochs, batch.num_frames)
        else:
            masks = self.module.held_out_masks(batch.clip_ids, batch.num_frames)
        return (batch.fbank, *masks), with_masks(batch.valid, masks)

    def means(self, outputs: dict[str, Tensor], valid: Tensor) -> dict[str, Tensor]:
        """Return the losses of the objective, that which is minimised among them."""
        return self.module.mean_losses(outputs, valid)

    def score(self, values: dict[str, float]) -> float:
        """Return the pretext accuracy, as published, or the negative loss where there is none."""
        return values.get("pretext_accuracy", -values["loss"])

    def criterion(self, values: dict[str, float]) -> float | None:
        """Return the loss; None with a teacher, whose targets move and grow harder to predict."""
        return None if self.module.has_teacher else values["loss"]

    def validate(self, engine: TrainEngine) -> dict[str, float]:
        """Return mean losses of the held-out clips. Collective."""
        with self.context.stream(self.valid_paths, "valid", epochs=1) as batches:
            values = evaluate(self, engine, batches)
        self.context.check_rejected("valid")
        return values
