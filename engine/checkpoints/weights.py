"""The weights of a model in and out of run folders, without optimizer state."""

from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from ssast.engine.checkpoints.store import META, Checkpoints, write_files
from ssast.engine.config import Config, to_plain
from ssast.engine.errors import CheckpointError

CHOSEN = "classifier"  # in a run's folder: the weights that did best on the held-out clips
WEIGHT = "weight/"  # before the names of weights in a checkpoint


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the weights of a run, or of one of its checkpoints, and what is stored beside them.

    Of a finished fine-tuning run these are the chosen weights; of another run those of the best
    checkpoint, else of the latest.

    Args:
        path: Folder of a run, of a checkpoint, or of exported weights.

    Returns:
        Tensors by the model's own names, mapped into memory, and the metadata: ``config`` and
        ``step``, and of a classifier ``classes`` and ``names``.

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged.
    """
    tensors, meta = _read(path)
    names = [name for name in tensors if name.startswith(WEIGHT)]
    return {name.removeprefix(WEIGHT): tensors[name] for name in names}, meta


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if (path / META).is_file():
        return Checkpoints.load(path)
    chosen, checkpoints = Checkpoints(path / CHOSEN), Checkpoints(path / "checkpoints")
    # The latest one has just been verified: its bytes are not hashed a second time.
    if (found := chosen.latest()) is not None:
        return Checkpoints.load(found, check=False)
    if (found := checkpoints.best()) is not None:
        return Checkpoints.load(found)
    if (found := checkpoints.latest()) is not None:
        return Checkpoints.load(found, check=False)
    raise CheckpointError(f"{path}: no run with checkpoints and no checkpoint there")


def export_weights(
    model: nn.Module, config: Config, step: int, folder: str | Path, dtype: torch.dtype
) -> Path:
    """Write the weights of a model and its settings, and nothing else: a third of a checkpoint.

    Args:
        model: A pretrained model.
        config: The configuration of its run.
        step: Optimizer steps it was trained for.
        folder: Output folder, created if need be.
        dtype: Type of the weights in the file; they are float32 again when they are loaded.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    weights = {WEIGHT + name: value.to(dtype) for name, value in model.state_dict().items()}
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_files(folder, weights, {"config": to_plain(config), "step": step})
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error
    return folder
