"""The page of ``ssast bench gpu``: a table of the parts, what each printed, pictures of runs."""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssast.benchmarks.gpu.parts import Part
from ssast.pipelines.files import write_atomically
from ssast.pipelines.text import markdown

PAGE, PICTURES = "gpu.md", "gpu"
SHOWN_LINES = 60  # the last ones of a part's output
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours and cursor movements of a terminal


def write_page(
    out: Path, docs: Path, parts: Sequence[Part], results: Mapping[str, Mapping[str, Any]]
) -> Path:
    """Write the page; return its path.

    Args:
        out: Folder of the session, with the output of each part.
        docs: Folder of the page and its pictures.
        parts: The parts that were run.
        results: Status and seconds of each, by name.
    """
    lines = ["# On a GPU", "", "Written by `make gpu`.", "", "| part | result | seconds |"]
    lines.append("| :-- | :-- | --: |")
    for part in parts:
        found = results[part.name]
        result = "done" if found["status"] == 0 else markdown(f"failed: {found['status']}")
        lines.append(f"| [{part.name}](#{part.name}) | {result} | {found['seconds']:.0f} |")
    for part in parts:
        lines += ["", f"## {part.name}", "", markdown(part.title), ""]
        lines += [*_indented(out / f"{part.name}.txt")]
        for picture in _pictures(part, docs / PICTURES):
            lines += ["", f"![{part.name}]({PICTURES}/{picture})"]
    docs.mkdir(parents=True, exist_ok=True)
    write_atomically(docs / PAGE, "\n".join(lines) + "\n")
    return docs / PAGE


def _indented(path: Path) -> list[str]:
    """Return the last lines of an output as a code block."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    # Of a progress bar only what it showed last.
    lines = [line.rpartition("\r")[2].rstrip() for line in CONTROL.sub("", text).split("\n")]
    return [f"    {line}" for line in lines if line][-SHOWN_LINES:]


def _pictures(part: Part, folder: Path) -> list[str]:
    """Copy the pictures of a part's run; return their names."""
    found = sorted(part.folder.glob("*.png")) if part.folder is not None else []
    names = []
    for picture in found:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{part.name}-{picture.name}"
        shutil.copyfile(picture, folder / name)
        names.append(name)
    return names
