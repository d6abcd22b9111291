"""Pretraining from a configuration."""

from ssast.engine.config import Config, check_paths
from ssast.engine.data.clips import draw_valid, find_clips
from ssast.engine.errors import ConfigError
from ssast.engine.train.inputs import of_clips
from ssast.engine.train.pretraining import Pretraining
from ssast.engine.train.run import run_training
from ssast.engine.train.task import run_folder


def pretrain(config: Config, *, resume: bool = False) -> int:
    """Pretrain, or resume pretraining.

    Args:
        config: Configuration of the run; ``run.folder`` must be set, as ``load_config`` does.
        resume: Resume from the latest checkpoint in the run's folder, if there is one.

    Returns:
        0, or the number of the signal that stopped the run after it had saved a checkpoint.

    Raises:
        ConfigError: See :func:`~ssast.engine.train.run.run_training`, also for the others; or
            settings of a fine-tuning.
        DataError: Wrong manifests, or too many unreadable clips.
        CheckpointError: A checkpoint cannot be written or read.
        TrainingError: Training diverged.
    """
    run_folder(config)  # must be set, before anything is read
    if config.finetune is not None:
        raise ConfigError(
            "this configuration has a section finetune: use ssast finetune, or leave it out"
        )
    check_paths(config)
    train_paths, held_out = find_clips(config)
    # What the weights, the masks or the data order depend on must not change on the way.
    fixed = [(s, k) for s in ("audio", "model", "objective") for k in vars(getattr(config, s))]
    return run_training(
        config,
        lambda context: Pretraining(context, train_paths, held_out),
        clips=train_paths,
        inputs=of_clips(config, train_paths, held_out, draw_valid(config, held_out)),
        fixed=[*fixed, ("train", "seed")],
        resume=resume,
    )
