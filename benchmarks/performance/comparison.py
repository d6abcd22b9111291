"""The tables that show machines side by side, on the page and in the README.

Each value is a ratio within one machine, or a rate of it; between machines only ratios compare how
much the engine gains.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ssast.benchmarks.loading.report import Result
from ssast.benchmarks.performance.prediction import clip_count
from ssast.benchmarks.performance.records import Record
from ssast.benchmarks.performance.tables import Row, default_row, step_rows
from ssast.benchmarks.study.tables import table
from ssast.benchmarks.training.variants import OPTIONS
from ssast.engine.errors import ConfigError
from ssast.engine.settings import SIZES
from ssast.pipelines.files import write_atomically

MARKS = ("<!-- speed: written by ssast bench performance -->", "<!-- end of speed -->")
README_SIZES = ("tiny", "small", "base")
LOADED = ("flac, 10 s", "wav, 10 s")


def machines(records: Sequence[Record]) -> list[str]:
    """Tabulate the machines and when they were measured."""
    rows = []
    for record in records:
        last, load = record.measured[-1], record.measured[-1]["load"]
        rows.append(
            [
                record.machine["name"],
                ", ".join(record.machine["instructions"]),
                last["torch"],
                " ".join(dict.fromkeys(run["commit"] for run in record.measured)),
                last["date"],
                "not kept" if load is None else f"{load:.2f}",
            ]
        )
    header = ["machine", "instruction sets", "torch", "commit", "date", "load before"]
    notes = [f"{record.machine['name']}: {record.note}." for record in records if record.note]
    return [*table(header, rows), *notes, *([""] if notes else [])]


def side_by_side(records: Sequence[Record]) -> list[str]:
    """Tabulate the speedups of each machine, a column each."""
    rows: dict[str, Callable[[Record], str]] = {}
    for size in [size for size in SIZES if any(size in record.scope.sizes for record in records)]:
        rows[f"{size}: step, fp32"] = partial(_step, size=size)
        rows[f"{size}: step, bf16"] = partial(_step, size=size, option="bf16")
        rows[f"{size}: clips/s, fp32"] = partial(_step, size=size, rate=True)
    for key in LOADED:
        rows[f"loader, {key}"] = partial(_loader, key=key)
    for size in SIZES:
        for what in ("predict", "embed"):
            for batch in (1, clip_count(size)):
                for command in (f"ssast {what}", f"ssast {what}, bf16"):
                    ours, loop = f"{size}: {command}", f"{size}: {what} by a loop, batch {batch}"
                    compared = partial(_predicted, ours=ours, loop=loop)
                    rows[f"{ours}, against batch {batch}"] = compared
    cells = [[name, *(value(record) for record in records)] for name, value in rows.items()]
    filled = [row for row in cells if any(row[1:])]
    return table(["", *(record.machine["name"] for record in records)], filled)


def predictions(record: Record) -> list[str]:
    """Tabulate prediction and embedding from files."""
    rows = []
    for key, found in record.read("predict").items():
        each = (found["cpu_s"] - found["start_cpu_s"]) / (found["clips"] - 1)
        each_wall = (found["wall_s"] - found["start_wall_s"]) / (found["clips"] - 1)
        rows.append(
            [
                key,
                str(found["clips"]),
                f"{found['start_cpu_s']:.2f}",
                f"{found['start_wall_s']:.2f}",
                f"{found['clips'] / found['wall_s']:.2f}",
                f"{1 / each_wall:.2f}",
                f"{1 / each:.2f}",
            ]
        )
    header = ["", "clips", "one clip, CPU s", "one clip, s", "clips/s, all", "clips/s after one"]
    return table([*header, "clips/CPU s after one"], rows) if rows else []


def _rows(record: Record, size: str) -> list[Row]:
    return step_rows(record, record.scope, size)[0] if size in record.scope.sizes else []


def _step(record: Record, size: str, option: str | None = None, *, rate: bool = False) -> str:
    """Return the speedup of the default step, or of one with an option; empty if not measured."""
    rows = _rows(record, size)
    row = default_row(rows)
    if option is not None:
        row = next((r for r in rows if r.variant == OPTIONS[option]), None)
    if row is None:
        return ""
    return f"{record.scope.batch / row.wall_s:.3g}" if rate else f"{row.speedup:.2f}"


def _loader(record: Record, key: str) -> str:
    found = record.read("loader").get(key)
    return "" if found is None else f"{Result(**found).ratio('files'):.2f}"


def _predicted(record: Record, ours: str, loop: str) -> str:
    """Return how many times as fast a command is as the loop: with start-up, and without."""
    results = record.read("predict")
    if ours not in results or loop not in results:
        return ""
    theirs, found = results[loop], results[ours]
    after = [result["wall_s"] - result["start_wall_s"] for result in (theirs, found)]
    return f"{theirs['wall_s'] / found['wall_s']:.2f} ({after[0] / after[1]:.2f})"


def readme_block(records: Sequence[Record]) -> str:
    """Return the table of the README between its marks."""
    columns = [(size, option) for size in README_SIZES for option in (None, "bf16")]
    rows = []
    for record in records:
        cells = [_step(record, size, option) for size, option in columns]
        if any(cells):
            rows.append([record.machine["name"], *cells])
    header = ["", *(f"{size}, {option or 'fp32'}" for size, option in columns)]
    return "\n".join([MARKS[0], *table(header, rows)[:-1], MARKS[1]])


def marked(text: str, name: str = "README.md") -> tuple[str, str, str]:
    """Split a text into what is before its marked block, the block, and what follows.

    Raises:
        ConfigError: The marks are not there once each, in order.
    """
    begin, end = (text.find(mark) for mark in MARKS)
    if not 0 <= begin < end or any(text.count(mark) != 1 for mark in MARKS):
        raise ConfigError(f"{name}: expected {MARKS[0]} and {MARKS[1]} once each, in this order")
    end += len(MARKS[1])
    return text[:begin], text[begin:end], text[end:]


def write_readme(readme: Path, records: Sequence[Record]) -> Path:
    """Write the table between the marks of a README.

    Raises:
        ConfigError: The marks are not there.
    """
    before, _, after = marked(readme.read_text(encoding="utf-8"), str(readme))
    write_atomically(readme, before + readme_block(records) + after)
    return readme
