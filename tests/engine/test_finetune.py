import csv
import json
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from finetune_runs import (
    data_overrides,
    make_sounds,
    make_splits,
    manifest,
    overrides,
    pretrained_file,
)
from golden_model import golden, pretraining_case
from runs import call, environment, lines, stop_at
from sounds import write_clips

from ssast.engine.checkpoints.classifier import (
    CHOSEN,
    build_classifier,
    fill_encoder,
    load_classifier,
)
from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.cli.main import main
from ssast.engine.config import from_plain, load_config
from ssast.engine.data.labels import LabelledClips, class_names, class_weights
from ssast.engine.data.splits import find_splits
from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.evaluation import predict
from ssast.engine.evaluation.predict import find_files
from ssast.engine.finetune import FinetuneEngine, finetune
from ssast.engine.formats.open import load_initial
from ssast.engine.model.classifier import LossClassifier
from ssast.engine.parallel.deepspeed_engine import TrainEngine
from ssast.engine.train.finetuning import Finetuning
from ssast.engine.train.job import Workplace
from ssast.pipelines.errors import DataError


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return make_splits(tmp_path_factory.mktemp("sounds"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return pretrained_file(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text("finetune: {mixup: 0.5, freq_mask: 4, time_mask: 6, noise: 0.1, roll: 3}\n")
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, splits, checkpoint, config_file):
    """A run that was never interrupted, from the command line."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    done = call(*command(run, splits, checkpoint, config_file))
    assert done.returncode == 0, done.stderr
    return run, done


def command(run, splits, checkpoint, config_file, **changed):
    settings = {"finetune__average_last_epochs": 2, "train__save_every": 2} | changed
    given = [*overrides(**settings), *data_overrides(splits), f"run.folder={run}"]
    return ["finetune", config_file, *given, "--checkpoint", checkpoint]


def load(config_file, splits, run, **changed):
    given = [*overrides(**changed), *data_overrides(splits), f"run.folder={run}"]
    return load_config(config_file, given)


def chosen_weights(run):
    return Checkpoints.load(Checkpoints(run / CHOSEN).latest())


def test_a_run_leaves_what_it_should(whole):
    run, done = whole
    assert done.stderr == ""
    assert "24 training and 9 held-out clips of 3 classes" in done.stdout
    assert [line["step"] for line in lines(run, "train")] == list(range(1, 10))
    valid = lines(run, "valid")
    assert [line["step"] for line in valid] == [0, 3, 6, 9]
    assert {"accuracy", "map", "mauc", "dprime", "macro_f1", "loss"} <= set(valid[-1])
    assert "| test | 9 |" in (run / "report.md").read_text()
    for split in ("valid", "test"):
        names = {path.name for path in (run / split).iterdir()}
        assert names == {"metrics.json", "predictions.csv", "confusion.png", "classes.png"}
    with (run / "test" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 and {row["labels"] for row in rows} == {"pitch0", "pitch1", "pitch2"}
    values = json.loads((run / "test" / "metrics.json").read_text())
    right = sum(row["class1"] == row["labels"] for row in rows)
    assert values["accuracy"] == pytest.approx(right / 9)


def test_the_kept_weights_are_the_best_on_the_held_out_clips(whole):
    tensors, meta = chosen_weights(whole[0])
    accuracies = [line["accuracy"] for line in lines(whole[0], "valid")]
    kept = meta["values"]["valid"]["accuracy"]
    assert kept >= max(accuracies)
    if meta["chosen"].startswith("step"):
        best, _ = Checkpoints.load(Checkpoints(whole[0] / "checkpoints").best())
        assert all(torch.equal(best[name], value) for name, value in tensors.items())


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(whole, splits, checkpoint, config_file, tmp_path):
    run = tmp_path / "killed"
    arguments = command(run, splits, checkpoint, config_file)
    step = random.randint(2, 8)
    status = stop_at(step, signal.SIGKILL, run, *arguments)
    assert status == -signal.SIGKILL, f"killed at step {step}"
    done = call(*arguments, "--resume")
    assert done.returncode == 0, done.stderr
    for split in ("train", "valid"):
        assert lines(run, split) == lines(whole[0], split), f"killed at step {step}"
    (ours, meta), (theirs, other) = chosen_weights(run), chosen_weights(whole[0])
    assert meta["chosen"] == other["chosen"] and meta["values"] == other["values"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_two_ranks_train_as_one(whole, splits, checkpoint, config_file, tmp_path):
    run = tmp_path / "two"
    arguments = command(run, splits, checkpoint, config_file)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", "-m", "ssast.engine.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for split in ("train", "valid"):
        for ours, theirs in zip(lines(run, split), lines(whole[0], split), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert chosen_weights(run)[1]["classes"] == ["pitch0", "pitch1", "pitch2"]
    assert (run / "test" / "confusion.png").is_file()


def test_a_finished_run_is_left_alone(whole, splits, checkpoint, config_file):
    report = whole[0] / "report.md"
    before = report.stat().st_mtime_ns
    done = call(*command(whole[0], splits, checkpoint, config_file), "--resume")
    assert done.returncode == 0, done.stderr
    assert report.stat().st_mtime_ns == before


@pytest.mark.parametrize("kind", ["patch", "frame"])
def test_the_published_classifier_comes_out(kind):
    """Pretrained weights in another grid, a head: the published logits."""
    for case in golden(kind)["finetune"]:
        pretrained, _, _ = pretraining_case(kind, torch.float64)
        plain = {
            "model": {"size": "tiny", "depth": 2, "patch": list(pretrained.encoder.embed.patch)},
            "audio": {"num_frames": case["input_tdim"], "mean": 0.0, "std": 0.5},
        }
        for pooling in ("avgtok", "cls"):
            stride = [case["fstride"], case["tstride"]]
            config = from_plain({**plain, "finetune": {"stride": stride, "pooling": pooling}})
            classifier = build_classifier(config, case["label_dim"]).double()
            fill_encoder(classifier.encoder, pretrained.encoder)
            head = {name: value.double() for name, value in case["mlp_head"].items()}
            classifier.head.load_state_dict(head)
            logits, want = classifier(case["input"].double()), case[f"ft_{pooling}"]
            exact = 1e-8 if config.grid == (1, 150) else 1e-10
            assert (logits - want).abs().max() < exact * want.abs().max()


def plain_file(tmp_path):
    path = tmp_path / "plain.yaml"
    path.write_text("finetune: {}\n")
    return path


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
    ],
    ids=lambda c: "-".join(str(v) for v in c.values()),
)
def test_every_setting_trains(changed, config_file, splits, checkpoint, tmp_path):
    config = load(config_file, splits, tmp_path / "run", finetune__epochs=2, **changed)
    assert finetune(config, checkpoint) == 0
    assert len(lines(tmp_path / "run", "valid")) == 3
    trained = load_classifier(tmp_path / "run")
    if changed.get("finetune__freeze") == "encoder":
        for name, value in load_initial(checkpoint)[0].blocks.state_dict().items():
            assert torch.equal(trained.classifier.encoder.blocks.state_dict()[name], value)


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_class_weights_are_factors_in_the_loss(loss):
    """Of the terms of the classes that a clip has, in training alone."""
    torch.manual_seed(0)
    config = from_plain(
        {"model": {"size": "tiny", "depth": 1}, "audio": {"num_frames": 32}, "finetune": {}}
    )
    model = build_classifier(config, 3, LossClassifier)
    model.loss = loss
    fbank, targets = torch.randn(4, 32, 128), torch.eye(3)[[0, 1, 2, 1]]
    weights = torch.tensor([0.5, 2.0, 0.0])
    plain = model(fbank, targets)
    model.class_weights = weights
    weighted = model(fbank, targets)
    logits = plain["logits"]
    if loss == "ce":
        want = -(weights * targets * logits.log_softmax(1)).sum(1)
    else:
        terms = (
            weights * targets * logits.sigmoid().log() + (1 - targets) * (-logits).sigmoid().log()
        )
        want = -terms.mean(1)
    torch.testing.assert_close(weighted["loss"], want)
    assert model.eval()(fbank, targets)["loss"].equal(plain["loss"])
    assert "class_weights" not in model.state_dict()


def test_balanced_class_weights():
    labels = manifest_of(["a", "b", "b", "b"])
    assert class_weights("balanced", labels).tolist() == pytest.approx([2.0, 2 / 3])
    assert class_weights("none", labels) is None


def manifest_of(names):
    classes = tuple(sorted(set(names)))
    numbers = np.array([classes.index(name) for name in names])
    paths = [f"{i}.wav" for i in range(len(names))]
    return LabelledClips(paths, classes, numbers, np.arange(len(names) + 1), "here")


def test_training_from_scratch(splits, tmp_path):
    """Without a checkpoint; the configuration says so, and a run from one remembers its own."""
    engine = FinetuneEngine(load(plain_file(tmp_path), splits, tmp_path / "run"))
    with pytest.raises(ConfigError, match="not trained yet"):
        engine.predict(["a.wav"])
    engine.fit(splits["train"], splits["valid"])
    assert engine.evaluate(splits["test"])["accuracy"] > 0.5
    assert "from scratch" in (tmp_path / "run" / "report.md").read_text()
    assert load_config(tmp_path / "run" / "config.yaml").finetune.checkpoint is None


def test_people_read_names_not_labels(splits, tmp_path):
    """Where there is a table of classes that tells them apart."""
    table = tmp_path / "labels.csv"
    head, rows = "index,mid,display_name\n", [f'{i},pitch{i},"Pitch, {i}"\n' for i in range(3)]
    table.write_text(head + "".join(rows))
    config = load(plain_file(tmp_path), splits, tmp_path / "run", finetune__epochs=1,
                  finetune__labels=str(table))  # fmt: skip
    assert finetune(config) == 0
    trained = load_classifier(tmp_path / "run")
    assert trained.classes == ("pitch0", "pitch1", "pitch2")
    clip = splits["test"].parent / "test" / "0_0.wav"
    (found,) = FinetuneEngine(config, trained=trained).predict([clip])
    assert {name for name, _ in found.classes} == {"Pitch, 0", "Pitch, 1", "Pitch, 2"}
    table.write_text(head + "".join(f"{i},pitch{i},same\n" for i in range(3)))
    assert class_names(trained.classes, table) == trained.classes


def test_a_run_remembers_its_checkpoint(whole, checkpoint, config_file, splits):
    """Also where it goes on without being told again."""
    assert load_config(whole[0] / "config.yaml").finetune.checkpoint == str(checkpoint)
    config = load(
        config_file, splits, whole[0], finetune__average_last_epochs=2, train__save_every=2
    )
    assert finetune(config, resume=True) == 0
    assert load_config(whole[0] / "config.yaml").finetune.checkpoint == str(checkpoint)


def test_learning_rates_of_layers(world, splits, checkpoint, tmp_path):
    """Adam's first step moves every weight by the learning rate of its group."""
    config = load(plain_file(tmp_path), splits, tmp_path, finetune__layer_decay=0.5,
                  finetune__head_lr_scale=10.0, optim__name="adam", optim__eps=1e-12)  # fmt: skip
    place = Workplace(config, world, 8)
    job = Finetuning(place, find_splits(config), load_initial(checkpoint)[0], 3)
    before = {name: value.clone() for name, value in job.module.named_parameters()}
    engine = TrainEngine(job.module, job.optimizer(), world=world, batch_size=8)
    with job.train_batches(0) as batches:
        arguments, valid = job.arguments(next(batches), training=True)
    engine.backward(job.means(engine(*arguments), valid)["loss"])
    assert engine.step(1e-3)
    engine.close()
    for name, value in job.module.named_parameters():
        moved = (value - before[name]).abs().max().item()
        scale = 10.0 if name.startswith("head") else 1.0
        for part, rate in (("blocks.0", 0.5), ("embed.", 0.25), ("mask_embed", 0.0)):
            scale = rate if part in name else scale
        assert moved == pytest.approx(1e-3 * scale, rel=0.05), name


def test_mixup_adds_the_clip_whose_label_it_adds(world, splits, checkpoint, tmp_path):
    """Also from the middle of the stream on, and never a clip that cannot be read."""
    bad = manifest(
        tmp_path / "bad.json", [*make_sounds(tmp_path / "s", 3, 2), tmp_path / "0_no.wav"]
    )
    config = load(plain_file(tmp_path), {**splits, "train": bad}, tmp_path, finetune__mixup=1.0,
                  data__max_rejected=0.9)  # fmt: skip
    place = Workplace(config, world, 8)
    job = Finetuning(place, find_splits(config), load_initial(checkpoint)[0], 1)
    with place.stream(job.splits.train.paths, None, epochs=1) as batches:
        every = next(batches)
    with job.train_batches(8) as batches:
        for _ in range(2):
            batch = next(batches)
            assert torch.equal(batch.other_fbank, every.fbank[batch.other_clips])
            (fbank, targets, _), valid = job.arguments(batch, training=True)
            changed = (fbank != batch.fbank).flatten(1).any(1)
            assert torch.equal(changed, batch.other_valid & valid)
            same = targets.amax(1) == 1
            twins = job.splits.train.targets().argmax(1)
            equal = torch.from_numpy(twins[batch.clip_ids] == twins[batch.other_clips])
            assert torch.equal(same, equal | ~batch.other_valid)
            assert targets.sum(1).tolist() == pytest.approx([1.0] * 8)


def test_early_stopping(splits, checkpoint, tmp_path):
    config = load(plain_file(tmp_path), splits, tmp_path / "run", finetune__patience=2,
                  finetune__epochs=30, optim__lr=0.0)  # fmt: skip
    assert finetune(config, checkpoint) == 0
    steps = [line["step"] for line in lines(tmp_path / "run", "valid")]
    assert steps == [0, 3, 6, 9]
    assert finetune(config, checkpoint, resume=True) == 0
    assert [line["step"] for line in lines(tmp_path / "run", "valid")] == steps


def test_predict_and_evaluate_from_the_command_line(whole, splits, capsys):
    folder = splits["test"].parent / "test"
    bad = folder / "9_bad.wav"
    bad.write_text("no audio")
    assert main(["predict", str(whole[0]), str(folder), "--json"]) == 0
    bad.unlink()
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 10
    assert found[-1]["classes"] == [] and found[-1]["reason"]
    for line in found[:-1]:
        assert sum(p for _, p in line["classes"]) == pytest.approx(1.0)
    assert main(["evaluate", str(whole[0]), str(splits["test"])]) == 0
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines())
    want = json.loads((whole[0] / "test" / "metrics.json").read_text())
    assert float(shown["accuracy"]) == pytest.approx(want["accuracy"], abs=1e-4)
    right = sum(line["classes"][0][0][-1] == line["path"].rpartition("/")[2][0]
                for line in found[:-1])  # fmt: skip
    assert want["accuracy"] == pytest.approx(right / 9)


def test_what_predict_is_given(splits, tmp_path):
    folder = splits["test"].parent / "test"
    clips = sorted(map(str, folder.glob("*.wav")))
    assert find_files([folder]) == find_files([f"file://{folder}"]) == clips
    assert find_files([splits["test"]]) == clips
    assert find_files([clips[1], "none.wav"]) == [clips[1], "none.wav"]
    with pytest.raises(DataError, match="no files: expected audio files"):
        find_files([])


@pytest.mark.parametrize("bad", [[0], [0, 1], [2, 3, 4], [0, 1, 2, 3, 4], [4]])
def test_bad_files_stop_no_prediction(bad, whole, splits, tmp_path, monkeypatch):
    """However many there are, and wherever; two at a time."""
    monkeypatch.setattr(predict, "BATCH", 2)
    engine = FinetuneEngine.from_checkpoint(whole[0])
    good = sorted((splits["test"].parent / "test").glob("*.wav"))[:5]
    want = engine.predict(good)
    paths = [tmp_path / f"{i}.wav" if i in bad else path for i, path in enumerate(good)]
    for i in bad[1:]:
        paths[i].touch()
    for i, found in enumerate(engine.predict(paths)):
        assert (found.reason is not None) == (i in bad) == (not found.classes)
        if i not in bad:
            assert dict(found.classes) == pytest.approx(dict(want[i].classes), abs=1e-6)
    if len(bad) == 5:
        clips = manifest(tmp_path / "bad.json", paths, ["pitch0"] * 5)
        with pytest.raises(DataError, match=r"bad\.json: none of its 5 clips can be read"):
            engine.evaluate(clips)


def test_a_trained_classifier_is_loaded_by_the_engine(whole, splits):
    engine = FinetuneEngine.from_checkpoint(whole[0], num_classes=3)
    (found,) = engine.predict([splits["test"].parent / "test" / "0_0.wav"], top=1)
    assert len(found.classes) == 1 and found.reason is None
    with pytest.raises(CheckpointError, match="has 3 classes, expected 50"):
        FinetuneEngine.from_checkpoint(whole[0], num_classes=50)
    with pytest.raises(ConfigError, match="this classifier is trained"):
        engine.fit(splits["train"])


def test_mistakes_are_found_before_any_work(splits, checkpoint, config_file, tmp_path):
    paths = make_sounds(tmp_path / "sounds", 3, 2)
    unknown = manifest(tmp_path / "unknown.json", paths, ["pitch0", "pitch1", "pich2"] * 2)
    several = manifest(tmp_path / "several.json", paths, ["pitch0,pitch1", *["pitch2"] * 5])
    one = manifest(tmp_path / "one.json", paths, ["same"] * 6)
    table = tmp_path / "labels.csv"
    table.write_text("index,mid,display_name\n" + "".join(f"{i},pitch{i},p{i}\n" for i in range(4)))
    same = manifest(tmp_path / "same.json", paths, ["pitch0"] * 6)
    two = tmp_path / "two.txt"
    two.write_text("1.0\n2.0\n")
    twice = manifest(tmp_path / "twice.json", [*paths, paths[2]])
    (tmp_path / "0_empty.wav").touch()
    gone = [tmp_path / "0_empty.wav", tmp_path / "1_gone.wav"]
    empty = manifest(tmp_path / "empty.json", [*paths, *gone])
    cases = [
        ({"data__valid": str(same)}, DataError, "the held-out clips are of one class"),
        ({"data__valid": str(unknown)}, DataError, "unknown label 'pich2'.*did you mean pitch2"),
        ({"data__train": str(several)}, DataError, "has 2 labels .*set finetune.loss=bce"),
        ({"data__train": str(one)}, DataError, "expected two classes or more, found 1"),
        ({"data__train": str(tmp_path / "sounds")}, DataError, "has no labels"),
        ({"data__train": None}, ConfigError, "data.train is not set"),
        ({"finetune__labels": str(table)}, DataError, r"1 of 4 classes have no training.*pitch3"),
        ({"data__valid": str(splits["train"])}, DataError, "24 clips of data.train .*also in"),
        ({"model__size": "small"}, CheckpointError, "has model.size 'tiny'.*set model.size=tiny"),
        ({"model__patch": [32, 2]}, CheckpointError, r"set model.patch=\[16,16\]"),
        ({"finetune__time_mask": 50}, ConfigError, "must be at most audio.n_mels 32"),
        ({"train__accumulation_steps": 3}, ConfigError, "train.batch_size 8 cannot be divided"),
        ({"finetune__class_weights": "balaced"}, DataError, "balaced: expected none, balanced or"),
        ({"finetune__class_weights": str(two)}, DataError, "2 numbers for 3 classes"),
        ({"finetune__class_weights": str(table)}, DataError, "expected a number a line"),
        (
            {"finetune__class_weights": "balanced", "finetune__balanced_sampling": True},
            ConfigError,
            "make up for rare classes twice",
        ),
        ({"data__train": str(twice)}, DataError, r"entry 6: .*1_0\.wav is listed already"),
        (
            {"data__valid": str(empty)},
            DataError,
            r"data.valid .*: 2 of 8 clips are missing",
        ),
    ]
    for changed, error, message in cases:
        run = tmp_path / "run"
        given = [*data_overrides(splits), *overrides(**changed), f"run.folder={run}"]
        with pytest.raises(error, match=message) as caught:
            finetune(load_config(config_file, given), checkpoint)
        assert "\n" not in str(caught.value)
        assert not run.exists(), message
    with pytest.raises(ConfigError, match=r"num_classes is 50, but .* has 3 classes"):
        finetune(load(config_file, splits, tmp_path / "run"), checkpoint, num_classes=50)
    with pytest.raises(ConfigError, match="no section finetune"):
        few = ["objective.num_masked=2"]
        FinetuneEngine.from_checkpoint(checkpoint, config="tiny_patch", overrides=few)


def test_resuming_refuses_another_training(whole, splits, checkpoint, config_file):
    config = load(config_file, splits, whole[0], finetune__mixup=0.1)
    with pytest.raises(ConfigError, match=r"finetune.mixup was 0.5 when .* began, now it is 0.1"):
        finetune(config, checkpoint, resume=True)


def test_a_copy_of_a_clip_is_a_leak(splits, checkpoint, config_file, tmp_path):
    copy = tmp_path / "0_copy.wav"
    copy.write_bytes((splits["train"].parent / "train" / "1_0.wav").read_bytes())
    others = sorted((splits["valid"].parent / "valid").glob("*.wav"))
    valid = manifest(tmp_path / "valid.json", [*others, copy])
    changed = {**splits, "valid": valid}
    with pytest.raises(DataError, match=r"1 clips of data.train .*1_0.wav and .*0_copy.wav"):
        finetune(load(config_file, changed, tmp_path / "run"), checkpoint)
    allowed = load(config_file, changed, tmp_path / "run", finetune__epochs=1,
                   finetune__allow_leakage=True)  # fmt: skip
    assert finetune(allowed, checkpoint) == 0


def test_the_command_line_names_mistakes(capsys, checkpoint, tmp_path):
    assert main(["finetune", "esc50_pach", "--checkpoint", str(checkpoint)]) == 2
    assert "did you mean esc50_patch?" in capsys.readouterr().err
    assert main(["finetune", "classifier", "--checkpoint", str(tmp_path / "no.pth")]) == 2
    assert "no.pth" in capsys.readouterr().err
    assert main(["predict", str(tmp_path / "none"), "a.wav"]) == 2
    assert "expected the folder of a fine-tuning run, found nothing" in capsys.readouterr().err
    assert main(["pretrain", "esc50_patch", "data.train=x"]) == 2
    assert "use ssast finetune" in capsys.readouterr().err
