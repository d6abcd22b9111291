"""The weights of a model in and out of run folders, without optimizer state."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import safetensors
import torch
from torch import Tensor, nn

from ssast.engine.checkpoints.store import META, Checkpoints, write_files
from ssast.engine.config import Config, to_plain
from ssast.engine.errors import CheckpointError

CHOSEN = "classifier"  # in a run's folder: the weights that did best on the held-out clips
WEIGHT = "weight/"  # before the names of weights in a checkpoint
EMA = "ema/"  # before those of averaged weights, which only trained ones have
NAMED = 20  # names in a message

Weights = Literal["raw", "ema"]
"""Weights as they were trained, or their exponential moving average."""

Kind = TypeVar("Kind", bound=nn.Module)

log = logging.getLogger(__name__)


def has_average(tensors: Iterable[str]) -> bool:
    """Return whether a checkpoint holds averaged weights, given the names of its tensors."""
    return any(name.startswith(EMA) for name in tensors)


def averaged_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a checkpoint, in place of the trained ones their average if it has one.

    Args:
        tensors: Tensors of the checkpoint.

    Returns:
        The weights, under the names of the raw ones.
    """
    raw = {name: value for name, value in tensors.items() if name.startswith(WEIGHT)}
    return {name: tensors.get(EMA + name.removeprefix(WEIGHT), v) for name, v in raw.items()}


def read_weights(
    path: Path, weights: Weights | None = None
) -> tuple[dict[str, Tensor], dict[str, Any], Weights | None]:
    """Read the weights of a run, or of one of its checkpoints, and what is stored beside them.

    Of a finished fine-tuning run these are the chosen weights; of another run those of the best
    checkpoint, else of the latest.

    Args:
        path: Folder of a run, of a checkpoint, or of exported weights.
        weights: Which ones, where there are two kinds; if None the averaged ones, which the best
            checkpoint was chosen by.

    Returns:
        Tensors by the model's own names, mapped into memory; the metadata: ``config`` and
        ``step``, and of a classifier ``classes`` and ``names``; and which weights they are, None
        where there is one kind only.

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged, or it has no averaged weights.
    """
    tensors, meta = _read(path)
    if weights == "ema" and not has_average(tensors):
        raise CheckpointError(f"{path}: has no averaged weights: its run had train.ema null")
    found = {n: value for n, value in tensors.items() if n.startswith(WEIGHT)}
    kind: Weights | None = (weights or "ema") if has_average(tensors) else None
    if kind == "ema":
        found = averaged_weights(tensors)
    return {name.removeprefix(WEIGHT): value for name, value in found.items()}, meta, kind


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


def sketch(build: Callable[[], Kind], source: str | Path) -> Kind:
    """Build a model without memory for its parameters, to compare it with the weights of a file.

    Settings in a file may claim a model of any size: memory is taken once its weights are seen to
    be there.

    Raises:
        CheckpointError: No such model can be built.
    """
    try:
        with torch.device("meta"):
            return build()
    except (
        RuntimeError,
        ArithmeticError,
        TypeError,
    ) as error:  # of sizes beyond what can be counted
        raise CheckpointError(f"{source}: no model has the sizes that it states") from error


def check_names(expected: Iterable[str], found: Iterable[str], source: str | Path) -> None:
    """Check that weights have the names that a model expects.

    Raises:
        CheckpointError: Some are missing, or were not expected.
    """
    missing, surplus = _differences(expected, found)
    if missing or surplus:
        raise CheckpointError(
            f"{source}: missing {_listed(missing)}, unexpected {_listed(surplus)}"
        )


def check_complete(expected: Iterable[str], found: Iterable[str], source: str | Path) -> None:
    """Check that weights from elsewhere have the names that a model expects, and report others.

    Raises:
        CheckpointError: Some are missing.
    """
    missing, surplus = _differences(expected, found)
    if missing:
        raise CheckpointError(
            f"{source}: not the state dict of this model: missing {_listed(missing)}, "
            f"unexpected {_listed(surplus)}"
        )
    if surplus:
        log.warning("%s: tensors that the model does not have: %s", source, _listed(surplus))


def _differences(expected: Iterable[str], found: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the expected names that are missing, and those found that were not expected."""
    wanted, given = dict.fromkeys(expected), dict.fromkeys(found)
    missing = [name for name in wanted if name not in given]
    return missing, [name for name in given if name not in wanted]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{[f'{name:.100}' for name in names[:NAMED]]}{more}" if names else "nothing"


def check_tensors(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Check tensors, by name: that they have the shapes of a model's, and finite values.

    Raises:
        CheckpointError: Shapes that differ, NaN or infinite values.
    """
    own = model.state_dict()
    wrong = [
        f"{name} {list(value.shape)}, expected {list(own[name].shape)}"
        for name, value in weights.items()
        if value.shape != own[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise CheckpointError(f"{source}: shapes that do not fit: {'; '.join(wrong[:NAMED])}{more}")
    wrong = [name for name, value in weights.items() if not value.isfinite().all()]
    if wrong:
        raise CheckpointError(f"{source}: NaN or infinite weights: {_listed(wrong)}")


def filled(build: Callable[[], Kind], weights: Mapping[str, Tensor], source: str | Path) -> Kind:
    """Return the model that ``build`` makes, filled with weights that have its own names.

    Raises:
        CheckpointError: Names or shapes differ, or values are NaN or infinite.
    """
    model = sketch(build, source)
    check_names(model.state_dict(), weights, source)
    check_tensors(model, weights, source)
    model = build()
    model.load_state_dict(weights)
    return model


def export_weights(
    model: nn.Module,
    config: Config,
    step: int,
    folder: str | Path,
    dtype: torch.dtype,
    raw: nn.Module | None = None,
) -> Path:
    """Write the weights of a model and its settings, and nothing else: a third of a checkpoint.

    Args:
        model: A pretrained model.
        config: The configuration of its run.
        step: Optimizer steps it was trained for.
        folder: Output folder, created if need be.
        dtype: Type of the weights in the file; they are float32 again when they are loaded.
        raw: The same model with its raw weights, where the first has averaged ones: both are
            written, as in a checkpoint.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    kinds = [(WEIGHT, model)] if raw is None else [(WEIGHT, raw), (EMA, model)]
    weights = {k + n: value.to(dtype) for k, m in kinds for n, value in m.state_dict().items()}
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_files(folder, weights, {"config": to_plain(config), "step": step})
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error
    return folder
