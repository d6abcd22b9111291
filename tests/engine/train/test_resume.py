"""Resuming never begins anew where something is there, and says why it cannot go on."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from runs import call, environment, lines, overrides

from ssast.engine.cli.main import main
from ssast.engine.config import load_config
from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.monitoring.guard import SpikeGuard
from ssast.engine.pretrain import pretrain
from ssast.engine.train import trainer
from ssast.engine.train.callbacks import Callback
from ssast.engine.train.step import train_step
from ssast.pipelines.errors import FolderInUse
from ssast.pipelines.locks import OWNER


@pytest.fixture(scope="module")
def first(tmp_path_factory, config_file, data):
    """A run of 6 steps with checkpoints of steps 2, 4 and 6, written with an open umask."""
    run = tmp_path_factory.mktemp("runs") / "first"
    given = (*overrides(train__steps=6, train__save_every=2), *data, f"run.folder={run}")
    before = os.umask(0o027)
    try:
        done = call("pretrain", config_file, *given)
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture
def run(first, tmp_path):
    """A copy that a test may harm."""
    return shutil.copytree(first, tmp_path / "run")


@pytest.fixture
def load(config_file, data, run):
    def load(**changed):
        given = {"train__steps": 8, "train__save_every": 2} | changed
        return load_config(config_file, [*overrides(**given), *data, f"run.folder={run}"])

    return load


def content(run: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_every_file_of_a_run_follows_the_umask(first):
    files = [path for path in first.rglob("*") if path.is_file()]
    assert len(files) > 12
    assert {str(p): stat.S_IMODE(p.stat().st_mode) for p in files} == {str(p): 0o640 for p in files}


def deny(monkeypatch, refused):
    """Refuse to open paths, as root may open all."""
    import builtins

    honest = builtins.open

    def fail(path, *arguments, **options):
        if refused(str(path)):
            raise PermissionError(13, "Permission denied", str(path))
        return honest(path, *arguments, **options)

    monkeypatch.setattr(builtins, "open", fail)


@pytest.mark.parametrize("steps", ["step", "step000000006"])
@pytest.mark.parametrize("resume", [True, False])
def test_unreadable_checkpoints_are_no_reason_to_begin_anew(steps, resume, run, load, monkeypatch):
    before = content(run)
    with monkeypatch.context() as patch:
        deny(patch, lambda path: steps in path and path.endswith("state.safetensors"))
        with pytest.raises(CheckpointError, match=r"step000000006 cannot be read: state.*denied"):
            pretrain(load(), resume=resume)
    assert content(run) == before
    assert pretrain(load(), resume=True) == 0
    assert [line["step"] for line in lines(run, "train")] == list(range(1, 9))


def test_damaged_checkpoints_are_kept_and_never_begun_anew_beside(run, load):
    for path in run.glob("checkpoints/step*/state.safetensors"):
        os.truncate(path, 0)
    before = content(run)
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged .* 0 bytes"):
        pretrain(load(), resume=True)
    assert content(run) == before


def test_a_damaged_checkpoint_outlives_the_run(run, load):
    for step in (2, 6):
        os.truncate(run / f"checkpoints/step00000000{step}/state.safetensors", 10)
    assert pretrain(load(train__steps=12, train__keep_checkpoints=1), resume=True) == 0
    found = {path.name for path in run.glob("checkpoints/step*")}
    assert {"step000000002", "step000000006.damaged", "step000000012"} <= found
    assert "step000000010" not in found


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "latest", "a link"])
def test_checkpoints_that_are_gone_are_missed(left, run, load):
    folder, latest = run / "checkpoints", (run / "checkpoints/latest").read_text()
    shutil.rmtree(folder)
    if left == "a link":
        folder.symlink_to(run / "unmounted")
    elif left != "nothing":
        folder.mkdir()
    if left == "latest":
        (folder / "latest").write_text(latest)
    before = content(run)
    message = {
        "latest": "step000000006 was saved here and is gone",
        "a link": "checkpoints cannot be read: No such file",
    }.get(left, "holds metrics of 6 steps and no checkpoint: restore .*checkpoints, or choose")
    for resume in (True, False):
        with pytest.raises(CheckpointError, match=message):
            pretrain(load(), resume=resume)
    assert content(run) == before


def test_a_run_that_saved_nothing_yet_may_begin_anew(run, load):
    shutil.rmtree(run / "checkpoints")
    rows = (run / "metrics.jsonl").read_text().splitlines()
    kept = [row for row in rows if json.loads(row)["step"] <= 2]
    (run / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    assert pretrain(load(train__steps=4), resume=True) == 0
    assert [line["step"] for line in lines(run, "train")] == [1, 2, 3, 4]


def test_checkpoints_that_vanish_while_training_are_written_again(run, load, monkeypatch):
    from ssast.engine.train.pretraining import Pretraining

    honest = Pretraining.validate

    def validate(self, engine):
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        return honest(self, engine)

    monkeypatch.setattr(Pretraining, "validate", validate)
    assert pretrain(load(train__steps=12), resume=True) == 0
    assert (run / "checkpoints/step000000012/manifest.json").is_file()


HOLD = """
import fcntl, sys
with open(sys.argv[1], "w") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_run_folder_is_of_one_process(run, load):
    before = content(run)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, run / ".lock"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(FolderInUse, match="run: another process is training in this folder"):
        pretrain(load(), resume=True)
    assert content(run) == before
    holder.communicate()
    assert pretrain(load(), resume=True) == 0


