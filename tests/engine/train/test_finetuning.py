"""The fine-tuning job: what it learns, every setting of it, and its batches."""

import json
import math
import random
from dataclasses import replace

import finetune_runs
import noise_runs
import pytest
import torch
from finetune_runs import load, make_sounds, manifest, overrides, plain_file
from runs import lines
from sounds import write_clips

from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.config import load_config
from ssast.engine.data.splits import find_splits
from ssast.engine.finetune import FinetuneEngine, finetune
from ssast.engine.formats.open import open_classifier, open_encoder
from ssast.engine.parallel.deepspeed_engine import TrainEngine
from ssast.engine.planning.synthetic import SyntheticContext, noise, synthetic_task
from ssast.engine.train.finetuning import Finetuning
from ssast.engine.train.step import train_step
from ssast.engine.train.task import RunContext


@pytest.mark.slow
def test_32_clips_are_learned_by_heart(checkpoint, tmp_path):
    labels = [f"label{random.Random(i).randint(0, 2)}" for i in range(32)]  # with no sense in them
    train = manifest(tmp_path / "train.json", write_clips(tmp_path, 32), labels)
    engine = FinetuneEngine.from_checkpoint(
        checkpoint,
        3,
        plain_file(tmp_path),
        overrides(
            finetune__epochs=160,
            finetune__allow_leakage=True,
            optim__schedule="constant",
            train__batch_size=16,
            train__log_every=100,
        ),
    )
    engine.fit(train, train, folder=tmp_path / "run")
    assert engine.evaluate(train)["accuracy"] == 1.0


@pytest.mark.slow
def test_shuffled_labels_are_not_learned(splits, checkpoint, tmp_path):
    paths = make_sounds(tmp_path / "sounds", 3, 8)
    labels = [f"pitch{i % 3}" for i in range(24)]  # as many of each in every class
    train = manifest(tmp_path / "train.json", paths, labels)
    results = {}
    for name, source in (("true", splits["train"]), ("shuffled", train)):
        config = load_config(
            plain_file(tmp_path),
            [*overrides(finetune__epochs=6, train__log_every=100), f"data.train={source}",
             f"data.valid={splits['valid']}", f"run.folder={tmp_path / name}"],
        )  # fmt: skip
        assert finetune(config, checkpoint) == 0
        # The last epoch: choosing the best one would itself learn from the held-out clips.
        results[name] = lines(tmp_path / name, "valid")[-1]["accuracy"]
    assert results["true"] == 1.0
    assert results["shuffled"] <= 0.67


@pytest.mark.parametrize(
    "changed",
    [
        {"finetune__loss": "bce", "finetune__label_smoothing": 0.1, "finetune__mixup": 1.0},
        {"finetune__freeze": "encoder", "finetune__stride": [10, 10], "finetune__roll": 0},
        {"finetune__layer_decay": 0.5, "finetune__head_lr_scale": 3.0, "finetune__pooling": "cls"},
        {
            "finetune__balanced_sampling": True,
            "audio__ignore_padding": True,
            "finetune__metric": "map",
        },
        {"optim__schedule": "multistep", "optim__name": "adam", "train__precision": "bf16"},
        {"train__zero_stage": 3, "train__accumulation_steps": 2, "finetune__patience": 1},
        {"finetune__class_weights": "balanced", "finetune__loss": "bce", "finetune__mixup": 0.5},
        {
            "finetune__drop_rows": 1,
            "finetune__drop_columns": 1,
            "audio__ignore_padding": True,
            "train__activation_checkpoint_every": 1,
        },
    ],
    ids=lambda c: "-".join(str(v) for v in c.values()),
)
def test_every_setting_trains(changed, recipe, splits, checkpoint, tmp_path):
    config = load(recipe, splits, tmp_path / "run", finetune__epochs=2, **changed)
    assert finetune(config, checkpoint) == 0
    assert len(lines(tmp_path / "run", "valid")) == 3
    trained = open_classifier(tmp_path / "run")
    if changed.get("finetune__freeze") == "encoder":
        for name, value in open_encoder(checkpoint).encoder.blocks.state_dict().items():
            assert torch.equal(trained.classifier.encoder.blocks.state_dict()[name], value)


