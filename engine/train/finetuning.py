"""The task of a fine-tuning run: labels, augmentations, losses, and which weights are kept."""

import itertools
import json
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssast.engine.checkpoints.classifier import build_classifier, fill_encoder, save_chosen
from ssast.engine.checkpoints.store import META, Checkpoints
from ssast.engine.checkpoints.weights import CHOSEN, EMA, averaged_weights, has_average
from ssast.engine.config import Config, finetune_settings
from ssast.engine.data import augment
from ssast.engine.data.clips import describe_clips
from ssast.engine.data.labels import LabelledClips, targets_of
from ssast.engine.data.sampling import Partners, balanced_weights
from ssast.engine.data.splits import Splits
from ssast.engine.data.token_dropping import keep_patches
from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.evaluation.metrics import classification_metrics
from ssast.engine.evaluation.report import REPORT, write_report, write_split
from ssast.engine.formats.open import LoadedModel
from ssast.engine.model.classifier import LossClassifier
from ssast.engine.monitoring.reporting import reporting
from ssast.engine.parallel.deepspeed_engine import TrainEngine
from ssast.engine.parallel.ranks import broadcast_object, gather_rows, run_on_main
from ssast.engine.registry import METRICS
from ssast.engine.train.inputs import of_test
from ssast.engine.train.step import evaluate
from ssast.engine.train.task import Progress, RunContext, Task
from ssast.pipelines.clips.order import rank_positions, read_weights
from ssast.pipelines.errors import DataError
from ssast.pipelines.files import write_atomically
from ssast.pipelines.stream.batch import Batch
from ssast.pipelines.text import say

Evaluation = tuple[dict[str, float], np.ndarray, np.ndarray]
"""Metrics, logits [n, C], and which clips could be read, [n] bool."""

TEST_CLIPS = "test/clips.json"  # which clips the metrics beside it are of
AVERAGE = "average/"  # before the names of averaged weights in a checkpoint


@dataclass(frozen=True)
class PairedBatch(Batch):
    """A batch, and for each of its clips the one that mixup may add: see :class:`Batch`."""

    other_fbank: Tensor
    other_frames: Tensor
    other_clips: Tensor
    other_valid: Tensor


