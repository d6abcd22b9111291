"""Validations of some of the held-out clips: always the same, and the others stay held out."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from finetune_runs import load, make_sounds, manifest, plain_file
from runs import lines, make_data, overrides, write_config

from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.checkpoints.weights import CHOSEN
from ssast.engine.config import Config, load_config
from ssast.engine.data.clips import draw_valid, find_clips
from ssast.engine.data.splits import find_splits
from ssast.engine.errors import ConfigError
from ssast.engine.finetune import finetune
from ssast.engine.pretrain import pretrain
from ssast.engine.train import run
from ssast.engine.train.pretraining import Pretraining
from ssast.pipelines.clips.manifest import read_manifest
from ssast.pipelines.errors import DataError


@pytest.fixture
def pretraining(tmp_path: Path) -> Callable[..., Config]:
    """A configuration of a run of its own, which validates on 3 of the 8 of 20 clips held out."""
    data = make_data(tmp_path, num_train=20)[:1]
    bounds = {"data__valid_share": 0.4, "data__valid_clips": 3, "train__validate_every": 2}

    def configured(name: str, **changed: object) -> Config:
        settings = overrides(**bounds | {"train__steps": 4} | changed)
        path = f"run.folder={tmp_path / name}"
        return load_config(write_config(tmp_path), [*settings, *data, path])

    return configured


def test_every_validation_is_of_the_same_clips(
    pretraining: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before and after a resumption; training never reads the other held-out clips."""
    honest, read = Pretraining.inputs, {True: set[str](), False: list[list[str]]()}

    def inputs(self, batch, *, training):  # type: ignore[no-untyped-def]
        paths = self.train_paths if training else self.valid_paths
        names = [str(paths[row]) for row in batch.clip_ids[batch.valid].tolist()]
        read[training].update(names) if training else read[training].append(names)  # type: ignore[union-attr]
        return honest(self, batch, training=training)

    monkeypatch.setattr(Pretraining, "inputs", inputs)
    assert pretrain(pretraining("whole", train__steps=12)) == 0
    assert "12 training clips, validating on 3 of 8 held-out clips" in capsys.readouterr().out
    assert pretrain(pretraining("parts")) == 0
    assert pretrain(pretraining("parts", train__steps=12), resume=True) == 0
    folder = pretraining("whole").run.folder
    for split in ("train", "valid"):
        found = [lines(Path(str(folder)).with_name(name), split) for name in ("whole", "parts")]
        assert found[0] == found[1]
    first, *others = read[False]
    assert len(first) == 3 and len(others) > 10 and all(names == first for names in others)
    train, held_out = find_clips(pretraining("whole"))
    assert set(map(str, train)) == read[True] and set(first) < set(map(str, held_out))
    other_seed = pretraining("whole", train__seed=5)
    assert list(map(str, draw_valid(other_seed, held_out))) == first
    with pytest.raises(ConfigError, match=r"draw of validation clips \(data.valid_clips\) changed"):
        pretrain(pretraining("whole", data__valid_clips=4), resume=True)


def test_a_bound_above_the_number_of_clips_is_none(pretraining: Callable[..., Config]) -> None:
    config = pretraining("whole", data__valid_clips=9)
    held_out = find_clips(config)[1]
    assert draw_valid(config, held_out) is held_out


