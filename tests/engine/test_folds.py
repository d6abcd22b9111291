"""Cross-validation: a run for each fold, resumable, and one report."""

import json
import shutil
import signal
import statistics

import numpy as np
import pytest
from finetune_runs import (
    data_overrides,
    make_sounds,
    manifest,
    overrides,
    plain_file,
    pretrained_file,
)
from runs import call, lines, stop_at

from ssast.engine.cli.main import main
from ssast.engine.config import finetune_settings, load_config
from ssast.engine.data.splits import find_splits
from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.evaluation.report import read_predictions
from ssast.engine.finetune import finetune
from ssast.engine.folds import cross_validate, find_folds, fold_config, uses_folds, write_folds
from ssast.pipelines.clips.holdout import hold_out_clips
from ssast.pipelines.clips.manifest import read_manifest, write_manifest
from ssast.pipelines.errors import DataError

FOLDS = 3


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    """Three folds of sounds whose pitch tells the class, as `ssast data manifests` writes them."""
    folder = tmp_path_factory.mktemp("folds")
    parts = [make_sounds(folder / f"part{k}", 3, 4, seed=k) for k in range(FOLDS)]
    for k in range(FOLDS):
        others = [path for other, part in enumerate(parts) if other != k for path in part]
        manifest(folder / f"train_{k + 1}.json", others)
        manifest(folder / f"eval_{k + 1}.json", parts[k])
    table = "index,mid,display_name\n" + "".join(f'{i},pitch{i},"p"\n' for i in range(3))
    (folder / "labels.csv").write_text(table)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return pretrained_file(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, folds):
    """A recipe that knows its folds, so that the command line need not."""
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(f"finetune: {{folds: {folds}, fold_role: valid}}\n")
    return path


