"""A whole training run: folder, engine, logs, loop. What is trained is a task."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.config import Config, dump_config, from_plain, is_of_run, load_config, to_plain
from ssast.engine.errors import CheckpointError, ConfigError, ReportError, Stopped
from ssast.engine.evaluation.cut_clips import sampled_cut
from ssast.engine.monitoring.curves import draw_curves
from ssast.engine.monitoring.flops import peak_flops, step_flops_per_clip
from ssast.engine.monitoring.loggers import build_loggers, check_loggers
from ssast.engine.monitoring.monitor import Monitor, environment, read_metrics
from ssast.engine.monitoring.reporting import reporting
from ssast.engine.monitoring.watchdog import Watchdog
from ssast.engine.parallel.agreement import check_agreement, code_version
from ssast.engine.parallel.ranks import expecting_peers, init_world, run_on_main
from ssast.engine.train.building import build_engine
from ssast.engine.train.caching import check_memory, describe_cache
from ssast.engine.train.callbacks import Callback
from ssast.engine.train.inputs import (
    NOT_TRAINED_ON,
    SELECTING,
    change_of,
    changed,
    differences,
    versions,
)
from ssast.engine.train.optim import warmup_steps
from ssast.engine.train.precision import choose_precision
from ssast.engine.train.saving import check_fallback, fallback_checkpoints
from ssast.engine.train.state import TrainState, seed_rank
from ssast.engine.train.task import RunContext, Task, check_batch, run_folder
from ssast.engine.train.trainer import Trainer
from ssast.kernels.attention import attention_backend, attention_trials
from ssast.kernels.matmul import fast_matmul, is_fast
from ssast.kernels.memory import keep_freed_memory
from ssast.pipelines.clips.mix import fingerprint
from ssast.pipelines.clips.shards import ClipPaths
from ssast.pipelines.files import write_atomically
from ssast.pipelines.locks import FolderLock
from ssast.pipelines.text import say

FEW_CLIPS = 1000  # a validation of so many is short, however often there is one

_log = logging.getLogger(__name__)


def run_training(
    config: Config,
    build: Callable[[RunContext], Task],
    *,
    clips: ClipPaths,
    inputs: Mapping[str, str],
    fixed: Sequence[tuple[str, str]],
    resume: bool,
    notes: Sequence[str] = (),
    callbacks: Sequence[Callback] = (),
) -> int:
    """Train, or resume training.

    Args:
        config: Configuration of the run.
        build: Builds the task; called after the seed is set.
        clips: The training clips, which must be the same when a run is resumed.
        inputs: Fingerprints of what else must be, see :mod:`ssast.engine.train.inputs`.
        fixed: Sections and keys of the configuration that must be the same then.
        resume: Resume from the latest checkpoint in the run's folder, if there is one.
        notes: First lines of the log: which settings are from where.
        callbacks: Called between steps, see :class:`~ssast.engine.train.callbacks.Callback`.

    Returns:
        0, or the number of the signal that stopped the run after it had saved a checkpoint.

    Raises:
        ConfigError: Settings that do not fit together or with this machine, or a folder that
            holds another run.
        FolderInUse: Another process is training in the folder, or has taken it over.
        DataError: Too many unreadable clips.
        CheckpointError: A checkpoint cannot be written or read.
        TrainingError: Training diverged, or a callback failed.
        LostPeer: Another process of the run is gone.
    """
    world = init_world(config.train.timeout_s)
    folder = run_folder(config)
    lock = FolderLock(folder, "another process is training")
    with expecting_peers(world), fast_matmul(), lock:
        report = folder / f"hung-rank{world.rank}.txt"
        watchdog = Watchdog(config.train.timeout_s, report, f"rank {world.rank}")
        context = RunContext(config, world, watchdog.heartbeat)
        checkpoints = Checkpoints(folder / "checkpoints", keep=config.train.keep_checkpoints)
        fallback = fallback_checkpoints(config)
        described: dict[str, int | str] = {"count": len(clips), "sha256": fingerprint(clips)}
        facts = {"version": versions(), "training clips": described, **inputs}
        check_agreement(to_plain(config) | facts, world)
        check_memory(config, world, len(clips))
        # In short turns: other ranks wait in a collective meanwhile, which ends at train.timeout_s.
        while not run_on_main(lambda: _acquire(lock, 0.3 * world.timeout_s), world):
            pass
        found = run_on_main(
            lambda: _open_folder(
                folder, config, checkpoints, fallback, described, inputs, fixed, resume
            ),
            world,
        )
        if world.device.type == "cpu":
            keep_freed_memory()
        torch.manual_seed(config.train.seed)
        task = build(context)
        choice = choose_precision(task, found)
        if choice is not None:
            notes = [*notes, f"train.precision auto: {choice.precision}: {choice.reason}"]
        notes = [*notes, *outside_patches(config)]
        state = TrainState(task, build_engine(task), described, inputs)
        run_on_main(lambda: _store_config(folder, config), world)  # once it is known to work
        if found is not None:
            state.restore(found)
        else:
            seed_rank(config.train.seed, 0, world)
        monitor = _open_monitor(state, found, notes)
        trainer = Trainer(state, checkpoints, monitor, lock, fallback, callbacks)
        # To the end: a signal must not interrupt the writing of the last checkpoint.
        with context.stop.listening():
            _train(trainer, watchdog, lock)
            # Also of a signal after the last step, or while logs were closed: what follows waits.
            context.stop.requested(world)
        stopped = context.stop.signal
        if world.is_main:
            try:
                with reporting(f"ssast visualize {folder} draws the curves again"):
                    draw_curves(folder)
            except ReportError as error:  # the status must stay that of the training
                _log.warning("%s", error)
            how = f"stopped by signal {stopped} after" if stopped else "finished"
            say(f"{how} step {state.progress.step} of {config.train.steps}: {folder}")
        return stopped


def _train(trainer: Trainer, watchdog: Watchdog, lock: FolderLock) -> None:
    """Train, write what is left, and report."""
    state, context = trainer.state, trainer.context
    error: BaseException | None = None
    try:
        with watchdog:
            stopped = trainer.train()
            context.heartbeat("writing a checkpoint")
            trainer.saver.wait()
            run_on_main(lock.check, context.world)
            trainer.tell_checkpoints()
            if not stopped:
                try:
                    state.task.finish(state.engine, state.progress)
                except Stopped:  # by a signal that came after the last step
                    trainer.saver.check()
    except BaseException as raised:
        error = raised
        raise
    finally:
        try:
            trainer.callbacks.end(error)
        finally:
            trainer.close()


def check_start(config: Config, *, resume: bool) -> bool:
    """Check what can be known of a run before anything is read. Collective.

    Returns:
        Whether there is a checkpoint from which it goes on.

    Raises:
        ConfigError: Its folder is not set, is one of data or holds a run that is not resumed, its
            batch cannot be divided, or a logger is not installed.
        CheckpointError: All checkpoints in its folder are damaged.
    """
    checkpoints = Checkpoints(run_folder(config) / "checkpoints")
    world = init_world(config.train.timeout_s)
    check_batch(config, world.world_size)
    check_loggers(config.run.loggers)

    def begun() -> bool:
        if not resume:
            _check_free(checkpoints.latest())
        return has_begun(checkpoints.folder.parent)

    with expecting_peers(world):
        return run_on_main(begun, world)


def has_begun(run: Path) -> bool:
    """Return whether a run has a checkpoint, which is verified when it is taken up."""
    return any((run / "checkpoints").glob("step*"))


def _check_free(found: Path | None) -> None:
    """Refuse to begin a run where there is a checkpoint of one."""
    if found is not None:
        raise ConfigError(
            f"{found.parents[1]} holds a run ({found.name}): add --resume (in Python resume=True) "
            "to go on with it, or choose another run.folder"
        )


def outside_patches(config: Config) -> list[str]:
    """Return a line for the log on the mel bins and frames that are in no patch, if there are any.

    Patches begin at the first bin and frame, as published: what is left over is at the ends, and
    between patches whose stride is larger than they are.
    """
    patch, audio = config.model.patch, config.audio
    stride = (config.finetune and config.finetune.stride) or patch
    sizes = {"mel bins": audio.n_mels, "frames": audio.num_frames}
    left = [
        f"{outside} of {total} {name}"
        for (name, total), size, step, count in zip(
            sizes.items(), patch, stride, config.grid, strict=True
        )
        if (outside := total - size - (count - 1) * min(size, step))
    ]
    cut = f"patches of {patch[0]} x {patch[1]}, {stride[0]} x {stride[1]} apart"
    return [f"{' and '.join(left)} are in no patch ({cut})"] if left else []


def _open_monitor(state: TrainState, found: Path | None, notes: Sequence[str]) -> Monitor:
    """Open the logs; their first lines say what was chosen, and why."""
    context, step = state.task.context, state.progress.step
    config, world, run = context.config, context.world, context.folder
    dtype = torch.bfloat16 if context.precision == "bf16" else torch.float32
    bf16_on_gpu = world.device.type == "cuda" and dtype == torch.bfloat16  # what peaks are of
    facts = environment(
        world,
        attention=attention_backend(world.device, dtype),
        precision=context.precision,
        matmul="oneDNN" if is_fast() else "PyTorch's choice",
        fbank=config.data.fbank_backend,
        code=code_version(),
    )
    if world.is_main:
        for name, content in (("environment", facts), ("deepspeed", state.engine.settings)):
            write_atomically(run / f"{name}.json", json.dumps(content, indent=1) + "\n")
    monitor = Monitor(
        run,
        world=world,
        step=step,
        steps=config.train.steps,
        batch_size=config.train.batch_size,
        flops_per_clip=step_flops_per_clip(config),
        peak_flops=peak_flops(facts["device"]) if bf16_on_gpu else None,
        loggers=build_loggers(config, run),
    )
    matmul = "matmul by oneDNN, " if is_fast() else ""
    monitor.say(
        f"{config.model.size} with {config.model.patch[0]} x {config.model.patch[1]} patches, "
        f"{state.task.summary}; "
        f"{world.world_size} x {facts['device']}, {context.precision}, "
        f"{matmul}attention {facts['attention']}, ZeRO stage {config.train.zero_stage}"
    )
    warmup = warmup_steps(config.optim, config.train.steps)
    if warmup >= config.train.steps:
        monitor.say(
            f"warning: the warm-up takes {warmup} steps, the run {config.train.steps}: the "
            f"learning rate does not stay at optim.lr; set optim.warmup_steps (0.1: 10 %)"
        )
    for note in notes:
        monitor.say(note)
    if world.is_main and not config.data.random_crop:
        cut = sampled_cut(state.task.train_paths, config.audio)
        if cut:
            monitor.say(cut)
    for backend, reason in attention_trials(world.device, dtype).items():
        if reason:
            monitor.say(f"attention {backend} is not used: {reason}")
    position = state.progress.position
    cached = describe_cache(config, world, len(state.task.train_paths), position)
    if cached is not None:
        monitor.say(cached)
    between = config.train.validate_every * config.train.batch_size
    if state.task.num_valid > max(between, FEW_CLIPS):
        monitor.say(
            f"warning: a validation reads {state.task.num_valid} clips, and training {between} "
            f"from one to the next: data.valid_clips={max(between // 10, FEW_CLIPS)} bounds it"
        )
    if found is not None:
        monitor.say(f"resumed from {found} at step {step}")
        for note in state.notes:
            monitor.say(note)
        if state.changes:
            monitor.say(f"warning: changed since the run began: {', '.join(state.changes)}")
    return monitor


def _open_folder(
    run: Path,
    config: Config,
    checkpoints: Checkpoints,
    fallback: Checkpoints | None,
    clips: Mapping[str, int | str],
    inputs: Mapping[str, str],
    fixed: Sequence[tuple[str, str]],
    resume: bool,
) -> Path | None:
    """Check the run's folder, which is locked; return the checkpoint to resume from, if any."""
    if fallback is not None:
        check_fallback(fallback, run)
    found = _newest(checkpoints, fallback)
    if found is None:
        _check_new(run, checkpoints.folder, config)
    if not resume:
        _check_free(found)
    if found is not None:
        _, meta = Checkpoints.load(found, check=False)
        # What an older version did not know had its default.
        differ = differences(from_plain(meta["config"]), config)
        for name in (f"{section}.{key}" for section, key in fixed):
            if name in differ:
                before, now = differ[name]
                raise ConfigError(
                    f"{name} was {before!r} when {run} began, now it is "
                    f"{now!r}: choose another run.folder"
                )
        if meta["clips"] != clips:
            named = f"data.train {config.data.train} lists other clips"
            if config.data.valid is None:
                named += ", or this version holds out others of them"
            if config.data.mix is not None:
                named = f"data.mix {config.data.mix} lists other clips or shares"
            if cuts := [change_of(name, differ[name]) for name in SELECTING if name in differ]:
                named = f"{', '.join(cuts)} gives other clips"
            raise ConfigError(
                f"{named} ({clips['count']}) than when {run} began "
                f"({meta['clips']['count']}): choose another run.folder"
            )
        others = [n for n in changed(meta.get("inputs", inputs), inputs) if n not in NOT_TRAINED_ON]
        if others:
            raise ConfigError(
                f"{' and '.join(others)} changed since {run} began: choose another run.folder"
            )
        _finish_mark(checkpoints, found, meta)
    return found


