"""The training loop: what happens between steps."""

from collections import Counter
from collections.abc import Iterator, Sequence

from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.errors import Stopped, TrainingError
from ssast.engine.monitoring.guard import CollapseGuard, SkipLog, SpikeGuard
from ssast.engine.monitoring.monitor import Monitor
from ssast.engine.monitoring.profiling import StepProfiler
from ssast.engine.parallel.ranks import gather_objects, reduce_sum, run_on_main
from ssast.engine.train.callbacks import Callback, Callbacks, RunState
from ssast.engine.train.execution import start_execution
from ssast.engine.train.optim import learning_rate, warmup_steps
from ssast.engine.train.saving import Saver
from ssast.engine.train.state import TrainState
from ssast.engine.train.step import MicroBatch, Totals, train_step
from ssast.pipelines.locks import FolderLock
from ssast.pipelines.stream.batch import Batch

MAX_ROLLBACKS = 3  # to one checkpoint, before a run is given up


class Trainer:
    """Trains, validates, logs and saves, from where the progress stands to the last step.

    Args:
        state: Task, engine and progress.
        checkpoints: Where the state is saved.
        monitor: Logs of the run.
        lock: Lock of the run's folder.
        fallback: Where the state is saved if it cannot be saved there.
        callbacks: The user's, called between steps.
    """

    def __init__(
        self,
        state: TrainState,
        checkpoints: Checkpoints,
        monitor: Monitor,
        lock: FolderLock,
        fallback: Checkpoints | None = None,
        callbacks: Sequence[Callback] = (),
    ):
        self.state, self.checkpoints, self.monitor = state, checkpoints, monitor
        task = state.task
        self.context = context = task.context
        world = context.world
        self.saver = Saver(
            checkpoints,
            world,
            monitor.say,
            lock,
            max_failed=context.config.train.max_failed_saves,
            fallback=fallback,
        )
        self.totals = Totals(world.device)
        self.totals.load(*state.progress.totals, world)
        self.skip_log = SkipLog(
            context.folder / "skipped.jsonl", world.rank, lambda row: str(task.train_paths[row])
        )
        config, progress = context.config, state.progress
        self.spike_guard = SpikeGuard(config.train.spike_factor, progress.losses)
        reports = config.objective.collapse_reports
        self.collapse_guard = CollapseGuard(task.floors, reports, progress.below)
        self.rollbacks: Counter[str] = Counter()
        self.stop = context.stop
        self.stop.failing = lambda: self.saver.failing
        self.callbacks = Callbacks(callbacks, RunState(state, monitor))
        self.stop.ending = lambda: self.callbacks.reason != ""

    def train(self) -> int:
        """Train to ``train.steps``, or until the patience of the task is over.

        Returns:
            The signal that stopped the run, after a checkpoint was saved, or 0.

        Raises:
            TrainingError: ``train.max_skipped_steps`` steps in a row gave no finite gradient (the
                state before them was saved), or the loss jumped again and again, or training
                collapsed.
            CheckpointError: ``train.max_failed_saves`` checkpoints in a row could not be written.
            FolderInUse: Another process has taken over the run's folder.
        """
        try:
            return self._train()
        except Stopped:  # in a validation, which is made up for when the run is resumed
            self.saver.check()
            self._save(None, last=True)
            return self.stop.signal

    def _train(self) -> int:
        task, engine, progress = self.state.task, self.state.engine, self.state.progress
        config, world, settings = self.context.config, self.context.world, self.context.config.train
        with (
            task.train_batches(progress.position) as stream,
            StepProfiler(config, world, task.module, self.monitor.say) as profiler,
        ):
            batches = self._watch(stream)
            restored = self.state.restored
            if restored is not None and restored.parent != self.checkpoints.folder:  # the fallback
                self._save(self.state.best, last=self._finished())
            self.callbacks.call("on_start")
            if progress.step == 0:
                self._validate()
            elif progress.validation_due:  # the run was stopped in it
                self._save(self._validate())
            batches = self._start_execution(batches)
            while not self._finished():
                lr = learning_rate(
                    progress.step,
                    config.optim,
                    steps=settings.steps,
                    plateau_scale=progress.plateau.scale,
                    steps_per_epoch=task.steps_per_epoch,
                )
                updated, micro_batches = train_step(task, engine, batches, lr, profiler.mark)
                self._record(updated, micro_batches)
                profiler.end_step()

                step = progress.step
                self.callbacks.call("on_step")
                self.tell_checkpoints()
                if self.skip_log.consecutive >= settings.max_skipped_steps:
                    self._diverged()
                log = step % settings.log_every == 0 or step == settings.steps
                if log:
                    values = self._log(lr)
                    self._check_collapse(values)
                    # The mean of a few last steps varies more than those before.
                    whole = step % settings.log_every == 0
                    if whole and self.spike_guard.spiked(values["loss"]) and self._roll_back():
                        continue
                validate = step % settings.validate_every == 0 or step == settings.steps
                best = self._validate() if validate else None
                # Asking other ranks waits for the device: only where logging does so anyway.
                ask = log or world.world_size == 1 or world.device.type == "cpu"
                stopped = ask and self.stop.requested(world)
                if ask:
                    self.context.check_rejected("train")
                if stopped:
                    self.saver.check()
                if self.stop.ends:
                    self._end_early()
                    best = best if validate else self._validate()
                finished = self._finished()
                if finished and not log:  # by patience or a callback
                    self._log(lr)
                last = stopped or finished
                if best is not None or last or step % settings.save_every == 0:
                    self._save(best, last=last)
                if stopped:
                    return self.stop.signal
        return 0

    def tell_checkpoints(self) -> None:
        """Tell the callbacks of the checkpoints that are on the disk since the last call."""
        for path in self.saver.take_written():
            self.callbacks.call("on_checkpoint", path)

    def close(self) -> None:
        """Let the last checkpoint be written, and close logs and engine."""
        self.saver.close()
        self.monitor.close()
        self.state.engine.close()

    def _watch(self, stream: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches of a stream, timing how long each is waited for."""
        while True:
            self.context.heartbeat("waiting for training data")
            with self.monitor.waiting_for_data():
                batch = next(stream)
            self.context.heartbeat("a training step")
            yield batch

    def _start_execution(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Choose how the training pass is executed; return the same batches. Collective."""
        if self._finished():
            return batches
        steps = self.context.config.train.steps
        self.context.heartbeat("a trial of the training pass")
        execution, batches = start_execution(self.state.task, batches, steps=steps)
        self.monitor.log_environment(execution=execution.facts())
        for line in execution.lines():
            self.monitor.say(line)
        self.monitor.restart_clock(self.state.progress.step)
        return batches

    def _finished(self) -> bool:
        progress, patience = self.state.progress, self.state.task.patience
        out_of_patience = patience is not None and progress.since_best >= patience
        ended = out_of_patience or progress.ended_by != ""
        return ended or progress.step >= self.context.config.train.steps

    def _end_early(self) -> None:
        """Note which callback ended the run. Collective."""
        progress = self.state.progress
        reason = next(filter(None, gather_objects(self.callbacks.reason, self.context.world)))
        progress.ended_by = reason.partition(":")[0]
        self.monitor.say(f"ended at step {progress.step} by the callback {reason}")

    def _record(self, updated: bool, micro_batches: list[MicroBatch]) -> None:
        """Count a step, and its losses if it changed the weights."""
        progress = self.state.progress
        progress.step += 1
        progress.position += self.context.config.train.batch_size
        for micro_batch in micro_batches:
            self.totals.add(micro_batch.means, micro_batch.valid, counts=updated)
        if updated:
            self.skip_log.taken()
        else:
            progress.skipped += 1
            self._record_skip(micro_batches)

    def _record_skip(self, micro_batches: list[MicroBatch]) -> None:
        """Log the clips of a skipped step, or that it had none. Collective."""
        step, world = self.state.progress.step, self.context.world
        count = sum(int(m.valid.sum()) for m in micro_batches)
        if reduce_sum([count], world)[0] == 0:
            self.monitor.say(f"step {step} is skipped: it has no valid clip")
            return
        self.skip_log.skipped(
            step,
            [
                (m.clip_ids[m.valid], {name: value[m.valid] for name, value in m.outputs.items()})
                for m in micro_batches
            ],
        )

    def _log(self, lr: float) -> dict[str, float]:
        """Log the steps since the last line; return their means over all ranks. Collective."""
        values = self.totals.read(self.context.world, grad_norm=self.state.engine.grad_norm)
        progress = self.state.progress
        named = {**values, "lr": lr, "skipped_steps": progress.skipped}
        metrics = self.monitor.log_train(progress.step, named)
        progress.skipped = 0
        self.callbacks.call("on_log", metrics)
        return values

    def _validate(self) -> float | None:
        """Validate; return the criterion if no checkpoint on the disk has a lower one.

        It is that of the averaged weights, if there are any, but where they are a teacher's, whose
        outputs the raw ones predict. None at the start, whose weights need not be kept, and where
        the task has no criterion. That a validation before was better is not enough: its checkpoint
        may not have been written. Collective.

        Raises:
            Stopped: The run was asked to stop.
        """
        task, engine, progress = self.state.task, self.state.engine, self.state.progress
        progress.validation_due = True
        values = task.validate(engine)
        averaged = None
        # At the start both are the same weights.
        if engine.averages and task.teacher is None and progress.step > 0:
            with engine.averaged():
                averaged = task.validate(engine)
        task.end_validation(engine, progress.step)
        progress.validation_due = False
        metrics = self.monitor.log_valid(progress.step, values, averaged)
        self.callbacks.call("on_validation", metrics)
        self.monitor.restart_clock(progress.step)
        if progress.step == 0:
            return None
        judged = values if averaged is None else averaged
        criterion = task.criterion(judged)
        self.context.heartbeat("writing a checkpoint")
        # The learning rate follows the raw weights: averaging must not change what is trained.
        progress.plateau.update(task.score(values), self.context.config.optim)
        progress.update(task.score(judged))
        if criterion is None:
            return None
        return criterion if criterion < self.saver.best_value() else None

    def _save(self, best: float | None, *, last: bool = False) -> None:
        self.context.heartbeat("gathering a checkpoint")
        progress = self.state.progress
        progress.losses = list(self.spike_guard.losses)
        progress.below = dict(self.collapse_guard.below)  # copied: a thread writes them
        progress.totals = self.totals.gather(self.context.world)
        tensors, meta = self.state.gather()
        self.saver.save(tensors, meta, step=progress.step, best=best, last=last)
        self.monitor.restart_clock(progress.step)

    def _diverged(self) -> None:
        """End the run after too many skipped steps."""
        self._save(None, last=True)  # the weights before them: skipped steps change none
        step, consecutive = self.state.progress.step, self.skip_log.consecutive
        raise TrainingError(
            f"no step from {step - consecutive + 1} to {step} "
            f"gave a finite gradient (their clips are in {self.skip_log.path}): lower "
            "optim.lr or set optim.max_grad_norm, then --resume"
        )

    def _check_collapse(self, values: dict[str, float]) -> None:
        """End the run where the metrics of a log line, which ranks share, show a collapse.

        Not in the warm-up. No checkpoint is written: the weights are of no use.
        """
        step, config = self.state.progress.step, self.context.config
        if step <= warmup_steps(config.optim, config.train.steps):
            return
        name = self.collapse_guard.collapsed(values)
        if name is not None:
            raise TrainingError(
                f"training has collapsed at step {step}, what the patches have has become alike: "
                f"{name} {values[name]:.2g} is below objective.min_{name} "
                f"{self.collapse_guard.floors[name]:g} in {self.collapse_guard.reports} log lines "
                "in a row: begin anew with a lower optim.lr, a longer optim.warmup_steps or a "
                "higher objective.teacher_decay"
            )

    def _roll_back(self) -> bool:
        """Go back to the last checkpoint, on with other clips; return whether there was one."""
        world, progress = self.context.world, self.state.progress
        step, position = progress.step, progress.position
        run_on_main(self.saver.settle, world)
        found = run_on_main(self.checkpoints.latest, world)
        if found is None:
            self.monitor.say(f"the loss has jumped at step {step}; there is no checkpoint yet")
            return False
        self.rollbacks[found.name] += 1
        if self.rollbacks[found.name] > MAX_ROLLBACKS:
            raise TrainingError(
                f"the loss has jumped {MAX_ROLLBACKS} times after {found}, the last time at step "
                f"{step}: lower optim.lr or set optim.max_grad_norm, then --resume"
            )
        self.state.restore(found)
        self.totals.load(*progress.totals, world)
        for note in self.state.notes:
            self.monitor.say(note)
        progress.position = position  # past the clips with which it happened
        self.monitor.rewind(progress.step)
        self.monitor.say(
            f"the loss has jumped at step {step}: back to {found.name}, on with other clips"
        )
        return True
