"""Mean and standard deviation of a run's input, measured on its training clips."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.config import Config
from ssast.engine.data.clips import fbank_spec
from ssast.engine.parallel.long_work import run_long
from ssast.engine.parallel.ranks import expecting_peers, init_world
from ssast.pipelines.clips.mix import MixedClips
from ssast.pipelines.clips.shards import ClipPaths
from ssast.pipelines.prepare.stats import measure

MAX_CLIPS = 10_000  # even without the usual precision


def with_measured_stats(
    config: Config, clips: ClipPaths, *, resume: bool
) -> tuple[Config, list[str]]:
    """Measure ``audio.mean`` and ``audio.std`` where ``audio.stats`` asks for it. Collective.

    A resumed run keeps those that it began with.

    Args:
        config: Configuration of the run.
        clips: The training clips.
        resume: Whether the run is resumed, if it has a checkpoint.

    Returns:
        The configuration with the measured values, and a line for the log, if any.

    Raises:
        DataError: No clip can be used.
    """
    if config.audio.stats == "given":
        return config, []

    def find(tick: Callable[[], None]) -> tuple[float, float, str]:
        folder = Path(config.run.folder or "", "checkpoints")
        found = Checkpoints(folder).latest() if resume else None
        if found is not None:
            stored = Checkpoints.load(found, check=False)[1]["config"]["audio"]
            return stored["mean"], stored["std"], "measured when the run began"
        stats = measure(
            config.data.train or "the training clips",
            clips=clips,
            spec=fbank_spec(config.audio),
            padding=not config.audio.ignore_padding,
            max_clips=MAX_CLIPS,
            num_threads=config.data.num_threads or min(8, world.cores),
            seed=config.train.seed,
            tick=tick,
        )
        again = " draws from" if isinstance(clips, MixedClips) else " of"
        seen = f"measured on {stats.num_clips}{again} {stats.num_total} training clips"
        return round(float(stats.mean), 4), round(float(stats.std), 4), seen

    world = init_world(config.train.timeout_s)
    with expecting_peers(world):
        mean, std, how = run_long(find, world, here=world.is_main)
    return (
        replace(config, audio=replace(config.audio, mean=mean, std=std)),
        [f"audio.mean {mean:g}, audio.std {std:g}: {how}"],
    )
