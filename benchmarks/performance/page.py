"""The page on what ``ssast bench performance`` has measured, written from its files.

It can be written at any moment: what is not measured is left out, and named.
"""

import shutil
from dataclasses import replace
from pathlib import Path

from ssast.benchmarks.performance import tables
from ssast.benchmarks.performance.measurements import sections
from ssast.benchmarks.performance.notes import Notes, Scope
from ssast.benchmarks.performance.pictures import draw_parts, draw_scaling, draw_steps
from ssast.benchmarks.study.page import write_sections
from ssast.engine.errors import ConfigError

COMMANDS = """    ssast bench performance            # measures what is missing, writes this page
    ssast bench performance --page     # only writes it, from the files
    ssast bench performance --sections step --sizes tiny --turns 1     # a minute or two"""


def write_page(notes: Notes, docs: Path) -> Path:
    """Write performance.md and its pictures.

    Args:
        notes: The measurements.
        docs: Gets performance.md and, in performance/, PNGs.

    Returns:
        The page.

    Raises:
        ConfigError: Nothing is measured, or a file is damaged.
    """
    scope = notes.scope()
    if scope is None:
        raise ConfigError(f"{notes.folder}: no measurements of ssast bench performance there")
    images = pictures(notes, scope, docs / "performance")
    waiting = missing(notes, scope)
    parts = [
        ("# Performance", [
            "What the speed of the engine is made of, measured on one machine by", "", COMMANDS,
            "", "No number is typed by hand.", "",
            *machines(notes),
            *([f"Not measured yet: {'; '.join(waiting)}.", ""] if waiting else []),
        ]),
        ("## The training step, one change after the other", [
            "Each row adds one change to the row before it; the first is the published step "
            "(benchmarks/training/baseline.py), the bold one what `ssast pretrain` does by "
            "default, and the rows below it add one option each to the bold one. "
            "\"Only what the losses need\": "
            "masked patches are not projected, what all clips share passes the first block's norm "
            "and projections once, and the last block ends with the masked tokens alone.", "",
            "Each variant runs in a process of its own, one at a time, in turns; masks, forward, "
            "backward and Adam are inside. All start from the same weights, and the losses are "
            "compared in the first step, on the same masks.", "",
            "Operations are counted as if none were left out: two passes for the published step, "
            "one for the others. The peak is that of a large product in the same process, so in "
            "the precision and by the library of the row.", "",
            *images["step"],
            *(line for size in scope.sizes for line in tables.steps(notes, scope, size)),
        ]),
        ("## The loader", _unless_empty([
            "Clips per CPU second of the audio stream and of a plain loader (soundfile and torch "
            f"in a DataLoader), {scope.clips} synthetic clips a round, and the stream's CPU time "
            "of a clip by stage. `ssast bench data` shows more.", "",
        ], tables.loaders(notes))),
        ("## End to end", _unless_empty([
            "Short runs of `ssast pretrain` on files, from decoding to the optimizer: medians of "
            "their reports but the first. Clips shorter than the input are padded. The step alone "
            "is the same with one batch of noise instead of files; both share the same cores.", "",
        ], tables.runs(notes))),
        ("## Roofline", [
            *tables.peaks(notes),
            *_unless_empty([
                "The least that the default step would need: products and attention at the peak "
                "of a large product, norms, activations, residuals and the optimizer's weights at "
                "the bandwidth of a large copy, by the formulas of engine/planning/plan.py.", "",
            ], tables.rooflines(notes, scope)),
            *_unless_empty([
                "Where the time of the default step goes (engine/monitoring/profiling.py).", "",
            ], tables.where_time_goes(notes, scope)),
            *images["parts"],
        ]),
        ("## Scaling", _unless_empty([
            f"The default step of tiny with batch {scope.batch}, {scope.frames} frames and "
            f"{scope.threads} threads, where nothing else is said. Two processes (gloo) have half "
            "of the batch and one thread each.", "",
        ], [*tables.scaling(notes, scope), *images["scaling"]])),
        ("## Predicted for GPUs", [
            "**Nothing here is measured**: formulas of `ssast plan` with the makers' peaks and the "
            "shares of them that are usual (engine/monitoring/gpus.py). `ssast plan --calibrate` "
            "puts a machine's own in their place.", "",
            *tables.plans(),
        ]),
    ]  # fmt: skip
    return write_sections(docs / "performance.md", parts)


def _unless_empty(words: list[str], lines: list[str]) -> list[str]:
    return [*words, *lines] if lines else []


def machines(notes: Notes) -> list[str]:
    """Where it was measured."""
    lines = (
        f"- {m['device']}, {m['cores']} cores; torch {m['torch']}; commit {m['commit']}"
        for m in notes.machines()
    )
    return [*dict.fromkeys(lines), ""]


def missing(notes: Notes, scope: Scope) -> list[str]:
    """What is not measured: cases by section, variants of the step that no process has run."""
    found, sizes = [], tuple(dict.fromkeys((*Scope().sizes, *scope.sizes)))
    for section, cases in sections(replace(scope, sizes=sizes)).items():
        there = {_without_turn(key) for key in notes.read(section)}
        wanted = dict.fromkeys(map(_without_turn, cases))
        left = [key for key in wanted if key not in there]
        if left:
            found.append(section if len(left) == len(wanted) else f"{section} ({', '.join(left)})")
    return found


def _without_turn(key: str) -> str:
    return key.partition(", turn")[0]


def pictures(notes: Notes, scope: Scope, folder: Path) -> dict[str, list[str]]:
    """Draw what there is something to draw of; lines of Markdown by section."""
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier page
    folder.mkdir(parents=True)
    drawn: dict[str, Path] = {}
    rows = {size: tables.step_rows(notes, scope, size)[0] for size in scope.sizes}
    if any(rows.values()):
        measured = {size: found for size, found in rows.items() if found}
        devices = " and ".join(dict.fromkeys(m["device"] for m in notes.machines()))
        words = f"A step of pretraining, {tables.words(scope)}, {devices}"
        drawn["step"] = draw_steps(folder / "step.png", measured, words)
    shares = tables.profiles(notes, scope)
    if shares:
        drawn["parts"] = draw_parts(folder / "parts.png", shares)
    rates = tables.rates(notes, scope)
    if rates:
        drawn["scaling"] = draw_scaling(folder / "scaling.png", rates)
    return {
        name: [f"![{name}](performance/{drawn[name].name})", ""] if name in drawn else []
        for name in ("step", "parts", "scaling")
    }