@pytest.mark.parametrize("stride", [None, [10, 10]], ids=str)
@pytest.mark.parametrize("padded", [True, False])
def test_dropped_tokens_are_not_computed_and_evaluation_uses_all(world, stride, padded):
    config = noise_runs.configure(
        finetune=True, finetune__stride=stride, finetune__drop_tokens=0.3,
        finetune__drop_columns=1, audio__ignore_padding=padded,
    )  # fmt: skip
    batch_size = config.train.batch_size
    task = synthetic_task(SyntheticContext(config, world, fbank=noise(config, batch_size)))
    lengths = []
    task.encoder.blocks[-1].norm2.register_forward_hook(
        lambda module, args, output: lengths.append(output[0].shape[1])
    )
    with task.train_batches(0) as batches:
        first, second = next(batches), next(batches)
    (rows, columns), kept = config.grid, []
    for batch in (first, second, first):
        inputs, _ = task.inputs(batch, training=True)
        kept.append(inputs[3].ids)
        task.module(*inputs)
    assert torch.equal(kept[0], kept[2]) and not torch.equal(kept[0], kept[1])
    task.module(*task.inputs(first, training=False)[0])
    patches = config.finetune.kept_patches(rows, columns, columns)
    assert patches < rows * (columns - 1)
    assert lengths == [2 + patches] * 3 + [2 + rows * columns]
    assert config.num_tokens == 2 + patches


@pytest.mark.parametrize("ignored", [True, False])
def test_without_padding_the_time_mask_lies_in_the_clips_own_frames(ignored, world):
    alone = dict.fromkeys(finetune_runs.AUGMENTED, 0) | {"finetune__time_mask": 0.9}
    config = noise_runs.configure(finetune=True, audio__ignore_padding=ignored, **alone)
    fbank = noise(config, config.train.batch_size)
    task = synthetic_task(SyntheticContext(config, world, fbank=fbank))
    with task.train_batches(0) as batches:
        batch = next(batches)
    batch = replace(batch, num_frames=torch.full_like(batch.num_frames, 16))
    masked = task.inputs(batch, training=True)[0][0] != batch.fbank
    assert masked[:, :16].any() and masked[:, 16:].any() == (not ignored)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_learning_rates_of_layers(norm, world, splits, checkpoint, tmp_path):
    """Adam's first step moves every weight by the learning rate of its group."""
    config = load(plain_file(tmp_path), splits, tmp_path, finetune__layer_decay=0.5,
                  finetune__head_lr_scale=10.0, optim__name="adam", optim__eps=1e-12,
                  model__norm=norm)  # fmt: skip
    context = RunContext(config, world)
    pretrained = open_encoder(checkpoint) if norm == "pre" else None
    task = Finetuning(context, find_splits(config), pretrained, 3)
    before = {name: value.clone() for name, value in task.module.named_parameters()}
    engine = TrainEngine(task.module, task.optimizer(), world=world, batch_size=8)
    with task.train_batches(0) as batches:
        updated, _ = train_step(task, engine, batches, 1e-3)
    assert updated
    engine.close()
    for name, value in task.module.named_parameters():
        moved = (value - before[name]).abs().max().item()
        scale = 10.0 if name.startswith("head") else 1.0
        for part, rate in (("blocks.0", 0.5), ("encoder.embed", 0.25), ("mask_embed", 0.0)):
            scale = rate if part in name else scale
        assert moved == pytest.approx(1e-3 * scale, rel=0.05), name


