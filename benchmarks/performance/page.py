"""The page with the results of ``ssast bench performance``, written from its files.

It can be written at any time: what is not measured yet is left out, and listed.
"""

from dataclasses import replace
from pathlib import Path

from ssast.benchmarks.performance import tables
from ssast.benchmarks.performance.cases import sections
from ssast.benchmarks.performance.comparison import machines, predictions, side_by_side
from ssast.benchmarks.performance.pictures import draw_parts, draw_scaling, draw_steps
from ssast.benchmarks.performance.records import Record, read_records
from ssast.benchmarks.performance.store import MOST_OTHER, Scope
from ssast.benchmarks.study.page import write_sections
from ssast.engine.errors import ConfigError

COMMANDS = """    ssast bench performance            # measures what is missing, writes this page
    ssast bench performance --page     # only writes it, from the files
    ssast bench performance --sections step --sizes tiny --repeats 1     # a minute or two
    ssast bench performance --sections step loader predict --variants main --repeats 1"""


def write_page(docs: Path) -> Path:
    """Write performance.md and its pictures, with the details of the machine measured last.

    Args:
        docs: Folder of performance.md and of performance/, with the records and the PNGs.

    Returns:
        Path of the page.

    Raises:
        ConfigError: There is no record, or one is damaged.
    """
    records = read_records(docs / "performance")
    if not records:
        raise ConfigError(f"{docs / 'performance'}: no records of ssast bench performance there")
    record = records[-1]
    scope = record.scope
    images = pictures(record, docs / "performance")
    left = missing(record)
    parts = [
        ("# Performance", [
            "How fast the engine is, and why, measured by", "", COMMANDS, "",
            "The commands write every number on this page, from the files of "
            "`docs/performance/`, one for each machine. A case during which other programs had "
            f"more than {MOST_OTHER:.0%} of a machine is measured again, and not published if "
            "that does not help.", "",
            *machines(records),
        ]),
        ("## Machines side by side", side(records)),
        (f"## In detail: {record.machine['name']}", [
            "The sections below are of this machine, which was measured last.", "",
            *([f"Not measured there: {'; '.join(left)}.", ""] if left else []),
        ]),
        ("## The training step, one change after the other", [
            "Each row adds one change to the row before it; the first is the published step "
            "(`benchmarks/training/baseline.py`, written anew), the bold one what `ssast pretrain` "
            "does in fp32, and the rows below it add one option each to the bold one; bf16 is the "
            "default where a trial finds it faster. \"Only what the "
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
            *(line for size in scope.sizes for line in tables.steps(record, scope, size)),
        ]),
        ("## The loader", _unless_empty([
            "Clips per CPU second of the audio stream and of a plain loader (soundfile and torch "
            f"in a DataLoader), {scope.clips} synthetic clips per round, and the stream's CPU time "
            "per clip by stage. `ssast bench data` shows more.", "",
        ], tables.loaders(record))),
        ("## Prediction and embedding", _unless_empty([
            "`ssast predict` and `ssast embed` from FLAC files of 10 s against the loop that one "
            "would write (soundfile, transformers' `ASTFeatureExtractor` and "
            "`ASTForAudioClassification`, `benchmarks/performance/plain_loop.py`): the same weights"
            f", {scope.threads} threads each. \"After one\": without what the first clip takes, "
            "which is mostly start-up.", "",
        ], predictions(record))),
        ("## End to end", _unless_empty([
            "Short runs of `ssast pretrain` on files, from decoding to the optimizer: medians over "
            "their log lines but the first. Clips shorter than the input are padded. The step "
            "alone is the same step on one batch of noise instead of files, on the same cores.",
            "",
        ], tables.runs(record))),
        ("## Roofline", [
            *tables.peaks(record),
            *_unless_empty([
                "The least time of the default step: matmuls and attention at the peak of a large "
                "matmul; norms, activations, residuals and the optimizer's weights at the "
                "bandwidth of a large copy, by the formulas of `engine/planning/plan.py`.", "",
            ], tables.rooflines(record, scope)),
            *_unless_empty([
                "Where the time of the default step goes (`engine/monitoring/profiling.py`).", "",
            ], tables.where_time_goes(record, scope)),
            *images["parts"],
        ]),
        ("## Scaling", _unless_empty([
            f"The default step of tiny with batch {scope.batch}, {scope.frames} frames and "
            f"{scope.threads} threads, unless stated otherwise. Two processes (gloo) have half of "
            "the batch and one thread each.", "",
        ], [*tables.scaling(record, scope), *images["scaling"]])),
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


def side(records: list[Record]) -> list[str]:
    """Return the section that compares the machines."""
    return [
        "Times as fast as the same work by the published step, a plain loader (clips per CPU "
        "second), or the plain loop (with start-up, in brackets without), on the same machine "
        "with as many threads; and clips per second of training.", "",
        *side_by_side(records),
    ]  # fmt: skip


def missing(record: Record) -> list[str]:
    """List what is not measured: cases by section, variants of the step without a process."""
    scope = record.scope
    found, sizes = [], tuple(dict.fromkeys((*Scope().sizes, *scope.sizes)))
    for section, cases in sections(replace(scope, sizes=sizes)).items():
        there = {_without_repeat(key) for key in record.read(section)}
        wanted = dict.fromkeys(map(_without_repeat, cases))
        left = [key for key in wanted if key not in there]
        if left:
            found.append(section if len(left) == len(wanted) else f"{section} ({', '.join(left)})")
    return found


def _without_repeat(key: str) -> str:
    return key.partition(", repeat")[0]


def pictures(record: Record, folder: Path) -> dict[str, list[str]]:
    """Draw what is measured; return lines of Markdown by section."""
    for path in folder.glob("*.png"):  # of an earlier page
        path.unlink()
    scope = record.scope
    drawn: dict[str, Path] = {}
    rows = {size: tables.step_rows(record, scope, size)[0] for size in scope.sizes}
    if any(rows.values()):
        measured = {size: found for size, found in rows.items() if found}
        words = f"A step of pretraining, {tables.describe(scope)}, {record.machine['name']}"
        drawn["step"] = draw_steps(folder / "step.png", measured, words)
    shares = tables.profiles(record, scope)
    if shares:
        drawn["parts"] = draw_parts(folder / "parts.png", shares)
    rates = tables.rates(record, scope)
    if rates:
        drawn["scaling"] = draw_scaling(folder / "scaling.png", rates)
    return {
        name: [f"![{name}](performance/{drawn[name].name})", ""] if name in drawn else []
        for name in ("step", "parts", "scaling")
    }
