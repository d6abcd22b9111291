"""Callbacks for tests, and a run with them that the ranks of a pool train."""

from pathlib import Path

import numpy as np

from ssast.engine.config import load_config
from ssast.engine.errors import StopTraining
from ssast.engine.finetune import finetune
from ssast.engine.pretrain import pretrain
from ssast.engine.registry import register_metric
from ssast.engine.train.callbacks import Callback


class Recorder(Callback):
    """What was called at which step, and with what."""

    def __init__(self):
        self.calls = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)
        return lambda state, *given: self.calls.append((name, state.step, *given))

    def steps(self, name):
        return [call[1] for call in self.calls if call[0] == name]

    def given(self, name):
        return [call[2] for call in self.calls if call[0] == name]


class StopAt(Callback):
    """Ends the run after a step, on one rank only."""

    def __init__(self, step, rank=0, method="on_step"):
        self.step, self.rank = step, rank
        setattr(self, method, self._stop)

    def _stop(self, state, *given):
        if state.step >= self.step and state.rank == self.rank:
            raise StopTraining("far enough")


def stopped_on_one_rank(world, config_file, settings, folder):
    """The steps that each rank took, and whether it was told of checkpoints."""
    recorder, run = Recorder(), Path(folder)
    config = load_config(config_file, [*settings, f"run.folder={run}"])
    assert pretrain(config, callbacks=[StopAt(2, rank=1), recorder]) == 0
    return recorder.steps("on_step"), [path.name for path in recorder.given("on_checkpoint")]


def resumed_with_the_callback_on_one_rank(world, config_file, settings, folder):
    """The steps of a run that was ended by a callback of rank 0, when it is resumed with it."""
    config = load_config(config_file, [*settings, f"run.folder={folder}"])
    ours = [StopAt(2)] if world.is_main else []
    assert pretrain(config, callbacks=ours) == 0
    recorder = Recorder()
    assert pretrain(config, resume=True, callbacks=[*ours, recorder]) == 0
    return recorder.steps("on_step")


def drawn(scores, targets):
    """A metric of no use, another one on each rank."""
    return float(np.random.default_rng().random())


def fine_tuned_by_a_random_metric(world, config_file, settings, folder):
    """The metrics that a rank was told."""
    recorder = Recorder()
    register_metric("drawn", drawn)
    config = load_config(config_file, [*settings, f"run.folder={folder}", "finetune.metric=drawn"])
    assert finetune(config, callbacks=[recorder]) == 0
    return [given["valid/drawn"] for given in recorder.given("on_validation")]