def _store_config(run: Path, config: Config) -> None:
    """Store the configuration of a run, from which it is resumed."""
    try:
        write_atomically(run / "config.yaml", dump_config(config))
    except OSError as error:
        raise ConfigError(f"run.folder {run}: cannot be written to: {error.strerror}") from error


def _newest(checkpoints: Checkpoints, fallback: Checkpoints | None) -> Path | None:
    """Return the newest checkpoint, of the run or of the fallback folder."""
    found = [path for c in (checkpoints, fallback) if c is not None and (path := c.latest())]
    return max(found, key=lambda path: int(path.stem[4:]), default=None)


def _finish_mark(checkpoints: Checkpoints, found: Path, meta: Mapping[str, Any]) -> None:
    """Mark a checkpoint as the best if the run was killed after writing it and before the mark."""
    best = meta.get("best")
    if best is None or found.parent != checkpoints.folder:
        return
    try:
        if best < checkpoints.best_value():
            checkpoints.mark_best(meta["step"], best)
    except CheckpointError as error:  # a full disk: training can go on
        _log.warning("%s", error)


def _check_new(run: Path, checkpoints: Path, config: Config) -> None:
    """Refuse to begin at step 0 where a run must have saved a checkpoint that is gone.

    A run that was killed before its first checkpoint may begin anew. Refuse also to write over a
    configuration that no run wrote.

    Raises:
        CheckpointError: Its metrics go beyond the first checkpoint, or cannot be read.
        ConfigError: The folder has a ``config.yaml`` of the user.
    """
    try:
        steps = [line["step"] for line in read_metrics(run / "metrics.jsonl")]
        saving = any(checkpoints.glob(".tmp-*"))  # killed while it wrote the first one
        stored = run / "config.yaml"
        if stored.is_file():
            config = load_config(stored)
            # A run that was killed before all else has left what it stored.
            if not is_of_run(stored) and stored.read_text("utf-8") != dump_config(config):
                raise ConfigError(f"{stored}: no run has written this: choose another run.folder")
        first = config.train.save_every
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or run} cannot be read: {error.strerror}"
        ) from error
    if max(steps, default=0) > first and not saving:
        raise CheckpointError(
            f"{run} holds metrics of {max(steps)} steps and no checkpoint: restore {checkpoints}, "
            "or choose another run.folder"
        )


def _acquire(lock: FolderLock, limit_s: float) -> bool:
    """Take the lock of a run folder; return False if it is not certain yet that it is free."""
    try:
        return lock.acquire(limit_s)
    except OSError as error:
        raise ConfigError(
            f"run.folder {lock.folder}: cannot be written to: {error.strerror}"
        ) from error
