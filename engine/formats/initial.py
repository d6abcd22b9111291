"""The checkpoint that a run begins from: its name, its model, and the settings taken from it."""

from dataclasses import replace
from pathlib import Path

from ssast.engine.checkpoints.adopt import adopt
from ssast.engine.checkpoints.weights import Weights
from ssast.engine.config import Config, load_config
from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.formats.open import WEIGHTS, LoadedModel, MissingMetadata, open_encoder

Checkpoint = LoadedModel | str | Path


def initial_checkpoint(run: Path) -> str | None:
    """Return the checkpoint that a run began from; None if from scratch, or without a run."""
    stored = run / "config.yaml"
    return _name(load_config(stored)) if stored.is_file() else None


def with_checkpoint(config: Config, checkpoint: Checkpoint | None, resume: bool) -> Config:
    """Return the configuration with the path of the weights that its run begins from.

    Args:
        config: Configuration of the run.
        checkpoint: What the user gave; it overrides the configuration.
        resume: Whether a run that names none takes the one that it began from.
    """
    if isinstance(checkpoint, LoadedModel):
        checkpoint = checkpoint.path
    name = _name(config) if checkpoint is None else str(checkpoint)
    if name is None and resume:
        name = initial_checkpoint(Path(config.run.folder or ""))
    if config.finetune is None:
        return replace(config, train=replace(config.train, checkpoint=name))
    return replace(config, finetune=replace(config.finetune, checkpoint=name))


def open_initial(
    config: Config,
    checkpoint: Checkpoint | None,
    metadata: MissingMetadata | None,
    weights: Weights | None = None,
) -> LoadedModel | None:
    """Open the model that a configuration names, unless the user gave it; None from scratch.

    Raises:
        CheckpointError: See :func:`~ssast.engine.formats.open.open_encoder`.
        ConfigError: See there; or weights are chosen of no checkpoint.
    """
    if isinstance(checkpoint, LoadedModel):
        return checkpoint
    name = _name(config)
    if name is None:
        if weights is not None:
            raise ConfigError(f"--weights {weights}: expected a checkpoint that has them: give one")
        if metadata not in (None, MissingMetadata()):
            raise ConfigError(
                "--frames, --stride and the like are what a published fine-tuned checkpoint does "
                "not say: give one, or set audio.num_frames and finetune.stride"
            )
        return None
    return open_encoder(name, metadata, weights)


def begin_from(
    config: Config,
    checkpoint: Checkpoint | None,
    metadata: MissingMetadata | None,
    weights: Weights | None,
    *,
    begun: bool,
) -> tuple[LoadedModel | None, Config, list[str]]:
    """Open the model that a run begins from, and take the settings that nobody set from it.

    A run that was begun has its weights already: where the model is gone, the settings that nobody
    set are those of the run so far.

    Returns:
        The model, if there is one; the configuration; lines for the log.

    Raises:
        CheckpointError: It cannot be opened, or does not fit.
        ConfigError: See :func:`open_initial`.
    """
    try:
        loaded = open_initial(config, checkpoint, metadata, weights)
    except CheckpointError as error:
        if not begun:
            raise
        stored = Path(config.run.folder or "") / "config.yaml"
        config, lines = adopt(config, load_config(stored), str(stored))
        return None, config, [f"{error}: not needed, as the run goes on from its own", *lines]
    return (None, config, []) if loaded is None else (loaded, *adopt_from(config, loaded))


def adopt_from(config: Config, loaded: LoadedModel) -> tuple[Config, list[str]]:
    """Take the settings that nobody set from a loaded model; see :func:`adopt`.

    Returns:
        The configuration, and lines for the log: also which of two kinds of weights it has.
    """
    config, lines = adopt(config, loaded.config, str(loaded.path), assumed=loaded.assumed)
    if loaded.weights is not None:
        lines.append(f"{loaded.path}: {WEIGHTS[loaded.weights]}")
    return config, lines


def _name(config: Config) -> str | None:
    settings = config.train if config.finetune is None else config.finetune
    return settings.checkpoint
