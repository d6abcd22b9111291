"""What is trained (:class:`Task`), and what its run offers it (:class:`RunContext`)."""

import itertools
import json
import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ssast.engine.config import Config
from ssast.engine.data.clips import fbank_spec
from ssast.engine.errors import ConfigError
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.parallel.deepspeed_engine import TrainEngine
from ssast.engine.parallel.ranks import World, gather_objects, reduce_max, reduce_sum
from ssast.engine.settings import Precision
from ssast.engine.train.caching import open_cache
from ssast.engine.train.optim import Plateau, build_optimizer
from ssast.engine.train.stop import Stop
from ssast.pipelines.clips.mix import MixedClips
from ssast.pipelines.clips.order import Weights, read_weights
from ssast.pipelines.clips.shards import ClipPaths
from ssast.pipelines.errors import DataError
from ssast.pipelines.files import append
from ssast.pipelines.stream.batch import Batch
from ssast.pipelines.stream.rejected import Rejections
from ssast.pipelines.stream.stream import AudioStream
from ssast.pipelines.text import json_line

_log = logging.getLogger(__name__)


def run_folder(config: Config) -> Path:
    """Return the folder of a run.

    Raises:
        ConfigError: It is not set, or is a folder of data, or its path is no text, which
            safetensors and TensorBoard need.
    """
    if config.run.folder is None:
        raise ConfigError("run.folder is not set")
    folder = os.path.abspath(config.run.folder)
    try:
        folder.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"run.folder {folder}: expected a path in UTF-8") from error
    test = None if config.finetune is None else config.finetune.test
    for key, source in (
        ("data.train", config.data.train),
        ("data.valid", config.data.valid),
        ("finetune.test", test),
    ):
        if source is not None and os.path.realpath(source) == os.path.realpath(folder):
            raise ConfigError(f"run.folder {folder} is {key} too: choose another run.folder")
    return Path(config.run.folder)


def check_batch(config: Config, world_size: int) -> None:
    """Check that a batch can be divided over processes and micro-batches.

    Raises:
        ConfigError: It cannot.
    """
    size, steps = config.train.batch_size, config.train.accumulation_steps
    if size % (world_size * steps):
        counts = [str(n) for n in range(1, size + 1) if size % (n * steps) == 0]
        where = f"on {', '.join(counts)} processes it can" if counts else "on none it can"
        raise ConfigError(
            f"train.batch_size {size} cannot be divided over {world_size} processes x "
            f"train.accumulation_steps {steps}: {where}"
        )


@dataclass
class Progress:
    """What changes from step to step, besides the weights and the optimizer."""

    step: int = 0
    position: int = 0
    """Clips taken from the data order so far, over all ranks."""

    plateau: Plateau = field(default_factory=Plateau)
    best_score: float = -math.inf
    """Highest score (see :meth:`Task.score`) of all validations, saved or not."""

    since_best: int = 0
    """Validations since the first one with that score."""

    validation_due: bool = False
    """Whether the run was stopped in the validation at this step."""

    ended_by: str = ""
    """Name of the callback that ended the run before its last step."""

    losses: list[float] = field(default_factory=list)
    """Those that the next are compared with, for a jump."""

    below: dict[str, int] = field(default_factory=dict)
    """Log lines in a row in which a metric was below its floor."""

    skipped: int = 0
    """Steps since the last log line that were skipped."""

    totals: tuple[list[str], list[float]] = field(default_factory=lambda: ([], []))
    """Names and sums of what the next log line averages, over all ranks."""

    def update(self, score: float) -> None:
        """Take the score of one more validation."""
        self.since_best += 1
        if score > self.best_score:
            self.best_score, self.since_best = score, 0


