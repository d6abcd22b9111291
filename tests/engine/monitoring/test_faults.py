"""What a run survives: bad gradients, jumps of the loss, full disks, hangs, lost processes."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rank_jobs import small_files
from runs import environment, lines, overrides, two_ranks

from ssast.benchmarks.faults import run as faults
from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.config import load_config
from ssast.engine.errors import CheckpointError, LostPeer, TrainingError
from ssast.engine.monitoring.guard import SkipLog, SpikeGuard, non_finite_clips
from ssast.engine.parallel.agreement import code_version, odd_ranks
from ssast.engine.parallel.ranks import World, expecting_peers
from ssast.engine.pretrain import pretrain
from ssast.engine.train.pretraining import Pretraining
from ssast.engine.train.saving import Saver
from ssast.engine.train.task import RejectLog
from ssast.pipelines.locks import FolderLock


@pytest.fixture
def load(config_file, data, tmp_path):
    def load(**changed):
        return load_config(
            config_file, [*overrides(**changed), *data, f"run.folder={tmp_path / 'run'}"]
        )

    return load


@pytest.fixture(scope="module")
def losses(config_file, data, tmp_path_factory):
    """Losses of an undisturbed run."""
    run = tmp_path_factory.mktemp("whole")
    assert pretrain(load_config(config_file, [*overrides(), *data, f"run.folder={run}"])) == 0
    return lines(run, "train")


def test_non_finite_clips_are_named_where_they_can_be():
    ids = torch.tensor([4, 2, 9])
    good = {"loss": torch.ones(3), "logits": torch.ones(3, 5)}
    bad = {"loss": torch.ones(3), "logits": torch.ones(3, 5)}
    bad["logits"][1, 3] = math.inf
    assert non_finite_clips([(ids, good), (ids + 10, bad)]) == ([12], True)
    assert non_finite_clips([(ids, good), (ids + 10, good)]) == ([4, 2, 9, 14, 12, 19], False)


def test_skips_in_a_row_are_counted(tmp_path):
    log = SkipLog(tmp_path / "skipped.jsonl", 3, lambda row: f"clip-\udcff{row}.wav")
    seen = [(torch.tensor([1]), {"loss": torch.tensor([math.nan])})]
    log.skipped(7, seen)
    log.skipped(8, seen)
    assert log.consecutive == 2
    log.taken()
    assert log.consecutive == 0
    text = (tmp_path / "skipped.jsonl").read_text(errors="surrogateescape")
    first, second = map(json.loads, text.splitlines())
    assert first == {"step": 7, "rank": 3, "certain": True, "clips": ["clip-\udcff1.wav"]}
    assert second["step"] == 8


def test_a_full_disk_ends_no_run_where_clips_are_listed(tmp_path, caplog):
    skips = SkipLog(tmp_path / "skipped.jsonl", 0, lambda row: f"clip{row}.wav")
    rejects = RejectLog(tmp_path / "rejected.jsonl", "train")
    with small_files(10):
        skips.skipped(7, [(torch.tensor([1]), {"loss": torch.tensor([math.nan])})])
        rejects(2, "clip2.wav", "it is empty")
    assert "skipped.jsonl is not written: [Errno 27] File too large: " in caplog.text
    assert "clip1.wav" in caplog.text and "clip2.wav" in caplog.text
    for name in ("skipped.jsonl", "rejected.jsonl"):
        assert (tmp_path / name).read_bytes() == b"", "no part of a line"
    rejects(2, "clip2.wav", "it is empty")
    assert json.loads((tmp_path / "rejected.jsonl").read_text())["path"] == "clip2.wav"


def test_a_jump_is_told_from_noise_and_from_falling():
    guard = SpikeGuard(10.0)
    noise = torch.randn(300, generator=torch.Generator().manual_seed(0)).tolist()
    falling = [5 * math.exp(-i / 50) + 0.05 * noise[i] for i in range(300)]
    assert not any(guard.spiked(loss) for loss in falling)
    assert guard.spiked(3.0)
    assert guard.spiked(3.0), "a jump must not become what is normal"
    assert not guard.spiked(falling[-1])
    assert not SpikeGuard(10.0).spiked(1e9), "nothing to compare with"
    assert not guard.spiked(math.nan)
    off = SpikeGuard(None)
    assert not any(off.spiked(loss) for loss in [1.0] * 10 + [1e9])


def test_a_bad_clip_is_named_and_its_step_left_out(load, losses, tmp_path, monkeypatch):
    honest, calls, poisoned = Pretraining.inputs, [], []

    def inputs(self, batch, *, training):
        (fbank, *masks), valid = honest(self, batch, training=training)
        if training:
            calls.append(batch)
            if len(calls) == 3:
                fbank = fbank.clone()
                fbank[1] = math.nan
                poisoned.append(str(self.train_paths[int(batch.clip_ids[1])]))
        return (fbank, *masks), valid

    monkeypatch.setattr(Pretraining, "inputs", inputs)
    assert pretrain(load()) == 0
    (line,) = map(json.loads, (tmp_path / "run" / "skipped.jsonl").open())
    assert line == {"step": 3, "rank": 0, "certain": True, "clips": poisoned}
    found = lines(tmp_path / "run", "train")
    assert found[:2] == losses[:2]
    assert [row["skipped_steps"] for row in found] == [0, 0, 1] + [0] * 9
    assert math.isnan(found[2]["loss"])
    assert all(math.isfinite(row["loss"]) for row in found[3:])


def test_a_jump_goes_back_but_not_to_the_same_clips(load, losses, tmp_path, monkeypatch, capsys):
    calls = []

    def spiked(self, loss):
        calls.append(loss)
        return len(calls) == 7  # at step 7; the last checkpoint is that of step 6

    monkeypatch.setattr(SpikeGuard, "spiked", spiked)
    assert pretrain(load(train__spike_factor=10.0)) == 0
    assert "the loss has jumped at step 7: back to step000000006, on" in capsys.readouterr().out
    found = lines(tmp_path / "run", "train")
    assert [row["step"] for row in found] == list(range(1, 13))
    assert found[:6] == losses[:6]
    assert found[6]["loss"] != losses[6]["loss"]
    _, meta = Checkpoints.load(Checkpoints(tmp_path / "run" / "checkpoints").latest())
    assert meta["progress"]["step"] == 12
    assert meta["progress"]["position"] == 13 * 4


def test_jumping_again_and_again_ends_a_run(load, tmp_path, monkeypatch):
    steps = iter(range(1, 100))
    monkeypatch.setattr(SpikeGuard, "spiked", lambda self, loss: next(steps) >= 5)
    with pytest.raises(TrainingError, match=r"jumped 3 times after .*step000000004, the last"):
        pretrain(load(train__spike_factor=10.0))


def test_a_jump_before_the_first_checkpoint_changes_nothing(
    load, losses, tmp_path, monkeypatch, capsys
):
    calls = []
    monkeypatch.setattr(SpikeGuard, "spiked", lambda self, loss: calls.append(0) or len(calls) == 2)
    assert pretrain(load(train__spike_factor=10.0)) == 0
    assert "jumped at step 2; there is no checkpoint yet" in capsys.readouterr().out
    assert lines(tmp_path / "run", "train") == losses


def test_a_full_disk_does_not_end_a_run_before_its_end(load, losses, tmp_path, capsys):
    assert pretrain(load(train__steps=4)) == 0
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    before = {p.name: p.read_bytes() for p in checkpoints.latest().iterdir()}
    capsys.readouterr()
    with small_files(50_000), pytest.raises(CheckpointError, match=r"step000000012: .*too large"):
        pretrain(load(), resume=True)
    said = capsys.readouterr().out
    for step in (6, 8):
        assert f"step00000000{step}: " in said
    assert "the last one is step000000004" in said
    assert lines(tmp_path / "run", "train") == losses
    assert checkpoints.latest().name == "step000000004"
    assert {p.name: p.read_bytes() for p in checkpoints.latest().iterdir()} == before
    assert not list(checkpoints.folder.glob(".tmp*"))
    assert pretrain(load(), resume=True) == 0  # there is space again
    assert lines(tmp_path / "run", "train") == losses


def test_a_saver_that_fails_says_so_once_and_raises_at_the_end(tmp_path):
    world, said = World(0, 0, 1, "single", torch.device("cpu")), []
    (tmp_path / "file").write_text("")
    lock = FolderLock(tmp_path, "a test is writing")
    saver = Saver(Checkpoints(tmp_path / "file" / "c"), world, said.append, lock, max_failed=3)
    saver.save({"a": torch.zeros(2)}, {}, step=1, best=None)
    saver.save({"a": torch.zeros(2)}, {}, step=2, best=0.5)
    with pytest.raises(CheckpointError, match="step000000002"):
        saver.wait()
    saver.wait()  # told once
    saver.close()
    assert len(said) == 2
    assert all("there is none before it" in text for text in said)


def test_a_saver_without_memory_says_so(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    world, said = World(0, 0, 1, "single", torch.device("cpu")), []
    lock = FolderLock(tmp_path, "a test is writing")
    saver = Saver(Checkpoints(tmp_path), world, said.append, lock, max_failed=3)
    monkeypatch.setattr(Checkpoints, "save", fail)
    saver.save({"a": torch.zeros(2)}, {}, step=7, best=None)
    saver.settle()
    text = "cannot write the checkpoint of step 7: MemoryError"
    assert said == [f"{text}; there is none before it"]
    with pytest.raises(CheckpointError, match=text):
        saver.wait()
    saver.close()


HANG = """
import sys, time
from pathlib import Path
from ssast.engine.monitoring.watchdog import Watchdog
with Watchdog(0.5, Path(sys.argv[1]), "rank 2") as dog:
    for _ in range(6):  # longer in all than the limit
        dog.heartbeat("a step")
        time.sleep(0.2)
    dog.heartbeat("waiting for training data")
    def stuck():
        time.sleep(60)
    stuck()
