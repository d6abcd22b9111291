"""Fine-tuning from end to end: runs, their resumption, and the mistakes that end one early."""

import csv
import json
import random
import signal

import devices
import pytest
import torch
from finetune_runs import (
    command,
    data_overrides,
    load,
    make_sounds,
    manifest,
    overrides,
    plain_file,
)
from runs import call, call_on_two_ranks, lines, stop_at

from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.checkpoints.weights import CHOSEN
from ssast.engine.cli.main import main
from ssast.engine.config import load_config
from ssast.engine.data.labels import class_names
from ssast.engine.errors import CheckpointError, ConfigError, ReportError
from ssast.engine.finetune import FinetuneEngine, finetune
from ssast.engine.formats.open import open_classifier
from ssast.pipelines.clips.manifest import write_manifest
from ssast.pipelines.errors import DataError


def chosen_weights(run):
    return Checkpoints.load(Checkpoints(run / CHOSEN).latest())


def test_a_run_leaves_what_it_should(finetuned):
    run, done = finetuned
    assert done.stderr == ""
    assert "24 training and 9 held-out clips of 3 classes" in done.stdout
    assert [line["step"] for line in lines(run, "train")] == list(range(1, 10))
    valid = lines(run, "valid")
    assert [line["step"] for line in valid] == [0, 3, 6, 9]
    assert {"accuracy", "map", "mauc", "dprime", "macro_f1", "loss"} <= set(valid[-1])
    assert "| test | 9 of 9 |" in (run / "report.md").read_text()
    for split in ("valid", "test"):
        names = {path.name for path in (run / split).iterdir()}
        written = {"metrics.json", "predictions.csv", "confusion.png", "classes.png"}
        assert names == written | ({"clips.json"} if split == "test" else set())
    with (run / "test" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 and {row["labels"] for row in rows} == {"pitch0", "pitch1", "pitch2"}
    values = json.loads((run / "test" / "metrics.json").read_text())
    right = sum(row["class1"] == row["labels"] for row in rows)
    assert values["accuracy"] == pytest.approx(right / 9)


def test_the_kept_weights_are_the_best_on_the_held_out_clips(device, finetuned):
    tensors, meta = chosen_weights(finetuned[0])
    accuracies = [line["accuracy"] for line in lines(finetuned[0], "valid")]
    kept = meta["values"]["valid"]["accuracy"]
    assert kept >= max(accuracies)
    if meta["chosen"].startswith("step"):
        best, _ = Checkpoints.load(Checkpoints(finetuned[0] / "checkpoints").best())
        assert all(torch.equal(best[name], value) for name, value in tensors.items())


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(device, finetuned, splits, checkpoint, recipe, tmp_path):
    run = tmp_path / "killed"
    arguments = command(run, splits, checkpoint, recipe)
    step = random.randint(2, 8)
    status = stop_at(step, signal.SIGKILL, run, *arguments)
    assert status == -signal.SIGKILL, f"killed at step {step}"
    done = call(*arguments, "--resume")
    assert done.returncode == 0, done.stderr
    for split in ("train", "valid"):
        found, expected = lines(run, split), lines(finetuned[0], split)
        assert devices.same(found, expected), f"killed at step {step}"
    (ours, meta), (theirs, other) = chosen_weights(run), chosen_weights(finetuned[0])
    assert meta["chosen"] == other["chosen"] and devices.same(meta["values"], other["values"])
    assert devices.same(ours, theirs)


@pytest.mark.slow
def test_two_ranks_train_as_one(finetuned, splits, checkpoint, recipe, tmp_path):
    run = tmp_path / "two"
    arguments = command(run, splits, checkpoint, recipe)
    done = call_on_two_ranks(*arguments)
    assert done.returncode == 0, done.stderr
    for split in ("train", "valid"):
        for ours, theirs in zip(lines(run, split), lines(finetuned[0], split), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert chosen_weights(run)[1]["classes"] == ["pitch0", "pitch1", "pitch2"]
    assert (run / "test" / "confusion.png").is_file()


def test_a_finished_run_is_left_alone(finetuned, splits, checkpoint, recipe):
    report = finetuned[0] / "report.md"
    before = report.stat().st_mtime_ns
    done = call(*command(finetuned[0], splits, checkpoint, recipe), "--resume")
    assert done.returncode == 0, done.stderr
    assert report.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("ssast.engine.evaluation.report.save_figure", ValueError("cannot draw $\n^")),
        ("ssast.engine.train.finetuning.write_split", OSError(28, "No space left on device")),
        ("ssast.engine.train.finetuning.write_report", OSError(28, "No space left on device")),
    ],
)
def test_a_report_that_fails_leaves_a_finished_classifier(
    function, error, splits, tmp_path, monkeypatch
):
    """And the resumed run writes it."""
    run = tmp_path / "run"
    config = load(plain_file(tmp_path), splits, run, finetune__epochs=1)

    def fail(*arguments):
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(function, fail)
        with pytest.raises(
            ReportError, match=r"the classifier is finished, in .*run; --resume"
        ) as e:
            finetune(config)
    assert "\n" not in str(e.value)
    assert not (run / "report.md").exists()
    before, meta = chosen_weights(run)
    assert open_classifier(run).classes == ("pitch0", "pitch1", "pitch2")
    trained = lines(run, "train")
    assert finetune(config, resume=True) == 0
    assert lines(run, "train") == trained
    assert "| test | 9 of 9 |" in (run / "report.md").read_text()
    found = json.loads((run / "valid" / "metrics.json").read_text())
    assert {name: found[name] for name in meta["values"]["valid"]} == meta["values"]["valid"]
    again, _ = chosen_weights(run)
    assert all(torch.equal(again[name], value) for name, value in before.items())
    assert (run / "test" / "predictions.csv").is_file()


