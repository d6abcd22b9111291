"""The page with the results of ``ssast bench performance``, written from its files.

It can be written at any time: what is not measured yet is left out, and listed.
"""

import shutil
from dataclasses import replace
from pathlib import Path

from ssast.benchmarks.performance import tables
from ssast.benchmarks.performance.cases import sections
from ssast.benchmarks.performance.pictures import draw_parts, draw_scaling, draw_steps
from ssast.benchmarks.performance.store import MOST_OTHER, ResultStore, Scope
from ssast.benchmarks.study.page import write_sections
from ssast.engine.errors import ConfigError

COMMANDS = """    ssast bench performance            # measures what is missing, writes this page
    ssast bench performance --page     # only writes it, from the files
    ssast bench performance --sections step --sizes tiny --repeats 1     # a minute or two"""


def write_page(store: ResultStore, docs: Path) -> Path:
    """Write performance.md and its pictures.

    Args:
        store: The measurements.
        docs: Folder for performance.md and, in performance/, its PNGs.

    Returns:
        Path of the page.

    Raises:
        ConfigError: Nothing is measured, a file is damaged, or other programs disturbed a case.
    """
    scope = store.scope()
    if scope is None:
        raise ConfigError(f"{store.folder}: no measurements of ssast bench performance there")
    if disturbed := store.disturbed():
        key, share = max(disturbed.items(), key=lambda item: item[1])
        raise ConfigError(
            f"{len(disturbed)} cases were disturbed by other programs, {key} most, which had "
            f"{share:.0%} of the machine (allowed: {MOST_OTHER:.0%}): the same command measures "
            "them again, once it is idle"
        )
    images = pictures(store, scope, docs / "performance")
    left = missing(store, scope)
    parts = [
        ("# Performance", [
            "How fast the engine is, and why, measured on one machine by", "", COMMANDS,
            "", "The commands write every number on this page.", "",
            *machines(store),
            *([f"Not measured yet: {'; '.join(left)}.", ""] if left else []),
        ]),
        ("## The training step, one change after the other", [
            "Each row adds one change to the row before it; the first is the published step "
            "(`benchmarks/training/baseline.py`), the bold one what `ssast pretrain` does by "
            "default, and the rows below it add one option each to the bold one. \"Only what the "
            "losses need\": masked patches are not projected, the masked tokens, which all clips "
            "share, pass the first block's norm and projections once, and the last block computes "
            "its output for masked tokens alone.", "",
            "Each variant runs in its own process, one at a time, and the variants alternate; "
            "masks, forward, backward and Adam are included. All start from the same weights, and "
            "the losses of the first step are compared, on the same masks.", "",
            "FLOPs are counted as if none were saved: two passes for the published step, one for "
            "the others. The peak is that of a large matmul in the same process, that is, in the "
            "precision and by the library of the row.", "",
            *images["step"],
            *(line for size in scope.sizes for line in tables.steps(store, scope, size)),
        ]),
        ("## The loader", _unless_empty([
            "Clips per CPU second of the audio stream and of a plain loader (soundfile and torch "
            f"in a DataLoader), {scope.clips} synthetic clips per round, and the stream's CPU time "
            "per clip by stage. `ssast bench data` shows more.", "",
        ], tables.loaders(store))),
        ("## End to end", _unless_empty([
            "Short runs of `ssast pretrain` on files, from decoding to the optimizer: medians over "
            "their log lines but the first. Clips shorter than the input are padded. The step "
            "alone is the same step on one batch of noise instead of files, on the same cores.",
            "",
        ], tables.runs(store))),
        ("## Roofline", [
            *tables.peaks(store),
            *_unless_empty([
                "The least time of the default step: matmuls and attention at the peak of a large "
                "matmul; norms, activations, residuals and the optimizer's weights at the "
                "bandwidth of a large copy, by the formulas of `engine/planning/plan.py`.", "",
            ], tables.rooflines(store, scope)),
            *_unless_empty([
                "Where the time of the default step goes (`engine/monitoring/profiling.py`).", "",
            ], tables.where_time_goes(store, scope)),
            *images["parts"],
        ]),
        ("## Scaling", _unless_empty([
            f"The default step of tiny with batch {scope.batch}, {scope.frames} frames and "
            f"{scope.threads} threads, unless stated otherwise. Two processes (gloo) have half of "
            "the batch and one thread each.", "",
        ], [*tables.scaling(store, scope), *images["scaling"]])),
        ("## Predicted for GPUs", [
            "**Nothing here is measured**: formulas of `ssast plan` with the vendors' peaks and "
            "typical shares of them (`engine/monitoring/gpus.py`). `ssast plan --calibrate` "
            "measures those of a machine instead.", "",
            *tables.plans(),
        ]),
    ]  # fmt: skip
    return write_sections(docs / "performance.md", parts)


def _unless_empty(words: list[str], lines: list[str]) -> list[str]:
    return [*words, *lines] if lines else []


def machines(store: ResultStore) -> list[str]:
    """List the machines of the measurements."""
    lines = (
        f"- {m['device']}, {m['cores']} cores; torch {m['torch']}; commit {m['commit']}"
        for m in store.machines()
    )
    return [*dict.fromkeys(lines), ""]


def missing(store: ResultStore, scope: Scope) -> list[str]:
    """List what is not measured: cases by section, variants of the step without a process."""
    found, sizes = [], tuple(dict.fromkeys((*Scope().sizes, *scope.sizes)))
    for section, cases in sections(replace(scope, sizes=sizes)).items():
        there = {_without_repeat(key) for key in store.read(section)}
        wanted = dict.fromkeys(map(_without_repeat, cases))
        left = [key for key in wanted if key not in there]
        if left:
            found.append(section if len(left) == len(wanted) else f"{section} ({', '.join(left)})")
    return found


def _without_repeat(key: str) -> str:
    return key.partition(", repeat")[0]


def pictures(store: ResultStore, scope: Scope, folder: Path) -> dict[str, list[str]]:
    """Draw what is measured; return lines of Markdown by section."""
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier page
    folder.mkdir(parents=True)
    drawn: dict[str, Path] = {}
    rows = {size: tables.step_rows(store, scope, size)[0] for size in scope.sizes}
    if any(rows.values()):
        measured = {size: found for size, found in rows.items() if found}
        devices = " and ".join(dict.fromkeys(m["device"] for m in store.machines()))
        words = f"A step of pretraining, {tables.describe(scope)}, {devices}"
        drawn["step"] = draw_steps(folder / "step.png", measured, words)
    shares = tables.profiles(store, scope)
    if shares:
        drawn["parts"] = draw_parts(folder / "parts.png", shares)
    rates = tables.rates(store, scope)
    if rates:
        drawn["scaling"] = draw_scaling(folder / "scaling.png", rates)
    return {
        name: [f"![{name}](performance/{drawn[name].name})", ""] if name in drawn else []
        for name in ("step", "parts", "scaling")
    }
