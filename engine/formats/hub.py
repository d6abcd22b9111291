"""Models on the Hugging Face hub, in and out; cache, token and offline mode are the hub's own."""

import re
from pathlib import Path
from typing import Any

from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.formats.huggingface import RAW_WEIGHTS
from ssast.engine.formats.huggingface_config import REMOTE_CODE
from ssast.engine.settings import Audio
from ssast.pipelines.text import one_line

PREFIX = "hf:"
FILES = ["*.json", "*.safetensors"]  # never code
_CARD = """---
library_name: transformers
pipeline_tag: {task}
tags: [audio, ssast, audio-spectrogram-transformer]
---

# {name}

An audio spectrogram transformer ([SSAST](https://arxiv.org/abs/2110.09784)), {about}, written by
`ssast export --to hf` of ssast-engine.

Input: {seconds:g} s at {rate} Hz mono, {frames} frames of {mels} mel bins, mean {mean:g}, standard
deviation {std:g}; the feature extractor has these settings.

    ssast {command}

or, with transformers, `{loader}.from_pretrained("{name}"{remote})`.

Please add what it was trained on, its licence, its scores and its limits.
"""


def fetch_from_hub(source: str) -> Path:
    """Return the folder of a model on the hub, which is downloaded the first time.

    Args:
        source: ``hf:owner/name`` or ``hf:owner/name@revision``.

    Raises:
        ConfigError: The source is malformed.
        CheckpointError: The model cannot be fetched.
    """
    found = re.fullmatch(rf"{PREFIX}([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source)
    if found is None:
        raise ConfigError(f"{source}: expected hf:owner/name or hf:owner/name@revision")
    hub = _hub(source)
    repository, revision = found.groups()
    try:
        return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=FILES))
    except Exception as error:  # the hub's own, httpx's, and of files: all mean the same here
        raise CheckpointError(f"{source}: cannot be fetched: {one_line(error):.200}") from error


def check_push(repository: str) -> None:
    """Check before any work that a model can be uploaded under a name.

    Raises:
        ConfigError: The name is malformed.
        CheckpointError: The package for it is not installed.
    """
    if re.fullmatch(r"[\w.-]+/[\w.-]+", repository) is None:
        raise ConfigError(f"--push {repository}: expected owner/name")
    _hub(repository)


def push_to_hub(
    folder: Path, repository: str, audio: Audio, *, num_classes: int | None, own_code: bool
) -> str:
    """Upload an exported folder as a model, with a model card; return its address.

    Args:
        folder: What :func:`~ssast.engine.formats.huggingface.export_huggingface` wrote.
        repository: ``owner/name``; it is created if need be.
        audio: Settings of the model's input.
        num_classes: Number of classes; None of an encoder.
        own_code: Whether the folder has a model file of its own.

    Raises:
        ConfigError: The name is malformed.
        CheckpointError: It cannot be uploaded, for instance without a token.
    """
    check_push(repository)
    classifier = num_classes is not None
    card = _CARD.format(
        name=repository,
        task="audio-classification" if classifier else "feature-extraction",
        about=f"fine-tuned for {num_classes} classes" if classifier else "pretrained",
        seconds=audio.num_frames / 100,
        rate=audio.sample_rate_hz,
        frames=audio.num_frames,
        mels=audio.n_mels,
        mean=audio.mean,
        std=audio.std,
        command=f"predict {PREFIX}{repository} dog.wav"
        if classifier
        else f"finetune classifier --checkpoint {PREFIX}{repository} data.train=train.json",
        loader="AutoModelForAudioClassification" if classifier else "AutoModel",
        remote=", trust_remote_code=True" if own_code else "",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    hub = _hub(repository)
    try:
        api = hub.HfApi()
        api.create_repo(repository, exist_ok=True)
        # Else those of a model that was pushed before would count as this one's.
        stale = [RAW_WEIGHTS, REMOTE_CODE.name]
        api.upload_folder(repo_id=repository, folder_path=folder, delete_patterns=stale)
    except Exception as error:  # as above
        raise CheckpointError(
            f"{repository}: cannot be uploaded, {folder} is written: {one_line(error):.200}"
        ) from error
    return f"{PREFIX}{repository}"


def _hub(source: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"{source}: needs huggingface_hub, which is not installed: pip install huggingface_hub"
        ) from error
    return huggingface_hub
