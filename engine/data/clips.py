"""What a configuration says of its audio: which clips, and which filterbanks of them."""

import numpy as np

from ssast.engine.config import Config
from ssast.engine.errors import ConfigError
from ssast.engine.settings import Audio
from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.clips.manifest import read_manifest
from ssast.pipelines.clips.mix import MixedClips, check_disjoint
from ssast.pipelines.clips.order import permutation
from ssast.pipelines.clips.shards import ClipPaths, ShardIndex, select
from ssast.pipelines.errors import DataError


def fbank_spec(audio: Audio) -> FbankSpec:
    """The filterbank settings of a configuration."""
    return FbankSpec(
        sample_rate_hz=audio.sample_rate_hz, n_mels=audio.n_mels, num_frames=audio.num_frames
    )


def find_clips(config: Config) -> tuple[ClipPaths, ClipPaths]:
    """The training and the held-out clips; of a mix, both of each of its data sets.

    Raises:
        ConfigError: No training data is named.
        DataError: A manifest is wrong, there is nothing to hold out, or data sets of a mix share
            clips.
    """
    data = config.data
    if data.train is None and not data.mix:
        raise ConfigError(
            "data.train is not set: give a manifest or a folder of audio files, "
            "for example data.train=/my/recordings"
        )
    valid = None if data.valid is None else read_manifest(data.valid).paths
    sets = {name: read_manifest(name).paths for name in data.mix or [str(data.train)]}
    check_disjoint(sets)
    if valid is None:
        splits = [_split(name, paths, data.valid_share) for name, paths in sets.items()]
    else:
        splits = [(paths, valid) for paths in sets.values()]
    train, held = zip(*splits, strict=True)
    if data.mix is None:
        return train[0], held[0]
    shares = list(data.mix.values())
    return MixedClips(train, shares), MixedClips(held, shares) if valid is None else valid


def _split(name: str, paths: ClipPaths, valid_share: float) -> tuple[ClipPaths, ClipPaths]:
    """Training and held-out clips of one data set."""
    if len(paths) < 2:
        raise DataError(f"{name}: one clip alone cannot be split; set data.valid")
    held = held_out(paths, max(1, round(valid_share * len(paths))))
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