def test_mixup_adds_the_clip_whose_label_it_adds(world, splits, checkpoint, tmp_path):
    """Also from the middle of the stream on, and never a clip that cannot be read."""
    bad = manifest(
        tmp_path / "bad.json", [*make_sounds(tmp_path / "s", 3, 2), tmp_path / "0_no.wav"]
    )
    config = load(plain_file(tmp_path), {**splits, "train": bad}, tmp_path, finetune__mixup=1.0,
                  data__max_rejected=0.9)  # fmt: skip
    context = RunContext(config, world)
    task = Finetuning(context, find_splits(config), open_encoder(checkpoint), 1)
    with context.stream(task.splits.train.paths, None, epochs=1) as batches:
        every = next(batches)
    with task.train_batches(8) as batches:
        for _ in range(2):
            batch = next(batches)
            assert torch.equal(batch.other_fbank, every.fbank[batch.other_clips])
            (fbank, targets, _), valid = task.inputs(batch, training=True)
            changed = (fbank != batch.fbank).flatten(1).any(1)
            assert torch.equal(changed, batch.other_valid & valid)
            same = targets.amax(1) == 1
            twins = task.splits.train.targets().argmax(1)
            equal = torch.from_numpy(twins[batch.clip_ids] == twins[batch.other_clips])
            assert torch.equal(same, equal | ~batch.other_valid)
            assert targets.sum(1).tolist() == pytest.approx([1.0] * 8)


def test_mixup_adds_random_crops_as_well(world, splits, checkpoint, tmp_path):
    changed = {"finetune__mixup": 1.0, "audio__num_frames": 16, "data__random_crop": True}
    config = load(plain_file(tmp_path), splits, tmp_path, **changed)
    context = RunContext(config, world)
    task = Finetuning(context, find_splits(config), None, 1)
    with context.stream(task.splits.train.paths, None, epochs=1) as stream:
        beginnings = torch.cat([batch.fbank for batch in stream])
    with task.train_batches(0) as batches, task.train_batches(8) as later:
        first, second = next(batches), next(batches)
        assert torch.equal(next(later).other_fbank, second.other_fbank)  # as after a stop
    for fbank, rows in ((first.fbank, first.clip_ids), (first.other_fbank, first.other_clips)):
        moved = (fbank != beginnings[rows]).flatten(1).any(1)
        assert moved.sum() >= len(rows) - 1


def test_weights_of_a_shorter_run_are_not_averaged(recipe, splits, tmp_path):
    """The last two of four epochs are not those of two: their weights are left out."""
    settings = {"finetune__average_last_epochs": 2, "finetune__checkpoint": None}
    run = tmp_path / "run"
    for epochs, resume in ((2, False), (4, True)):
        config = load(recipe, splits, run, finetune__epochs=epochs, **settings)
        assert finetune(config, resume=resume) == 0
        found = Checkpoints(run / "checkpoints").latest()
        assert json.loads((found / "meta.json").read_text())["num_averaged"] == 2


def test_early_stopping(splits, checkpoint, tmp_path):
    config = load(plain_file(tmp_path), splits, tmp_path / "run", finetune__patience=2,
                  finetune__epochs=30, optim__lr=0.0)  # fmt: skip
    assert finetune(config, checkpoint) == 0
    steps = [line["step"] for line in lines(tmp_path / "run", "valid")]
    assert steps == [0, 3, 6, 9]
    assert finetune(config, checkpoint, resume=True) == 0
    assert [line["step"] for line in lines(tmp_path / "run", "valid")] == steps


def test_of_equal_metrics_the_lower_loss_is_better(world, splits, checkpoint, tmp_path):
    config = load(plain_file(tmp_path), splits, tmp_path / "run")
    task = Finetuning(RunContext(config, world), find_splits(config), open_encoder(checkpoint), 3)
    ranked = [(0.75, 0.3), (0.75, 0.4), (0.75, math.inf), (0.75 - 1e-7, 0.0), (0.5, 0.1)]
    values = [task.criterion({"accuracy": metric, "loss": loss}) for metric, loss in ranked]
    assert values == sorted(values) and len(set(values)) == len(values)
