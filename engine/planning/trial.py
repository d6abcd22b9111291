"""A setting tried out: a few real training steps in a process of its own.

The process may be killed, run out of memory or hang; whoever asked gets an answer all the same.
Without a stream of clips, one batch of noise takes the place of data.
"""

import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import psutil

from ssast.engine.config import Config, from_plain, to_plain

CGROUP = Path("/sys/fs/cgroup")
WARM_UP = 2  # steps before those that count
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc", "MemoryError")


@dataclass(frozen=True)
class Trial:
    """What became of it.

    Attributes:
        outcome: "ok", or why there are no numbers.
        reason: The last line of an error.
        step_s: Median seconds of a step.
        least_s: Of the fastest step; on a CPU, the least CPU seconds a thread, which do not depend
            on what else runs there.
        clips_per_s: Of this process.
        memory_gib: Highest memory: of the device, or resident on a CPU.
        base_gib: The same before there was a model.
    """

    outcome: Literal["ok", "out of memory", "too slow", "failed"]
    reason: str = ""
    step_s: float = float("nan")
    least_s: float = float("nan")
    clips_per_s: float = float("nan")
    memory_gib: float = float("nan")
    base_gib: float = float("nan")


def try_out(
    config: Config,
    *,
    seconds: float = 20.0,
    max_steps: int = 20,
    num_threads: int | None = None,
    attention: str | None = None,
    memory_gib: float | None = None,
    timeout_s: float = 300.0,
) -> Trial:
    """Run a few steps of a configuration on this machine.

    Args:
        config: Of one process; ``train.batch_size`` is that process's. Reads clips where
            ``data.train`` is set.
        seconds: For the steps that count; at least three, or two steps in all if they are long,
            are taken all the same.
        max_steps: Steps that count, at most.
        num_threads: Of PyTorch; its own choice if None.
        attention: A backend of :mod:`ssast.kernels.attention`; the fastest if None.
        memory_gib: What a CPU process may allocate; what is free now, less a tenth, if None.
        timeout_s: After which the process is killed.
    """
    task = {
        "config": to_plain(config),
        "seconds": seconds,
        "max_steps": max_steps,
        "attention": attention,
        "memory_gib": memory_gib or 0.9 * available_gib(),
    }
    env = dict(os.environ)
    if num_threads is not None:
        env["OMP_NUM_THREADS"] = str(num_threads)
    process = subprocess.Popen(
        [sys.executable, "-m", "ssast.engine.planning.trial"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(json.dumps(task), timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return Trial("too slow", f"no result within {timeout_s:.0f} s")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: nobody else's processes
            process.communicate()
    if process.returncode == 0:
        return Trial(**json.loads(out.splitlines()[-1]))
    lines = [line for line in err.splitlines() if line.strip()] or [""]
    if any(sign in err for sign in _OUT_OF_MEMORY) or process.returncode == -signal.SIGKILL:
        return Trial("out of memory", lines[-1])
    return Trial("failed", lines[-1] or f"exit status {process.returncode}")


def available_gib() -> float:
    """Return the main memory that this process and its children may still take."""
    left = psutil.virtual_memory().available
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and limit.read_text().strip() != "max":  # psutil knows the machine alone
        left = min(left, int(limit.read_text()) - int(used.read_text()))
    return left / 2**30


def _main() -> None:
    """The process: a task on stdin, a result on stdout."""
    task = json.loads(sys.stdin.readline())
    config = from_plain(task["config"])
    from ssast.engine.parallel.ranks import init_world
    from ssast.kernels.matmul import fast_matmul

    world = init_world()
    if world.device.type != "cuda":  # a GPU's driver reserves far more addresses than it uses
        limit = int(task["memory_gib"] * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with fast_matmul():
        trial = _measure(config, world, task)
    print(json.dumps(asdict(trial)), flush=True)
    os._exit(0)  # reading threads need not be waited for


def _measure(config: Config, world: Any, task: dict[str, Any]) -> Trial:
    import torch

    from ssast.engine.monitoring.monitor import peak_memory_gib
    from ssast.engine.train.building import build_engine
    from ssast.engine.train.memory import keep_freed_memory
    from ssast.engine.train.optim import build_optimizer
    from ssast.kernels import attention

    if task["attention"] is not None:
        attention.CANDIDATES = dict.fromkeys(attention.CANDIDATES, (task["attention"],))
    cuda, train = world.device.type == "cuda", config.train
    if not cuda:
        keep_freed_memory()
    module, loss_of = _task(config, world.device)
    micro = train.batch_size // train.accumulation_steps
    with _batches(config, micro, world) as batches:
        next(batches)
        base_gib = peak_memory_gib(world.device)
        optimizer = build_optimizer(module, config.optim)
        engine = build_engine(
            config, module, module.encoder, optimizer, world=world, batch_size=micro
        )
        steps_s: list[float] = []
        least_s = float("inf")
        start = time.perf_counter()
        deadline = float("inf")
        while len(steps_s) < WARM_UP + task["max_steps"]:
            now = time.perf_counter()
            if len(steps_s) == WARM_UP:
                deadline = now + task["seconds"]
            if len(steps_s) >= WARM_UP + 3 and now > deadline:
                break
            if len(steps_s) >= 2 and now > start + 2 * task["seconds"]:  # long ones, of which
                break  # the first are hardly longer than the others
            begin, cpu_s = time.perf_counter(), time.process_time()
            for _ in range(train.accumulation_steps):
                engine.backward(loss_of(engine, next(batches)))
                engine.step(config.optim.lr)
            if cuda:
                torch.cuda.synchronize()
            steps_s.append(time.perf_counter() - begin)
            cpu_s = (time.process_time() - cpu_s) / torch.get_num_threads()
            if len(steps_s) > 1:
                least_s = min(least_s, steps_s[-1] if cuda else cpu_s)
        counted = steps_s[WARM_UP:] or steps_s[-1:]
        step_s = statistics.median(counted)
        return Trial(
            "ok",
            step_s=step_s,
            least_s=least_s,
            clips_per_s=train.batch_size / step_s,
            memory_gib=peak_memory_gib(world.device),
            base_gib=base_gib,
        )


def _task(config: Config, device: Any) -> tuple[Any, Any]:
    """What is trained, and a function from its engine and a batch to the loss."""
    import torch

    from ssast.engine.checkpoints.classifier import build_classifier
    from ssast.engine.model.classifier import LossClassifier
    from ssast.engine.model.objective import MSPM, mean_losses
    from ssast.engine.planning.plan import NUM_CLASSES

    if config.finetune is None:
        mspm = MSPM(config).to(device)

        def pretraining_loss(engine: Any, batch: Any) -> Any:
            masks = mspm.draw_masks(batch.clip_ids, batch.epochs, batch.num_frames)
            losses = engine(batch.fbank, *masks)
            return mean_losses(losses, batch.valid, config.objective.mse_weight)["loss"]

        return mspm, pretraining_loss

    classifier = build_classifier(config, NUM_CLASSES, LossClassifier).to(device)
    classifier.loss = config.finetune.loss
    frames = config.audio.ignore_padding

    def finetuning_loss(engine: Any, batch: Any) -> Any:
        classes = batch.clip_ids % NUM_CLASSES
        targets = torch.nn.functional.one_hot(classes, NUM_CLASSES).float()
        return engine(batch.fbank, targets, batch.num_frames if frames else None)["loss"].mean()

    return classifier, finetuning_loss


def _batches(config: Config, batch_size: int, world: Any) -> Any:
    """A context with the endless batches of the configured clips, or one of noise for ever."""
    import torch

    from ssast.engine.data.clips import fbank_spec, find_clips
    from ssast.pipelines.stream.batch import Batch
    from ssast.pipelines.stream.stream import AudioStream

    audio, data = config.audio, config.data
    if data.train is not None:
        return AudioStream(
            find_clips(config)[0],
            fbank_spec(audio),
            batch_size=batch_size,
            seed=config.train.seed,
            device=world.device,
            num_threads=data.num_threads or 1,
            read_ahead=data.read_ahead,
            fbank=data.fbank_backend,
            max_rejected=1.0,
        )
    noise = torch.randn(batch_size, audio.num_frames, audio.n_mels)
    batch = Batch(
        fbank=audio.mean + 2 * audio.std * noise,
        num_frames=torch.full((batch_size,), audio.num_frames),
        clip_ids=torch.arange(batch_size),
        epochs=torch.zeros(batch_size, dtype=torch.int64),
        valid=torch.ones(batch_size, dtype=torch.bool),
    )
    endless: Iterator[Batch] = repeat(batch.to(world.device))
    return nullcontext(endless)


if __name__ == "__main__":
    _main()
