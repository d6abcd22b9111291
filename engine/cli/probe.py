"""``ssast probe``, and ``ssast evaluate --probe``."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssast.engine.cli.imports import imports
from ssast.engine.cli.options import (
    NAMED,
    add_missing_metadata,
    add_precision,
    add_quiet,
    add_weights,
    missing_metadata,
    table_format,
)
from ssast.engine.errors import ConfigError
from ssast.pipelines.files import check_new, check_writable


def add_probe_command(commands: Any) -> None:
    """Add ``ssast probe`` to the subparsers of ``ssast``."""
    command = commands.add_parser("probe", help="evaluate frozen features on labelled tasks")
    command.add_argument(
        "checkpoint",
        metavar="CKPT",
        help=f"folder of a run, a checkpoint, a published .pth, a transformers folder, {NAMED}",
    )
    command.add_argument(
        "--tasks",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of manifests <task>_{train,eval}.json",
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write probe.json there (default: in the folder of a run; nothing for other models)",
    )
    add_layers(command)
    add_weights(command)
    add_missing_metadata(command)
    add_precision(command)
    add_quiet(command)
    command.set_defaults(run=_probe, max_rejected=None)


def add_layers(command: argparse.ArgumentParser) -> None:
    """Add ``--layers`` and ``--attentive``."""
    command.add_argument(
        "--layers",
        action="store_true",
        help="probe each layer, and their learned weighted sum; the table says which is best",
    )
    command.add_argument(
        "--attentive",
        action="store_true",
        help="with --layers: also pool the columns of patches by attention with a learned query",
    )


def check_options(options: argparse.Namespace) -> None:
    """Check options that need others.

    Raises:
        ConfigError: They lack them.
    """
    if options.attentive and not options.layers:
        raise ConfigError("--attentive is for --layers")
    if options.layers and not getattr(options, "probe", True):
        raise ConfigError("--layers is for --probe")


def _probe(options: argparse.Namespace) -> int:
    from ssast.engine.evaluation.probe_tasks import find_tasks

    if options.out is not None:
        check_new([options.out], [options.tasks])
        check_writable(options.out)
    return run_probe(options, find_tasks(options.tasks))


def run_probe(options: argparse.Namespace, tasks: Mapping[str, tuple[Path, Path | None]]) -> int:
    """Probe the checkpoint of a command line on tasks, print the tables and write them."""
    with imports():
        from ssast.engine.checkpoints.store import META
        from ssast.engine.evaluation import layer_probe, probe
        from ssast.engine.formats.open import open_model

    check_options(options)
    loaded = open_model(options.checkpoint, missing_metadata(options), options.weights)
    table = table_format(options) if hasattr(options, "columns") else layer_probe.PLAIN
    given: dict[str, Any] = {
        "table": table,
        "progress": not options.quiet,
        "precision": options.precision,
    }
    out = options.out
    if out is None and loaded.origin == "run" and not hasattr(options, "probe"):
        # A checkpoint or exported weights have this file, and are nobody's to write into.
        out = None if (loaded.path / META).exists() else loaded.path
    path = None
    if out is not None:
        check_writable(out)
        path = out / (layer_probe.REPORTS if options.layers else probe.SCORES)
        probe.read_rows(path)
    if options.layers:
        poolings: tuple[Any, ...] = ("mean", "attentive") if options.attentive else ("mean",)
        reports = []
        found = layer_probe.probe_layers(loaded, tasks, poolings, options.max_rejected, **given)
        for report in found:
            print(layer_probe.format_report(report), flush=True)
            reports.append(report)
        if path is not None:
            print(layer_probe.write_reports(reports, path))
        return 0
    scores = probe.probe_model(loaded, tasks, options.max_rejected, **given)
    print(probe.format_scores(scores))
    if path is not None:
        print(probe.write_scores(scores, path))
    return 0
