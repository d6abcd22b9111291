"""What is written of a data set."""

import csv
import json
import os
from pathlib import Path

from ssast.pipelines.clips.manifest import read_manifest


def silent(line: str) -> None:
    pass


def written(out: Path, split: str, source: Path) -> dict[str, tuple[str, ...] | None]:
    """Labels by path, relative to the copy, or to the output folder with a leading '@'."""
    manifest = read_manifest(out / f"{split}.json")
    labels = manifest.labels or [None] * len(manifest)
    made = f"{out}{os.sep}"
    names = [
        f"@{path.removeprefix(made)}" if path.startswith(made) else os.path.relpath(path, source)
        for path in manifest.paths
    ]
    return dict(zip(names, labels, strict=True))


def classes(out: Path) -> list[list[str]]:
    with open(out / "labels.csv", encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
