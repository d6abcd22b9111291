"""The ``ssast data`` commands."""

import argparse
from pathlib import Path
from typing import Any, get_args

from ssast.engine.cli.options import add_table_format, table_format
from ssast.kernels.channel import Channel
from ssast.pipelines.text import printable

SHOWN = 10  # problems that are printed


def add_data_commands(commands: Any) -> None:
    """Add ``data`` and its commands to those of ``ssast``.

    Args:
        commands: Subparsers of ``ssast``.
    """
    data = commands.add_parser("data", help="get and prepare audio")
    kinds = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(kinds)
    _add_manifests(kinds)
    _add_prepare(kinds)
    _add_check(kinds)
    _add_stats(kinds)
    _add_look(kinds)


def _add_demo(kinds: Any) -> None:
    command = kinds.add_parser("demo", help="the recordings of the demo, and labelled tasks")
    command.add_argument(
        "--sounds",
        action="store_true",
        help="800 MB of packages instead of 200: also sound events and drums, for make reproduce",
    )
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="(data/demo; with --sounds data/sounds)"
    )
    command.add_argument(
        "--cache", type=Path, metavar="DIR", help="(SSAST_CACHE/packages, ~/.cache/ssast/packages)"
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
        "iemocap or fsd50k; folders (each of them a class); of events in long recordings raven "
        "(selection tables), audacity (label tracks) or audioset_segments (whole videos); lhotse "
        "(cuts)",
    )
    command.add_argument(
        "source", type=Path, metavar="SRC", help="the folder of your copy; of cuts also a file"
    )
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="gets SPLIT.json, labels.csv, ..."
    )
    command.add_argument(
        "--label-column",
        metavar="NAME",
        help="raven: of the labels (the first of annotation, label, species, common name, ...); "
        "lhotse: text, speaker, custom.NAME, ... of supervisions (custom.label, or else text)",
    )
    command.add_argument(
        "--window-s",
        type=float,
        metavar="S",
        help="raven, audacity: cut recordings into windows, with the labels of the events in them "
        "(the events are the clips)",
    )
    command.add_argument(
        "--hop-s", type=float, metavar="S", help="between the starts of two windows (--window-s)"
    )
    command.add_argument(
        "--background",
        metavar="LABEL",
        help="label of windows that no event touches (they are left out)",
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
        "source",
        metavar="SRC",
        help="a folder (or its URL), a manifest (CSV, JSON, ...), a plain .tar",
    )
    command.add_argument("out", metavar="OUT", help="folder for the shards, or its URL (s3://...)")
    _add_channel(command)
    command.add_argument(
        "--codec",
        choices=("flac", "wav", "float"),
        default="flac",
        help="of the clips: flac and wav have 16 bits, and clips with peaks beyond full scale are "
        "scaled down to it; float is WAV of 32 bit, which keeps all levels (flac)",
    )
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
    add_table_format(command)
    command.set_defaults(run=_prepare)


def _add_channel(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--channel",
        choices=get_args(Channel),
        default="mean",
        help="of recordings with several channels, as audio.channel (mean)",
    )


def _add_check(kinds: Any) -> None:
    command = kinds.add_parser(
        "check",
        help="decode all of a data set and say what is wrong with it",
        description="Exit status 1 if anything is wrong.",
    )
    command.add_argument(
        "path", metavar="PATH", help="prepared shards (or their URL), a manifest or a folder"
    )
    command.add_argument(
        "--labels", type=Path, metavar="CSV", help="known labels (labels.csv beside the manifest)"
    )
    command.add_argument("--report", type=Path, metavar="FILE", help="all problems, lines of JSON")
    command.add_argument("--jobs", type=int, metavar="N", help="threads (usable cores)")
    add_table_format(command)
    command.set_defaults(run=_check)


def _add_stats(kinds: Any) -> None:
    command = kinds.add_parser(
        "stats",
        help="mean and standard deviation for audio.mean and audio.std",
        description="Look at clips in a random order until the mean and the standard deviation of "
        "the log-mel are known well enough.",
    )
    command.add_argument(
        "path", metavar="PATH", help="prepared shards (or their URL), a manifest or a folder"
    )
    command.add_argument(
        "--num-frames", type=int, default=1024, metavar="T", help="as audio.num_frames (1024)"
    )
    _add_channel(command)
    command.add_argument(
        "--sample-rate-hz",
        type=int,
        default=16000,
        metavar="HZ",
        help="as audio.sample_rate_hz (16000)",
    )
    command.add_argument(
        "--n-mels", type=int, default=128, metavar="F", help="as audio.n_mels (128)"
    )
    command.add_argument(
        "--no-padding", action="store_true", help="leave frames after a clip's end out"
    )
    command.add_argument("--share", type=float, default=1.0, help="of the clips, at most (1)")
    command.add_argument("--max-clips", type=int, metavar="N", help="at most")
    command.add_argument(
        "--precision",
        type=float,
        default=0.005,
        metavar="P",
        help="stop when the 95 %% intervals are within P times the standard deviation (0.005)",
    )
    command.add_argument("--seed", type=int, default=0, help="of the order of the clips (0)")
    command.add_argument("--jobs", type=int, metavar="N", help="threads (usable cores)")
    command.add_argument("--out", type=Path, metavar="DIR", help="gets stats.json and stats.png")
    add_table_format(command, labels=False)
    command.set_defaults(run=_stats)


