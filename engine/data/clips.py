"""The clips and the filterbank settings that a configuration names."""

import logging

from ssast.engine.config import Config
from ssast.engine.data.leakage import check_disjoint
from ssast.engine.errors import ConfigError
from ssast.engine.settings import Audio, Data
from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.audio.windows import cut_into_windows
from ssast.pipelines.clips.columns import TableFormat
from ssast.pipelines.clips.holdout import split_clips
from ssast.pipelines.clips.manifest import read_clips
from ssast.pipelines.clips.mix import MixedClips, select
from ssast.pipelines.clips.shards import ClipPaths, ShardIndex
from ssast.pipelines.clips.subset import draw_clips
from ssast.pipelines.errors import DataError, TooFewRecordings

log = logging.getLogger(__name__)


def fbank_spec(audio: Audio) -> FbankSpec:
    """Return the filterbank settings of a configuration."""
    return FbankSpec(
        sample_rate_hz=audio.sample_rate_hz,
        n_mels=audio.n_mels,
        num_frames=audio.num_frames,
        channel=audio.channel,
    )


def table_format(data: Data) -> TableFormat:
    """Return what a configuration sets of the format of manifests.

    Raises:
        ConfigError: A value cannot be.
    """
    try:
        return TableFormat(data.columns or {}, data.label_separator, data.delimiter, data.encoding)
    except DataError as error:
        raise ConfigError(str(error)) from error


def find_clips(config: Config) -> tuple[ClipPaths, ClipPaths]:
    """Find the training and the held-out clips; each data set of a mix holds out its own.

    Raises:
        ConfigError: No training data is named.
        DataError: A manifest is wrong, there is nothing to hold out, or data sets share recordings.
    """
    data = config.data
    if data.train is None and not data.mix:
        raise ConfigError(
            "data.train is not set: give a manifest or a folder of audio files, "
            "for example data.train=/my/recordings"
        )
    names = data.mix or [str(data.train)]
    table = table_format(data)
    sets = {name: _windows(name, read_clips(name, table), data) for name in names}
    key = "data.train" if data.mix is None else "data.mix"
    for name, paths in sets.items():
        _report_channel(name, paths, config.audio.channel)
    named = {f"{key} {name}": paths for name, paths in sets.items()}
    if data.valid is None:
        check_disjoint(named)
        splits = [_split(name, paths, data.valid_share) for name, paths in sets.items()]
    else:
        valid = _windows(data.valid, read_clips(data.valid, table), data)
        if data.mix is None and data.valid == data.train:
            # Meant so: whether a model can learn a few clips by heart.
            log.warning("data.train and data.valid are both %s: nothing is held out", data.valid)
        else:
            check_disjoint(named | {f"data.valid {data.valid}": valid})
        splits = [(paths, valid) for paths in sets.values()]
    train, held = zip(*splits, strict=True)
    if data.mix is None:
        return train[0], held[0]
    shares = list(data.mix.values())
    return MixedClips(train, shares), MixedClips(held, shares) if data.valid is None else valid


def _windows(name: str, paths: ClipPaths, data: Data) -> ClipPaths:
    """Cut recordings into the windows that are set, and say how many there are."""
    if data.window_s is None:
        return paths
    windows, _ = cut_into_windows(paths, data.window_s, data.hop_s)
    log.info("%s: %d windows of %d clips", name, len(windows), len(paths))
    return windows


def _report_channel(name: str, paths: ClipPaths, channel: str) -> None:
    """Say where a data set has been prepared with another channel than that of the settings."""
    if isinstance(paths, ShardIndex) and (made := paths.channel()) != channel:
        log.warning(
            "%s was prepared with --channel %s: audio.channel=%s makes no difference to it",
            name,
            made,
            channel,
        )


def draw_valid(config: Config, held_out: ClipPaths) -> ClipPaths:
    """Return the held-out clips of one validation: ``data.valid_clips`` of them at most.

    Raises:
        DataError: A list of a prepared folder cannot be read.
    """
    count = config.data.valid_clips
    if count is None or count >= len(held_out):
        return held_out
    return select(held_out, draw_clips(held_out, count))


def describe_clips(train: int, valid: int, held_out: int) -> str:
    """Return the numbers of training clips, and of held-out ones in a validation and in all."""
    if valid == held_out:
        return f"{train} training and {held_out} held-out clips"
    return f"{train} training clips, validating on {valid} of {held_out} held-out clips"


def _split(name: str, paths: ClipPaths, valid_share: float) -> tuple[ClipPaths, ClipPaths]:
    """Return the training and the held-out clips of one data set."""
    try:
        train, held = split_clips(paths, valid_share)
    except TooFewRecordings as error:
        raise DataError(f"{name}: {error}; set data.valid") from error
    return select(paths, train), select(paths, held)