def test_curves_that_fail_change_no_status(splits, tmp_path, monkeypatch, caplog):
    def fail(run):
        raise ValueError("no font")

    monkeypatch.setattr("ssast.engine.train.run.draw_curves", fail)
    config = load(plain_file(tmp_path), splits, tmp_path / "run", finetune__epochs=1)
    assert finetune(config) == 0
    assert "no font; ssast visualize" in caplog.text


def test_test_clips_that_cannot_be_read_are_counted(splits, tmp_path, capsys):
    """Too many of them are an error, which costs no classifier."""
    run, paths = tmp_path / "run", sorted((splits["test"].parent / "test").glob("*.wav"))
    (tmp_path / "0_bad.wav").write_text("no audio")
    (tmp_path / "1_bad.wav").write_text("no audio either")
    bad = [tmp_path / "0_bad.wav", tmp_path / "1_bad.wav"]
    test = manifest(tmp_path / "test.json", [*paths, *bad])
    given = {**splits, "test": test}
    config = load(plain_file(tmp_path), given, run, finetune__epochs=1)
    message = r"test: 2 of the first 11 clips cannot be used .*0_bad.wav.*; the classifier is fin"
    with pytest.raises(DataError, match=message):
        finetune(config)
    assert main(["evaluate", str(run), str(test)]) == 2
    assert "2 of 11 clips cannot be read" in capsys.readouterr().err
    lenient = load(plain_file(tmp_path), given, run, finetune__epochs=1, data__max_rejected=0.2)
    assert finetune(lenient, resume=True) == 0
    assert "test (step 3), 9 of 11 clips: " in capsys.readouterr().out
    assert "| test | 9 of 11 |" in (run / "report.md").read_text()
    values = json.loads((run / "test" / "metrics.json").read_text())
    assert (values["num_scored"], values["num_clips"]) == (9, 11)
    assert main(["evaluate", str(run), str(test), "--max-rejected", "0.2"]) == 0
    assert "clips     9 of 11\n" in capsys.readouterr().out
    assert main(["evaluate", str(run), str(test), "--probe", "--max-rejected", "0.1"]) == 2
    assert "test.json: 2 of 11 clips cannot be read" in capsys.readouterr().err
    assert main(["evaluate", str(run), str(test), "--probe", "--max-rejected", "0.2"]) == 0
    assert "9 of 11" in capsys.readouterr().out


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
    trained = open_classifier(tmp_path / "run")
    assert trained.classes == ("pitch0", "pitch1", "pitch2")
    clip = splits["test"].parent / "test" / "0_0.wav"
    (found,) = FinetuneEngine(config, trained=trained).predict([clip])
    assert {name for name, _ in found.classes} == {"Pitch, 0", "Pitch, 1", "Pitch, 2"}
    table.write_text(head + "".join(f"{i},pitch{i},same\n" for i in range(3)))
    assert class_names(trained.classes, table) == trained.classes


def test_a_run_remembers_its_checkpoint(finetuned, checkpoint, recipe, splits):
    """Also where it goes on without being told again."""
    assert load_config(finetuned[0] / "config.yaml").finetune.checkpoint == str(checkpoint)
    config = load(
        recipe, splits, finetuned[0], finetune__average_last_epochs=2, train__save_every=2
    )
    assert finetune(config, resume=True) == 0
    assert load_config(finetuned[0] / "config.yaml").finetune.checkpoint == str(checkpoint)


def test_a_trained_classifier_is_loaded_by_the_engine(finetuned, splits):
    engine = FinetuneEngine.from_checkpoint(finetuned[0], num_classes=3)
    (found,) = engine.predict([splits["test"].parent / "test" / "0_0.wav"], top=1)
    assert len(found.classes) == 1 and found.reason is None
    with pytest.raises(CheckpointError, match="has 3 classes, expected 50"):
        FinetuneEngine.from_checkpoint(finetuned[0], num_classes=50)
    with pytest.raises(ConfigError, match="this classifier is trained"):
        engine.fit(splits["train"])


