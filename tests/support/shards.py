"""Prepared shards for tests."""

from pathlib import Path

from sounds import tone, write

from ssast.pipelines.audio.convert import Recipe
from ssast.pipelines.clips.shards import ShardIndex
from ssast.pipelines.prepare.pack import Packing, prepare_shards


def prepare(source: Path, out: Path, *, codec: str = "flac", **recipe: float) -> ShardIndex:
    """Shards of a folder or manifest."""
    packing = Packing(Recipe(**recipe), codec=codec)
    prepare_shards(source, out, packing, progress=False, log=lambda line: None)
    return ShardIndex(out)


def make_recordings(folder: Path, count: int, *, seconds: float = 3.0) -> list[Path]:
    """Recordings that all differ."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        write(folder / f"{k}.wav", tone(round(16000 * seconds), seed=k), subtype="PCM_16")
        for k in range(count)
    ]
