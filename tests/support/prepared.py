"""Prepared folders, and what is in them."""

import io
import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import soundfile

from ssast.pipelines.audio.convert import Recipe
from ssast.pipelines.clips.manifest import read_manifest
from ssast.pipelines.clips.shards import ShardIndex
from ssast.pipelines.prepare.pack import Packing, prepare_shards

RECIPE = Recipe(clip_s=1.0)


def prepared(source: Path, out: Path, recipe: Recipe = RECIPE, **settings: object) -> ShardIndex:
    packing = Packing(recipe, **{"shard_mib": 0.1, **settings})  # type: ignore[arg-type]
    prepare_shards(source, out, packing, jobs=2, progress=False, log=lambda line: None)
    index = read_manifest(out).paths
    assert isinstance(index, ShardIndex)
    return index


def rejected(out: Path) -> dict[str, str]:
    lines = map(json.loads, (out / "rejected.jsonl").read_text().splitlines())
    return {line["name"]: line["reason"] for line in lines}


def tree(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() for p in files}


def samples_of(data: bytes) -> np.ndarray:
    samples, rate_hz = soundfile.read(io.BytesIO(data), dtype="int16")
    assert rate_hz == 16000 and samples.ndim == 1
    return samples