def test_mistakes_are_found_before_any_work(splits, checkpoint, recipe, tmp_path):
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
        ({"data__valid": str(same)}, DataError, "held-out clips are all of one class"),
        ({"data__valid": str(unknown)}, DataError, "unknown label 'pich2'.*did you mean pitch2"),
        ({"data__train": str(several)}, DataError, "has 2 labels .*set finetune.loss=bce"),
        ({"data__train": str(one)}, DataError, "expected two classes or more, found 1"),
        ({"data__train": str(tmp_path / "sounds")}, DataError, "has no labels"),
        ({"data__train": None}, ConfigError, "data.train is not set"),
        ({"data__valid": str(splits["train"])}, DataError, "24 recordings of data.train .*also in"),
        ({"model__size": "small"}, CheckpointError, "has model.size 'tiny'.*set model.size=tiny"),
        ({"model__patch": [32, 2]}, CheckpointError, r"set model.patch=\[16,16\]"),
        ({"finetune__time_mask": 50}, ConfigError, "must be at most audio.n_mels 32"),
        ({"finetune__drop_rows": 2}, ConfigError, "of the 2 x 3 patches: at most 1, got 2"),
        ({"finetune__drop_columns": 3}, ConfigError, "finetune.drop_columns must leave some of"),
        ({"finetune__drop_tokens": 1.0}, ConfigError, "finetune.drop_tokens must be .*0.99"),
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
            finetune(load_config(recipe, given), checkpoint)
        assert "\n" not in str(caught.value)
        assert not run.exists(), message
    with pytest.raises(ConfigError, match=r"num_classes is 50, but .* has 3 classes"):
        finetune(load(recipe, splits, tmp_path / "run"), checkpoint, num_classes=50)
    with pytest.raises(ConfigError, match="no section finetune"):
        few = ["objective.num_masked=2"]
        FinetuneEngine.from_checkpoint(checkpoint, config="tiny_patch", overrides=few)


@pytest.mark.parametrize("key", ["data.train", "data.valid", "finetune.test"])
def test_no_run_is_written_into_the_data(key, splits, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "link").symlink_to(data)
    given = [*overrides(), *data_overrides(splits), f"{key}={data}", f"run.folder={tmp_path}/link"]
    with pytest.raises(ConfigError, match=f"run.folder .*link is {key} too"):
        finetune(load_config(plain_file(tmp_path), given))
    assert not list(data.iterdir())


def test_resuming_refuses_another_training(finetuned, splits, checkpoint, recipe):
    config = load(recipe, splits, finetuned[0], finetune__mixup=0.1)
    with pytest.raises(ConfigError, match=r"finetune.mixup was 0.5 when .* began, now it is 0.1"):
        finetune(config, checkpoint, resume=True)


def test_the_command_line_names_mistakes(capsys, checkpoint, tmp_path):
    assert main(["finetune", "esc50_pach", "--checkpoint", str(checkpoint)]) == 2
    assert "did you mean esc50_patch?" in capsys.readouterr().err
    assert main(["finetune", "classifier", "--checkpoint", str(tmp_path / "no.pth")]) == 2
    assert "no.pth" in capsys.readouterr().err
    assert main(["predict", str(tmp_path / "none"), "a.wav"]) == 2
    assert "expected a run, a checkpoint or a model, found nothing" in capsys.readouterr().err
    assert main(["pretrain", "esc50_patch", "data.train=x"]) == 2
    assert "use ssast finetune" in capsys.readouterr().err


def test_tagging_with_background_and_a_class_without_clips(splits, checkpoint, recipe, tmp_path):
    """Clips without a label are trained on, and the official order of the classes is kept."""
    parts = {}
    for split in ("train", "valid", "test"):
        paths = sorted((splits[split].parent / split).glob("*.wav"))
        labels = [[] if p.name[0] == "2" else ["pitch1", "pitch0"][int(p.name[0]) :] for p in paths]
        parts[split] = tmp_path / f"{split}.json"
        write_manifest(parts[split], paths, labels)
    table = tmp_path / "labels.csv"
    rows = "".join(f"{i},{mid},{i}\n" for i, mid in enumerate(("pitch1", "gone", "pitch0")))
    table.write_text("index,mid,display_name\n" + rows, "utf-16")
    changed = {"finetune__loss": "bce", "finetune__balanced_sampling": True, "finetune__epochs": 1}
    config = load(recipe, parts, tmp_path / "run", finetune__labels=str(table), **changed)
    assert finetune(config, checkpoint) == 0
    assert open_classifier(tmp_path / "run").classes == ("pitch1", "gone", "pitch0")
    with (tmp_path / "run/test/predictions.csv").open() as file:
        found = {row["labels"] for row in csv.DictReader(file)}
    assert found == {"", "pitch0", '["pitch1", "pitch0"]'}
    values = json.loads((tmp_path / "run/test/metrics.json").read_text())
    assert {"map", "mauc", "macro_f1"} <= values.keys() and "accuracy" not in values
