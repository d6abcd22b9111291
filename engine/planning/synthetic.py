"""One batch in place of a data set, for the time a training step takes by itself."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssast.engine.config import Config, finetune_settings
from ssast.engine.data.labels import LabelledClips
from ssast.engine.train.pretraining import Pretraining
from ssast.engine.train.task import RunContext, Task
from ssast.pipelines.stream.batch import Batch

NUM_CLASSES = 527  # AudioSet's


def noise(config: Config, batch_size: int) -> Tensor:
    """Return filterbanks [B, T, F] with the mean and deviation that a model normalises by."""
    audio = config.audio
    generator = torch.Generator().manual_seed(1)
    unit = torch.randn(batch_size, audio.num_frames, audio.n_mels, generator=generator)
    return audio.mean + 2 * audio.std * unit


@dataclass(frozen=True)
class SyntheticContext(RunContext):
    """A run whose streams give the same filterbanks without end, each time as another epoch."""

    fbank: Tensor = field(kw_only=True)
    """[B, T, F], B clips of one rank in one micro-batch."""

    def stream(
        self, paths: Sequence[Any], split: str | None, **settings: Any
    ) -> AbstractContextManager[Iterator[Batch]]:
        """Open a stream of that batch, whatever the clips are."""
        return nullcontext(self.batches())

    def batches(self) -> Iterator[Batch]:
        """Yield the batch, epoch after epoch."""
        B, T, _ = self.fbank.shape
        device = self.world.device
        fbank, frames = self.fbank.to(device), torch.full((B,), T, device=device)
        clips = torch.arange(B, device=device)
        valid = torch.ones(B, dtype=torch.bool, device=device)
        for epoch in count():
            yield Batch(fbank, frames, clips, torch.full_like(clips, epoch), valid)


def synthetic_task(context: SyntheticContext) -> Task:
    """Build the task of a configuration; in fine-tuning, clip i is of class i mod NUM_CLASSES."""
    config, B = context.config, len(context.fbank)
    if config.finetune is None:
        clips = [""] * B
        return Pretraining(context, clips, clips)
    # A plan of pretraining need not wait for what computes metrics.
    from ssast.engine.data.splits import Splits
    from ssast.engine.train.finetuning import Finetuning

    rows = np.arange(max(B, NUM_CLASSES))
    classes = tuple(map(str, range(NUM_CLASSES)))
    offsets = np.append(rows, len(rows))
    clips_of = LabelledClips([""] * len(rows), classes, rows % NUM_CLASSES, offsets, "noise")
    weighed = finetune_settings(config).class_weights != "none"
    weights = np.ones(NUM_CLASSES) if weighed else None
    splits = Splits(clips_of, clips_of, clips_of, None, weights, classes)
    return Finetuning(context, splits, None, 1)