def command(recipe, run, checkpoint):
    given = [*overrides(finetune__epochs=2), f"run.folder={run}"]
    return ["finetune", recipe, *given, "--checkpoint", checkpoint]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, recipe, checkpoint):
    """Runs that were never interrupted."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    done = call(*command(recipe, run, checkpoint))
    assert done.returncode == 0, done.stderr
    return run


def test_the_report_is_of_all_folds(whole, folds):
    found = json.loads((whole / "metrics.json").read_text())
    each = [
        json.loads((whole / f"fold_{k}" / "valid" / "metrics.json").read_text()) for k in (1, 2, 3)
    ]
    accuracies = [values["accuracy"] for values in each]
    assert found["mean"]["accuracy"] == pytest.approx(statistics.mean(accuracies))
    assert found["std"]["accuracy"] == pytest.approx(statistics.stdev(accuracies))
    pairs = [
        pair
        for k in (1, 2, 3)
        for pair in read_predictions(whole / f"fold_{k}" / "valid" / "predictions.csv")
    ]
    assert len(pairs) == 12 * FOLDS
    right = sum(label == named for label, named in pairs)
    assert found["pooled"]["accuracy"] == pytest.approx(right / len(pairs))
    assert right / len(pairs) > 0.5  # chance: a third
    report = (whole / "report.md").read_text()
    assert "pretrained.pth, loss ce" in report
    assert ", 2 epochs each. Weights" in report
    assert "| mean | 36 of 36 |" in report and "| standard deviation |" in report
    assert (whole / "confusion.png").stat().st_size > 1000
    stored = load_config(whole / "fold_2" / "config.yaml")
    assert (stored.data.train, stored.data.valid) == (
        str(folds / "train_2.json"),
        str(folds / "eval_2.json"),
    )
    assert finetune_settings(stored).labels == str(folds / "labels.csv")


@pytest.mark.slow
def test_a_killed_cross_validation_goes_on(whole, recipe, checkpoint, tmp_path, capsys):
    """Killed in the second fold: the first is not repeated, and all ends as if uninterrupted."""
    run = tmp_path / "run"
    arguments = command(recipe, run, checkpoint)
    assert stop_at(4, signal.SIGKILL, run / "fold_2", *arguments) == -signal.SIGKILL
    first = (run / "fold_1" / "report.md").stat().st_mtime_ns
    assert not (run / "report.md").exists()
    assert main([str(a) for a in arguments]) == 2
    assert "fold_1 holds a run: add --resume" in capsys.readouterr().err
    # The checkpoint need not be named again, not even for the third fold.
    done = call(*arguments[:-2], "--resume")
    assert done.returncode == 0, done.stderr
    assert (run / "fold_1" / "report.md").stat().st_mtime_ns == first
    assert lines(run / "fold_2", "train") == lines(whole / "fold_2", "train")
    assert (run / "metrics.json").read_text() == (whole / "metrics.json").read_text()


def test_folds_that_have_all_begun_need_no_initial_checkpoint(whole, recipe, tmp_path, capsys):
    run, gone = tmp_path / "run", tmp_path / "gone.pth"
    shutil.copytree(whole, run)
    (run / "report.md").unlink()
    given = command(recipe, run, gone)[2:-2]
    for named in ([], [f"finetune.checkpoint={gone}"]):
        config = load_config(recipe, [*given, *named])
        assert cross_validate(config, None if named else gone, resume=True) == 0
        assert capsys.readouterr().out.count("not needed, as the run goes on from its own") == FOLDS
    assert (run / "report.md").is_file()
    shutil.rmtree(run / "fold_3")
    with pytest.raises(CheckpointError, match=r"gone\.pth"):
        cross_validate(load_config(recipe, given), gone, resume=True)


def test_a_fold_is_looked_at_once_or_chosen_on(recipe, folds):
    fold = find_folds(folds)[0]
    config = load_config(recipe, ["finetune.fold_role=test", "data.valid_share=0.25"])
    test = fold_config(config, fold)
    assert test.data.valid is None and finetune_settings(test).test == str(folds / "eval_1.json")
    assert test.run.folder == "runs/small/fold_1"
    chosen = fold_config(load_config(recipe), fold)
    assert chosen.data.valid == str(folds / "eval_1.json")
    assert finetune_settings(chosen).test is None


def test_the_validation_clips_of_a_fold_are_held_out_by_recording(recipe, folds):
    """Of its training clips, each class; the fold itself is left for the test."""
    config = load_config(recipe, ["finetune.fold_role=test", "data.valid_share=0.25"])
    for fold in find_folds(folds):
        splits = find_splits(fold_config(config, fold))
        manifest = read_manifest(fold.train)
        held = hold_out_clips(manifest.paths, 0.25, manifest.labels)
        assert splits.valid.paths == [manifest.paths[row] for row in np.flatnonzero(held)]
        assert splits.train.paths == [manifest.paths[row] for row in np.flatnonzero(~held)]
        assert splits.valid.counts().tolist() == [2, 2, 2]
        assert splits.test.paths == read_manifest(fold.evaluate).paths


def test_folds_or_a_single_run(recipe, folds, tmp_path):
    """What is named on the command line goes before what a recipe names."""
    single = tmp_path / "single.yaml"
    single.write_text("data: {train: a.json}\nfinetune: {}\n")
    for path, given, many in (
        (recipe, [], True),
        (recipe, ["data.train=a.json"], False),
        (single, [], False),
        (single, [f"finetune.folds={folds}"], True),
    ):
        assert uses_folds(load_config(path, given)) == many
    both = [f"finetune.folds={folds}", "data.train=a.json"]
    with pytest.raises(ConfigError, match=r"finetune\.folds and data\.train exclude each other"):
        uses_folds(load_config(single, both))


@pytest.mark.parametrize(("role", "key"), [("test", "finetune.test"), ("valid", "data.valid")])
def test_clips_that_the_folds_would_replace_are_refused(role, key, recipe, folds, tmp_path):
    given = [*overrides(), f"run.folder={tmp_path / 'run'}", f"finetune.fold_role={role}"]
    config = load_config(recipe, [*given, f"{key}={folds / 'eval_1.json'}"])
    with pytest.raises(ConfigError, match=rf"finetune.folds and {key} exclude each other"):
        cross_validate(config)


def test_from_scratch_all_layers_learn_alike(folds, tmp_path, capsys):
    """A recipe's layer decay is for pretrained layers; also in folds, and when they go on."""
    path = tmp_path / "decayed.yaml"
    path.write_text(f"finetune: {{folds: {folds}, layer_decay: 0.75}}\n")
    given = [*overrides(finetune__epochs=1), f"run.folder={tmp_path / 'run'}"]
    for resume in (False, True):
        assert cross_validate(load_config(path, given), resume=resume) == 0
        stored = [load_config(found) for found in tmp_path.glob("run/*/config.yaml")]
        assert [config.finetune.layer_decay for config in stored] == [1.0] * FOLDS
        line = "finetune.layer_decay 0.75 of decayed.yaml is left out: from scratch, "
        assert capsys.readouterr().out.count(line) == FOLDS


