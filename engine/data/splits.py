"""The labelled clips of a fine-tuning run, checked before training starts."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ssast.engine.config import OVERRIDE, Config, finetune_settings
from ssast.engine.data.clips import table_format
from ssast.engine.data.labels import (
    LabelledClips,
    class_names,
    class_weights,
    find_classes,
    read_labelled,
    warn_of_empty_classes,
)
from ssast.engine.data.leakage import check_files_exist, check_no_leakage
from ssast.engine.errors import ConfigError
from ssast.pipelines.clips.holdout import hold_out_clips
from ssast.pipelines.clips.overlap import Contents
from ssast.pipelines.clips.subset import draw_clips
from ssast.pipelines.errors import DataError, StorageError, TooFewRecordings

log = logging.getLogger(__name__)

Work = Callable[[Callable[[], None]], str]  # what it is given, it calls often


def run_here(work: Work) -> str:
    """Do work in this process, whatever the others do."""
    return work(lambda: None)


@dataclass(frozen=True)
class Splits:
    """Training, held-out and test clips of a fine-tuning run."""

    train: LabelledClips
    valid: LabelledClips
    valid_drawn: LabelledClips
    """The held-out clips that validations during training use: all, or ``data.valid_clips``."""

    test: LabelledClips | None
    class_weights: np.ndarray | None = None
    """Factors of the classes in the loss, [C]."""

    names: tuple[str, ...] = ()
    """Display names of the classes."""

    compared: str = ""
    """What was read to compare the splits; empty if nothing was."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in their order."""
        return self.train.classes


def find_splits(
    config: Config, num_classes: int | None = None, run_once: Callable[[Work], str] = run_here
) -> Splits:
    """Read and check the training, held-out and test clips of a configuration.

    Args:
        config: The configuration, with a section ``finetune``.
        num_classes: Expected number of classes; any number if None.
        run_once: Runs the checks that look at every file, which one process of a machine may do for
            all; see :func:`~ssast.engine.parallel.long_work.run_long`.

    Raises:
        ConfigError: No training data is named, or settings contradict each other.
        DataError: A manifest is wrong, a label is unknown, too many files are missing or empty,
            nothing can be held out, or splits share recordings.
    """
    settings = finetune_settings(config)
    if config.data.train is None:
        raise ConfigError(
            "data.train is not set: give a manifest with labels, for example data.train=train.json"
        )
    _check_settings(config)
    table = table_format(config.data)
    classes = find_classes(config.data.train, settings.labels, table)
    if num_classes is not None and num_classes != len(classes):
        raise ConfigError(
            f"num_classes is {num_classes}, but {settings.labels or config.data.train} has "
            f"{len(classes)} classes"
        )
    one_label = settings.loss == "ce"
    train = read_labelled(config.data.train, classes, one_label=one_label, table=table)
    if config.data.valid is not None:
        with _of_recipe(config, "data.valid"):
            valid = read_labelled(config.data.valid, classes, one_label=one_label, table=table)
    else:
        train, valid = _split(train, config.data.valid_share)
    test = None
    if settings.test is not None:
        with _of_recipe(config, "finetune.test"):
            test = read_labelled(settings.test, classes, one_label=one_label, table=table)
    warn_of_empty_classes(train)
    weights = class_weights(settings.class_weights, train)
    splits = {"data.train": train, "data.valid": valid}
    if test is not None:
        splits["finetune.test"] = test
    _check_classes(valid, f"{len(valid)} held-out clips")
    drawn = _draw(valid, config.data.valid_clips)

    def check_files(tick: Callable[[], None]) -> str:
        contents = Contents(tick)
        check_files_exist(splits, config.data.max_rejected, contents)
        if not settings.allow_leakage:
            check_no_leakage(splits, contents)
        return contents.summary()

    compared = run_once(check_files)
    names = class_names(classes, settings.labels)
    return Splits(train, valid, drawn, test, weights, names, compared)


def _check_settings(config: Config) -> None:
    settings = finetune_settings(config)
    if settings.balanced_sampling and config.data.sample_weights is not None:
        raise ConfigError(
            "finetune.balanced_sampling and data.sample_weights exclude each other: set one"
        )
    if settings.balanced_sampling and settings.class_weights == "balanced":
        raise ConfigError(
            "finetune.balanced_sampling and finetune.class_weights=balanced make up for rare "
            "classes twice: set one"
        )
    if settings.freq_mask > config.audio.n_mels or settings.time_mask > config.audio.num_frames:
        raise ConfigError(
            f"finetune.freq_mask {settings.freq_mask:g} and finetune.time_mask "
            f"{settings.time_mask:g} must be at most audio.n_mels {config.audio.n_mels} and "
            f"audio.num_frames {config.audio.num_frames}, or shares of them below 1"
        )


def _check_classes(valid: LabelledClips, clips: str) -> None:
    counts = valid.counts()
    if not ((counts > 0) & (counts < len(valid))).any():
        found = "of one class" if counts.any() else "of no class"
        raise DataError(
            f"{valid.source}: the {clips} are all {found}, expected clips of different classes: no "
            "metric could compare checkpoints"
        )


def _draw(valid: LabelledClips, count: int | None) -> LabelledClips:
    """Return the clips of one validation: ``count`` of the held-out ones at most."""
    if count is None or count >= len(valid):
        return valid
    drawn = valid.take(draw_clips(valid.paths, count, valid.labels()))
    _check_classes(drawn, f"{count} of {len(valid)} held-out clips that data.valid_clips leaves")
    held, left = np.count_nonzero(valid.counts()), np.count_nonzero(drawn.counts())
    if left < held:
        log.warning(
            "data.valid_clips %d leaves clips of %d of the %d classes that are held out: metrics "
            "of validations during training know only these",
            count, left, held,
        )  # fmt: skip
    return drawn


@contextmanager
def _of_recipe(config: Config, name: str) -> Iterator[None]:
    """Say of clips that do not fit to those of the user that they are a recipe's."""
    try:
        yield
    except StorageError:
        raise
    except DataError as error:
        origins = config.stated or {}
        if origins.get("data.train") != OVERRIDE or origins.get(name, OVERRIDE) == OVERRIDE:
            raise
        remedy = f"{name} is that of {origins[name]}: set it, or {name}=null"
        raise DataError(f"{error} ({remedy})") from error


def _split(clips: LabelledClips, valid_share: float) -> tuple[LabelledClips, LabelledClips]:
    """Return the training and the held-out clips."""
    try:
        held = hold_out_clips(clips.paths, valid_share, clips.labels())
    except TooFewRecordings as error:
        raise DataError(f"{clips.source}: {error}; set data.valid") from error
    return clips.take(np.flatnonzero(~held)), clips.take(np.flatnonzero(held))
