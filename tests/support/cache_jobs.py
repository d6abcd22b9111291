"""What the ranks of a world do with a shared cache in tests. Every function runs on every rank."""

from typing import Any

import torch

from ssast.engine.config import load_config
from ssast.engine.data.clips import find_clips
from ssast.engine.errors import ConfigError
from ssast.engine.parallel.ranks import reduce_sum
from ssast.engine.train import caching
from ssast.engine.train.task import RunContext
from ssast.pipelines.stream import source
from ssast.pipelines.stream.cache import MemoryCache


def read_epochs(world, recipe, settings, machine, epochs) -> dict[str, Any]:  # type: ignore[no-untyped-def]
    """Clips that this rank reads in each epoch, and all filterbanks, from a machine of a name."""
    config = load_config(recipe, settings)
    train, _ = find_clips(config)
    context, reads, honest = RunContext(config, world), list[int](), source.read_clip
    rows = {str(path): row for row, path in enumerate(train)}

    def counted(path, *args, **given):  # type: ignore[no-untyped-def]
        reads.append(rows[str(path)])
        return honest(path, *args, **given)

    real_machines = caching.machines_of
    caching.machines_of = lambda world: [machine.format(r) for r in range(world.world_size)]
    source.read_clip = counted
    found, each = [], []
    try:
        with context.stream(train, "train") as batches:
            note = caching.describe_cache(config, world, len(train), 0)
            for _ in range(epochs):
                before = len(reads)
                for _ in range(len(train) // config.train.batch_size):
                    found.append(next(batches).fbank.clone())
                    reduce_sum([1], world)  # as a step does: no rank runs ahead of the others
                each.append(len(reads) - before)
    finally:
        source.read_clip, caching.machines_of = honest, real_machines
    return {"reads": each, "fbank": torch.stack(found), "note": note}


def refusals(world, recipe, settings, clips) -> list[str]:  # type: ignore[no-untyped-def]
    """The errors where rank 0 has too little memory, and where rank 1 cannot share it."""
    config, errors = load_config(recipe, settings), []
    honest_memory, honest_path = caching.available_gib, MemoryCache.path
    try:
        caching.available_gib = lambda: 1e-6 if world.is_main else 1.0
        MemoryCache.path = "/proc/1/fd/no-such"  # type: ignore[method-assign, assignment]
        for check in (
            lambda: caching.check_memory(config, world, clips),
            lambda: caching.open_cache(config, world, clips, None),
        ):
            try:
                check()
            except ConfigError as error:
                errors.append(str(error))
    finally:
        caching.available_gib, MemoryCache.path = honest_memory, honest_path  # type: ignore[method-assign]
    return errors