def _add_look(kinds: Any) -> None:
    command = kinds.add_parser(
        "look",
        help="a page about a data set: lengths, classes, levels, copies, spectrograms, settings",
        description="Listen to a random draw of a data set and write OUT/index.html, its figures, "
        "and configurations with the settings that fit: pretrain.yaml and, where there are labels, "
        "finetune.yaml.",
    )
    command.add_argument(
        "path", metavar="PATH", help="prepared shards (or their URL), a manifest or a folder"
    )
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="gets index.html and its figures"
    )
    command.add_argument(
        "--max-clips", type=int, default=2000, metavar="N", help="to listen to, at most (2000)"
    )
    command.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    add_table_format(command)
    command.add_argument("--jobs", type=int, metavar="N", help="threads (usable cores)")
    command.set_defaults(run=_look)


def _demo(options: argparse.Namespace) -> int:
    from ssast.pipelines.demo.corpora import fetch_demo, fetch_sounds

    out = options.out or Path("data/sounds" if options.sounds else "data/demo")
    if options.sounds:
        fetch_sounds(out, options.cache)
    else:
        fetch_demo(out, options.cache)
    return 0


def _manifests(options: argparse.Namespace) -> int:
    from ssast.pipelines.datasets.annotations import Reading
    from ssast.pipelines.datasets.manifests import write_dataset

    reading = Reading(options.label_column, options.window_s, options.hop_s, options.background)
    for path in write_dataset(options.name, options.source, options.out, print, reading):
        print(path)
    return 0


def _prepare(options: argparse.Namespace) -> int:
    from ssast.pipelines.audio.convert import Recipe
    from ssast.pipelines.prepare.pack import Packing, prepare_shards

    recipe = Recipe(
        clip_s=options.clip_s,
        min_s=options.min_s,
        hop_s=options.hop_s,
        channel=options.channel,
        is_float=options.codec == "float",
    )
    packing = Packing(recipe, options.codec, options.shard_mib, options.drop_duplicates)
    table = table_format(options)
    prepare_shards(options.source, options.out, packing, table=table, jobs=options.jobs)
    return 0


def _check(options: argparse.Namespace) -> int:
    from ssast.pipelines.errors import DataError
    from ssast.pipelines.files import check_new, check_writable
    from ssast.pipelines.prepare.check import check_data, is_report

    if options.report is not None:
        if options.report.is_dir():
            raise DataError(f"--report {options.report}: expected a file, found a folder")
        if not is_report(options.report):
            check_new([options.report], [options.path, *filter(None, [options.labels])])
        check_writable(options.report.parent)
    found = check_data(
        options.path,
        classes=options.labels,
        table=table_format(options),
        report=options.report,
        jobs=options.jobs,
    )
    labels = f", {len(found.labels)} labels" if found.labels else ""
    print(
        f"{options.path}: {found.num_clips} clips, {found.seconds / 3600:.2f} h{labels}, "
        f"{len(found.problems)} problem{'' if len(found.problems) == 1 else 's'}"
    )
    for problem in found.problems[:SHOWN]:
        print(f"{printable(problem.where)}: {printable(problem.problem)}")
    if len(found.problems) > SHOWN:
        print(f"... and {len(found.problems) - SHOWN} more, see --report")
    if found.wrong_lengths:
        count = len(found.wrong_lengths)
        print(f"{count} with a header that states another length, which are read to their ends:")
        for note in found.wrong_lengths[:SHOWN]:
            print(f"{printable(note.where)}: {printable(note.problem)}")
    return 1 if found.problems else 0


def _stats(options: argparse.Namespace) -> int:
    from ssast.kernels.fbank import FbankSpec
    from ssast.pipelines.cores import usable_cores
    from ssast.pipelines.errors import DataError
    from ssast.pipelines.files import check_new, check_writable
    from ssast.pipelines.prepare.stats import PICTURE, STATS, measure, write_stats

    try:
        spec = FbankSpec(
            sample_rate_hz=options.sample_rate_hz,
            num_frames=options.num_frames,
            n_mels=options.n_mels,
            channel=options.channel,
        )
    except ValueError as error:
        raise DataError(str(error)) from error
    if options.out is not None:
        check_new([options.out / name for name in (STATS, PICTURE)], [options.path])
        check_writable(options.out)
    stats = measure(
        options.path,
        table=table_format(options),
        spec=spec,
        padding=not options.no_padding,
        share=options.share,
        max_clips=options.max_clips,
        precision=options.precision,
        seed=options.seed,
        num_threads=usable_cores() if options.jobs is None else options.jobs,
    )
    rejected = f", {stats.num_rejected} unusable" if stats.num_rejected else ""
    print(
        f"{options.path}: {stats.num_clips} of {stats.num_total} clips{rejected}, "
        f"{stats.seconds_per_clip:.2f} s of sound each"
    )
    print(
        f"mean {stats.mean:.4f} +- {stats.mean_error:.4f}, "
        f"standard deviation {stats.std:.4f} +- {stats.std_error:.4f} (95 %)"
    )
    if options.out is not None:
        for path in write_stats(stats, options.out):
            print(path)
    print(f"audio.mean={stats.mean:.4f} audio.std={stats.std:.4f}")
    return 0


def _look(options: argparse.Namespace) -> int:
    from ssast.engine.config import CONFIGS
    from ssast.pipelines.files import check_new, check_writable
    from ssast.pipelines.prepare.look import look_at
    from ssast.pipelines.prepare.look_page import is_look, write_look
    from ssast.pipelines.text import parse_yaml

    if not is_look(options.out):
        check_new([options.out], [options.path])
    check_writable(options.out)
    look = look_at(
        options.path,
        table=table_format(options),
        max_clips=options.max_clips,
        seed=options.seed,
        jobs=options.jobs,
    )
    bad = f", {len(look.bad)} of them unusable" if look.bad else ""
    print(f"{options.path}: {look.num_drawn} of {look.num_clips} clips were listened to{bad}")
    recipe = parse_yaml((CONFIGS / "classifier.yaml").read_text("utf-8"))
    for path in write_look(look, options.out, recipe):
        print(path)
    return 0
