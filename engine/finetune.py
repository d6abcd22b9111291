"""Fine-tuning, and what a fine-tuned classifier is for: evaluation and prediction.

engine = FinetuneEngine.from_checkpoint("SSAST-Base-Patch-400.pth", num_classes=50)
engine.fit("train.json", "valid.json")
engine.evaluate("test.json")
engine.predict(["dog.wav"])
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ssast.engine.checkpoints.classifier import Trained, check_fits, load_classifier, with_model_of
from ssast.engine.config import Config, finetune_settings, load_config
from ssast.engine.data.clips import fbank_spec
from ssast.engine.data.labels import read_labelled
from ssast.engine.data.splits import find_splits
from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.evaluation.metrics import classification_metrics, likeliest, probabilities
from ssast.engine.evaluation.predict import Prediction, find_files, score_clips
from ssast.engine.evaluation.timeline import Timeline, Windows, timeline
from ssast.engine.formats.open import Unsaid, is_classifier, load_initial, open_classifier
from ssast.engine.train.finetuning import Finetuning, steps_of_epochs
from ssast.engine.train.run import run_training
from ssast.engine.train.task import run_folder
from ssast.pipelines.errors import DataError


def finetune(
    config: Config,
    checkpoint: str | Path | None = None,
    *,
    resume: bool = False,
    num_classes: int | None = None,
) -> int:
    """Train a classifier, or go on with it.

    Args:
        config: Everything about it; with a section ``finetune`` and a ``run.folder``.
        checkpoint: Goes before ``finetune.checkpoint``: a published file, a pretraining run's
            folder, or one of its checkpoints. Without either, of a run that goes on its own; and
            else the model is trained from scratch.
        resume: Go on from the latest checkpoint in the run's folder, if there is one.
        num_classes: How many classes are expected; any number if None.

    Returns:
        0, or the number of the signal that stopped the run after it had saved a checkpoint.

    Raises:
        ConfigError: See :func:`~ssast.engine.train.run.run_training`.
        DataError: Wrong manifests or labels, splits that share clips, too many unreadable clips.
        CheckpointError: The pretrained weights do not fit, or a checkpoint cannot be written.
        TrainingError: Training diverged.
    """
    run_folder(config)  # must be set, before anything is read
    config = _with_checkpoint(config, checkpoint, resume)
    settings = finetune_settings(config)
    pretrained = None
    if settings.checkpoint is not None:
        pretrained, pretrained_config = load_initial(settings.checkpoint)
        check_fits(config, pretrained_config, settings.checkpoint)
    splits = find_splits(config, num_classes)
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
        fixed=[*fixed, ("train", "seed")],
        resume=resume,
    )


def _with_checkpoint(config: Config, checkpoint: str | Path | None, resume: bool) -> Config:
    """The configuration with where its weights are from."""
    settings = finetune_settings(config)
    name = settings.checkpoint if checkpoint is None else str(checkpoint)
    if name is None and resume:
        name = begun_from(Path(config.run.folder or ""))
    return replace(config, finetune=replace(settings, checkpoint=name))


def begun_from(run: Path) -> str | None:
    """The checkpoint that a run began from; None if from scratch, or if there is no run."""
    stored = run / "config.yaml"
    settings = load_config(stored).finetune if stored.is_file() else None
    return None if settings is None else settings.checkpoint


class FinetuneEngine:
    """A classifier: to be trained, or trained.

    Args:
        config: With a section ``finetune``.
        checkpoint: Pretrained weights to begin from; those of the configuration if None, and if it
            names none either, the model is trained from scratch.
        trained: A classifier that is trained already.
        num_classes: How many classes are expected in training; any number if None.
    """

    def __init__(
        self,
        config: Config,
        *,
        checkpoint: str | Path | None = None,
        trained: Trained | None = None,
        num_classes: int | None = None,
    ):
        finetune_settings(config)
        self.config, self.checkpoint = config, checkpoint
        self.trained, self.num_classes = trained, num_classes
        self._given = trained is not None
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        num_classes: int | None = None,
        config: str | Path = "classifier",
        overrides: Iterable[str] = (),
        *,
        unsaid: Unsaid | None = None,
        labels: str | Path | None = None,
    ) -> "FinetuneEngine":
        """A classifier to be trained from pretrained weights, or a trained one.

        Args:
            path: A published file, the folder of a run, one of its checkpoints, or a folder of
                transformers.
            num_classes: How many classes are expected; any number if None.
            config: Of the training: a YAML file, or the name of a recipe. The model is that of the
                checkpoint all the same.
            overrides: Settings that go before the file's, ``section.key=value``.
            unsaid: What the published file of a trained classifier does not say.
            labels: A CSV of the classes of a trained classifier that does not name them.

        Raises:
            CheckpointError: There is no checkpoint, or a trained classifier has another number of
                classes.
            ConfigError: The configuration is wrong.
        """
        path = Path(path)
        if is_classifier(path):
            trained = open_classifier(path, unsaid, labels)
            if num_classes not in (None, len(trained.classes)):
                raise CheckpointError(
                    f"{path}: has {len(trained.classes)} classes, expected {num_classes}"
                )
            return cls(trained.config, trained=trained)
        pretrained = load_initial(path)[1]
        model = pretrained.model
        depth = "null" if model.depth is None else model.depth
        fitting = [
            f"model={{size: {model.size}, patch: {list(model.patch)}, depth: {depth}}}",
            f"audio.n_mels={pretrained.audio.n_mels}",
        ]
        settings = load_config(config, [*fitting, *overrides])
        return cls(with_model_of(settings, pretrained), checkpoint=path, num_classes=num_classes)

    def fit(
        self,
        train: str | Path,
        valid: str | Path | None = None,
        *,
        folder: str | Path | None = None,
        resume: bool = False,
    ) -> "FinetuneEngine":
        """Train; afterwards this engine is the classifier that did best on the held-out clips.

        Args:
            train: A manifest with labels.
            valid: The held-out clips; a share of the training clips if None.
            folder: Of the run; that of the configuration if None.
            resume: Go on with a run that is there.

        Raises:
            ConfigError: This is a trained classifier; or see :func:`finetune`, also for the others.
            DataError: Wrong manifests.
            CheckpointError: The weights do not fit.
            TrainingError: Training diverged.
            KeyboardInterrupt: Training was stopped by a signal, after a checkpoint was saved.
        """
        if self._given:
            raise ConfigError("this classifier is trained: begin from a pretrained checkpoint")
        data = replace(
            self.config.data, train=str(train), valid=None if valid is None else str(valid)
        )
        run = self.config.run if folder is None else replace(self.config.run, folder=str(folder))
        self.config = replace(self.config, data=data, run=run)
        stopped = finetune(
            self.config, self.checkpoint, resume=resume, num_classes=self.num_classes
        )
        if stopped:
            raise KeyboardInterrupt(f"stopped by signal {stopped}: fit(..., resume=True) goes on")
        assert run.folder is not None
        self.trained = load_classifier(run.folder)
        return self

    def evaluate(self, manifest: str | Path, out: Path | None = None) -> dict[str, float]:
        """Metrics on the clips of a manifest.

        Args:
            manifest: With labels.
            out: A folder for predictions and pictures; none are written if None.

        Raises:
            ConfigError: The classifier is not trained.
            DataError: The manifest is wrong, or has labels that were not learned.
        """
        trained = self._trained()
        loss = finetune_settings(trained.config).loss
        clips = read_labelled(str(manifest), trained.classes, one_label=loss == "ce")
        logits, reasons = score_clips(trained, clips.paths, self.device)
        read = np.array([row not in reasons for row in range(len(clips))])
        if not read.any():
            raise DataError(f"{manifest}: none of its {len(clips)} clips can be read")
        values = classification_metrics(logits[read], clips.targets()[read])
        if out is not None:
            from ssast.engine.evaluation.report import write_split

            write_split(out, clips, logits, read, values, loss)
        return values

    def predict(self, sources: Sequence[str | Path], top: int = 5) -> list[Prediction]:
        """The likeliest classes of files, of all files in folders, or of the clips of manifests.

        They are given the names that people know them by. Of a file that is longer than the model's
        input, the beginning counts.

        Raises:
            ConfigError: The classifier is not trained.
            DataError: A folder or a manifest is wrong.
        """
        trained = self._trained()
        paths = find_files(sources)
        logits, reasons = score_clips(trained, paths, self.device)
        scores = probabilities(logits, finetune_settings(trained.config).loss)
        return [
            Prediction(str(path), (), reasons[row])
            if row in reasons
            else Prediction(str(path), tuple(likeliest(scores[row], trained.names, top)))
            for row, path in enumerate(paths)
        ]

    def timelines(
        self,
        sources: Sequence[str | Path],
        window_s: float | None = None,
        hop_s: float | None = None,
    ) -> Iterator[Timeline]:
        """What is heard when in recordings of any length, one after the other.

        Args:
            sources: As for :meth:`predict`.
            window_s: Length of a window in seconds, that of the model's input if None.
            hop_s: From one window to the next, half a window if None.

        Raises:
            ConfigError: The classifier is not trained, or the windows are too long or have gaps.
            DataError: A folder or a manifest is wrong.
        """
        trained = self._trained()
        cutting = Windows.of(fbank_spec(trained.config.audio), window_s, hop_s)
        paths = find_files(sources)
        return (timeline(trained, path, cutting, self.device) for path in paths)

    def _trained(self) -> Trained:
        if self.trained is None:
            raise ConfigError("this classifier is not trained yet: call fit first")
        return self.trained