"""


def test_a_hang_ends_with_its_place(tmp_path):
    report = tmp_path / "hung.txt"
    done = subprocess.run(
        [sys.executable, "-c", HANG, report], capture_output=True, text=True, check=False
    )
    assert done.returncode == 75
    assert (
        "rank 2: waiting for training data took longer than train.timeout_s (0.5 s)" in done.stderr
    )
    assert len(done.stderr.splitlines()) == 1
    assert "in stuck" in report.read_text()
    with open("/dev/full", "w") as full:  # a message that cannot be printed
        done = subprocess.run([sys.executable, "-c", HANG, report], stderr=full, check=False)
    assert done.returncode == 75


def test_who_differs_is_named():
    facts = {"optim.lr": "0.1", "train.seed": "0"}
    said = [("a", facts), ("a", facts), ("b", facts | {"train.seed": "7"}), ("b", facts)]
    assert odd_ranks(said) == (
        "the processes disagree: train.seed is 7 on rank 2, machine b, and 0 on 3 of 4"
    )
    assert odd_ranks([("a", facts)] * 4) is None
    said[3] = ("b", {"optim.lr": "0.1"})
    assert "rank 2 (and 1 more)" in odd_ranks(said)
    assert len(code_version()) == 12


def test_errors_of_the_network_are_told_from_those_of_a_program():
    two, one = (World(0, 0, n, "env", torch.device("cpu")) for n in (2, 1))
    text = "[/pytorch/gloo/tcp/pair.cc:534] Connection closed by peer [::1]:1\nexception"
    lost = pytest.raises(LostPeer, match=r"rank 0 has lost .*\(Connection closed by peer")
    with lost, expecting_peers(two):
        raise RuntimeError(text)
    for world, error in ((one, RuntimeError(text)), (two, RuntimeError("shapes differ"))):
        with pytest.raises(type(error), match=str(error)[1:8]), expecting_peers(world):
            raise error
    with pytest.raises(TrainingError), expecting_peers(two):
        raise TrainingError("timed out")


def torchrun(run: Path, config_file: Path, data: list[str], *arguments: str) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=2"]
    program = ["--nproc-per-node=2", "-m", "ssast.engine.cli", "pretrain", str(config_file)]
    return subprocess.Popen(
        [*launcher, *program, *arguments, *data, f"run.folder={run}", "--resume"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    )


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    """Processes that a launcher has started, in the order of their ranks."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    ranks = {}
    for child in children:
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks |= {int(v[5:]): int(child) for v in variables if v.startswith(b"RANK=")}
    return [ranks[rank] for rank in sorted(ranks)]


