"""The training loop: what happens in a step, and what happens between steps."""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import torch
from torch import Tensor

from ssast.engine.config import Config
from ssast.engine.deepspeed_engine import TrainEngine
from ssast.engine.distributed import World, reduce_max, reduce_sum
from ssast.engine.monitor import Monitor
from ssast.engine.objective import MSPM, mean_losses, with_masks
from ssast.engine.optim import Plateau, learning_rate
from ssast.pipelines.batch import Batch


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why."""


@dataclass
class Progress:
    """What changes from step to step, besides the weights and the optimizer."""

    step: int = 0
    position: int = 0
    """Clips taken from the data order so far, over all ranks."""

    plateau: Plateau = field(default_factory=Plateau)
    best_loss: float = math.inf
    """Of all validations."""


class Totals:
    """Sums over clips that stay on the device until they are asked for."""

    def __init__(self, device: torch.device):
        self._sums, self._names = torch.zeros(0, device=device), list[str]()

    def add(self, means: dict[str, Tensor], valid: Tensor) -> None:
        """Add the means over the valid clips of one batch."""
        count = valid.sum()
        values = [count, *(value.detach() * count for value in means.values())]
        row = torch.stack([v.to(torch.float64) for v in values])
        if not self._names:
            self._names, self._sums = list(means), torch.zeros_like(row)
        self._sums += row

    def means(self, world: World) -> dict[str, float]:
        """Means over the clips of all ranks since the last call. Collective."""
        count, *sums = reduce_sum(self._sums.tolist(), world)
        self._sums.zero_()
        return {n: s / max(count, 1) for n, s in zip(self._names, sums, strict=True)}


class Stop:
    """Set by SIGINT or SIGTERM; a second signal acts at once."""

    def __init__(self) -> None:
        self.signal = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch both signals inside, then put the handlers before back."""
        before = {s: signal.signal(s, self._catch) for s in (signal.SIGINT, signal.SIGTERM)}
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


def train(
    engine: TrainEngine,
    batches: Iterator[Batch],
    progress: Progress,
    config: Config,
    *,
    monitor: Monitor,
    validate: Callable[[], dict[str, float]],
    save: Callable[[bool], None],
) -> int:
    """Train from ``progress.step`` to ``train.steps``.

    Args:
        engine: Holds an MSPM module.
        batches: The data from ``progress.position`` on.
        progress: Carried on in place.
        config: Of the run.
        monitor: Told of everything.
        validate: Gives the mean losses over the held-out clips.
        save: Writes a checkpoint; its argument says whether it is the best so far.

    Returns:
        The signal that stopped the run, after a checkpoint was saved, or 0.

    Raises:
        TrainingError: No step between two log lines gave a finite gradient.
    """
    world, stop, settings = engine.world, Stop(), config.train
    totals, skipped, logged = Totals(world.device), engine.skipped_steps, progress.step
    with stop.listening():
        if progress.step == 0:
            monitor.log_valid(0, validate())
            monitor.restart_clock(progress.step)
        while progress.step < settings.steps:
            lr = step(engine, batches, progress, config, totals, monitor)
            last, saved = progress.step == settings.steps, False
            report = last or progress.step % settings.log_every == 0

            if report:
                means = totals.means(world)
                skipped, before = engine.skipped_steps, skipped
                if skipped - before == progress.step - logged:
                    raise TrainingError(
                        f"no step from {logged + 1} to {progress.step} gave a finite gradient: "
                        "lower optim.lr or set optim.max_grad_norm, then --resume"
                    )
                logged = progress.step
                monitor.log_train(progress.step, {**means, "lr": lr, "skipped": skipped - before})
            if progress.step % settings.validate_every == 0 or last:
                values = validate()
                monitor.log_valid(progress.step, values)
                progress.plateau.update(values.get("accuracy", -values["loss"]), config.optim)
                if values["loss"] < progress.best_loss:
                    progress.best_loss = values["loss"]
                    save(True)
                    saved = True
                monitor.restart_clock(progress.step)
            # Asking other ranks waits for the device: only where the report does so anyway.
            stopped = (report or world.world_size == 1) and stop.asked(world)
            if not saved and (stopped or last or progress.step % settings.save_every == 0):
                save(False)
                monitor.restart_clock(progress.step)
            if stopped:
                return stop.signal
    return 0


def step(
    engine: TrainEngine,
    batches: Iterator[Batch],
    progress: Progress,
    config: Config,
    totals: Totals,
    monitor: Monitor,
) -> float:
    """One optimizer step; returns its learning rate. The host never waits for the device here."""
    model, settings = engine.module, config.train
    assert isinstance(model, MSPM)
    lr = learning_rate(
        progress.step,
        config.optim,
        steps=settings.steps,
        plateau_scale=progress.plateau.scale,
    )
    for _ in range(settings.accumulate):
        with monitor.waiting_for_data():
            batch = next(batches)
        masks = model.draw_masks(batch.clip_ids, batch.epochs, batch.num_frames)
        losses = engine(batch.fbank, *masks)
        valid = with_masks(batch.valid, masks)
        means = mean_losses(losses, valid, config.objective.mse_weight)
        engine.backward(means["loss"])
        engine.step(lr)
        totals.add(means, valid)
    progress.step += 1
    progress.position += settings.batch_size
    return lr


@torch.no_grad()
def validate(engine: TrainEngine, batches: Iterator[Batch], config: Config) -> dict[str, float]:
    """Mean losses over held-out clips, with masks that are the same each time. Collective."""
    model, totals = engine.module, Totals(engine.world.device)
    assert isinstance(model, MSPM)
    engine.train(False)
    for batch in batches:
        masks = model.held_out_masks(batch.clip_ids, batch.num_frames)
        valid = with_masks(batch.valid, masks)
        losses = engine(batch.fbank, *masks)
        totals.add(mean_losses(losses, valid, config.objective.mse_weight), valid)
    engine.train(True)
    return totals.means(engine.world)
