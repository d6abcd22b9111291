"""A whole training run: engine, streams, loop, checkpoints, logs. What is trained is a job."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssast.engine.checkpoints.background import Saver
from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.config import Config, dump_config, from_plain, to_plain
from ssast.engine.errors import ConfigError, TrainingError
from ssast.engine.monitoring.curves import draw_curves
from ssast.engine.monitoring.flops import peak_flops, step_flops_per_clip
from ssast.engine.monitoring.guard import SkipLog
from ssast.engine.monitoring.monitor import Monitor, environment
from ssast.engine.monitoring.watchdog import Watchdog
from ssast.engine.parallel.agreement import check_agreement, code_version
from ssast.engine.parallel.deepspeed_engine import TrainEngine
from ssast.engine.parallel.ranks import (
    World,
    broadcast_object,
    expecting_peers,
    init_world,
    run_on_main,
)
from ssast.engine.train.building import build_engine, precision_of
from ssast.engine.train.job import Job, Workplace, micro_batch_size, run_folder
from ssast.engine.train.loop import Progress, Services, train
from ssast.engine.train.memory import keep_freed_memory
from ssast.engine.train.optim import Plateau
from ssast.kernels.attention import attention_backend, attention_trials
from ssast.kernels.matmul import fast_matmul, is_fast
from ssast.pipelines.clips.mix import fingerprint
from ssast.pipelines.clips.shards import ClipPaths

MAX_ROLLBACKS = 3  # to one checkpoint, before a run is given up


def run_training(
    config: Config,
    build: Callable[[Workplace], Job],
    *,
    clips: ClipPaths,
    fixed: Sequence[tuple[str, str]],
    resume: bool,
) -> int:
    """Run a training, or go on with one.

    Args:
        config: Everything about it.
        build: Makes the job, after the seed is set.
        clips: The training clips, which must stay the same when a run goes on.
        fixed: Sections and keys of the configuration that must stay the same.
        resume: Go on from the latest checkpoint in the run's folder, if there is one.

    Returns:
        0, or the number of the signal that stopped the run after it had saved a checkpoint.

    Raises:
        ConfigError: Settings that do not fit together or with this machine, or a folder that
            holds another run.
        DataError: Too many unreadable clips.
        CheckpointError: A checkpoint cannot be written or read.
        TrainingError: Training diverged.
        LostPeer: Another process of the run is gone.
    """
    world = init_world(config.train.timeout_s)
    with expecting_peers(world), fast_matmul():
        return _Run(config, world, clips=clips, fixed=fixed, resume=resume).train(build)


class _Run:
    """The parts of a run, and how they work together."""

    def __init__(
        self,
        config: Config,
        world: World,
        *,
        clips: ClipPaths,
        fixed: Sequence[tuple[str, str]],
        resume: bool,
    ):
        self.config, self.world = config, world
        batch_size = micro_batch_size(config, world)
        self.folder = run_folder(config)
        self.watchdog = Watchdog(
            config.train.timeout_s,
            self.folder / f"hung-rank{world.rank}.txt",
            f"rank {world.rank}",
        )
        self.place = Workplace(config, world, batch_size, self.watchdog.beat)
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints", keep=config.train.keep_checkpoints
        )
        self.clips: dict[str, int | str] = {"count": len(clips), "sha256": fingerprint(clips)}
        check_agreement(
            {**to_plain(config), "code version": code_version(), "clips": self.clips}, world
        )
        self.found = run_on_main(
            lambda: _open_run(self.folder, config, self.checkpoints, self.clips, fixed, resume),
            world,
        )
        self.progress = Progress()
        self.rolled_back: Counter[Path] = Counter()
        self.precision = precision_of(config, world.device)

    def train(self, build: Callable[[Workplace], Job]) -> int:
        """Build everything else, go through the steps, finish; 0 or the signal that stopped it."""
        config, world, run = self.config, self.world, self.folder
        if world.device.type == "cpu":
            keep_freed_memory()
        torch.manual_seed(config.train.seed)
        self.job = job = build(self.place)
        job.module.to(world.device)
        self.engine = engine = build_engine(
            config,
            job.module,
            job.encoder,
            job.optimizer(),
            world=world,
            batch_size=self.place.batch_size,
        )
        if self.found is not None:
            self.progress = _restore(engine, self.found, job)
        self.monitor = monitor = self._monitor()
        self.saver = Saver(self.checkpoints, world, monitor.say)
        services = Services(
            monitor=monitor,
            beat=self.watchdog.beat,
            skips=SkipLog(run / "skipped.jsonl", world.rank, lambda row: str(job.train_paths[row])),
            validate=lambda: job.validate(engine, self.progress),
            save=self._save,
            roll_back=self._roll_back,
        )
        try:
            with self.watchdog:
                with job.train_batches(self.progress.position) as batches:
                    stopped = train(engine, batches, self.progress, config, job, services)
                self.watchdog.beat("writing a checkpoint")
                self.saver.wait()
                if not stopped:
                    job.finish(engine, self.progress)
        finally:
            self.saver.close()
            monitor.close()
            engine.close()
        if world.is_main:
            draw_curves(run)
            what = f"stopped by signal {stopped} after" if stopped else "finished"
            print(f"{what} step {self.progress.step} of {config.train.steps}: {run}", flush=True)
        return stopped

    def _monitor(self) -> Monitor:
        """The logs, with what was chosen and why in their first lines."""
        config, world, run = self.config, self.world, self.folder
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        facts = environment(
            world,
            attention=attention_backend(world.device, dtype),
            precision=self.precision,
            matmul="oneDNN" if is_fast() else "PyTorch's choice",
            fbank=config.data.fbank_backend,
            code=code_version(),
        )
        if world.is_main:
            for name, content in (("environment", facts), ("deepspeed", self.engine.settings)):
                (run / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
        monitor = Monitor(
            run,
            world=world,
            step=self.progress.step,
            steps=config.train.steps,
            batch_size=config.train.batch_size,
            flops_per_clip=step_flops_per_clip(config),
            peak_flops=peak_flops(facts["device"]) if world.device.type == "cuda" else None,
        )
        products = "products by oneDNN, " if is_fast() else ""
        monitor.say(
            f"{config.model.size} with {config.model.patch[0]} x {config.model.patch[1]} patches, "
            f"{self.job.summary}; "
            f"{world.world_size} x {facts['device']}, {self.precision}, "
            f"{products}attention {facts['attention']}, ZeRO stage {config.train.zero_stage}"
        )
        for backend, reason in attention_trials(world.device, dtype).items():
            if reason:
                monitor.say(f"attention {backend} is not used: {reason}")
        if self.found is not None:
            monitor.say(f"resumed from {self.found} at step {self.progress.step}")
        return monitor

    def _save(self, best: bool) -> None:
        self.watchdog.beat("gathering a checkpoint")
        progress = self.progress
        tensors, adam_step = self.engine.state()
        tensors["rng/cpu"] = torch.get_rng_state()
        tensors |= self.job.tensors()
        meta = {
            "progress": vars(progress) | {"plateau": dict(vars(progress.plateau))},
            "adam_step": adam_step,
            "clips": self.clips,
            "config": to_plain(self.config),
            **self.job.meta(),
        }
        criterion = progress.best_loss if best else None
        self.saver.save(tensors, meta, step=progress.step, best=criterion)

    def _roll_back(self) -> None:
        step, position = self.progress.step, self.progress.position
        run_on_main(self.saver.settle, self.world)
        found = run_on_main(self.checkpoints.latest, self.world)
        if found is None:
            self.monitor.say(f"the loss has jumped at step {step}; there is no checkpoint yet")
            return
        self.rolled_back[found] += 1
        if self.rolled_back[found] > MAX_ROLLBACKS:
            raise TrainingError(
                f"the loss has jumped {MAX_ROLLBACKS} times after {found}, the last time at step "
                f"{step}: lower optim.lr or set optim.max_grad_norm, then --resume"
            )
        restored = _restore(self.engine, found, self.job)
        restored.position = position  # over the clips with which it happened
        vars(self.progress).update(vars(restored))
        self.monitor.rewind(self.progress.step)
        self.monitor.say(
            f"the loss has jumped at step {step}: back to {found.name}, on with other clips"
        )


def _open_run(
    run: Path,
    config: Config,
    checkpoints: Checkpoints,
    clips: dict[str, int | str],
    fixed: Sequence[tuple[str, str]],
    resume: bool,
) -> Path | None:
    """Make or check the run's folder; the checkpoint to go on from, if any."""
    found = checkpoints.latest()
    if found is not None and not resume:
        raise ConfigError(
            f"{run} holds a run ({found.name}): add --resume to go on with it, "
            "or choose another run.folder"
        )
    if found is not None:
        _, meta = Checkpoints.load(found, check=False)
        # What an older version did not know had its default.
        old, new = to_plain(from_plain(meta["config"])), to_plain(config)
        for section, key in fixed:
            before, now = old.get(section, {}).get(key), new.get(section, {}).get(key)
            if before != now:
                raise ConfigError(
                    f"{section}.{key} was {before!r} when {run} began, now it is "
                    f"{now!r}: choose another run.folder"
                )
        if meta["clips"] != clips:
            named = f"data.train {config.data.train} lists other clips"
            if config.data.mix is not None:
                named = f"data.mix {config.data.mix} lists other clips or shares"
            raise ConfigError(
                f"{named} ({clips['count']}) than when {run} began "
                f"({meta['clips']['count']}): choose another run.folder"
            )
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(dump_config(config))
    return found


def _restore(engine: TrainEngine, path: Path, job: Job) -> Progress:
    # Rank 0 alone reads: other machines need not see its disk.
    tensors: dict[str, Tensor] = {}
    meta: dict[str, Any] = {}
    rng = torch.get_rng_state()
    if engine.world.is_main:
        tensors, meta = Checkpoints.load(path, check=False)
        rng = tensors["rng/cpu"].clone()
    meta, rng = broadcast_object((meta, rng), engine.world)
    job.restore(tensors, meta)
    engine.load_state(tensors, meta["adam_step"])
    torch.set_rng_state(rng)
    plateau = Plateau(**meta["progress"].pop("plateau"))
    return Progress(**meta["progress"], plateau=plateau)
