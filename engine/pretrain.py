"""Pretraining from a configuration."""

from dataclasses import replace
from pathlib import Path

from ssast.engine.checkpoints.adopt import adopt
from ssast.engine.config import Config, check_paths, load_config
from ssast.engine.data.clips import draw_valid, find_clips
from ssast.engine.errors import ConfigError
from ssast.engine.formats.open import LoadedModel, open_encoder
from ssast.engine.train.inputs import of_clips
from ssast.engine.train.pretraining import Pretraining
from ssast.engine.train.run import run_training
from ssast.engine.train.statistics import with_measured_stats
from ssast.engine.train.task import run_folder


def pretrain(
    config: Config, checkpoint: LoadedModel | str | Path | None = None, *, resume: bool = False
) -> int:
    """Pretrain, continue the pretraining of a model, or resume a run.

    Args:
        config: Configuration of the run; ``run.folder`` must be set, as ``load_config`` does.
        checkpoint: Model to continue from, or the path of one; overrides ``train.checkpoint``. With
            neither, a resumed run takes its own, and a new one starts from scratch. Of a model
            without pretraining heads the encoder is taken.
        resume: Resume from the latest checkpoint in the run's folder, if there is one.

    Returns:
        0, or the number of the signal that stopped the run after it had saved a checkpoint.

    Raises:
        ConfigError: See :func:`~ssast.engine.train.run.run_training`, also for the others; or
            settings of a fine-tuning.
        DataError: Wrong manifests, or too many unreadable clips.
        CheckpointError: A checkpoint cannot be written or read, or does not fit.
        TrainingError: Training diverged.
    """
    run_folder(config)  # must be set, before anything is read
    if config.finetune is not None:
        raise ConfigError(
            "this configuration has a section finetune: use ssast finetune, or leave it out"
        )
    config = _with_checkpoint(config, checkpoint, resume)
    check_paths(config)
    pretrained, notes = None, list[str]()
    if config.train.checkpoint is not None:
        pretrained = checkpoint if isinstance(checkpoint, LoadedModel) else None
        pretrained = pretrained or open_encoder(config.train.checkpoint)
        config, notes = adopt(
            config,
            pretrained.config,
            str(pretrained.path),
            assumed=pretrained.assumed,
            objective=True,
        )
    train_paths, held_out = find_clips(config)
    config, measured = with_measured_stats(config, train_paths, resume=resume)
    # What the weights, the masks or the data order depend on must not change on the way.
    fixed = [(s, k) for s in ("audio", "model", "objective") for k in vars(getattr(config, s))]
    return run_training(
        config,
        lambda context: Pretraining(context, train_paths, held_out, pretrained),
        clips=train_paths,
        inputs=of_clips(
            config,
            train_paths,
            held_out,
            draw_valid(config, held_out),
            None if pretrained is None else pretrained.model,
        ),
        fixed=[*fixed, ("train", "seed")],
        resume=resume,
        notes=[*notes, *measured],
    )


def _with_checkpoint(
    config: Config, checkpoint: LoadedModel | str | Path | None, resume: bool
) -> Config:
    """Return the configuration with the path of the weights that it continues from."""
    if isinstance(checkpoint, LoadedModel):
        checkpoint = checkpoint.path
    name = config.train.checkpoint if checkpoint is None else str(checkpoint)
    stored = Path(config.run.folder or "", "config.yaml")
    if name is None and resume and stored.is_file():
        name = load_config(stored).train.checkpoint
    return replace(config, train=replace(config.train, checkpoint=name))
