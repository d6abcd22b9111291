"""Pretrain from a configuration, or continue from a checkpoint.

engine = PretrainEngine.from_checkpoint("checkpoints/tiny_patch")
engine.fit("/my/recordings")
engine.evaluate("/other/recordings")
engine.save("weights")
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from ssast.engine.checkpoints.weights import Weights, export_weights
from ssast.engine.config import Config, check_paths, load_config, with_data
from ssast.engine.data.clips import draw_valid, find_clips
from ssast.engine.errors import ConfigError
from ssast.engine.evaluation.pretext import pretext_losses
from ssast.engine.formats.initial import adopt_from, begin_from, with_checkpoint
from ssast.engine.formats.open import (
    LoadedModel,
    MissingMetadata,
    open_encoder,
    open_model,
    open_raw,
)
from ssast.engine.model.objective import PretrainingModel
from ssast.engine.objective_settings import OF_GUARD
from ssast.engine.parallel.ranks import leaving_world
from ssast.engine.train.callbacks import Callback
from ssast.engine.train.inputs import of_clips
from ssast.engine.train.pretraining import Pretraining
from ssast.engine.train.run import check_start, run_training
from ssast.engine.train.statistics import with_measured_stats
from ssast.engine.train.task import run_folder
from ssast.pipelines.files import check_new


def pretrain(
    config: Config,
    checkpoint: LoadedModel | str | Path | None = None,
    *,
    resume: bool = False,
    metadata: MissingMetadata | None = None,
    weights: Weights | None = None,
    callbacks: Sequence[Callback] = (),
) -> int:
    """Pretrain, continue the pretraining of a model, or resume a run.

    Args:
        config: Configuration of the run; ``run.folder`` must be set, as ``load_config`` does.
        checkpoint: Model to continue from, or the path of one; overrides ``train.checkpoint``. With
            neither, a resumed run takes its own, and a new one starts from scratch. Of a model
            without pretraining heads the encoder is taken.
        resume: Resume from the latest checkpoint in the run's folder, if there is one.
        metadata: Frames and stride of a published fine-tuned checkpoint.
        weights: Which weights of a checkpoint with averaged ones; see
            :func:`~ssast.engine.formats.open.open_model`.
        callbacks: Called between steps, see :class:`~ssast.engine.train.callbacks.Callback`.

    Returns:
        0, or the number of the signal that stopped the run after it had saved a checkpoint.

    Raises:
        ConfigError: See :func:`~ssast.engine.train.run.run_training`, also for the others; or
            settings of a fine-tuning.
        DataError: Wrong manifests, or too many unreadable clips.
        CheckpointError: A checkpoint cannot be written or read, or does not fit.
        TrainingError: Training diverged.
    """
    begun = check_start(config, resume=resume)
    if config.finetune is not None:
        raise ConfigError(
            "this configuration has a section finetune: use ssast finetune, or leave it out"
        )
    config = with_checkpoint(config, checkpoint, resume)
    check_paths(config)
    pretrained, config, notes = begin_from(config, checkpoint, metadata, weights, begun=begun)
    train_paths, held_out = find_clips(config)
    config, measured = with_measured_stats(config, train_paths, resume=resume)
    # What the weights, the masks or the data order depend on must not change on the way.
    fixed = [(s, k) for s in ("audio", "model", "objective") for k in vars(getattr(config, s))]
    fixed = [(section, key) for section, key in fixed if key not in OF_GUARD]
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
        callbacks=callbacks,
    )


class PretrainEngine:
    """A model that is to be pretrained, or has been.

    Args:
        config: Configuration of the pretraining.
        checkpoint: Model to continue from, or the path of one; see :func:`pretrain`.
    """

    def __init__(self, config: Config, *, checkpoint: LoadedModel | str | Path | None = None):
        self.config, self.checkpoint = config, checkpoint
        self.trained: LoadedModel | None = None

    @classmethod
    def from_config(cls, config: str | Path, overrides: Iterable[str] = ()) -> "PretrainEngine":
        """Pretrain from scratch.

        Args:
            config: A YAML file, or the name of a recipe.
            overrides: Settings that override the file's, ``section.key=value``.

        Raises:
            ConfigError: The configuration is wrong.
        """
        return cls(load_config(config, overrides))

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        config: str | Path = "continue",
        overrides: Iterable[str] = (),
        *,
        weights: Weights | None = None,
    ) -> "PretrainEngine":
        """Open a model to continue its pretraining.

        Args:
            path: Whatever :func:`~ssast.engine.formats.open.open_model` opens.
            config: A YAML file, or the name of a recipe. What it does not set of the model, its
                input and the objective is the checkpoint's.
            overrides: Settings that override the file's, ``section.key=value``.
            weights: See :func:`~ssast.engine.formats.open.open_model`.

        Raises:
            CheckpointError: There is no model, or it does not fit.
            ConfigError: The configuration is wrong.
        """
        loaded = open_encoder(path, weights=weights)
        settings, _ = adopt_from(load_config(config, overrides), loaded)
        return cls(settings, checkpoint=loaded)

    def fit(
        self,
        train: str | Path,
        valid: str | Path | None = None,
        *,
        folder: str | Path | None = None,
        resume: bool = False,
        callbacks: Sequence[Callback] = (),
    ) -> "PretrainEngine":
        """Pretrain; afterwards this is the model that did best on the held-out clips.

        Args:
            train: Training clips, as ``data.train`` takes them: a folder or a manifest.
            valid: Held-out clips; a share of the training clips if None.
            folder: Run folder; that of the configuration if None.
            resume: Resume the run in the folder, if there is one.
            callbacks: Called between steps, see :class:`~ssast.engine.train.callbacks.Callback`.

        Raises:
            ConfigError: See :func:`pretrain`, also for the other errors.
            DataError: Wrong manifests.
            CheckpointError: The weights do not fit.
            TrainingError: Training diverged.
            KeyboardInterrupt: Training was stopped by a signal, after a checkpoint was saved.
        """
        self.config = with_data(self.config, train, valid, folder)
        with leaving_world():
            stopped = pretrain(self.config, self.checkpoint, resume=resume, callbacks=callbacks)
        if stopped:
            raise KeyboardInterrupt(f"stopped by signal {stopped}: fit(..., resume=True) goes on")
        self.trained = open_model(run_folder(self.config))
        return self

    def evaluate(self, source: str | Path) -> dict[str, float]:
        """Compute the losses on clips; before :meth:`fit`, those of the checkpoint.

        Args:
            source: See :func:`~ssast.engine.evaluation.pretext.pretext_losses`, also for the
                errors.

        Raises:
            ConfigError: There is no model yet.
        """
        return pretext_losses(self._model(), source)

    def save(self, folder: str | Path) -> Path:
        """Write the weights in float16 and their settings, for ``checkpoint``; return the folder.

        Raises:
            CheckpointError: The folder cannot be written.
            ConfigError: Nothing was pretrained yet.
        """
        if self.trained is None or not isinstance(self.trained.model, PretrainingModel):
            raise ConfigError("nothing is pretrained yet: call fit first")
        check_new([Path(folder)], [])
        model, config = self.trained.model, self.trained.config
        raw = open_raw(self.trained)
        given = (model, config, self.trained.step or 0, folder, torch.float16)
        return export_weights(*given, None if raw is None else raw.model)

    def _model(self) -> LoadedModel | str | Path:
        model = self.trained or self.checkpoint
        if model is None:
            raise ConfigError("there is no model yet: call fit first, or begin from a checkpoint")
        return model
