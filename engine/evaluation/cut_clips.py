"""Clips longer than the input of a model, of which only the beginning is used."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from ssast.engine.data.clips import fbank_spec
from ssast.engine.settings import Audio
from ssast.pipelines.audio.decode import Item, length_s
from ssast.pipelines.clips.remote import is_url
from ssast.pipelines.errors import DataError
from ssast.pipelines.stream.batch import Batch

_log = logging.getLogger(__name__)
SAMPLED = 100  # clips whose headers are read before training


class CutClips:
    """The count of clips that are cut to the input of a model.

    Args:
        paths: All clips.
        audio: Input of the model.
    """

    def __init__(self, paths: Sequence[Any], audio: Audio):
        self._paths, self._spec, self._count = paths, fbank_spec(audio), 0

    def add(self, batch: Batch) -> None:
        """Count those of a batch; the headers of clips that fill the input tell their lengths."""
        full = batch.valid & (batch.num_frames == self._spec.num_frames)
        self._count += sum(self.is_longer(row) for row in batch.clip_ids[full].tolist())

    def warn(self) -> None:
        """Warn of all of them in one line, if there are any."""
        if self._count:
            _log.warning(
                "%d of %d clips are longer than the model's input of %.4g s: only their beginnings "
                "are used; ssast predict --window-s takes all of a recording",
                self._count, len(self._paths), self.input_s,
            )  # fmt: skip

    @property
    def input_s(self) -> float:
        """Length of the input in s."""
        return self._spec.num_samples / self._spec.sample_rate_hz

    def is_longer(self, row: int) -> bool:
        """Return whether a clip has at least one frame more than the input."""
        length = None
        with suppress(OSError, DataError):
            length = length_s(Item.of(self._paths[row]))
        spec = self._spec
        return length is not None and length * spec.sample_rate_hz >= spec.num_samples + spec.hop


def sampled_cut(paths: Sequence[Any], audio: Audio) -> str:
    """Say how many of some clips, evenly drawn, are longer than the input; "" where none is.

    Clips behind URLs are not looked at.
    """
    cut = CutClips(paths, audio)
    rows = sorted({round(row) for row in np.linspace(0, len(paths) - 1, SAMPLED)})
    rows = [row for row in rows if not is_url(getattr(paths[row], "path", ""))]
    count = sum(map(cut.is_longer, rows))
    if not count:
        return ""
    return (
        f"{count} of {len(rows)} training clips that were looked at are longer than the input of "
        f"{cut.input_s:.4g} s: training hears their beginnings alone; audio.num_frames sets the "
        "input, data.random_crop=true takes parts at random"
    )
