"""The process of a trial: takes the steps that training would take, and times them."""

import itertools
import json
import os
import resource
import statistics
import sys
import time
from dataclasses import asdict, replace

import torch

from ssast.engine.config import Config, from_plain
from ssast.engine.data.clips import find_clips
from ssast.engine.data.splits import find_splits
from ssast.engine.monitoring.monitor import peak_memory_gib
from ssast.engine.parallel.ranks import World, init_world
from ssast.engine.planning.synthetic import SyntheticContext, noise, synthetic_task
from ssast.engine.planning.trial import Trial
from ssast.engine.train.building import build_engine
from ssast.engine.train.execution import start_execution
from ssast.engine.train.finetuning import Finetuning
from ssast.engine.train.pretraining import Pretraining
from ssast.engine.train.step import train_step
from ssast.engine.train.task import RunContext, Task
from ssast.kernels.matmul import fast_matmul
from ssast.kernels.memory import keep_freed_memory

WARM_UP = 2  # steps before those that count


def main() -> None:
    """Read a request from stdin, write a :class:`Trial` to stdout."""
    request = json.loads(sys.stdin.readline())
    config = from_plain(request["config"])
    world = init_world()
    if world.device.type == "cpu":  # a GPU's driver reserves far more addresses than it uses
        limit = int(request["memory_gib"] * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        keep_freed_memory()
    with fast_matmul():
        task = trial_task(config, world, WARM_UP + request["max_steps"])
        trial = measure(task, request["seconds"], request["max_steps"])
    print(json.dumps(asdict(trial)), flush=True)
    os._exit(0)  # reading threads need not be waited for


def trial_task(config: Config, world: World, steps: int) -> Task:
    """Build the task as a run would, on the configured clips or on noise.

    Args:
        config: Configuration of one process.
        world: This process.
        steps: Steps that will be taken; as many are drawn of what mixup adds.
    """
    data = replace(config.data, max_rejected=1.0)  # bad clips are for the run to complain about
    config = replace(config, data=data, train=replace(config.train, steps=steps))
    torch.manual_seed(config.train.seed)
    if data.train is None and data.mix is None:
        batch_size = config.train.batch_size // config.train.accumulation_steps
        return synthetic_task(SyntheticContext(config, world, fbank=noise(config, batch_size)))
    context = RunContext(config, world)
    if config.finetune is None:
        return Pretraining(context, *find_clips(config))
    # Looking for copies of clips would read them all.
    splits = find_splits(replace(config, finetune=replace(config.finetune, allow_leakage=True)))
    return Finetuning(context, splits, None, 1)


def measure(task: Task, seconds: float, max_steps: int) -> Trial:
    """Take steps until time is up.

    Args:
        task: What is trained.
        seconds: Time for the steps that count.
        max_steps: Largest number of steps that count.
    """
    config, device = task.context.config, task.context.world.device
    cuda = device.type == "cuda"
    task.module.to(device)
    with task.train_batches(0) as stream:
        first = next(stream)  # opens files and starts threads, which no step should wait for
        base_gib = peak_memory_gib(device)
        engine = build_engine(task)
        _, batches = start_execution(
            task, itertools.chain([first], stream), steps=config.train.steps
        )
        steps_s: list[float] = []
        least_s = deadline = float("inf")
        start = time.perf_counter()
        while len(steps_s) < WARM_UP + max_steps:
            now = time.perf_counter()
            if len(steps_s) == WARM_UP:
                deadline = now + seconds
            if len(steps_s) >= WARM_UP + 3 and now > deadline:
                break
            if len(steps_s) >= 2 and now > start + 2 * seconds:  # long ones, of which
                break  # the first are hardly longer than the others
            begin, cpu_s = time.perf_counter(), time.process_time()
            train_step(task, engine, batches, config.optim.lr)
            if cuda:
                torch.cuda.synchronize()
            steps_s.append(time.perf_counter() - begin)
            cpu_s = (time.process_time() - cpu_s) / torch.get_num_threads()
            if len(steps_s) > 1:
                least_s = min(least_s, steps_s[-1] if cuda else cpu_s)
    step_s = statistics.median(steps_s[WARM_UP:] or steps_s[-1:])
    return Trial(
        "ok",
        step_s=step_s,
        least_s=least_s,
        clips_per_s=config.train.batch_size / step_s,
        memory_gib=peak_memory_gib(device),
        base_gib=base_gib,
    )


if __name__ == "__main__":
    main()
