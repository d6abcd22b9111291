"""Callbacks of a run: the user's own loggers, metrics and stop rules.

class StopAt(Callback):
    def on_validation(self, state, metrics):
        if metrics["valid/loss"] < 2.5:
            raise StopTraining("the loss is low enough")

pretrain(config, callbacks=[StopAt()])
"""

import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ssast.engine.config import Config
from ssast.engine.errors import StopTraining, TrainingError
from ssast.engine.monitoring.monitor import Monitor
from ssast.engine.parallel.ranks import gather_objects
from ssast.engine.train.state import TrainState
from ssast.pipelines.text import one_line

_log = logging.getLogger(__name__)


class RunState:
    """What a callback sees of the run: always its present state."""

    def __init__(self, state: TrainState, monitor: Monitor):
        self._state, self._monitor = state, monitor

    @property
    def step(self) -> int:
        """Number of optimizer steps taken."""
        return self._state.progress.step

    @property
    def config(self) -> Config:
        """Configuration of the run; its last step is ``config.train.steps``."""
        return self._state.task.context.config

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self._state.task.context.folder

    @property
    def rank(self) -> int:
        """Number of this process; the others are on the same step."""
        return self._state.engine.world.rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._state.engine.world.world_size

    @property
    def module(self) -> nn.Module:
        """What is trained, on this process's device; with ZeRO stage 3 a shard of its weights."""
        return self._state.task.module

    def log(self, metrics: Mapping[str, float]) -> None:
        """Log metrics at this step, under their own names, in metrics.jsonl and the run logs."""
        self._monitor.log(self.step, {name: float(value) for name, value in metrics.items()})


class Callback:
    """What a run calls between steps: override what you need, in at most ``train.timeout_s``.

    Every process calls its own callbacks, in the order in which they were given. A callback that
    raises :class:`~ssast.engine.errors.StopTraining`, on whatever process, ends the run on all of
    them: it is validated and saved, and a fine-tuned classifier is reported, as after the last
    step. Any other error ends the run as a
    :class:`~ssast.engine.errors.TrainingError` that names the callback.
    """

    def on_start(self, state: RunState) -> None:
        """Called once before the first step, also of a resumed run."""

    def on_step(self, state: RunState) -> None:
        """Called after each optimizer step."""

    def on_log(self, state: RunState, metrics: Mapping[str, float]) -> None:
        """Called every ``train.log_every`` steps, with the names of metrics.jsonl: train/loss."""

    def on_validation(self, state: RunState, metrics: Mapping[str, float]) -> None:
        """Called after each validation, with the names of metrics.jsonl: valid/loss."""

    def on_checkpoint(self, state: RunState, path: Path) -> None:
        """Called on rank 0 once a checkpoint is on the disk, some steps after its own."""

    def on_end(self, state: RunState, error: BaseException | None) -> None:
        """Called at the end, with the error that ended the run, if one did."""


class Callbacks:
    """The callbacks of a run; other ranks may have others. Collective.

    Attributes:
        reason: Which callback of this process wants the run to end, and why; "" if none does.
    """

    def __init__(self, callbacks: Sequence[Callback], state: RunState):
        self._callbacks, self._state = list(callbacks), state
        self.reason = ""
        context = state._state.task.context
        self._heartbeat = context.heartbeat
        ended_by = state._state.progress.ended_by
        names = gather_objects([_name(callback) for callback in callbacks], context.world)
        if ended_by not in itertools.chain(*names):
            state._state.progress.ended_by = ""  # resumed without it: the run goes on

    def call(self, method: str, *arguments: Any) -> None:
        """Call a method of all callbacks.

        Raises:
            TrainingError: A callback raised something else than ``StopTraining``.
        """
        for callback in self._callbacks:
            self._heartbeat(f"callback {_name(callback)}.{method}")
            try:
                getattr(callback, method)(self._state, *arguments)
            except StopTraining as stop:
                self.reason = self.reason or f"{_name(callback)}: {one_line(stop)}"
            except Exception as error:
                raise TrainingError(
                    f"callback {_name(callback)}.{method} at step {self._state.step}: "
                    f"{type(error).__name__}: {one_line(error)}"
                ) from error

    def end(self, error: BaseException | None) -> None:
        """Call ``on_end`` of all; where an error ended the run, that one stays the error."""
        try:
            self.call("on_end", error)
        except TrainingError as another:
            if error is None:
                raise
            _log.warning("%s", another)


def _name(callback: Callback) -> str:
    return type(callback).__name__
