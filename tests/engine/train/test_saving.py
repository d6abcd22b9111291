"""Saves that fail: one is told of, several in a row end the run, and the state goes elsewhere."""

import errno
import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from runs import lines, overrides, two_ranks

from ssast.engine.checkpoints import store
from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.cli.main import main
from ssast.engine.config import load_config
from ssast.engine.errors import CheckpointError, ConfigError, SaveError
from ssast.engine.parallel.ranks import World
from ssast.engine.pretrain import pretrain
from ssast.engine.train.pretraining import Pretraining
from ssast.engine.train.saving import Saver, fallback_checkpoints
from ssast.pipelines.locks import FolderLock

WORLD = World(0, 0, 1, "single", torch.device("cpu"))


@pytest.fixture
def disk(monkeypatch):
    """Errors of the disks: what is raised where a state is written below a folder."""
    errors: dict[Path, BaseException] = {}

    def write(folder, *arguments, real=store.write_files):
        for below, error in errors.items():
            if Path(folder).is_relative_to(below):
                raise error
        real(folder, *arguments)

    monkeypatch.setattr(store, "write_files", write)
    return errors


class Saves:
    """A saver that is told step and criterion, in a folder with a fallback beside it."""

    def __init__(self, folder, **options):
        self.said, lock = [], FolderLock(folder, "a test is writing")
        self.run, self.other = Checkpoints(folder / "run"), Checkpoints(folder / "other", keep=1)
        self.saver = Saver(
            self.run, WORLD, self.said.append, lock, max_failed=3, fallback=self.other, **options
        )

    def __call__(self, step, best=None, last=False):
        self.saver.save({"a": torch.tensor(step)}, {}, step=step, best=best, last=last)
        self.saver.settle()
        return self.saver


def failed(number):
    return OSError(number, os.strerror(number))


PASSING = [failed(errno.EIO), failed(errno.ESTALE), MemoryError()]
LASTING = [failed(errno.ENOSPC), failed(errno.EACCES), failed(errno.EROFS), KeyError("a")]


@pytest.mark.parametrize("error", [*PASSING, *LASTING], ids=repr)
def test_saves_that_fail_in_a_row_end_the_run(tmp_path, disk, error):
    save = Saves(tmp_path)
    for step in (1, 2):
        disk[tmp_path / "run"] = error
        assert not save(step).failing
    disk.clear()
    assert not save(3).failing  # from here on in a row
    disk[tmp_path / "run"] = error
    for step in (4, 5):
        assert not save(step).failing
        save.saver.check()
        assert save.other.latest() is None
    assert save(6).failing
    kind = SaveError if error in PASSING else CheckpointError
    place = tmp_path / "other/step000000006"
    with pytest.raises(CheckpointError, match=f"3 .* in a row .*; the state is in {place}: ") as e:
        save.saver.check()
    assert type(e.value) is kind
    assert Checkpoints.load(place)[0]["a"] == 6
    assert [
        re.findall("step (?:of )?0*([0-9]+)|$", t.replace("step0", "step 0"))[0] for t in save.said
    ] == list("12456")
    disk.clear()
    save(7)  # too late: all ranks have heard, or will
    assert save.saver.failing and save.run.latest().name == "step000000003"
    save.saver.close()


def test_the_last_save_goes_elsewhere_at_once(tmp_path, disk):
    save = Saves(tmp_path)
    disk[tmp_path / "run"] = failed(errno.ENOSPC)
    save(1, last=True)
    with pytest.raises(
        CheckpointError, match=r"No space left .*; the state is in .*/other/step0+1"
    ):
        save.saver.wait()
    disk[tmp_path / "other"] = failed(errno.EDQUOT)
    save(2, last=True)
    with pytest.raises(CheckpointError, match=r"No space left .*; train.fallback_folder: .*quota"):
        save.saver.wait()
    disk.clear()
    assert save.other.latest().name == "step000000001"
    save(3)
    assert save.other.latest() is None, "older than what the run's own folder has"
    save.saver.close()


def test_a_mark_that_fails_is_made_up_for(tmp_path, disk, monkeypatch):
    save = Saves(tmp_path)
    with monkeypatch.context() as patch:

        def full(*_):
            raise CheckpointError("cannot write best.json: No space left on device")

        patch.setattr(Checkpoints, "mark_best", full)
        save(1, best=0.5)
        save.saver.check()
        assert save.saver.best_value() == 0.5, "its checkpoint is on the disk"
        save(2, best=0.4, last=True)
        with pytest.raises(CheckpointError, match=r"best\.json: No space"):
            save.saver.wait()
    assert save.run.best_value() == math.inf
    save(3)
    assert save.run.best().name == "step000000002"
    assert [text for text in save.said if "best.json" not in text] == []
    save.saver.close()


def test_a_best_that_cannot_be_read_yet_is_kept(tmp_path, monkeypatch):
    """After a resumption nothing is known of it: the next one must not take its place unasked."""
    before = Saves(tmp_path)
    before(1, best=0.5)
    before.saver.close()
    save = Saves(tmp_path)
    with monkeypatch.context() as patch:

        def stale(_):
            raise CheckpointError("cannot read best.json: Stale file handle")

        patch.setattr(Checkpoints, "best_value", stale)
        assert not save.saver.best_value() > 0.9
    assert save.saver.best_value() == 0.5
    save.saver.close()