@pytest.mark.slow
def test_torchrun_resumes_after_a_rank_is_killed(config_file, data, losses, tmp_path):
    run = tmp_path / "run"
    process = torchrun(run, config_file, data, *overrides())
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "resumed from" in output
    for ours, theirs in zip(lines(run, "train"), losses, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-5)


@pytest.mark.slow
def test_small_trial_of_faults(tmp_path, capsys):
    """Kinds that are quick, and tested nowhere else, once, on one rank."""
    kinds = ["full-disk", "torn", "output"]
    arguments = ["--kinds", *kinds, "--count", "3", "--ranks", "1", "--steps", "40"]
    assert faults.main([*arguments, "--json", str(tmp_path / "f.json")]) == 0
    found = json.loads((tmp_path / "f.json").read_text())
    assert {fault["kind"] for fault in found["faults"]} == set(kinds)
    assert all(fault["lost"] == 0 and fault["equal"] for fault in found["faults"])
    assert "3 faults in " in capsys.readouterr().out


@pytest.mark.slow
def test_ranks_with_other_settings_are_refused(config_file, data, tmp_path):
    """Two processes of a hand-made launcher, one of them started with another seed."""
    common = ("pretrain", config_file, *overrides(), *data, f"run.folder={tmp_path / 'run'}")
    for status, error in two_ranks(*common, each=[(f"train.seed={rank}",) for rank in range(2)]):
        assert status == 2
        assert "the processes disagree: train.seed is 1 on rank 1, machine " in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()
