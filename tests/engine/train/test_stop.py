"""A run that is asked to stop does so in the middle of a validation, and makes up for it."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from runs import lines, make_data, overrides, write_config

from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.config import Config, load_config
from ssast.engine.parallel.ranks import World
from ssast.engine.pretrain import pretrain
from ssast.engine.train import stop
from ssast.engine.train.pretraining import Pretraining
from ssast.engine.train.stop import Stop
from ssast.engine.train.trainer import Trainer

WORLD = World(0, 0, 1, "single", torch.device("cpu"))


def two_steps(folder: Path) -> Config:
    return load_config(
        write_config(folder),
        [*overrides(train__steps=2), *make_data(folder), f"run.folder={folder / 'run'}"],
    )


@pytest.mark.parametrize("stop_at", [0, 2, 4])
def test_a_validation_is_abandoned(
    stop_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start, on the way, and at the end; the resumed run is that of an unstopped one."""
    data = make_data(tmp_path, num_valid=12)
    settings = overrides(train__steps=4, train__validate_every=2, train__save_every=3,
                         optim__schedule="plateau", train__spike_factor=1e9)  # fmt: skip
    whole, stopped = (
        load_config(write_config(tmp_path), [*settings, *data, f"run.folder={tmp_path / name}"])
        for name in ("whole", "stopped")
    )
    assert pretrain(whole) == 0
    honest, seen = Pretraining.inputs, list[int]()

    def inputs(self, batch, *, training):  # type: ignore[no-untyped-def]
        done = lines(tmp_path / "stopped", "train")
        if not training and (done[-1]["step"] if done else 0) == stop_at:
            seen.append(len(batch))
            if len(seen) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return honest(self, batch, training=training)

    monkeypatch.setattr(Pretraining, "inputs", inputs)
    assert pretrain(stopped) == signal.SIGTERM
    assert len(seen) == 1  # of three batches
    assert len(lines(tmp_path / "stopped", "valid")) == stop_at // 2
    latest = Checkpoints(tmp_path / "stopped" / "checkpoints").latest()
    assert latest is not None and latest.name == f"step{stop_at:09d}"
    monkeypatch.undo()
    assert pretrain(stopped, resume=True) == 0
    for split in ("train", "valid"):
        assert lines(tmp_path / "stopped", split) == lines(tmp_path / "whole", split)
    states = []
    for name in ("whole", "stopped"):
        checkpoints = Checkpoints(tmp_path / name / "checkpoints")
        best, latest = checkpoints.best(), checkpoints.latest()
        assert best is not None and latest is not None
        states.append((best.name, *Checkpoints.load(latest)))
    (best, tensors, meta), (other_best, others, other_meta) = states
    assert best == other_best and meta["progress"] == other_meta["progress"]
    assert len(meta["progress"]["losses"]) > 2  # with which a jump is told
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_a_signal_does_not_interrupt_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes while the thread writes, after the last step."""
    config = two_steps(tmp_path)
    honest, outside = Checkpoints.save, list[int]()

    def save(self, *args, step, **settings):  # type: ignore[no-untyped-def]
        if step == 2:
            time.sleep(0.5)  # the main thread waits for this one
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        return honest(self, *args, step=step, **settings)

    monkeypatch.setattr(Checkpoints, "save", save)
    before = signal.signal(signal.SIGTERM, lambda number, frame: outside.append(number))
    try:
        assert pretrain(config) == signal.SIGTERM  # it is done, but what comes after must not begin
    finally:
        signal.signal(signal.SIGTERM, before)
    assert outside == [], "it reached the handler of before, which ends a process"
    latest = Checkpoints(tmp_path / "run/checkpoints").latest()
    assert latest is not None and latest.name == "step000000002"


def test_a_signal_while_the_logs_are_closed_stops_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = two_steps(tmp_path)
    honest = Trainer.close

    def close(self: Trainer) -> None:
        signal.raise_signal(signal.SIGTERM)
        honest(self)

    monkeypatch.setattr(Trainer, "close", close)
    assert pretrain(config) == signal.SIGTERM


def test_a_signal_while_other_ranks_are_asked_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the ranks' answers, that of this one is from before it."""
    honest, requests = stop.reduce_max, Stop()

    def slow(values: list[float], world: World) -> list[float]:
        found = honest(values, world)
        if not any(found):
            signal.raise_signal(signal.SIGTERM)
        return found

    monkeypatch.setattr(stop, "reduce_max", slow)
    with requests.listening():
        assert [requests.requested(WORLD) for _ in range(2)] == [False, True]
    assert requests.signal == signal.SIGTERM