@pytest.fixture
def load(config_file, data, tmp_path):
    def load(**changed):
        given = [*overrides(**changed), *data, f"run.folder={tmp_path / 'run'}"]
        return load_config(config_file, given)

    return load


def test_a_criterion_counts_once_its_checkpoint_is_on_the_disk(load, tmp_path, disk, monkeypatch):
    values = {2: 5.0, 4: 3.0, 6: 4.0, 8: 4.5, 10: 3.5, 12: 3.4}
    checkpoints = Checkpoints(tmp_path / "run/checkpoints")
    honest, seen = Pretraining.validate, {}
    steps = iter([0, 2, 4, 6, 8, 8, 10, 12])  # resumed from step 6

    def validate(self, engine):
        found, step = honest(self, engine), next(steps)
        seen[step] = checkpoints.best()
        disk.clear()
        if step == 4:
            disk[tmp_path / "run"] = failed(errno.ENOSPC)
        loss = values.get(step, 9.0)
        return found | {"loss": loss, "pretext_accuracy": -loss}  # the score, which patience counts

    monkeypatch.setattr(Pretraining, "validate", validate)
    often = {"train__validate_every": 2, "train__save_every": 50, "train__keep_checkpoints": 9}
    assert pretrain(load(train__steps=8, **often)) == 0
    assert json.loads((checkpoints.best() / "meta.json").read_text())["best"] == 4.0
    best = json.loads((checkpoints.folder / "best.json").read_text())
    assert (best["step"], best["value"]) == (6, 4.0), "the 3.0 of step 4 was never saved"
    progress = json.loads((checkpoints.latest() / "meta.json").read_text())["progress"]
    assert (progress["best_score"], progress["since_best"]) == (-3.0, 2), "patience counts it"
    # Killed between the checkpoint of step 6 and its mark: the resumed run makes up for it.
    (checkpoints.folder / "step000000008").rename(tmp_path / "later")
    (checkpoints.folder / "latest").write_text("step000000006\n")
    (checkpoints.folder / "best.json").write_text(
        '{"name": "step000000002", "step": 2, "value": 5.0}\n'
    )
    seen.clear()
    assert pretrain(load(**often), resume=True) == 0
    # That of step 10 may still be on its way to the disk at step 12.
    assert [seen[step].name[-2:] for step in (8, 10)] == ["06", "06"]
    assert checkpoints.best().name == "step000000012"


def test_storage_that_keeps_failing_ends_with_status_75(
    load, tmp_path, disk, config_file, data, capsys
):
    disk[tmp_path / "run"] = failed(errno.EIO)
    given = [*overrides(train__save_every=2, train__max_failed_saves=2), *data]
    assert main(["pretrain", str(config_file), *given, f"run.folder={tmp_path / 'run'}"]) == 75
    error = capsys.readouterr().err.splitlines()[-1]
    assert "2 checkpoints in a row could not be written, the last: cannot write" in error
    assert lines(tmp_path / "run", "train")[-1]["step"] < 8


def test_a_fallback_folder_is_checked_at_the_start(load, tmp_path):
    for inside in ("run", "run/other"):
        config = load(train__fallback_folder=str(tmp_path / inside))
        with pytest.raises(ConfigError, match=r"train\.fallback_folder .* is inside run\.folder"):
            pretrain(config)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"train\.fallback_folder .*file: cannot be written to"):
        pretrain(load(train__fallback_folder=str(tmp_path / "file")))


def test_the_end_of_a_run_is_taken_up_from_the_fallback(load, tmp_path, disk):
    config = load(train__steps=4, train__fallback_folder=str(tmp_path / "other"))
    disk[tmp_path / "run"] = failed(errno.ENOSPC)
    with pytest.raises(CheckpointError, match=r"No space left .*; the state is in .*step0+4: "):
        pretrain(config)
    disk.clear()
    assert pretrain(config, resume=True) == 0
    checkpoints = Checkpoints(tmp_path / "run/checkpoints")
    assert checkpoints.latest().name == checkpoints.best().name == "step000000004"
    assert fallback_checkpoints(config).latest() is None


@pytest.mark.slow
def test_both_ranks_end_and_the_fallback_is_taken_up(load, config_file, data, tmp_path, capsys):
    run = tmp_path / "run"
    assert pretrain(load()) == 0
    whole = lines(run, "train")
    run.rename(tmp_path / "whole")
    run.mkdir()
    (run / "checkpoints").touch()  # no folder: every save fails, on rank 0 alone
    given = {
        "train__save_every": 2,
        "train__max_failed_saves": 2,
        "train__fallback_folder": "other",
    }
    common = [*overrides(**given), *data, f"run.folder={run}"]
    ended = two_ranks("pretrain", config_file, *common, folders=(tmp_path, tmp_path))
    for status, error in ended:
        assert status == 2
        assert "2 checkpoints in a row could not be written" in error
    config = load(**given | {"train__fallback_folder": str(tmp_path / "other")})
    fallback = fallback_checkpoints(config)
    assert f"the state is in {fallback.folder.relative_to(tmp_path)}/step000000004: " in ended[0][1]
    (run / "checkpoints").unlink()
    with pytest.raises(ConfigError, match=r"other holds a run .step0+4.: add --resume"):
        pretrain(config)
    capsys.readouterr()
    assert pretrain(config, resume=True) == 0
    assert f"resumed from {fallback.latest() or fallback.folder}" in capsys.readouterr().out
    for ours, theirs in zip(lines(run, "train"), whole, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-5)
    assert fallback.latest() is None
