"""A trial takes the steps of training: the same clips, the same augmentations, the same losses."""

import finetune_runs
import pytest
from finetune_runs import AUGMENTED, data_overrides, make_splits
from runs import overrides

from ssast.engine.config import load_config
from ssast.engine.data import augment
from ssast.engine.finetune import finetune
from ssast.engine.planning.synthetic import NUM_CLASSES
from ssast.engine.planning.trial_process import WARM_UP, measure, trial_task
from ssast.engine.pretrain import pretrain
from ssast.engine.train.finetuning import Finetuning
from ssast.engine.train.pretraining import Pretraining
from ssast.kernels.matmul import fast_matmul

STEPS = 6
SAME_RATE = {"optim__schedule": "constant", "optim__warmup_steps": 0}


@pytest.fixture
def seen(monkeypatch):
    """What the training steps of both tasks do, in their order."""
    events = []

    def record(owner, name, describe):
        honest = getattr(owner, name)

        def call(*arguments, **named):
            result = honest(*arguments, **named)
            event = describe(result, *arguments, **named)
            if event is not None:
                events.append(event)
            return result

        monkeypatch.setattr(owner, name, call)

    def batch_of(result, task, batch, *, training):
        if training:
            others = batch.other_clips.tolist() if hasattr(batch, "other_clips") else None
            return "batch", batch.clip_ids.tolist(), batch.epochs.tolist(), others
        return None

    def loss_of(means, task, outputs, valid):
        return ("loss", means["loss"].item()) if task.module.training else None

    for task in (Pretraining, Finetuning):
        record(task, "inputs", batch_of)
        record(task, "means", loss_of)
    for name in ("mix", "mix_targets", "spec_augment", "add_noise", "roll"):
        record(augment, name, lambda result, *arguments, name=name: name)
    return events


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return make_splits(tmp_path_factory.mktemp("sounds"))


def trial_of(config, world, seen):
    """What the steps of a trial do."""
    seen.clear()
    with fast_matmul():
        trial = measure(trial_task(config, world, STEPS), 60.0, STEPS - WARM_UP)
    assert trial.outcome == "ok" and trial.step_s > 0
    return list(seen)


def load_finetune(folder, splits, **changed):
    path = folder / "tuned.yaml"
    path.write_text("finetune: {}")
    given = {**SAME_RATE, **AUGMENTED, "finetune__epochs": STEPS // 3, **changed}
    data = data_overrides(splits) if splits else []
    return load_config(path, [*finetune_runs.overrides(**given), *data, f"run.folder={folder}"])


@pytest.mark.parametrize(
    "changed",
    [
        {"finetune__class_weights": "balanced"},
        {
            "finetune__balanced_sampling": True,
            "finetune__loss": "bce",
            "train__accumulation_steps": 2,
        },
        {"finetune__mixup": 0.0, "data__random_crop": True},
    ],
    ids=["class weights", "balanced sampling", "no mixup"],
)
def test_a_trial_takes_the_steps_of_a_fine_tuning(changed, world, splits, tmp_path, seen):
    config = load_finetune(tmp_path, splits, **changed)
    assert finetune(config) == 0
    training = list(seen)
    micro_batches = STEPS * config.train.accumulation_steps
    kinds = [event if isinstance(event, str) else event[0] for event in training]
    assert kinds.count("batch") == kinds.count("roll") == kinds.count("loss") == micro_batches
    assert kinds.count("mix") == (micro_batches if config.finetune.mixup else 0)
    assert trial_of(config, world, seen) == training


@pytest.mark.parametrize(
    "changed", [{}, {"train__accumulation_steps": 2, "objective__two_pass": True}]
)
def test_a_trial_takes_the_steps_of_a_pretraining(
    changed, world, config_file, data, tmp_path, seen
):
    given = overrides(**SAME_RATE, train__steps=STEPS, **changed)
    config = load_config(config_file, [*given, *data, f"run.folder={tmp_path / 'run'}"])
    assert pretrain(config) == 0
    training = list(seen)
    assert len(training) == 2 * STEPS * config.train.accumulation_steps
    assert trial_of(config, world, seen) == training


def test_a_trial_on_noise_augments_as_well(world, tmp_path, seen):
    config = load_finetune(tmp_path, None, finetune__class_weights="balanced")
    events = trial_of(config, world, seen)
    batches = [event for event in events if event[0] == "batch"]
    assert [epochs[0] for _, _, epochs, _ in batches] == list(range(STEPS))
    assert all(0 <= other < NUM_CLASSES for *_, others in batches for other in others)
    for name in ("mix", "mix_targets", "spec_augment", "add_noise", "roll"):
        assert events.count(name) == STEPS
