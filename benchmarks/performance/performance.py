"""Measures what the engine's speed is made of, and writes docs/performance.md from it.

The training step, one change after the other; the loader; short real runs; the roofline; scaling.
Every measurement is kept in a file: stop it at any time, the same command goes on where it was.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ssast.benchmarks.operations.kernels import machine_facts
from ssast.benchmarks.performance.measurements import CPU, TURNS, sections
from ssast.benchmarks.performance.notes import OUT, Notes, Scope
from ssast.benchmarks.performance.page import write_page
from ssast.engine.cli.data import PACKAGE_CACHE
from ssast.engine.errors import ConfigError
from ssast.engine.settings import SIZES
from ssast.pipelines.demo.corpora import fetch_demo
from ssast.pipelines.files import usable_cores

PARTS = ("step", "roofline", "scaling", "loader", "runs")
DOCS = Path("docs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing, then write the page.

    Args:
        arguments: Of the command line, without the program's name; None: those of the process.

    Returns:
        The exit status, 0.

    Raises:
        ConfigError: Wrong options, or others than those of the files; or a process ended without a
            result.
        DataError: The recordings cannot be had.
    """
    options = _parser().parse_args(arguments)
    notes = Notes(options.out)
    if not options.page:
        _measure(notes, options)
    print(write_page(notes, options.docs))
    return 0


def _parser() -> argparse.ArgumentParser:
    scope = Scope()
    parser = argparse.ArgumentParser("ssast bench performance", description=__doc__)
    add = parser.add_argument
    add("--sections", nargs="+", choices=PARTS, default=list(PARTS), help="(all)")
    add("--sizes", nargs="+", choices=list(SIZES), default=list(scope.sizes), help="of the model")
    turns = ", ".join(f"{size} {number}" for size, number in TURNS.items())
    add("--turns", type=int, help=f"processes of each variant of the step ({turns}, else 1)")
    add("--batch", type=int, help=f"clips of a step ({scope.batch})")
    add("--frames", type=int, help=f"of a clip ({scope.frames})")
    add("--threads", type=int, help="(all cores)")
    add("--clips", type=int, help=f"that a loader reads ({scope.clips})")
    add("--data", help=f"as of ssast data demo, fetched to {scope.data}")
    add("--out", type=Path, default=OUT, help=f"folder of the measurements ({OUT})")
    add("--docs", type=Path, default=DOCS, help=f"folder of the page ({DOCS})")
    add("--page", action="store_true", help="only write the page from what is measured")
    return parser


def _measure(notes: Notes, options: argparse.Namespace) -> None:
    for name, least in (("turns", 1), ("batch", 2), ("frames", 32), ("threads", 1), ("clips", 1)):
        if (given := getattr(options, name)) is not None and given < least:
            raise ConfigError(f"--{name} must be {least} or more, got {given}")
    known = notes.scope() or Scope(threads=usable_cores())
    names = ("turns", "batch", "frames", "threads", "clips", "data")
    changes = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    scope = replace(known, sizes=tuple(options.sizes), **changes)
    machine = machine_facts(CPU)
    for section, cases in sections(scope).items():
        if section.partition("-")[0] in options.sections:
            if section == "runs" and scope.data == Scope().data:
                fetch_demo(Path(scope.data), PACKAGE_CACHE.expanduser())
            notes.measure(section, cases, scope, machine)
