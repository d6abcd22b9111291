"""Command-line arguments that several commands of ``ssast`` share."""

import argparse
from pathlib import Path
from typing import Any


def add_config(command: argparse.ArgumentParser) -> None:
    """Add CONFIG and its overrides."""
    command.add_argument("config", metavar="CONFIG", help="YAML file or name of a recipe")
    add_overrides(command)


def add_overrides(command: argparse.ArgumentParser) -> None:
    """Add settings that override those of the configuration."""
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="settings that override those of the configuration",
    )


NAMED = "or a name of ssast weights, hf:owner/name, or an address"


def add_quiet(command: argparse.ArgumentParser) -> None:
    """Add ``--quiet``."""
    command.add_argument(
        "--quiet", action="store_true", help="show no progress bar (default: on a terminal)"
    )


def add_precision(command: argparse.ArgumentParser) -> None:
    """Add ``--precision``."""
    command.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of matmuls and attention; bf16 is faster on GPUs, and on CPUs with AVX512-BF16 or "
        "AMX; what is written is float32 (default: fp32)",
    )


def add_table_format(command: argparse.ArgumentParser, *, labels: bool = True) -> None:
    """Add what can be set of the format of manifests.

    Args:
        command: The command.
        labels: Whether it reads labels.
    """
    group = command.add_argument_group("format of a manifest, where it is not told by itself")
    group.add_argument(
        "--columns",
        metavar="ROLE=NAME,...",
        help="as data.columns: wav=clip,labels=species" if labels else "as data.columns: wav=clip",
    )
    if labels:
        group.add_argument(
            "--label-separator", metavar="TEXT", help="between labels, as data.label_separator"
        )
    group.add_argument("--delimiter", metavar="CHAR", help="between columns; tab for a tab")
    group.add_argument("--encoding", metavar="NAME", help="of its text, such as cp1252")


def table_format(options: argparse.Namespace) -> Any:
    """Return what these options set.

    Raises:
        DataError: A value cannot be.
    """
    from ssast.pipelines.clips.columns import TableFormat
    from ssast.pipelines.errors import DataError

    columns = {}
    for pair in options.columns.split(",") if options.columns else ():
        role, equals, name = pair.partition("=")
        if not equals:
            raise DataError(f"--columns: expected ROLE=NAME,..., found {options.columns!r}")
        columns[role.strip()] = name.strip()
    separator = getattr(options, "label_separator", None)
    return TableFormat(columns, separator, options.delimiter, options.encoding)


def add_layer(command: argparse.ArgumentParser) -> None:
    """Add ``--layer``."""
    command.add_argument(
        "--layer",
        type=_layer,
        default="last",
        metavar="N",
        help="layer of the encoder: 0 for its patch embedding, n for the output of its n-th block, "
        "last, or all, in one array [clips, layers, ...] (default: last)",
    )


def _layer(text: str) -> int | str:
    if text in ("last", "all"):
        return text
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"expected a number, last or all, got {text!r}")
    return int(text)


def add_resume(command: argparse.ArgumentParser) -> None:
    """Add ``--resume``."""
    command.add_argument(
        "--resume", action="store_true", help="resume the run from its latest checkpoint"
    )


def add_weights(command: argparse.ArgumentParser) -> None:
    """Add ``--weights``."""
    command.add_argument(
        "--weights",
        choices=("ema", "raw"),
        help="of a run with train.ema: averaged weights, or those without averaging (default: ema)",
    )


def add_input_metadata(command: argparse.ArgumentParser) -> Any:
    """Add options for the input of published checkpoints; return their group."""
    group = command.add_argument_group("metadata that published fine-tuned checkpoints lack")
    group.add_argument("--frames", type=int, metavar="T", help="input length in frames of 10 ms")
    group.add_argument(
        "--stride",
        type=int,
        nargs=2,
        metavar=("F", "T"),
        help="patch stride in mel bins and frames",
    )
    return group


def add_missing_metadata(command: argparse.ArgumentParser, *, classifier: bool = False) -> None:
    """Add options for all metadata that published checkpoints lack."""
    group = add_input_metadata(command)
    group.add_argument(
        "--pooling",
        choices=("avgtok", "cls"),
        help="mean of the patch tokens, or of the cls tokens (default: avgtok)",
    )
    group.add_argument(
        "--mean", type=float, help="mean of the input features (default: AudioSet's)"
    )
    group.add_argument(
        "--std", type=float, help="standard deviation of the input features (default: AudioSet's)"
    )
    if classifier:
        group.add_argument(
            "--loss",
            choices=("ce", "bce"),
            help="single-label (ce) or multi-label (bce) "
            "(default: as a transformers folder says, else ce)",
        )
        group.add_argument(
            "--labels",
            type=Path,
            metavar="CSV",
            help="classes in the order of the outputs: index,mid,display_name",
        )


def missing_metadata(options: argparse.Namespace) -> Any:
    """Return what these options give."""
    from ssast.engine.formats.open import MissingMetadata

    return MissingMetadata(
        num_frames=options.frames,
        stride=None if options.stride is None else tuple(options.stride),
        pooling=getattr(options, "pooling", None),
        mean=getattr(options, "mean", None),
        std=getattr(options, "std", None),
        loss=getattr(options, "loss", None),
        labels=getattr(options, "labels", None),
    )