class Finetuning(Task):
    """Training of a classifier on labelled clips.

    Args:
        context: What the run offers.
        splits: The clips.
        pretrained: Model whose encoder is trained on; None leaves the weights as they are drawn.
        num_epoch_steps: Steps of one epoch.

    Raises:
        ConfigError: Patches are dropped that the blocks of an own backbone need.
    """

    module: LossClassifier

    def __init__(
        self,
        context: RunContext,
        splits: Splits,
        pretrained: LoadedModel | None,
        num_epoch_steps: int,
    ):
        config, train = context.config, splits.train
        self.settings = settings = finetune_settings(config)
        module = build_classifier(config, len(splits.classes), LossClassifier)
        if settings.drops and module.encoder.backbone != "transformer":
            raise ConfigError(
                "finetune.drop_tokens, drop_columns and drop_rows need model.backbone transformer, "
                f"whose blocks take any of the patches, got {module.encoder.backbone!r}"
            )
        module.loss, module.label_smoothing = settings.loss, settings.label_smoothing
        if splits.class_weights is not None:
            module.class_weights = torch.from_numpy(splits.class_weights).float()
        if pretrained is not None:
            fill_encoder(module.encoder, pretrained.encoder)
        source = settings.checkpoint or "from scratch"
        if pretrained is not None and pretrained.is_classifier:
            source += f" (fine-tuned: its head of {pretrained.num_classes} classes is left out)"
        summary = (
            f"{source}, "
            f"{describe_clips(len(train), len(splits.valid_drawn), len(splits.valid))} of "
            f"{len(splits.classes)} classes"
        )
        super().__init__(context, module, module.encoder, train.paths, summary)
        self.splits, self.steps_per_epoch = splits, num_epoch_steps
        self.num_valid = len(splits.valid_drawn)
        self.patience, self.seed = settings.patience, config.train.seed
        auto = "accuracy" if train.single and splits.valid.single else "map"
        self.metric = auto if settings.metric == "auto" else settings.metric
        self.weights = None
        if settings.balanced_sampling:
            self.weights = balanced_weights(train)
        elif config.data.sample_weights is not None:
            self.weights = read_weights(config.data.sample_weights, len(train))
        self._train_labels = train.table().to(context.world.device)
        self._valid_labels = splits.valid.table().to(context.world.device)
        self._averages: dict[str, Tensor] = {}
        self._num_averaged = 0

    def lr_scale(self, name: str) -> float:
        """Return 1 for the last block and the norm after it.

        Each block below learns ``layer_decay`` as fast as the one above, the embedding slowest; the
        head has a factor of its own.
        """
        depth, decay = len(self.encoder.blocks), self.settings.layer_decay
        if name.startswith("head."):
            return self.settings.head_lr_scale
        if name.startswith("encoder.blocks."):
            return decay ** (depth - 1 - int(name.split(".")[2]))
        below = name.startswith(("encoder.embed.", "encoder.embed_norm."))
        return decay**depth if below else 1.0

    @contextmanager
    def train_batches(self, start: int) -> Iterator[Iterator[Batch]]:
        """Open the endless stream of training clips; mixup pairs it with a second one."""
        context, paths = self.context, self.splits.train.paths
        with ExitStack() as stack:
            batches = stack.enter_context(
                context.stream(paths, "train", start=start, weights=self.weights)
            )
            if self.settings.mixup:
                train = context.config.train
                total = train.steps * train.batch_size
                partners = Partners(paths, total, self.seed, self.weights)
                others = stack.enter_context(
                    context.stream(partners, None, start=start, epochs=1, random_crop=True)
                )
                batches = map(
                    partial(self._pair, partners, start), itertools.count(), batches, others
                )
            yield batches

    def _pair(
        self, partners: Partners, start: int, iteration: int, batch: Batch, other: Batch
    ) -> PairedBatch:
        world = self.context.world
        places = rank_positions(start, iteration, len(batch), world.rank, world.world_size)
        rows = torch.from_numpy(partners.rows(np.minimum(places, len(partners) - 1)))
        rows = rows.to(world.device, non_blocking=True)
        return PairedBatch(
            **vars(batch),
            other_fbank=other.fbank,
            other_frames=other.num_frames,
            other_clips=rows,
            other_valid=other.valid,
        )

    def inputs(self, batch: Batch, *, training: bool) -> tuple[tuple[Any, ...], Tensor]:
        """Return filterbanks, targets and where padding begins.

        In training they are augmented, and the patches come last that are not dropped.
        """
        labels = self._train_labels if training else self._valid_labels
        fbank, targets = batch.fbank, targets_of(labels, batch.clip_ids, len(self.splits.classes))
        if training:
            fbank, targets = self._augment(batch, targets)
        frames = batch.num_frames if self.context.config.audio.ignore_padding else None
        if not (training and self.settings.drops):
            return (fbank, targets, frames), batch.valid
        draw = augment.Draw(self.seed, batch.clip_ids, batch.epochs)
        embed = self.encoder.embed
        kept = keep_patches(draw, self.settings, embed.grid, embed.valid_columns(frames))
        return (fbank, targets, frames, kept), batch.valid

    def _augment(self, batch: Batch, targets: Tensor) -> tuple[Tensor, Tensor]:
        settings, audio, fbank = self.settings, self.context.config.audio, batch.fbank
        draw = augment.Draw(self.seed, batch.clip_ids, batch.epochs)
        if isinstance(batch, PairedBatch):
            share = augment.mixup_shares(draw, settings.mixup).where(batch.other_valid, 1.0)
            others = targets_of(self._train_labels, batch.other_clips, targets.shape[1])
            fbank = augment.mix(
                fbank, batch.num_frames, batch.other_fbank, batch.other_frames, share
            )
            targets = augment.mix_targets(targets, others, share)
        whole = torch.full_like(batch.num_frames, fbank.shape[1])
        frames = batch.num_frames if audio.ignore_padding else whole
        if settings.freq_mask or settings.time_mask:
            fbank = augment.spec_augment(
                fbank, draw, settings.freq_mask, settings.time_mask, frames
            )
        if settings.noise:
            fbank = augment.add_noise(fbank, draw, 2 * audio.std * settings.noise)
        if settings.roll:
            fbank = augment.roll(fbank, draw, settings.roll, frames)
        return fbank, targets

    def means(self, outputs: dict[str, Tensor], valid: Tensor) -> dict[str, Tensor]:
        """Return means over the clips that could be read."""
        weights = valid / valid.sum().clamp(min=1)
        names = ("loss", "accuracy") if self.metric == "accuracy" else ("loss",)
        return {name: (outputs[name].where(valid, 0) * weights).sum() for name in names}

    def criterion(self, values: dict[str, float]) -> float:
        """Return the negative metric; of equal ones that with the lower loss is lower."""
        loss = values["loss"]
        # In [0, 1e-9]: less than any two metrics that differ in one clip are apart.
        return -self.score(values) + 1e-9 * (loss / (1 + loss) if math.isfinite(loss) else 1.0)

    def score(self, values: dict[str, float]) -> float:
        """Return the metric; where it is undefined, less than any other."""
        return values.get(self.metric, -sys.float_info.max)

    def validate(self, engine: TrainEngine) -> dict[str, float]:
        """Return loss and metrics of held-out clips. Collective."""
        return self._evaluate(engine, self.splits.valid_drawn, "valid")[0]

    def end_validation(self, engine: TrainEngine, step: int) -> None:
        """Include late weights in the average over epochs. Collective."""
        if self.settings.average_last_epochs and step > self._averaged_after:
            tensors, _ = engine.state()
            self._num_averaged += 1
            for name, value in tensors.items():
                if name.startswith("weight/"):
                    key = AVERAGE + name.removeprefix("weight/")
                    mean = self._averages.setdefault(key, torch.zeros_like(value))
                    mean += (value - mean) / self._num_averaged

    @property
    def _averaged_after(self) -> int:
        """The step after which the last epochs begin, whose weights are averaged."""
        late = self.settings.average_last_epochs * self.steps_per_epoch
        return max(self.context.config.train.steps - late, 0)

    def _evaluate(self, engine: TrainEngine, clips: LabelledClips, split: str) -> Evaluation:
        """Return values, logits [n, C], and which clips could be read, [n] bool. Collective."""
        rows: list[Tensor] = []
        logits: list[Tensor] = []

        def watch(batch: Batch, outputs: dict[str, Tensor], valid: Tensor) -> None:
            rows.append(batch.clip_ids[valid])
            logits.append(outputs["logits"][valid])

        world = self.context.world
        self._valid_labels = clips.table().to(world.device)
        with self.context.stream(clips.paths, split, epochs=1) as batches:
            values = evaluate(self, engine, batches, watch)
        self.context.check_rejected(split)
        whole, read = gather_rows(torch.cat(rows), torch.cat(logits), len(clips), world)
        mask = read.numpy()
        values.pop("accuracy", None)
        scores = classification_metrics(
            whole[read].double().numpy(),
            clips.targets()[mask],
            self.settings.loss,
            self.settings.metric,
        )
        # One that draws at random differs between ranks, which must do the same next.
        scores = broadcast_object(scores, world)
        if METRICS.is_built_in(self.metric) and self.metric not in scores and split == "valid":
            raise DataError(
                f"{clips.source}: the {mask.sum()} of {len(clips)} held-out clips that can be read "
                f"define no {self.metric}, which weights are chosen by"
            )
        return {**values, **scores}, whole.double().numpy(), mask

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the averaged weights; how many were averaged, and the classes."""
        meta = {
            "classes": list(self.splits.classes),
            "names": list(self.splits.names),
            "num_averaged": self._num_averaged,
            "averaged_after": self._averaged_after,
        }
        return {name: mean.clone() for name, mean in self._averages.items()}, meta

    def load_state(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Take up the averaged weights, unless those were the last epochs of a shorter run."""
        if meta["averaged_after"] != self._averaged_after:
            self._averages, self._num_averaged = {}, 0
            return
        self._averages = {n: t.clone() for n, t in tensors.items() if n.startswith(AVERAGE)}
        self._num_averaged = meta["num_averaged"]

    def finish(self, engine: TrainEngine, progress: Progress) -> None:
        """Save the weights that did best on the held-out clips, then report on all clips.

        The classifier is on the disk before the test clips are read and anything is drawn; where
        that fails, the resumed run writes the report.
        """
        run, world, step = self.context.folder, self.context.world, progress.step
        done, reported = run_on_main(
            lambda: (finished_at(run), is_reported(run, self._test_clips())), world
        )
        if done != step:
            chosen, valid = self._keep_best(engine, progress)
        elif not reported:
            kept, chosen = _load_kept(run) if world.is_main else ({}, "")
            self._load_weights(engine, averaged_weights(kept), step)
            valid = self._evaluate(engine, self.splits.valid, "valid")
        else:
            return
        safe = f"the classifier is finished, in {run}; --resume writes its report"
        splits, results = {"valid": self.splits.valid}, {"valid": valid}
        if self.splits.test is not None:
            splits["test"] = self.splits.test
            try:
                results["test"] = self._evaluate(engine, self.splits.test, "test")
            except DataError as error:
                raise type(error)(f"{error}; {safe}") from error
        epochs = step / self.steps_per_epoch
        run_on_main(lambda: self._report(chosen, splits, results, safe, epochs), world)

    def _test_clips(self) -> dict[str, str] | None:
        """Return which clips are the test clips, if there are any."""
        if self.splits.test is None:
            return None
        return {"finetune.test": str(self.settings.test), **of_test(self.splits.test)}

    def _keep_best(self, engine: TrainEngine, progress: Progress) -> tuple[str, Evaluation]:
        """Save the chosen weights; return which, and their held-out metrics. Collective."""
        run, world, step = self.context.folder, self.context.world, progress.step
        whole: dict[str, Tensor] = {}  # on rank 0

        def read_best() -> tuple[str, float]:
            checkpoints = Checkpoints(run / "checkpoints")
            best = checkpoints.best()
            if best is None:
                raise CheckpointError(f"{run / 'checkpoints'}: the best checkpoint is gone")
            whole.update(Checkpoints.load(best)[0])
            if self.settings.average_last_epochs and not self._num_averaged:
                say(
                    f"finetune.average_last_epochs: nothing was averaged, as the run ended at step "
                    f"{step}, before its last epochs, which begin after step "
                    f"{self._averaged_after}"
                )
            ema = "EMA of " if has_average(whole) else ""
            return f"{ema}step {int(best.stem[4:])}", checkpoints.best_value()

        chosen, best_criterion = run_on_main(read_best, world)
        if self._num_averaged:
            average = {f"weight/{n.removeprefix(AVERAGE)}": t for n, t in self._averages.items()}
            averaged = self._load_weights(engine, average, step)
            values, _, _ = self._evaluate(engine, self.splits.valid_drawn, "valid")
            if self.criterion(values) <= best_criterion:
                chosen = f"average of {self._num_averaged} epochs"
                whole = {n: t for n, t in averaged.items() if not n.startswith(EMA)}
        engine.load_state({**whole, **averaged_weights(whole)}, step)
        valid = self._evaluate(engine, self.splits.valid, "valid")

        def save() -> None:
            names, values = list(self.splits.names), {"valid": valid[0]}
            save_chosen(
                run,
                whole,
                step=step,
                config=self.context.config,
                classes=self.splits.classes,
                facts={"names": names, "chosen": chosen, "values": values},
            )
            (run / REPORT).unlink(missing_ok=True)  # that of an earlier end of the run

        run_on_main(save, world)
        return chosen, valid

    def _load_weights(
        self, engine: TrainEngine, weights: dict[str, Tensor], step: int
    ) -> dict[str, Tensor]:
        """Load weights of rank 0 and leave the optimizer as it is; return both. Collective."""
        tensors, _ = engine.state()
        tensors |= weights
        engine.load_state(tensors, step)
        return tensors

    def _report(
        self,
        chosen: str,
        splits: dict[str, LabelledClips],
        results: dict[str, Evaluation],
        safe: str,
        epochs: float,
    ) -> None:
        """Write the report of the run, last of all report.md; print the metrics."""
        run = self.context.folder
        for split, (values, _, read) in results.items():
            shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
            clips = f"{read.sum()} of {len(read)} clips"
            say(f"{split} ({chosen}), {clips}: {shown}")
        with reporting(safe):
            (run / REPORT).unlink(missing_ok=True)  # no report beside parts of another one
            for split, (values, logits, read) in results.items():
                write_split(run / split, splits[split], logits, read, values, self.settings.loss)
            if "test" in results:
                write_atomically(run / TEST_CLIPS, json.dumps(self._test_clips(), indent=1) + "\n")
            write_report(
                run / REPORT,
                self.context.config,
                self.splits,
                chosen,
                {split: values for split, (values, _, _) in results.items()},
                {split: read for split, (_, _, read) in results.items()},
                epochs,
            )


