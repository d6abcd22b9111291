"""Pretrained weights out of a run, for whatever comes after pretraining."""

from pathlib import Path

import safetensors
import torch

from ssast.engine.checkpoints.store import META, STATE, Checkpoints, write_files
from ssast.engine.config import Config, from_plain
from ssast.engine.errors import CheckpointError
from ssast.engine.model.objective import MSPM


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the best (else the latest) one of a run.

    Raises:
        CheckpointError: There is none.
    """
    if (path / "meta.json").is_file():
        return path
    checkpoints = Checkpoints(path / "checkpoints")
    found = checkpoints.best() or checkpoints.latest()
    if found is None:
        raise CheckpointError(f"{path}: no run with checkpoints and no checkpoint there")
    return found


def load_pretrained(path: str | Path) -> tuple[MSPM, Config]:
    """The pretrained model of a run, or of one of its checkpoints, on the CPU, and its settings.

    The encoder alone is ``model.encoder``; :class:`ssast.engine.model.classifier.Classifier` puts a
    classifier on top of it.

    Raises:
        CheckpointError: There is no whole checkpoint.
    """
    tensors, meta = Checkpoints.load(find_checkpoint(Path(path)))
    config = from_plain(meta["config"])
    model = MSPM(config)
    weights = {n.removeprefix("weight/"): t for n, t in tensors.items() if n.startswith("weight/")}
    model.load_state_dict(weights)
    return model.eval(), config


def export_weights(path: str | Path, folder: str | Path, dtype: torch.dtype) -> Path:
    """Write what :func:`load_pretrained` needs of a run, and nothing else: a third of the bytes.

    Args:
        path: A pretraining run or one of its checkpoints.
        folder: Made if it is not there.
        dtype: Of the weights in the file; they are float32 again when they are loaded.

    Returns:
        The folder.

    Raises:
        CheckpointError: There is no whole checkpoint, or the folder cannot be written.
    """
    tensors, meta = Checkpoints.load(find_checkpoint(Path(path)))
    weights = {n: value.to(dtype) for n, value in tensors.items() if n.startswith("weight/")}
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_files(folder, weights, {key: meta[key] for key in ("config", "step")})
        # safetensors makes a file that nobody else may read.
        (folder / STATE).chmod((folder / META).stat().st_mode)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error
    return folder