@pytest.mark.parametrize("bound", [None, 5])
def test_a_long_validation_is_warned_of(
    bound: int | None,
    pretraining: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of 8 clips, where 4 are trained on between two."""
    monkeypatch.setattr(run, "FEW_CLIPS", 5)
    config = pretraining("run", data__valid_clips=bound, train__validate_every=1, train__steps=1)
    assert pretrain(config) == 0
    warning = "a validation reads 8 clips, and training 4 from one to the next: data.valid_clips=5"
    assert (warning in capsys.readouterr().out) == (bound is None)


def test_finetuning_chooses_by_some_and_reports_on_all(
    splits: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also the averaged weights are compared by the clips that each epoch was."""
    folder = tmp_path / "run"
    config = load(plain_file(tmp_path), splits, folder, data__valid_clips=4, train__log_every=100,
                  finetune__epochs=2, finetune__average_last_epochs=2,
                  finetune__metric="map")  # fmt: skip
    drawn = find_splits(config).valid_drawn
    assert len(drawn) == 4 and (drawn.counts() > 0).all()
    read = list[tuple[str, int]]()
    from ssast.engine.train.finetuning import Finetuning

    honest = Finetuning._evaluate

    def evaluate(self, engine, clips, split):  # type: ignore[no-untyped-def]
        read.append((split, len(clips)))
        return honest(self, engine, clips, split)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Finetuning, "_evaluate", evaluate)
        assert finetune(config) == 0
    few = ("valid", 4)
    assert read == [few, few, few, few, ("valid", 9), ("test", 9)]
    said = capsys.readouterr().out
    assert "24 training clips, validating on 4 of 9 held-out clips of 3 classes" in said
    report = (folder / "report.md").read_text()
    assert "| valid | 9 of 9 |" in report and "chosen on 4 of the 9 held-out clips" in report
    found = Checkpoints(folder / CHOSEN).latest()
    assert found is not None
    _, meta = Checkpoints.load(found)
    assert meta["values"]["valid"].keys() >= {"map", "accuracy"}
    changed = replace(config, data=replace(config.data, valid_clips=5))
    with pytest.raises(ConfigError, match=r"draw of validation clips .* changed since"):
        finetune(changed, resume=True)


def test_classes_that_are_left_out_are_named(
    splits: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load(plain_file(tmp_path), splits, tmp_path / "run", data__valid_clips=2)
    assert len(find_splits(config).valid_drawn) == 2
    assert "data.valid_clips 2 leaves clips of 2 of the 3 classes that are held out" in caplog.text
    config = replace(config, data=replace(config.data, valid_clips=1))
    with pytest.raises(
        DataError, match=r"the 1 of 9 held-out clips that data.valid_clips leaves are all of one"
    ):
        find_splits(config)


def test_leaks_are_looked_for_among_all_held_out_clips(
    splits: dict[str, Path], tmp_path: Path
) -> None:
    """A training clip in the validation list, whether it is drawn or not."""
    train = read_manifest(splits["train"]).paths
    others = make_sounds(tmp_path / "more", 3, 4, seed=9)
    found = set[bool]()
    for leaked in train[::6]:
        valid = manifest(tmp_path / "valid.json", [*others, Path(str(leaked))])
        given = splits | {"valid": valid}
        config = load(plain_file(tmp_path), given, tmp_path / "run", data__valid_clips=6)
        with pytest.raises(DataError, match=r"are also in data.valid"):
            find_splits(config)
        allowed = replace(config, finetune=replace(config.finetune, allow_leakage=True))  # type: ignore[type-var]
        found.add(str(leaked) in map(str, find_splits(allowed).valid_drawn.paths))
    assert False in found


def test_ranks_draw_alike(pretraining: Callable[..., Config]) -> None:
    """Over any number of ranks, a pass is over the drawn clips, each once."""
    from ssast.engine.parallel.ranks import World
    from ssast.engine.train.task import RunContext

    config = pretraining("run")
    held_out = find_clips(config)[1]
    for world_size in (1, 2, 4):
        seen = list[str]()
        for rank in range(world_size):
            world = World(rank, rank, world_size, "env", torch.device("cpu"))
            task = Pretraining(RunContext(config, world), *find_clips(config))
            with task.context.stream(task.valid_paths, None, epochs=1) as batches:
                for batch in batches:
                    rows = batch.clip_ids[batch.valid].tolist()
                    seen += [str(task.valid_paths[row]) for row in rows]
        assert sorted(seen) == sorted(map(str, draw_valid(config, held_out)))
