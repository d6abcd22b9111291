"""Fine-tune a classifier, then evaluate it and predict with it.

engine = FinetuneEngine.from_checkpoint("SSAST-Base-Patch-400", num_classes=50)
engine.fit("train.json", "valid.json")
engine.evaluate("test.json")
engine.predict(["dog.wav"])
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ssast.engine.checkpoints.weights import Weights
from ssast.engine.config import (
    OVERRIDE,
    Config,
    check_paths,
    finetune_settings,
    load_config,
    with_data,
)
from ssast.engine.data.splits import find_splits
from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.evaluation.predict import Prediction, predict
from ssast.engine.evaluation.timeline import Timeline, timelines
from ssast.engine.formats.initial import adopt_from, begin_from, with_checkpoint
from ssast.engine.formats.open import (
    LoadedModel,
    MissingMetadata,
    as_classifier,
    open_classifier,
    open_model,
)
from ssast.engine.registry import METRICS
from ssast.engine.settings import Precision

if TYPE_CHECKING:  # imported only where there is training
    from ssast.engine.train.callbacks import Callback


def finetune(
    config: Config,
    checkpoint: LoadedModel | str | Path | None = None,
    *,
    resume: bool = False,
    num_classes: int | None = None,
    metadata: MissingMetadata | None = None,
    weights: Weights | None = None,
    callbacks: Sequence["Callback"] = (),
) -> int:
    """Fine-tune a classifier, or resume a run.

    Args:
        config: Configuration with a section ``finetune`` and a ``run.folder``.
        checkpoint: Model to begin from, or the path of one; overrides ``finetune.checkpoint``. With
            neither, a resumed run takes its own, and a new one is trained from scratch. It is
            pretrained, or fine-tuned already: then its head is left out.
        resume: Resume from the latest checkpoint in the run's folder, if there is one.
        num_classes: Expected number of classes; any if None.
        metadata: Frames and stride of a published fine-tuned checkpoint.
        weights: Which weights of a checkpoint with averaged ones; see
            :func:`~ssast.engine.formats.open.open_model`.
        callbacks: Called between steps, see :class:`~ssast.engine.train.callbacks.Callback`.

    Returns:
        0, or the number of the signal that stopped the run after it had saved a checkpoint.

    Raises:
        ConfigError: See :func:`~ssast.engine.train.run.run_training`.
        DataError: Wrong manifests or labels, splits that share clips, too many unreadable clips.
        CheckpointError: The pretrained weights do not fit, or a checkpoint cannot be written.
        TrainingError: Training diverged.
    """
    # Imported here: a FinetuneEngine that only predicts needs no training code.
    from ssast.engine.parallel.long_work import run_long
    from ssast.engine.parallel.ranks import expecting_peers, init_world
    from ssast.engine.train.finetuning import Finetuning, steps_of_epochs
    from ssast.engine.train.inputs import of_splits
    from ssast.engine.train.run import check_start, run_training
    from ssast.engine.train.statistics import with_measured_stats

    begun = check_start(config, resume=resume)
    METRICS.check(finetune_settings(config).metric)
    config, notes = without_recipe_data(with_checkpoint(config, checkpoint, resume))
    notes += without_effect(config)
    check_paths(config)
    pretrained, config, lines = begin_from(config, checkpoint, metadata, weights, begun=begun)
    notes += lines
    config, lines = without_layer_decay(config, begun=begun)
    notes += lines
    world = init_world(config.train.timeout_s)
    with expecting_peers(world):
        splits = find_splits(
            config, num_classes, partial(run_long, world=world, here=world.local_rank == 0)
        )
    notes += [splits.compared] if splits.compared else []
    config, lines = with_measured_stats(config, splits.train.paths, resume=resume)
    notes += lines
    settings = finetune_settings(config)
    each, steps = steps_of_epochs(config, len(splits.train))
    train = replace(
        config.train,
        steps=steps,
        validate_every=each,
        save_every=min(config.train.save_every, each),
    )
    config = replace(config, train=train)
    # How long to train, and what is looked at afterwards, may change on the way; and a checkpoint
    # may have moved.
    free = {"epochs", "patience", "average_last_epochs", "test", "allow_leakage", "labels"}
    free |= {"checkpoint", "folds", "fold_role"}
    fixed = [(s, k) for s in ("audio", "model") for k in vars(getattr(config, s))]
    fixed += [("finetune", key) for key in vars(settings) if key not in free]
    return run_training(
        config,
        lambda context: Finetuning(context, splits, pretrained, each),
        clips=splits.train.paths,
        inputs=of_splits(config, splits, pretrained.model if pretrained else None),
        fixed=[*fixed, ("train", "seed"), ("train", "batch_size")],  # which epochs are counted by
        resume=resume,
        notes=notes,
        callbacks=callbacks,
    )


def without_effect(config: Config) -> list[str]:
    """Return a line for the log on what the user set that is of pretraining alone."""
    given = [name for name, origin in (config.stated or {}).items() if origin == OVERRIDE]
    lengths = ("train.steps", "train.validate_every")
    unused = [name for name in given if name in lengths or name.startswith("objective.")]
    if not unused:
        return []
    said = "finetune.epochs says how long, and each ends with a validation"
    return [f"{', '.join(unused)}: of pretraining, not used; {said}"]


def without_layer_decay(config: Config, *, begun: bool) -> tuple[Config, list[str]]:
    """Let all layers learn alike from scratch, unless the user set ``finetune.layer_decay``.

    A run that was begun with the recipe's keeps it, and the ``config.yaml`` of a run repeats it.

    Returns:
        The configuration, and lines for the log.
    """
    settings = finetune_settings(config)
    origin = (config.stated or {}).get("finetune.layer_decay", OVERRIDE)
    set_by_user = origin in (OVERRIDE, "config.yaml")
    if settings.checkpoint is not None or set_by_user or settings.layer_decay == 1:
        return config, []
    stored = Path(config.run.folder or "") / "config.yaml"
    begun_with = load_config(stored).finetune if begun and stored.is_file() else None
    if begun_with is not None and begun_with.layer_decay == settings.layer_decay:
        return config, []
    line = f"finetune.layer_decay {settings.layer_decay:g} of {origin} is left out: from scratch, "
    line += "no layer has learned anything yet"
    return replace(config, finetune=replace(settings, layer_decay=1.0)), [line]


def without_recipe_data(config: Config) -> tuple[Config, list[str]]:
    """Leave out other clips of a recipe where the user gave ``data.train``.

    Its folds, and validation and test clips that are not there.

    Returns:
        The configuration, and lines for the log.
    """
    stated, notes = config.stated or {}, list[str]()
    if stated.get("data.train") != OVERRIDE:
        return config, notes
    for name in ("data.valid", "finetune.test", "finetune.folds"):
        section, _, key = name.partition(".")
        path, origin = getattr(getattr(config, section), key), stated.get(name, OVERRIDE)
        if path is None or origin == OVERRIDE:
            continue
        if name == "finetune.folds" or not Path(path).exists():
            changed = {section: replace(getattr(config, section), **{key: None})}
            config = replace(config, **changed)
            why = "data.train is given" if name == "finetune.folds" else "it is not there"
            notes.append(f"{name} {path} of {origin} is left out: {why}")
    return config, notes


class FinetuneEngine:
    """A classifier that is to be fine-tuned, or has been.

    Args:
        config: Configuration with a section ``finetune``.
        checkpoint: Model to begin from, or the path of one, see :func:`finetune`; that of the
            configuration if None, and if it names none either, the model is trained from scratch.
        trained: Classifier that is fine-tuned already.
        num_classes: Expected number of classes in training; any if None.
    """

    def __init__(
        self,
        config: Config,
        *,
        checkpoint: LoadedModel | str | Path | None = None,
        trained: LoadedModel | None = None,
        num_classes: int | None = None,
    ):
        finetune_settings(config)
        self.config, self.checkpoint = config, checkpoint
        self.trained, self.num_classes = trained, num_classes
        self._given = trained is not None

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        num_classes: int | None = None,
        config: str | Path = "classifier",
        overrides: Iterable[str] = (),
        *,
        metadata: MissingMetadata | None = None,
        weights: Weights | None = None,
    ) -> "FinetuneEngine":
        """Open a pretrained model to fine-tune, or a fine-tuned classifier.

        Args:
            path: Whatever :func:`~ssast.engine.formats.open.open_model` opens.
            num_classes: Expected number of classes; any if None.
            config: Configuration of the training: a YAML file, or the name of a recipe. What it
                does not set of the model and its input is the checkpoint's.
            overrides: Settings that override the file's, ``section.key=value``.
            metadata: What the published file of a fine-tuned classifier does not say.
            weights: See :func:`~ssast.engine.formats.open.open_model`.

        Raises:
            CheckpointError: There is no model, or a classifier has another number of classes.
            ConfigError: The configuration is wrong, or given with a fine-tuned classifier.
        """
        loaded, overrides = open_model(path, metadata, weights), list(overrides)
        if loaded.is_classifier:
            if overrides or config != "classifier":
                raise ConfigError(
                    f"{path}: is fine-tuned already, expected a pretrained model with config or "
                    "overrides, which are of a training"
                )
            trained = as_classifier(loaded)
            if num_classes not in (None, trained.num_classes):
                raise CheckpointError(
                    f"{path}: has {trained.num_classes} classes, expected {num_classes}"
                )
            return cls(trained.config, trained=trained)
        settings = load_config(config, overrides)
        finetune_settings(settings)  # before anything of it is compared
        settings, _ = adopt_from(settings, loaded)
        return cls(settings, checkpoint=loaded, num_classes=num_classes)

    def fit(
        self,
        train: str | Path,
        valid: str | Path | None = None,
        *,
        folder: str | Path | None = None,
        resume: bool = False,
        callbacks: Sequence["Callback"] = (),
    ) -> "FinetuneEngine":
        """Fine-tune; afterwards this is the classifier that did best on the held-out clips.

        Args:
            train: Manifest with labels.
            valid: Manifest of the held-out clips; a share of the training clips if None.
            folder: Run folder; that of the configuration if None.
            resume: Resume the run in the folder, if there is one.
            callbacks: Called between steps, see :class:`~ssast.engine.train.callbacks.Callback`.

        Raises:
            ConfigError: The classifier is fine-tuned already; or see :func:`finetune`, also for the
                other errors.
            DataError: Wrong manifests.
            CheckpointError: The weights do not fit.
            TrainingError: Training diverged.
            KeyboardInterrupt: Training was stopped by a signal, after a checkpoint was saved.
        """
        if self._given:
            raise ConfigError(
                "this classifier is trained: FinetuneEngine(config, checkpoint=...) trains its "
                "encoder on, with a new head"
            )
        from ssast.engine.parallel.ranks import leaving_world

        self.config = with_data(self.config, train, valid, folder)
        with leaving_world():
            stopped = finetune(
                self.config,
                self.checkpoint,
                resume=resume,
                num_classes=self.num_classes,
                callbacks=callbacks,
            )
        if stopped:
            raise KeyboardInterrupt(f"stopped by signal {stopped}: fit(..., resume=True) goes on")
        assert self.config.run.folder is not None
        self.trained = open_classifier(self.config.run.folder)
        return self

    def evaluate(
        self,
        manifest: str | Path,
        out: str | Path | None = None,
        *,
        precision: Precision = "fp32",
    ) -> dict[str, float]:
        """Compute the metrics on the clips of a manifest.

        Args:
            manifest: See :func:`~ssast.engine.evaluation.evaluate.evaluate`, also for the errors.
            out: See there.
            precision: See there.

        Raises:
            ConfigError: The classifier is not fine-tuned yet.
        """
        from ssast.engine.evaluation.evaluate import evaluate  # scikit-learn takes a second

        return evaluate(self._trained(), manifest, out, precision=precision)

    def predict(
        self,
        sources: str | Path | Sequence[str | Path],
        top: int = 5,
        *,
        precision: Precision = "fp32",
    ) -> list[Prediction]:
        """Predict the classes of files, of all files in folders, or of the clips of manifests.

        Args:
            sources: See :func:`~ssast.engine.evaluation.predict.predict`, also for the errors.
            top: See there.
            precision: See there.

        Raises:
            ConfigError: The classifier is not fine-tuned yet.
        """
        return predict(self._trained(), sources, top, precision=precision)

    def timelines(
        self,
        sources: str | Path | Sequence[str | Path],
        window_s: float | None = None,
        hop_s: float | None = None,
        *,
        precision: Precision = "fp32",
    ) -> Iterator[Timeline]:
        """Classify recordings of any length window by window.

        Args:
            sources: See :func:`~ssast.engine.evaluation.timeline.timelines`, also for the errors.
            window_s: See there.
            hop_s: See there.
            precision: See there.

        Raises:
            ConfigError: The classifier is not fine-tuned yet.
        """
        return timelines(self._trained(), sources, window_s, hop_s, precision=precision)

    def _trained(self) -> LoadedModel:
        if self.trained is None:
            raise ConfigError("this classifier is not trained yet: call fit first")
        return self.trained
