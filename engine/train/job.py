"""What a run and the job that it does know of each other."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ssast.engine.config import Config
from ssast.engine.data.clips import fbank_spec
from ssast.engine.errors import ConfigError
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.parallel.deepspeed_engine import TrainEngine
from ssast.engine.parallel.ranks import (
    World,
)
from ssast.engine.train.loop import Progress, Task
from ssast.pipelines.clips.mix import MixedClips
from ssast.pipelines.clips.order import Weights, read_weights
from ssast.pipelines.clips.shards import ClipPaths
from ssast.pipelines.stream.batch import Batch
from ssast.pipelines.stream.stream import AudioStream


def run_folder(config: Config) -> Path:
    """Where a run's results go.

    Raises:
        ConfigError: It is not set.
    """
    if config.run.folder is None:
        raise ConfigError("run.folder is not set")
    return Path(config.run.folder)


@dataclass(frozen=True)
class Workplace:
    """What a job may use of its run."""

    config: Config
    world: World
    batch_size: int
    """Clips of one rank in one micro-step."""

    beat: Callable[[str], None] = lambda _: None
    """Told before anything that may hang, what it is."""

    @property
    def folder(self) -> Path:
        """Of the run."""
        return run_folder(self.config)

    def stream(
        self,
        paths: Sequence[Any],
        split: str | None,
        *,
        start: int = 0,
        epochs: int | None = None,
        weights: Weights | None = None,
    ) -> AudioStream:
        """The clips as the configuration wants them read; see :class:`AudioStream`.

        Clips that cannot be read are noted with the split's name, and if they are too many they end
        the run; without a name they do neither.
        """
        config, world = self.config, self.world
        on_reject = RejectLog(self.folder / "rejected.jsonl", split) if split else None
        training = epochs is None
        if training and weights is None and config.data.sample_weights is not None:
            weights = read_weights(config.data.sample_weights, len(paths))
        if training and isinstance(paths, MixedClips):
            weights = paths.weights()
        return AudioStream(
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
            max_rejected=config.data.max_rejected if split else 1.0,
            weights=weights,
            random_crop=training and config.data.random_crop,
            cache_gib=config.data.cache_gib if training else 0.0,
            cache_folder=config.data.cache_folder,
            on_reject=on_reject,
        )


class Job(Task, Protocol):
    """A task with its data and its validation."""

    @property
    def encoder(self) -> SpectrogramTransformer:
        """Of the module."""
        ...

    summary: str
    """One line on model and data."""

    train_paths: ClipPaths
    """Of the training clips."""

    def optimizer(self) -> torch.optim.Optimizer:
        """Over the module's trainable parameters."""
        ...

    def train_batches(self, start: int) -> AbstractContextManager[Iterator[Batch]]:
        """The training data from a position of its order on."""
        ...

    def validate(self, engine: TrainEngine, progress: Progress) -> dict[str, float]:
        """Values of the held-out clips. Collective."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds besides weights, moments and counters; on rank 0."""
        ...

    def restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Take that from a checkpoint; its tensors are on rank 0 alone."""
        ...

    def meta(self) -> dict[str, Any]:
        """What a checkpoint says besides configuration and progress, as JSON has it."""
        ...

    def finish(self, engine: TrainEngine, progress: Progress) -> None:
        """After the last step. Collective."""
        ...


class RejectLog:
    """Writes clips that could not be read to rejected.jsonl, each once for a run."""

    def __init__(self, path: Path, split: str):
        self._path, self._split = path, split
        self._known: set[bytes] = set()
        self._read_to = 0

    def __call__(self, clip_id: int, path: str, reason: str) -> None:
        """Write down a clip: its row in the manifest, its path, and what is wrong with it."""
        line = {"split": self._split, "clip": clip_id, "path": path, "reason": reason}
        text = json.dumps(line, ensure_ascii=False).encode(errors="surrogateescape") + b"\n"
        self._path.parent.mkdir(parents=True, exist_ok=True)  # another machine may not have it yet
        with self._path.open("a+b") as file:
            # Other ranks write here as well: only what has come since is read.
            file.seek(self._read_to)
            self._known.update(file)
            self._read_to = file.tell()
            if text not in self._known:
                file.write(text)


def micro_batch_size(config: Config, world: World) -> int:
    """Clips of one rank in one micro-step.

    Raises:
        ConfigError: The batch cannot be divided evenly.
    """
    parts = world.world_size * config.train.accumulation_steps
    if config.train.batch_size % parts:
        raise ConfigError(
            f"train.batch_size {config.train.batch_size} cannot be divided over "
            f"{world.world_size} processes x "
            f"train.accumulation_steps {config.train.accumulation_steps}"
        )
    return config.train.batch_size // parts
