"""Clips longer than the input of a model, of which only the beginning is used."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ssast.engine.data.clips import fbank_spec
from ssast.engine.settings import Audio
from ssast.pipelines.audio.decode import Item, length_s
from ssast.pipelines.errors import DataError
from ssast.pipelines.stream.batch import Batch

_log = logging.getLogger(__name__)


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
        self._count += sum(self._is_longer(row) for row in batch.clip_ids[full].tolist())

    def warn(self) -> None:
        """Warn of all of them in one line, if there are any."""
        if self._count:
            _log.warning(
                "%d of %d clips are longer than the model's input of %.4g s: only their beginnings "
                "are used; ssast predict --window-s takes all of a recording",
                self._count, len(self._paths), self._spec.num_samples / self._spec.sample_rate_hz,
            )  # fmt: skip

    def _is_longer(self, row: int) -> bool:
        """Return whether a clip has at least one frame more than the input."""
        length = None
        with suppress(OSError, DataError):
            length = length_s(Item.of(self._paths[row]))
        spec = self._spec
        return length is not None and length * spec.sample_rate_hz >= spec.num_samples + spec.hop
