"""What a run depends on must be the same on all ranks, and when it is resumed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from finetune_runs import load, manifest, overrides, plain_file, pretrained_file
from runs import make_data, two_ranks, write_config
from runs import overrides as pretraining

from ssast.engine.config import Config, load_config
from ssast.engine.errors import ConfigError
from ssast.engine.finetune import finetune
from ssast.engine.pretrain import pretrain
from ssast.engine.train import inputs, state
from ssast.pipelines.clips.manifest import read_manifest, write_manifest

SHORT = {"finetune__epochs": 1, "train__log_every": 100}


def swapped(source: Path, out: Path) -> Path:
    """The same clips, with the labels of two classes swapped."""
    found = read_manifest(source)
    assert found.labels is not None
    other = {"pitch0": "pitch1", "pitch1": "pitch0"}
    labels = [[other.get(name, name) for name in clip] for clip in found.labels]
    write_manifest(out, found.paths, labels)
    return out


def class_table(path: Path, names: list[str]) -> Path:
    rows = [f"{k},{name},{name}" for k, name in enumerate(names)]
    path.write_text("\n".join(["index,mid,display_name", *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def run(splits: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """A finished run with every kind of file."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "clips.txt").write_text("1\n" * 24)
    (folder / "classes.txt").write_text("1\n1\n2\n")
    table = class_table(folder / "labels.csv", ["pitch0", "pitch1", "pitch2"])
    config = load(plain_file(folder), splits, folder / "run", **SHORT,
                  data__sample_weights=str(folder / "clips.txt"),
                  finetune__class_weights=str(folder / "classes.txt"),
                  finetune__labels=str(table),
                  finetune__checkpoint=str(pretrained_file(folder)))  # fmt: skip
    assert finetune(config) == 0
    return folder, config


def other_weights(config: Config, folder: Path) -> Config:
    (folder / "other.txt").write_text("1\n" * 23 + "2\n")
    return replace(config, data=replace(config.data, sample_weights=str(folder / "other.txt")))


def no_weights(config: Config, folder: Path) -> Config:
    return replace(config, data=replace(config.data, sample_weights=None))


def other_labels(config: Config, folder: Path) -> Config:
    train = swapped(Path(str(config.data.train)), folder / "swapped.json")
    return replace(config, data=replace(config.data, train=str(train)))


def other_order(config: Config, folder: Path) -> Config:
    table = class_table(folder / "other.csv", ["pitch1", "pitch0", "pitch2"])
    return replace(config, finetune=replace(config.finetune, labels=str(table)))


def other_validation(config: Config, folder: Path) -> Config:
    paths = list(read_manifest(str(config.data.valid)).paths)
    valid = manifest(folder / "valid.json", [Path(str(path)) for path in paths[:-1]])
    return replace(config, data=replace(config.data, valid=str(valid)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (other_weights, r"sampling weights \(data.sample_weights\) changed since"),
        (no_weights, r"sampling weights \(data.sample_weights\) changed since"),
        (other_labels, "labels of the training clips changed since"),
        (other_order, "order of the classes and labels of the training clips and .* changed since"),
        (other_validation, "validation clips and labels of the validation clips changed since"),
    ],
)
def test_resuming_refuses_other_inputs(
    change: Callable[[Config, Path], Config],
    expected: str,
    run: tuple[Path, Config],
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=f"{expected}.* choose another run.folder"):
        finetune(change(run[1], tmp_path), resume=True)


def test_resuming_refuses_changed_class_weights(run: tuple[Path, Config]) -> None:
    folder, config = run
    before = (folder / "classes.txt").read_text()
    (folder / "classes.txt").write_text("1\n2\n2\n")
    with pytest.raises(ConfigError, match=r"class weights \(finetune.class_weights\) changed"):
        finetune(config, resume=True)
    (folder / "classes.txt").write_text(before)


def test_what_is_not_trained_on_may_change(
    run: tuple[Path, Config],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other test clips, pretrained weights and versions: a warning."""
    _, config = run
    assert finetune(config, resume=True) == 0
    assert "warning" not in capsys.readouterr().out
    path = Path(str(config.finetune.checkpoint if config.finetune else None))
    loaded = torch.load(path)
    loaded["module.v.norm.bias"] += 1
    torch.save(loaded, tmp_path / "other.pth")
    settings = replace(config.finetune, test=None, checkpoint=str(tmp_path / "other.pth"))
    honest = inputs.versions
    monkeypatch.setattr(state, "versions", lambda: {**honest(), "torch": "9.9"})
    assert finetune(replace(config, finetune=settings), resume=True) == 0
    said = capsys.readouterr().out
    names = "pretrained weights, test clips, labels of the test clips"
    assert "warning: changed since the run began: " in said
    assert all(name in said for name in names.split(", "))
    assert f"torch ({torch.__version__}, now 9.9)" in said


def test_pretraining_is_not_resumed_with_other_validation_clips(tmp_path: Path) -> None:
    data, run = make_data(tmp_path), f"run.folder={tmp_path / 'run'}"
    config = load_config(write_config(tmp_path), [*pretraining(train__steps=2), *data, run])
    assert pretrain(config) == 0
    (tmp_path / "valid" / "000.flac").unlink()
    with pytest.raises(ConfigError, match="validation clips changed since"):
        pretrain(config, resume=True)


@pytest.mark.slow
def test_ranks_with_other_labels_are_refused(splits: dict[str, Path], tmp_path: Path) -> None:
    """Two machines whose manifests have one name, and opposite labels."""
    for rank, train in enumerate((splits["train"], swapped(splits["train"], tmp_path / "s.json"))):
        (tmp_path / f"machine{rank}").mkdir()
        (tmp_path / f"machine{rank}" / "train.json").write_text(train.read_text())
    common = ("finetune", plain_file(tmp_path), *overrides(**SHORT))
    common += (f"data.valid={splits['valid']}", "data.train=train.json")
    common += (f"run.folder={tmp_path / 'run'}",)
    folders = [tmp_path / f"machine{rank}" for rank in range(2)]
    for status, error in two_ranks(*common, folders=folders):
        assert status == 2 and len(error.splitlines()) == 1
        assert "the processes disagree: labels of the training clips is " in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ranks_with_other_validation_clips_are_refused(tmp_path: Path) -> None:
    """ZeRO 3 would hang in the validation, as ranks have different numbers of batches."""
    data = make_data(tmp_path)
    folders = [tmp_path / f"machine{rank}" for rank in range(2)]
    paths = [str(path) for path in read_manifest(tmp_path / "valid").paths]
    for count, folder in zip((3, 2), folders, strict=True):
        folder.mkdir()
        content = {"data": [{"wav": path} for path in paths[:count]]}
        (folder / "valid.json").write_text(json.dumps(content))
    settings = pretraining(train__zero_stage=3)
    common = ("pretrain", write_config(tmp_path), *settings, data[0], "data.valid=valid.json")
    for status, error in two_ranks(*common, f"run.folder={tmp_path / 'run'}", folders=folders):
        assert status == 2 and len(error.splitlines()) == 1
        assert "the processes disagree: validation clips is " in error
