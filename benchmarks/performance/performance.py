"""Measure how fast the engine is, and why, and write docs/performance.md.

The training step, one change after the other; the loader; prediction; short real runs; the
roofline; scaling. Every result is kept in a file: stop it at any time, the same command resumes.
When all is there, the results of this machine go to a file of docs/performance/, and the page, its
pictures and the table of the README are written from the files of all machines.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ssast.benchmarks.device import add_device_option, find_device, use_device
from ssast.benchmarks.performance.cases import REPEATS, sections
from ssast.benchmarks.performance.comparison import write_readme
from ssast.benchmarks.performance.machine import describe_machine
from ssast.benchmarks.performance.page import write_page
from ssast.benchmarks.performance.records import publish, read_records
from ssast.benchmarks.performance.store import OUT, ResultStore, Scope
from ssast.benchmarks.training.variants import DEFAULT, OPTIONS, VARIANTS
from ssast.engine.errors import ConfigError
from ssast.engine.settings import SIZES
from ssast.pipelines.cores import usable_cores
from ssast.pipelines.demo.corpora import fetch_demo

PARTS = ("step", "roofline", "scaling", "loader", "predict", "runs")
MAIN = ("published", next(name for name, v in VARIANTS.items() if v == DEFAULT), "bf16")
DOCS = Path("docs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing, then write the page.

    Args:
        arguments: Command-line arguments without the program's name; None: those of the process.

    Returns:
        The exit status, 0.

    Raises:
        ConfigError: Wrong options, or other options than those of the files; or a process failed,
            or other programs disturbed a case.
        DataError: The recordings cannot be downloaded.
    """
    options = _parser().parse_args(arguments)
    store = ResultStore(options.out)
    if not options.page:
        _measure(store, options)
    folder = options.docs / "performance"
    if store.scope() is not None or not options.page:
        print(publish(store, folder))
    print(write_page(options.docs))
    if options.readme.exists():
        print(write_readme(options.readme, read_records(folder)))
    return 0


def _parser() -> argparse.ArgumentParser:
    scope = Scope()
    parser = argparse.ArgumentParser("ssast bench performance", description=__doc__)
    add = parser.add_argument
    add("--sections", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured (all)")
    add("--sizes", nargs="+", choices=list(SIZES), default=list(scope.sizes), help="model sizes")
    repeats = ", ".join(f"{size} {number}" for size, number in REPEATS.items())
    add("--repeats", type=int, help=f"processes of each variant of the step ({repeats}, else 1)")
    add("--variants", nargs="+", choices=["main", *VARIANTS, *OPTIONS], default=[],
        help=f"variants of the step (all; main: {', '.join(MAIN)})")  # fmt: skip
    add("--batch", type=int, help=f"clips of a step ({scope.batch})")
    add("--frames", type=int, help=f"frames of a clip ({scope.frames})")
    add("--threads", type=int, help="threads of PyTorch and the loaders (all cores)")
    add("--clips", type=int, help=f"clips that a loader reads ({scope.clips})")
    add("--data", help=f"folder of ssast data demo ({scope.data}, downloaded)")
    add_device_option(parser)
    add("--out", type=Path, default=OUT, help=f"folder of the results ({OUT})")
    add("--docs", type=Path, default=DOCS, help=f"folder of the page ({DOCS})")
    add("--readme", type=Path, default=Path("README.md"), help="with a table (README.md)")
    add("--page", action="store_true", help="measure nothing: only write what is written")
    return parser


def _measure(store: ResultStore, options: argparse.Namespace) -> None:
    for name, least in (("repeats", 1), ("batch", 2), ("frames", 32), ("threads", 1), ("clips", 1)):
        if (given := getattr(options, name)) is not None and given < least:
            raise ConfigError(f"--{name} must be {least} or more, got {given}")
    known = store.scope() or Scope(threads=usable_cores())
    names = ("repeats", "batch", "frames", "threads", "clips", "data")
    changes = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    device = torch.device(known.device) if options.device == "auto" and store.scope() else None
    device = device or find_device(options.device)
    if device.type == "cpu":
        use_device(device)  # nor do processes that are started see a GPU
    variants = MAIN if "main" in options.variants else tuple(options.variants)
    scope = replace(
        known, sizes=tuple(options.sizes), variants=variants, device=str(device), **changes
    )
    machine = describe_machine(device)
    for section, cases in sections(scope).items():
        if section.partition("-")[0] in options.sections:
            if section == "runs" and scope.data == Scope().data:
                fetch_demo(Path(scope.data))
            store.measure(section, cases, scope, machine)
