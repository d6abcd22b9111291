"""Pretrained weights out of a run, for whatever comes after pretraining."""

from pathlib import Path

from ssast.engine.checkpoint import CheckpointError, Checkpoints
from ssast.engine.config import Config, from_plain
from ssast.engine.objective import MSPM


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

    The encoder alone is ``model.encoder``; :class:`ssast.engine.classifier.Classifier` puts a
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