def test_the_configuration_of_a_run_repeats_its_layer_decay(splits, tmp_path):
    """Which a user had set, as a recipe's is left out from scratch."""
    given = [*data_overrides(splits), *overrides(finetune__epochs=1, finetune__layer_decay=0.6)]
    one, two = tmp_path / "one", tmp_path / "two"
    assert finetune(load_config(plain_file(tmp_path), [*given, f"run.folder={one}"])) == 0
    assert finetune(load_config(one / "config.yaml", [f"run.folder={two}"])) == 0
    assert load_config(two / "config.yaml").finetune.layer_decay == 0.6
    assert lines(one, "train") == lines(two, "train")


def test_the_published_recipes_have_five_folds():
    for name, role in (("esc50", "valid"), ("iemocap", "test")):
        for kind in ("patch", "frame"):
            settings = finetune_settings(load_config(f"{name}_{kind}"))
            assert (settings.folds, settings.fold_role) == (f"data/{name}", role)


@pytest.mark.parametrize("kind", ["patch", "frame"])
def test_keywords_are_drawn_as_published(kind):
    """S3PRL's sampler of Speech Commands 1 makes all classes equally frequent; SUPERB uses it."""
    assert finetune_settings(load_config(f"speechcommands_v1_{kind}")).balanced_sampling


def test_what_is_wrong_with_a_fold_is_said_before_the_first(folds, checkpoint, tmp_path):
    with pytest.raises(DataError, match=r"expected train_1\.json.*found no folds"):
        find_folds(tmp_path)
    for name in ("train_1", "eval_1", "train_2"):
        (tmp_path / f"{name}.json").write_text((folds / f"{name}.json").read_text())
    with pytest.raises(DataError, match=r"expected eval_2\.json, fold 2 has no such file"):
        find_folds(tmp_path)
    manifest(tmp_path / "eval_2.json", sorted((folds / "part1").glob("*.wav")), ["pich"] * 12)
    path = tmp_path / "small.yaml"
    path.write_text(f"finetune: {{folds: {tmp_path}}}\n")
    run = tmp_path / "run"
    config = load_config(path, [*overrides(), f"run.folder={run}", "data.valid_share=0.2"])
    with pytest.raises(DataError, match=r"eval_2\.json.*unknown label 'pich'.*did you mean"):
        cross_validate(config, checkpoint)
    assert not run.exists()
    with pytest.raises(ConfigError, match=r"finetune\.folds and run\.folder must both be set"):
        cross_validate(load_config("classifier"), checkpoint)


def test_clips_of_several_labels_have_a_report_of_all_folds(folds, checkpoint, tmp_path):
    copies = tmp_path / "folds"
    copies.mkdir()
    for name in (f"{kind}_{k}.json" for kind in ("train", "eval") for k in (1, 2, 3)):
        found = read_manifest(folds / name)
        labels = [[*own, "pitch2"] if own == ("pitch0",) else list(own) for own in found.labels]
        write_manifest(copies / name, found.paths, labels)
    given = overrides(finetune__epochs=1, finetune__loss="bce", finetune__folds=str(copies))
    config = load_config("classifier", [*given, "finetune.fold_role=valid",
                                        f"run.folder={tmp_path / 'run'}"])  # fmt: skip
    assert cross_validate(config, checkpoint) == 0
    found = json.loads((tmp_path / "run/metrics.json").read_text())
    assert found["mean"]["map"] > 0 and "pooled" not in found and len(found["folds"]) == FOLDS
    assert "3 folds" in (tmp_path / "run/report.md").read_text()


def test_the_report_has_the_epochs_that_were_trained(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run/fold_2/config.yaml"
    text = path.read_text()
    assert "validate_every: 3\n" in text
    path.write_text(text.replace("validate_every: 3\n", "validate_every: 6\n"))
    write_folds(tmp_path / "run", [1, 2, 3], "valid", "folds")
    assert ", 1 to 2 epochs each. Weights" in (tmp_path / "run/report.md").read_text()
