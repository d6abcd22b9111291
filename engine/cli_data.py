"""The ``ssast data`` commands."""

import argparse
from pathlib import Path
from typing import Any

PACKAGE_CACHE = Path("~/.cache/ssast/packages")


def add_data_commands(commands: Any) -> None:
    """Adds ``data`` and its commands to those of ``ssast``.

    Args:
        commands: What ``add_subparsers`` of the parser has returned.
    """
    data = commands.add_parser("data", help="get and prepare audio")
    kinds = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(kinds)
    _add_manifests(kinds)
    _add_prepare(kinds)


def _add_demo(kinds: Any) -> None:
    command = kinds.add_parser("demo", help="16 kHz clips, a held-out split and labelled tasks")
    command.add_argument(
        "--source", type=Path, metavar="DIR", help="a folder of your own audio instead"
    )
    command.add_argument(
        "--out", type=Path, default=Path("data/demo"), metavar="DIR", help="(data/demo)"
    )
    command.add_argument(
        "--cache", type=Path, default=PACKAGE_CACHE, metavar="DIR", help=f"default: {PACKAGE_CACHE}"
    )
    command.set_defaults(run=_demo)


def _add_manifests(kinds: Any) -> None:
    command = kinds.add_parser(
        "manifests",
        help="manifests of a known data set from your own copy",
        description="Write the official splits, labels and sampling weights of a data set on disk.",
    )
    command.add_argument(
        "name",
        metavar="NAME",
        help="audioset, librispeech, esc50, speechcommands_v1, speechcommands_v2, voxceleb1, "
        "iemocap or fsd50k",
    )
    command.add_argument("source", type=Path, metavar="SRC", help="the folder of your copy")
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="gets SPLIT.json, labels.csv, ..."
    )
    command.set_defaults(run=_manifests)


def _add_prepare(kinds: Any) -> None:
    command = kinds.add_parser(
        "prepare",
        help="recordings of any format to shards of 16 kHz clips",
        description="Decode each recording once, cut it into clips of 16 kHz mono and pack these "
        "into plain tar shards; OUT is then what data.train names. A run that was stopped goes on "
        "with the same command. ffmpeg, if installed, reads what libsndfile cannot (m4a, wma, ...)",
    )
    command.add_argument(
        "source", type=Path, metavar="SRC", help="a folder, a .json or .csv manifest, a plain .tar"
    )
    command.add_argument("out", type=Path, metavar="OUT", help="folder for the shards")
    command.add_argument("--codec", choices=("flac", "wav"), default="flac", help="(flac)")
    command.add_argument(
        "--clip-s", type=float, default=10.0, metavar="S", help="longest clip in seconds (10)"
    )
    command.add_argument(
        "--hop-s", type=float, metavar="S", help="from clip to clip of a recording (--clip-s)"
    )
    command.add_argument(
        "--min-s", type=float, default=0.1, metavar="S", help="shortest clip in seconds (0.1)"
    )
    command.add_argument(
        "--shard-mib", type=float, default=256, metavar="N", help="MiB of SRC in a shard (256)"
    )
    command.add_argument(
        "--drop-duplicates", action="store_true", help="each sequence of samples once"
    )
    command.add_argument("--jobs", type=int, metavar="N", help="threads (usable cores)")
    command.set_defaults(run=_prepare)


def _demo(options: argparse.Namespace) -> int:
    from ssast.pipelines.corpora import fetch_demo, prepare_folder

    if options.source is not None:
        prepare_folder(options.source, options.out)
    else:
        fetch_demo(options.out, options.cache.expanduser())
    return 0


def _manifests(options: argparse.Namespace) -> int:
    from ssast.pipelines.datasets import write_dataset

    for path in write_dataset(options.name, options.source, options.out, print):
        print(path)
    return 0


def _prepare(options: argparse.Namespace) -> int:
    from ssast.pipelines.convert import Recipe
    from ssast.pipelines.pack import Packing, prepare_shards

    recipe = Recipe(clip_s=options.clip_s, min_s=options.min_s, hop_s=options.hop_s, whole=True)
    packing = Packing(recipe, options.codec, options.shard_mib, options.drop_duplicates)
    prepare_shards(options.source, options.out, packing, jobs=options.jobs)
    return 0
