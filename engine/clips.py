"""What a configuration says of its audio: which clips, and which filterbanks of them."""

import numpy as np

from ssast.engine.config import Config, ConfigError
from ssast.engine.settings import Audio
from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.batch import DataError
from ssast.pipelines.manifest import read_manifest
from ssast.pipelines.order import permutation
from ssast.pipelines.shards import ClipPaths, ShardIndex, select


def fbank_spec(audio: Audio) -> FbankSpec:
    """The filterbank settings of a configuration."""
    return FbankSpec(
        sample_rate_hz=audio.sample_rate_hz, n_mels=audio.n_mels, num_frames=audio.num_frames
    )


def find_clips(config: Config) -> tuple[ClipPaths, ClipPaths]:
    """The training and the held-out clips.

    Raises:
        ConfigError: No training data is named.
        DataError: A manifest is wrong, or there is nothing to hold out.
    """
    if config.data.train is None:
        raise ConfigError(
            "data.train is not set: give a manifest or a folder of audio files, "
            "for example data.train=/my/recordings"
        )
    paths = read_manifest(config.data.train).paths
    if config.data.valid is not None:
        return paths, read_manifest(config.data.valid).paths
    if len(paths) < 2:
        raise DataError(f"{config.data.train}: one clip alone cannot be split; set data.valid")
    held = held_out(paths, max(1, round(config.data.valid_share * len(paths))))
    return select(paths, np.flatnonzero(~held)), select(paths, np.flatnonzero(held))


def held_out(paths: ClipPaths, count: int) -> np.ndarray:
    """Chooses clips to hold out, the same ones whenever it is asked.

    Clips that were cut from one recording stay together, where that is known and there is another.

    Args:
        paths: Two clips or more.
        count: How many to hold out, at least; 1 or more.

    Returns:
        [n] bool; neither all nor none.
    """
    groups = np.arange(len(paths))
    if isinstance(paths, ShardIndex):
        _, of_recording = np.unique(paths.recordings(), return_inverse=True)
        groups = of_recording if of_recording.max() else groups
    sizes = np.bincount(groups)
    order = permutation(0, 0, len(sizes))
    enough = int(np.searchsorted(np.cumsum(sizes[order]), count)) + 1
    return np.isin(groups, order[: min(enough, len(sizes) - 1)])
