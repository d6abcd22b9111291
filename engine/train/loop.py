"""The training loop: what happens in a step, and what happens between steps."""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ssast.engine.config import Config
from ssast.engine.errors import TrainingError
from ssast.engine.monitoring.guard import SkipLog, SpikeGuard
from ssast.engine.monitoring.monitor import Monitor
from ssast.engine.monitoring.profiling import StepProfiler
from ssast.engine.parallel.deepspeed_engine import TrainEngine
from ssast.engine.parallel.ranks import World, reduce_max, reduce_sum
from ssast.engine.train.optim import Plateau, learning_rate
from ssast.pipelines.stream.batch import Batch


@dataclass
class Progress:
    """What changes from step to step, besides the weights and the optimizer."""

    step: int = 0
    position: int = 0
    """Clips taken from the data order so far, over all ranks."""

    plateau: Plateau = field(default_factory=Plateau)
    best_loss: float = math.inf
    """The lowest criterion (see :class:`Task`) of all validations."""

    since_best: int = 0
    """Validations since that one."""


class Task(Protocol):
    """What is trained: a module and its losses. Pretraining is one, fine-tuning another."""

    @property
    def module(self) -> nn.Module:
        """Its call gives values per clip, [B] each, that :meth:`means` averages."""
        ...

    steps_per_epoch: int
    patience: int | None
    """Validations without a lower criterion after which training ends; None: never."""

    def arguments(self, batch: Batch, *, training: bool) -> tuple[tuple[Any, ...], Tensor]:
        """Arguments of the module for a batch, and which of its clips count, [B] bool."""
        ...

    def means(self, outputs: dict[str, Tensor], valid: Tensor) -> dict[str, Tensor]:
        """Scalar means over the clips that count; "loss" is minimised."""
        ...

    def criterion(self, values: dict[str, float]) -> float:
        """What the best checkpoint has the lowest of, from the result of a validation."""
        ...

    def score(self, values: dict[str, float]) -> float:
        """What the plateau rule watches, the higher the better, from the same."""
        ...


class Totals:
    """Sums over clips that stay on the device until they are asked for."""

    def __init__(self, device: torch.device):
        self._sums, self._names = torch.zeros(0, device=device), list[str]()

    def add(self, means: dict[str, Tensor], valid: Tensor, counts: bool = True) -> None:
        """Add the means over the valid clips of one batch, or only take note of their names."""
        count = valid.sum()
        values = [count, *(value.detach() * count for value in means.values())]
        row = torch.stack([v.to(torch.float64) for v in values])
        if not self._names:
            self._names, self._sums = list(means), torch.zeros_like(row)
        if counts:
            self._sums += row

    def means(self, world: World) -> dict[str, float]:
        """Means over the clips of all ranks since the last call, NaN of none. Collective."""
        count, *sums = reduce_sum(self._sums.tolist(), world)
        self._sums.zero_()
        return {n: s / count if count else math.nan for n, s in zip(self._names, sums, strict=True)}