@pytest.mark.parametrize("steps", [20, 8])  # in the middle, and at the end
def test_a_run_whose_folder_is_taken_over_stops_and_writes_no_checkpoint(
    steps, run, config_file, data, monkeypatch, capsys
):
    before, taken = content(run / "checkpoints"), 6

    def steal(*arguments):
        nonlocal taken
        taken += 1
        done = train_step(*arguments)
        if taken == 8:
            record = json.loads((run / OWNER).read_text()) | {"token": "b", "host": "b7", "pid": 5}
            (run / OWNER).write_text(json.dumps(record))
        return done

    monkeypatch.setattr(trainer, "train_step", steal)
    given = [*overrides(train__steps=steps, train__save_every=2), *data, f"run.folder={run}"]
    assert main(["pretrain", str(config_file), *given, "--resume"]) == 75
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{run}: another process has taken over this folder (host b7, process 5, since" in error
    assert error.endswith(": this one stops, and writes nothing more")
    assert content(run / "checkpoints") == before
    assert json.loads((run / OWNER).read_text())["token"] == "b"
    assert lines(run, "train")[-1]["step"] < 12


def test_a_folder_that_cannot_be_written_is_one_line(run, load, monkeypatch, capsys):
    deny(monkeypatch, lambda path: path.endswith(".lock"))
    with pytest.raises(ConfigError, match="run: cannot be written to: Permission denied"):
        pretrain(load(), resume=True)


def test_a_finished_run_resumes_to_its_end(run, load, capsys):
    before = content(run / "checkpoints")
    assert pretrain(load(train__steps=6), resume=True) == 0
    assert "finished step 6 of 6" in capsys.readouterr().out
    assert content(run / "checkpoints") == before


def test_the_command_ends_with_status_2(run, config_file, data, capsys):
    os.truncate(run / "checkpoints/best.json", 0)
    shutil.rmtree(run / "checkpoints/step000000006")
    shutil.rmtree(run / "checkpoints/step000000004")
    os.truncate(run / "checkpoints/step000000002/meta.json", 3)
    given = [*overrides(train__steps=8), *data, f"run.folder={run}", "--resume"]
    assert main(["pretrain", str(config_file), *given]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith(f"ssast: error: {run}/checkpoints: every checkpoint is damaged")
    )


def test_a_stop_between_log_lines_leaves_them_as_they_are(config_file, data, tmp_path):
    """Each is the mean of all steps since the one before, some of them from before the stop."""

    class StopAt(Callback):
        def on_step(self, state):
            if state.step == 6:
                signal.raise_signal(signal.SIGTERM)

    def load(name):
        given = overrides(train__log_every=4, train__save_every=4, train__spike_factor=1e9)
        return load_config(config_file, [*given, *data, f"run.folder={tmp_path / name}"])

    assert pretrain(load("whole")) == 0
    assert pretrain(load("stopped"), callbacks=[StopAt()]) == signal.SIGTERM
    assert [line["step"] for line in lines(tmp_path / "stopped", "train")] == [4]
    assert pretrain(load("stopped"), resume=True) == 0
    assert lines(tmp_path / "stopped", "train") == lines(tmp_path / "whole", "train")


def test_a_last_line_of_few_steps_is_no_jump(config_file, data, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(SpikeGuard, "spiked", lambda self, loss: seen.append(loss))
    given = overrides(train__log_every=5, train__spike_factor=10.0)
    assert pretrain(load_config(config_file, [*given, *data, f"run.folder={tmp_path}/run"])) == 0
    found = lines(tmp_path / "run", "train")
    assert [line["step"] for line in found] == [5, 10, 12]
    assert seen == [line["loss"] for line in found[:2]]


def test_settings_that_cannot_work_are_not_stored(run, load):
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=r"train\.cuda_graphs"):
        pretrain(load(train__cuda_graphs=True), resume=True)
    assert (run / "config.yaml").read_bytes() == before
