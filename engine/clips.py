"""What a configuration says of its audio: which clips, and which filterbanks of them."""

from ssast.engine.config import Audio, Config, ConfigError
from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.batch import DataError
from ssast.pipelines.manifest import read_manifest
from ssast.pipelines.order import permutation


def fbank_spec(audio: Audio) -> FbankSpec:
    """The filterbank settings of a configuration."""
    return FbankSpec(
        sample_rate_hz=audio.sample_rate_hz, n_mels=audio.n_mels, num_frames=audio.num_frames
    )


def find_clips(config: Config) -> tuple[list[str], list[str]]:
    """Paths of the training and of the held-out clips.

    Raises:
        ConfigError: No training data is named.
        DataError: A manifest is wrong, or there is nothing to hold out.
    """
    if config.data.train is None:
        raise ConfigError(
            "data.train is not set: give a manifest or a folder of audio files, "
            "for example data.train=/my/recordings"
        )
    paths = list(read_manifest(config.data.train).paths)
    if config.data.valid is not None:
        return paths, list(read_manifest(config.data.valid).paths)
    if len(paths) < 2:
        raise DataError(f"{config.data.train}: one clip alone cannot be split; set data.valid")
    count = max(1, round(config.data.valid_share * len(paths)))
    held = set(permutation(0, 0, len(paths))[:count].tolist())
    return [p for i, p in enumerate(paths) if i not in held], [paths[i] for i in sorted(held)]