class Stop:
    """Set by SIGINT, SIGTERM or SIGUSR1 (batch systems warn with it); a second one acts at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.signal = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals inside, then put the handlers before back."""
        before = {s: signal.signal(s, self._catch) for s in self.SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def asked(self, world: World) -> bool:
        """Whether any rank has been asked to stop. Collective."""
        self.signal = int(reduce_max([self.signal], world)[0])
        return self.signal != 0


@dataclass(frozen=True)
class Services:
    """What a run does for its loop. All but ``monitor`` and ``beat`` are collective."""

    monitor: Monitor
    beat: Callable[[str], None]
    """Told what is done next, so that a hang is noticed and named."""

    skips: SkipLog
    validate: Callable[[], dict[str, float]]
    """Mean losses over the held-out clips."""

    save: Callable[[bool], None]
    """Writes a checkpoint; its argument says whether it is the best so far."""

    roll_back: Callable[[], None]
    """Goes back to the last checkpoint, but not to its place in the data."""


def train(
    engine: TrainEngine,
    batches: Iterator[Batch],
    progress: Progress,
    config: Config,
    task: Task,
    services: Services,
) -> int:
    """Train from ``progress.step`` to ``train.steps``.

    Args:
        engine: Holds the task's module.
        batches: The data from ``progress.position`` on.
        progress: Carried on in place.
        config: Of the run.
        task: What is trained.
        services: Of the run.

    Returns:
        The signal that stopped the run, after a checkpoint was saved, or 0.

    Raises:
        TrainingError: ``train.max_skipped_steps`` steps in a row gave no finite gradient. The state
            before them was saved.
    """
    world, stop, settings, monitor = engine.world, Stop(), config.train, services.monitor
    totals, skipped, guard = (
        Totals(world.device),
        engine.skipped_steps,
        SpikeGuard(settings.spike_factor),
    )
    with stop.listening(), StepProfiler(config, world, task.module, monitor.say) as profiler:
        if progress.step == 0:
            monitor.log_valid(0, services.validate())
            monitor.restart_clock(progress.step)
        while progress.step < settings.steps and not has_given_up(task, progress):
            lr = step(engine, batches, progress, config, task, totals, services, profiler)
            last, saved = progress.step == settings.steps, False
            report = last or progress.step % settings.log_every == 0

            if services.skips.in_row >= settings.max_skipped_steps:
                services.save(False)  # of the weights before: skipped steps change none
                raise TrainingError(
                    f"no step from {progress.step - services.skips.in_row + 1} to {progress.step} "
                    f"gave a finite gradient (their clips are in {services.skips.path}): lower "
                    "optim.lr or set optim.max_grad_norm, then --resume"
                )
            if report:
                means = totals.means(world)
                skipped, before = engine.skipped_steps, skipped
                monitor.log_train(
                    progress.step, {**means, "lr": lr, "skipped_steps": skipped - before}
                )
                if guard.spiked(means["loss"]):
                    services.roll_back()
                    continue
            if progress.step % settings.validate_every == 0 or last:
                values = services.validate()
                monitor.log_valid(progress.step, values)
                progress.plateau.update(task.score(values), config.optim)
                progress.since_best += 1
                if task.criterion(values) < progress.best_loss:
                    progress.best_loss, progress.since_best = task.criterion(values), 0
                    services.save(True)
                    saved = True
                last = last or has_given_up(task, progress)
                monitor.restart_clock(progress.step)
            # Asking other ranks waits for the device: only where the report does so anyway.
            asked = report or world.world_size == 1 or world.device.type == "cpu"
            stopped = asked and stop.asked(world)
            if not saved and (stopped or last or progress.step % settings.save_every == 0):
                services.save(False)
                monitor.restart_clock(progress.step)
            if stopped:
                return stop.signal
    return 0


def has_given_up(task: Task, progress: Progress) -> bool:
    """Whether the criterion has not fallen for as many validations as the task bears."""
    return task.patience is not None and progress.since_best >= task.patience


def step(
    engine: TrainEngine,
    batches: Iterator[Batch],
    progress: Progress,
    config: Config,
    task: Task,
    totals: Totals,
    services: Services,
    profiler: StepProfiler,
) -> float:
    """One optimizer step; returns its learning rate."""
    settings = config.train
    lr = learning_rate(
        progress.step,
        config.optim,
        steps=settings.steps,
        plateau_scale=progress.plateau.scale,
        steps_per_epoch=task.steps_per_epoch,
    )
    seen, taken = [], False
    for _ in range(settings.accumulation_steps):
        profiler.mark("data")
        services.beat("waiting for training data")
        with services.monitor.waiting_for_data():
            batch = next(batches)
        services.beat("a training step")
        profiler.mark("inputs")
        arguments, valid = task.arguments(batch, training=True)
        outputs = engine(*arguments)
        means = task.means(outputs, valid)
        profiler.mark("backward")
        engine.backward(means["loss"])
        profiler.mark("optimizer")
        taken = engine.step(lr)
        seen.append((batch.clip_ids, outputs, means, valid))
    profiler.mark("other")
    progress.step += 1
    progress.position += settings.batch_size
    for _, _, means, valid in seen:
        totals.add(means, valid, counts=taken)
    if taken:
        services.skips.taken()
    else:
        services.skips.skipped(progress.step, [(ids, outputs) for ids, outputs, _, _ in seen])
    profiler.end_step()
    return lr


@torch.no_grad()
def validate(
    engine: TrainEngine,
    batches: Iterator[Batch],
    task: Task,
    watch: Callable[[Batch, dict[str, Tensor], Tensor], None] = lambda *_: None,
    beat: Callable[[str], None] = lambda _: None,
) -> dict[str, float]:
    """Means over held-out clips. Collective.

    Args:
        engine: Holds the task's module.
        batches: One pass over the clips.
        task: What is trained.
        watch: Sees each batch, what the module gives for it, and which of its clips count.
        beat: Told before each batch; see :class:`Services`.
    """
    totals = Totals(engine.world.device)
    engine.train(False)
    beat("a validation")
    for batch in batches:
        beat("a validation")
        arguments, valid = task.arguments(batch, training=False)
        outputs = engine(*arguments)
        watch(batch, outputs, valid)
        totals.add(task.means(outputs, valid), valid)
    engine.train(True)
    return totals.means(engine.world)
