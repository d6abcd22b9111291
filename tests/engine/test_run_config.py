"""The configuration that lies in a run's folder, named from elsewhere."""

import shutil
from pathlib import Path

import finetune_runs
import pytest
from runs import call, lines, overrides

from ssast.engine.config import load_config
from ssast.engine.errors import ConfigError
from ssast.engine.pretrain import pretrain


@pytest.fixture(scope="module")
def begun(tmp_path_factory, config_file, data):
    """A folder with a run in runs/x, begun there with a relative run.folder and relative data."""
    folder = tmp_path_factory.mktemp("begun")
    for name, source in (given.split("=") for given in data):
        (folder / name.removeprefix("data.")).symlink_to(source)
    given = [*overrides(train__steps=4), "data.train=train", "data.valid=valid"]
    done = call("pretrain", config_file, *given, "run.folder=runs/x", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def place(begun, tmp_path, monkeypatch):
    """A copy of it, and beside it the working directory."""
    shutil.copytree(begun, tmp_path / "place", symlinks=True)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "place"


@pytest.mark.parametrize("absolute", [True, False])
def test_a_stored_configuration_resumes_the_run_that_it_lies_in(absolute, place, data):
    name = place / "runs/x/config.yaml" if absolute else Path("../place/runs/x/config.yaml")
    assert pretrain(load_config(name, ["train.steps=6", *data]), resume=True) == 0
    assert [line["step"] for line in lines(place / "runs/x", "train")] == list(range(1, 7))
    assert list(Path.cwd().iterdir()) == []


def test_without_resume_the_run_is_not_begun_again(place, data):
    with pytest.raises(ConfigError, match=r"runs/x holds a run \(step000000004\): add --resume"):
        pretrain(load_config(place / "runs/x/config.yaml", data))
    assert list(Path.cwd().iterdir()) == []


def test_a_run_that_was_moved_is_the_same_run(place, data):
    shutil.move(place / "runs/x", place / "moved")
    config = load_config(place / "moved/config.yaml", ["train.steps=5", *data])
    assert config.run.folder == str(place / "moved")
    assert pretrain(config, resume=True) == 0
    assert not (place / "runs/x").exists()


def test_from_where_it_began_nothing_changes(place, monkeypatch):
    monkeypatch.chdir(place)
    assert load_config("runs/x/config.yaml").run.folder == "runs/x"
    assert load_config("runs/x/config.yaml", ["run.folder=runs/y"]).run.folder == "runs/y"


def test_a_config_yaml_that_lies_in_no_run_is_a_plain_recipe(tmp_path):
    (tmp_path / "config.yaml").write_text("run: {folder: elsewhere}\n")
    assert load_config(tmp_path / "config.yaml").run.folder == "elsewhere"


def test_a_run_does_not_take_the_place_of_a_recipe(tmp_path, data, config_file):
    recipe = tmp_path / "exp/config.yaml"
    recipe.parent.mkdir()
    recipe.write_text(config_file.read_text() + "# mine\n")
    before = recipe.read_text()
    config = load_config(recipe, [*data, "train.steps=2", f"run.folder={recipe.parent}"])
    with pytest.raises(ConfigError, match=r"config\.yaml: no run has written this"):
        pretrain(config)
    assert recipe.read_text() == before


def test_home_is_understood_in_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "mine.yaml"
    path.write_text("data: {mix: {~/a: 3, /b: 1}}\n")
    config = load_config(path, ["run.folder=~/runs/x", "data.cache_folder=~/cache"])
    assert config.run.folder == f"{tmp_path}/runs/x"
    assert config.data.cache_folder == f"{tmp_path}/cache"
    assert config.data.mix == {f"{tmp_path}/a": 3, "/b": 1}
    assert load_config(path, ["run.folder=./~/x"]).run.folder == "./~/x"


def test_relative_data_is_missed_with_the_working_directory(place):
    config = load_config(place / "runs/x/config.yaml", ["train.steps=6"])
    with pytest.raises(ConfigError, match=f"data.train: train is not in .* {Path.cwd()}, which"):
        pretrain(config, resume=True)
    config = load_config(place / "runs/x/config.yaml", [f"data.train={place / 'train'}"])
    with pytest.raises(ConfigError, match=r"data\.valid: valid is not in the working dir"):
        pretrain(config, resume=True)


@pytest.mark.parametrize("key", ["labels", "test", "folds"])
def test_relative_tables_and_folds_are_missed_too(key, splits, checkpoint, tmp_path, monkeypatch):
    from ssast.engine.finetune import finetune
    from ssast.engine.folds import cross_validate

    (tmp_path / "plain.yaml").write_text("finetune: {}\n")
    given = [*finetune_runs.overrides(), f"run.folder={tmp_path / 'run'}"]
    if key != "folds":
        given.append(f"data.train={splits['train']}")
    config = load_config(tmp_path / "plain.yaml", [*given, f"finetune.{key}=nowhere"])
    train = cross_validate if key == "folds" else finetune
    with pytest.raises(ConfigError, match=f"finetune.{key}: nowhere is not in the working dir"):
        train(config, checkpoint)


def test_a_stored_fine_tuning_resumes_from_elsewhere(finetuned, tmp_path, monkeypatch, capsys):
    from ssast.engine.cli.main import main

    run = shutil.copytree(finetuned[0], tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    stored = load_config(run / "config.yaml")
    assert stored.run.folder == str(run)
    assert main(["finetune", str(run / "config.yaml"), "--resume"]) == 0
    assert f"resumed from {run}" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("given", [["train.batch_size=9", "train.accumulation_steps=2"], []])
def test_mistakes_are_told_before_the_data_is_read(given, place, data, monkeypatch):
    """A batch that cannot be divided, and a folder that holds a run."""
    monkeypatch.setattr("ssast.engine.pretrain.find_clips", lambda _: pytest.fail("data is read"))
    config = load_config(place / "runs/x/config.yaml", [*given, *data])
    with pytest.raises(ConfigError, match="cannot be divided" if given else "holds a run"):
        pretrain(config)
