"""Fingerprints of what a run depends on besides its configuration.

All ranks must have the same, and so must a run when it is resumed.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ssast.engine.config import Config, to_plain
from ssast.engine.data.labels import LabelledClips
from ssast.engine.data.splits import Splits
from ssast.engine.monitoring.monitor import package_versions
from ssast.engine.parallel.agreement import code_version
from ssast.pipelines.clips.mix import fingerprint
from ssast.pipelines.clips.order import read_weights
from ssast.pipelines.clips.shards import ClipPaths
from ssast.pipelines.text import NAME_BYTES, shown

Fingerprints = dict[str, str]
# What a resumed run can go on without: the weights are in its checkpoint.
NOT_TRAINED_ON = ("test clips", "labels of the test clips", "pretrained weights")
NOT_OF_TRAINING = ("run", "profile")  # sections
SELECTING = ("data.valid_share", "data.window_s", "data.hop_s")  # choose the clips of data.train
PLACES = (
    *("data.train", "data.valid", "data.mix", "data.sample_weights", "data.cache_folder"),
    *("finetune.test", "finetune.folds", "finetune.labels", "finetune.checkpoint"),
    *("train.checkpoint", "train.fallback_folder"),
)


def of_clips(
    config: Config,
    train: ClipPaths,
    held_out: ClipPaths,
    drawn: ClipPaths,
    pretrained: nn.Module | None,
) -> Fingerprints:
    """Return the fingerprints of the validation clips, sampling and pretrained weights.

    Args:
        config: The configuration.
        train: The training clips.
        held_out: The held-out clips.
        drawn: Those of them that validations use.
        pretrained: Model whose weights the run begins with, if any.

    Raises:
        DataError: The file of the sampling weights is wrong.
    """
    found = {"validation clips": fingerprint(held_out)[:16]}
    if len(drawn) < len(held_out):
        found["draw of validation clips (data.valid_clips)"] = fingerprint(drawn)[:16]
    if config.data.sample_weights is not None:
        read_weights(config.data.sample_weights, len(train))
        content = Path(config.data.sample_weights).read_bytes()
        found["sampling weights (data.sample_weights)"] = _digest([content])
    if pretrained is not None:
        tensors = sorted(pretrained.state_dict().items())
        found["pretrained weights"] = _digest(_bytes(value) for _, value in tensors)
    return found


def of_splits(config: Config, splits: Splits, pretrained: nn.Module | None) -> Fingerprints:
    """Return those of :func:`of_clips`, and of classes and labels.

    Raises:
        DataError: The file of the sampling weights is wrong.
    """
    valid = splits.valid.paths
    found = of_clips(config, splits.train.paths, valid, splits.valid_drawn.paths, pretrained)
    found["order of the classes"] = _digest(
        name.encode(errors=NAME_BYTES) + b"\0" for name in splits.classes
    )
    for name, clips in (("training", splits.train), ("validation", splits.valid)):
        found[f"labels of the {name} clips"] = _labels(clips)
    if splits.test is not None:
        found |= of_test(splits.test)
    if splits.class_weights is not None:
        found["class weights (finetune.class_weights)"] = _digest([splits.class_weights.tobytes()])
    return found


def of_test(clips: LabelledClips) -> Fingerprints:
    """Return the fingerprints of the test clips and of their labels."""
    return {
        "test clips": fingerprint(clips.paths)[:16],
        "labels of the test clips": _labels(clips),
    }


def versions() -> Fingerprints:
    """Return the versions of the code and of the packages that compute."""
    packages = {name: str(version) for name, version in package_versions().items()}
    return {**packages, "code": code_version()}


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the names whose fingerprints differ, or are missing on one side."""
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def differences(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """Return the old and the new value of the settings ``section.key`` that differ."""
    old, new = to_plain(before), to_plain(now)
    pairs = {
        f"{section}.{key}": (old.get(section, {}).get(key), value)
        for section, values in new.items()
        for key, value in values.items()
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def changed_settings(before: Config, now: Config) -> list[str]:
    """Return ``section.key (old, now new)`` of settings that may change what is trained.

    Not those that say where something lies: whether it is the same is told by its fingerprint.
    """
    return [
        change_of(name, pair)
        for name, pair in differences(before, now).items()
        if name.partition(".")[0] not in NOT_OF_TRAINING and name not in PLACES
    ]


def change_of(name: str, pair: tuple[Any, Any]) -> str:
    """Format a setting that differs, ``section.key (old, now new)``."""
    return f"{name} ({shown(pair[0])}, now {shown(pair[1])})"


def _labels(clips: LabelledClips) -> str:
    return _digest(np.asarray(part, np.int64).tobytes() for part in (clips.offsets, clips.indices))


def _bytes(value: torch.Tensor) -> memoryview:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _digest(parts: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
