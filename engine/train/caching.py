"""The cache of filterbanks in memory: one for each machine, shared by its ranks."""

import math
from collections import Counter

import numpy as np

from ssast.engine.config import Config
from ssast.engine.data.clips import fbank_spec
from ssast.engine.errors import ConfigError
from ssast.engine.parallel.machine import available_gib, machines_of
from ssast.engine.parallel.ranks import World, gather_objects
from ssast.pipelines.clips.order import Weights
from ssast.pipelines.stream.cache import MemoryCache, cached_clips, clip_bytes

FEW_HITS = 0.25  # of the clips of a run: fewer are warned of


def check_memory(config: Config, world: World, num_clips: int) -> None:
    """Check that the cache fits into each machine. Collective where there is a cache.

    Args:
        config: Configuration of the run.
        world: This process's world.
        num_clips: Number of training clips.

    Raises:
        ConfigError: On every rank, if it does not on some machine.
    """
    if not config.data.cache_gib:
        return
    needed, available = _needed_gib(config, num_clips), available_gib()
    problem = None
    if needed > available:
        problem = (
            f"data.cache_gib {config.data.cache_gib:g}: the cache of {num_clips} training clips "
            f"takes {needed:.3g} GiB on each machine, but rank {world.rank} finds "
            f"{available:.3g} GiB of free memory on its machine"
        )
    _raise_first(problem, world)


def describe_cache(config: Config, world: World, num_clips: int, start: int) -> str | None:
    """Return a line about the cache and the hits to expect; None without one. Collective.

    Args:
        config: Configuration of the run.
        world: This process's world.
        num_clips: Number of training clips.
        start: Position in the data order at which the run begins.
    """
    if not config.data.cache_gib:
        return None
    shares = np.array(list(Counter(machines_of(world)).values())) / world.world_size
    kept = _cached(config, num_clips) / num_clips
    size = f"{_needed_gib(config, num_clips):.3g} of {config.data.cache_gib:g} GiB"
    where = "in memory" if len(shares) == 1 else f"in memory on each of {len(shares)} machines"
    text = f"filterbanks of {kept:.0%} of the training clips are cached, {size} {where}"
    mixed = config.finetune is not None and config.finetune.mixup > 0
    partners = "; mixup's partners, one for each clip, are read anew each time" * mixed
    weighted = config.data.mix is not None or config.data.sample_weights is not None
    if weighted or (config.finetune is not None and config.finetune.balanced_sampling):
        return text + partners  # how often each clip is drawn depends on its weight
    epochs = (config.train.steps * config.train.batch_size - start) / num_clips
    if epochs <= 0:
        return text + partners
    hits = expected_hits(kept, shares, epochs)
    text += f"; expected hits: {hits:.0%} over {epochs:.3g} epochs"
    if epochs > 1:
        text += f", {kept * (shares**2).sum():.0%} in the second"
    if hits < FEW_HITS:
        text = f"warning: {text}: data.cache_gib=0 would cost little"
    return text + partners


def expected_hits(kept: float, shares: np.ndarray, epochs: float) -> float:
    """Return which part of the clips that are drawn is cached, in the mean over a run.

    The ranks of a machine take a share f of each epoch, in a fresh order: before epoch e, from 1,
    they have computed a part 1 - (1 - f)^(e - 1) of the clips, and of those with room these hit.

    Args:
        kept: Part of the clips for which the cache has room.
        shares: Share of each machine in the clips of an epoch, [M], with sum 1.
        epochs: Number of epochs, above 0.
    """
    number = np.arange(math.ceil(epochs))
    length = np.minimum(epochs - number, 1.0)  # the last epoch may be cut
    hits = shares[:, None] * (1 - (1 - shares[:, None]) ** number)
    return float(kept * (hits.sum(0) * length).sum() / epochs)


def open_cache(
    config: Config, world: World, num_clips: int, weights: Weights | None
) -> MemoryCache | None:
    """Open the cache of this process's machine; None without one. Collective where there is one.

    Args:
        config: Configuration of the run.
        world: This process's world.
        num_clips: Number of training clips.
        weights: Their sampling weights.

    Raises:
        ConfigError: On every rank, if one cannot open what another rank of its machine created.
    """
    if not config.data.cache_gib:
        return None
    spec, limit = fbank_spec(config.audio), round(config.data.cache_gib * 2**30)
    machines = machines_of(world)
    first = machines.index(machines[world.rank])
    cache = MemoryCache(num_clips, spec, limit, weights=weights) if first == world.rank else None
    paths = gather_objects(None if cache is None else cache.path, world)
    problem = None
    if cache is None:
        try:
            cache = MemoryCache(num_clips, spec, limit, weights=weights, path=paths[first])
        except OSError as error:
            problem = (
                f"data.cache_gib: rank {world.rank} cannot share the memory of rank {first} on its "
                f"machine ({error.strerror}): set data.cache_gib=0, or data.cache_folder"
            )
    _raise_first(problem, world)
    return cache


def _raise_first(problem: str | None, world: World) -> None:
    problems = [text for text in gather_objects(problem, world) if text is not None]
    if problems:
        raise ConfigError(problems[0])


def _cached(config: Config, num_clips: int) -> int:
    return cached_clips(num_clips, fbank_spec(config.audio), round(config.data.cache_gib * 2**30))


def _needed_gib(config: Config, num_clips: int) -> float:
    return _cached(config, num_clips) * clip_bytes(fbank_spec(config.audio)) / 2**30