def finished_at(run: Path) -> int | None:
    """Return the step at which the classifier of a run was saved; None if it was not."""
    found = Checkpoints(run / CHOSEN).latest()
    return None if found is None else int(json.loads((found / META).read_text("utf-8"))["step"])


def is_finished(run: Path) -> bool:
    """Return whether a run has its classifier, and its report."""
    return finished_at(run) is not None and (run / REPORT).is_file()


def is_reported(run: Path, test: dict[str, str] | None) -> bool:
    """Return whether a finished run has its report, also on these test clips, if there are any."""
    written = run / TEST_CLIPS
    return (run / REPORT).is_file() and (
        test is None or (written.is_file() and json.loads(written.read_text("utf-8")) == test)
    )


def _load_kept(run: Path) -> tuple[dict[str, Tensor], str]:
    """Load the weights of a finished run, and which they are."""
    found = Checkpoints(run / CHOSEN).latest()
    assert found is not None
    weights, meta = Checkpoints.load(found, check=False)
    return weights, meta["chosen"]


def steps_of_epochs(config: Config, num_clips: int) -> tuple[int, int]:
    """Return the steps of one epoch (the last may reach into the next one) and of all epochs."""
    each = -(-num_clips // config.train.batch_size)
    return each, each * finetune_settings(config).epochs