@dataclass(frozen=True)
class RunContext:
    """The configuration and the processes of a run, and its streams of clips.

    Attributes:
        config: Configuration of the run.
        world: This process among all processes of the run.
        heartbeat: Told what is done next, before anything that may hang.
        stop: Requests to stop the run.

    Raises:
        ConfigError: The batch cannot be divided evenly over the processes.
    """

    config: Config
    world: World
    heartbeat: Callable[[str], None] = lambda _: None
    stop: Stop = field(default_factory=Stop)
    _rejections: dict[str, Rejections] = field(default_factory=dict, init=False, repr=False)
    _precision: list[Precision] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check that the batch can be divided."""
        check_batch(self.config, self.world.world_size)

    @property
    def batch_size(self) -> int:
        """Clips of one rank in one micro-batch."""
        train = self.config.train
        return train.batch_size // (self.world.world_size * train.accumulation_steps)

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return run_folder(self.config)

    @property
    def precision(self) -> Precision:
        """Precision of weights and activations."""
        if self.config.train.precision != "auto":
            return self.config.train.precision
        if self._precision:
            return self._precision[-1]
        return "fp32" if self.world.device.type == "cpu" else "bf16"

    def set_precision(self, precision: Precision) -> None:
        """Set what ``train.precision: auto`` stands for, before the engine is built."""
        self._precision.append(precision)

    def stream(
        self,
        paths: Sequence[Any],
        split: str | None,
        *,
        start: int = 0,
        epochs: int | None = None,
        weights: Weights | None = None,
        random_crop: bool | None = None,
    ) -> AbstractContextManager[Iterator[Batch]]:
        """Open a stream of clips, read as the configuration says; see :class:`AudioStream`.

        Collective where clips are trained on and ``data.cache_gib`` is set.

        Args:
            paths: The clips.
            split: Under which clips that cannot be read are logged, and counted for
                :meth:`check_rejected`. With None they are neither logged nor counted.
            start: Position in the data order.
            epochs: Passes over the clips; None trains on them without end.
            weights: How often each clip is drawn in training; those of the configuration if None.
            random_crop: Whether ``data.random_crop`` counts; only in training if None.
        """
        config, world = self.config, self.world
        training = epochs is None
        if training and weights is None and config.data.sample_weights is not None:
            weights = read_weights(config.data.sample_weights, len(paths))
        if training and isinstance(paths, MixedClips):
            weights = paths.weights()
        stream = AudioStream(
            paths,
            fbank_spec(config.audio),
            batch_size=self.batch_size,
            seed=config.train.seed,
            rank=world.rank,
            world_size=world.world_size,
            start=start,
            epochs=epochs,
            device=world.device,
            num_threads=config.data.num_threads or min(8, world.cores),
            read_ahead=config.data.read_ahead,
            fbank=config.data.fbank_backend,
            max_rejected=1.0,  # all ranks must end together, see check_rejected
            # Other ranks wait in a collective meanwhile, which ends at train.timeout_s.
            retry_s=min(config.data.retry_s, 0.8 * config.train.timeout_s),
            weights=weights,
            random_crop=config.data.random_crop
            and (training if random_crop is None else random_crop),
            cache=open_cache(config, world, len(paths), weights) if training else None,
            cache_folder=config.data.cache_folder,
            on_reject=RejectLog(self.folder / "rejected.jsonl", split) if split else None,
        )
        if split:
            self._rejections[split] = stream.rejections
        return stream

    def check_rejected(self, split: str) -> None:
        """Check the share of clips that all ranks together could not read. Collective.

        Args:
            split: Name of a stream, the last one of that name.

        Raises:
            DataError: It is larger than ``data.max_rejected``; on every rank, with one message.
        """
        limit, ours = self.config.data.max_rejected, self._rejections[split]
        counts = ours.counts
        seen, rejected, files = reduce_sum([counts.seen, counts.rejected, counts.files], self.world)
        if counts.shuffled:  # ranks meet the same files in different epochs
            (files,) = reduce_max([counts.files], self.world)
        counts = replace(counts, seen=int(seen), rejected=int(rejected), files=int(files))
        if counts.too_many(limit):
            examples = itertools.chain(*gather_objects(ours.examples(), self.world))
            raise DataError(f"{split}: {counts.message(limit, list(examples))}")


class Task(ABC):
    """A module with its data and losses; pretraining is one task, fine-tuning another.

    Args:
        context: What the run offers.
        module: What is trained. Its call gives values per clip, each [B, ...].
        encoder: The module's encoder.
        train_paths: The training clips.
        summary: One line about the data.

    Attributes:
        steps_per_epoch: Steps by which the multistep schedule counts epochs.
        patience: Validations without a higher score after which training ends; None: never.
        num_valid: Number of clips in a validation.
        teacher: Encoder that is to have the averaged weights after each step, where the loss is
            made of its outputs. It is no part of the module.
        ema_decay: Decay of the averages by the number of optimizer steps taken before, where it is
            not that of ``train.ema``.
        floors: Metrics of training that show a collapse when they stay below a value.
    """

    steps_per_epoch: int = 1
    patience: int | None = None
    num_valid: int = 0
    teacher: SpectrogramTransformer | None = None
    ema_decay: Callable[[int], float] | None = None
    floors: Mapping[str, float] = MappingProxyType({})

    def __init__(
        self,
        context: RunContext,
        module: nn.Module,
        encoder: SpectrogramTransformer,
        train_paths: ClipPaths,
        summary: str,
    ):
        self.context, self.module, self.encoder = context, module, encoder
        self.train_paths, self.summary = train_paths, summary

    @abstractmethod
    def inputs(self, batch: Batch, *, training: bool) -> tuple[tuple[Any, ...], Tensor]:
        """Return the module's arguments for a batch, and which of its clips count, [B] bool."""

    @abstractmethod
    def means(self, outputs: dict[str, Tensor], valid: Tensor) -> dict[str, Tensor]:
        """Return scalar means over the clips that count; "loss" is minimised."""

    @abstractmethod
    def validate(self, engine: TrainEngine) -> dict[str, float]:
        """Return losses and metrics of the held-out clips. Collective."""

    def end_validation(self, engine: TrainEngine, step: int) -> None:  # noqa: B027
        """Take note of the weights that were validated, once for each validation. Collective."""

    def blocks(self) -> list[nn.Module]:
        """Return the blocks of the encoder and of the teacher."""
        encoders = [self.encoder] if self.teacher is None else [self.encoder, self.teacher]
        return [block for encoder in encoders for block in encoder.blocks]

    def train_batches(self, start: int) -> AbstractContextManager[Iterator[Batch]]:
        """Open the endless stream of training clips at a position of the data order."""
        return self.context.stream(self.train_paths, "train", start=start)

    def lr_scale(self, name: str) -> float:
        """Return the learning rate of a parameter as a multiple of the run's."""
        return 1.0

    def optimizer(self) -> torch.optim.Optimizer:
        """Build the optimizer of the module's trainable parameters."""
        return build_optimizer(self.module, self.context.config.optim, self.lr_scale)

    def criterion(self, values: dict[str, float]) -> float | None:
        """Return what the best checkpoint has the lowest of, from the result of a validation.

        None: nothing tells which checkpoint is better, and the latest is used.
        """
        return values["loss"]

    def score(self, values: dict[str, float]) -> float:
        """Return what the plateau schedule and the patience watch, the higher the better."""
        criterion = self.criterion(values)
        return -values["loss"] if criterion is None else -criterion

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a checkpoint holds of the task itself: tensors on rank 0, and JSON values."""
        return {}, {}

    def load_state(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:  # noqa: B027
        """Take up what :meth:`state` gave, from all tensors (rank 0's) and values."""

    def finish(self, engine: TrainEngine, progress: Progress) -> None:  # noqa: B027
        """Do what is left after the last step. Collective."""


class RejectLog:
    """Writes clips that could not be read to rejected.jsonl, each once for a run."""

    def __init__(self, path: Path, split: str):
        self._path, self._split = path, split
        self._known: set[bytes] = set()
        self._read_to = 0

    def __call__(self, clip_id: int, path: str, reason: str) -> None:
        """Log a clip: its row in the manifest, its path, and why it could not be read."""
        line = {"split": self._split, "clip": clip_id, "path": path, "reason": reason}
        try:
            self._append(json_line(line))
        except OSError as error:  # a full disk must not end the training
            _log.warning("%s is not written: %s: %s", self._path, error, json.dumps(line))

    def _append(self, text: bytes) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)  # another machine may not have it yet
        with self._path.open("a+b") as file:
            # Other ranks write here as well: only what has come since is read.
            file.seek(self._read_to)
            self._known.update(file)
            self._read_to = file.tell()
        if text not in self._known:
            append(self._path, text)
