"""``ssast finetune``, ``ssast evaluate`` and ``ssast predict``."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssast.engine.cli.imports import imports
from ssast.engine.cli.options import (
    NAMED,
    add_config,
    add_input_metadata,
    add_missing_metadata,
    add_precision,
    add_quiet,
    add_resume,
    add_table_format,
    add_weights,
    missing_metadata,
    table_format,
)
from ssast.engine.cli.probe import add_layers, check_options, run_probe
from ssast.engine.cli.status import FILES_STATUS, files_status
from ssast.engine.errors import ConfigError
from ssast.pipelines.files import check_new, check_writable
from ssast.pipelines.text import is_terminal, printable

if TYPE_CHECKING:  # imported only when needed: --help answers at once
    from ssast.engine.formats.open import LoadedModel

RECIPES = """recipes: classifier, demo_finetune,
audioset_20k_{patch,frame}, audioset_2m_{patch,frame},
esc50_{patch,frame}, speechcommands_v1_{patch,frame}, speechcommands_v2_{patch,frame},
voxceleb1_{patch,frame}, iemocap_{patch,frame}

examples:
  ssast finetune classifier --checkpoint runs/mine data.train=train.json
  ssast finetune classifier --checkpoint runs/mine data.train=train.json --resume
  ssast finetune classifier data.train=train.json model.size=tiny         from scratch
  ssast finetune esc50_patch --checkpoint SSAST-Base-Patch-400            5-fold cross-validation
"""


def add_finetune_commands(commands: Any) -> None:
    """Add the three commands to the subparsers of ``ssast``."""
    command = commands.add_parser(
        "finetune",
        help="train a classifier from pretrained weights or from scratch",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=RECIPES,
    )
    add_config(command)
    command.add_argument(
        "--checkpoint",
        metavar="CKPT",
        help="weights to begin from: folder of a run, a published .pth, a transformers folder, "
        f"{NAMED}; of a fine-tuned model the head is left out (default: none)",
    )
    add_resume(command)
    add_weights(command)
    add_input_metadata(command)
    command.set_defaults(run=_finetune)

    command = commands.add_parser(
        "evaluate", help="compute metrics of a classifier, or of frozen features, on labelled clips"
    )
    _add_classifier(command)
    command.add_argument("manifest", metavar="MANIFEST", help="manifest of labelled clips")
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="write predictions.csv, metrics.json and plots"
    )
    command.add_argument(
        "--probe",
        action="store_true",
        help="evaluate the frozen encoder of any model: linear probe and nearest neighbours",
    )
    add_layers(command)
    command.add_argument(
        "--train",
        type=Path,
        metavar="TRAIN",
        help="with --probe: training clips (default: 5-fold cross-validation on MANIFEST)",
    )
    command.add_argument(
        "--max-rejected",
        type=_share,
        metavar="SHARE",
        help="largest share of unreadable clips (default: data.max_rejected of the run)",
    )
    add_table_format(command)
    command.set_defaults(run=_evaluate)

    command = commands.add_parser(
        "predict", help="print the most likely classes of recordings", epilog=FILES_STATUS
    )
    _add_classifier(command)
    command.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="audio files, folders or manifests"
    )
    command.add_argument(
        "--top", type=int, default=3, metavar="K", help="number of classes (default: 3)"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object per line")
    long = command.add_argument_group("sliding windows over long recordings")
    long.add_argument(
        "--window-s",
        type=float,
        metavar="S",
        help="window length in seconds (default: the input length of the model)",
    )
    long.add_argument(
        "--hop-s",
        type=float,
        metavar="S",
        help="hop between windows in seconds (default: half a window)",
    )
    long.add_argument(
        "--out", type=Path, metavar="DIR", help="write windows.jsonl and a plot of each recording"
    )
    add_table_format(command, labels=False)
    command.set_defaults(run=_predict)


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, got {text}")
    return share


def _add_classifier(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "checkpoint",
        metavar="RUN",
        help="folder of a fine-tuning run, a published fine-tuned .pth, a transformers folder, "
        f"{NAMED}",
    )
    add_weights(command)
    add_missing_metadata(command, classifier=True)
    add_precision(command)
    add_quiet(command)


def _finetune(options: argparse.Namespace) -> int:
    with imports():
        from ssast.engine.config import load_config
        from ssast.engine.finetune import finetune
        from ssast.engine.folds import cross_validate, uses_folds

    config = load_config(options.config, options.overrides)
    train = cross_validate if uses_folds(config) else finetune
    stopped = train(
        config,
        options.checkpoint,
        resume=options.resume,
        metadata=missing_metadata(options),
        weights=options.weights,
    )
    return 128 + stopped if stopped else 0


def _evaluate(options: argparse.Namespace) -> int:
    if options.train is not None and not options.probe:
        raise ConfigError("--train is for --probe")
    if options.out is not None:
        check_new([options.out], [options.manifest])
        check_writable(options.out)
    if options.probe:
        manifest = Path(options.manifest)
        pair = (manifest, None) if options.train is None else (options.train, manifest)
        return run_probe(options, {manifest.stem: pair})
    check_options(options)
    with imports():
        from ssast.engine.evaluation.evaluate import evaluate
        from ssast.engine.evaluation.metrics import COUNTS
        from ssast.engine.formats.open import open_classifier
        from ssast.kernels.memory import keep_freed_memory

    keep_freed_memory()
    metadata = missing_metadata(options)
    loaded = open_classifier(options.checkpoint, metadata, options.weights, named=True)
    values = evaluate(
        loaded,
        options.manifest,
        options.out,
        options.max_rejected,
        precision=options.precision,
        table=table_format(options),
        progress=not options.quiet,
    )
    scored, total = (int(values.pop(name)) for name in COUNTS)
    print(f"{'clips':10}{scored} of {total}")
    for name, value in values.items():
        print(f"{name:10}{value:8.4f}")
    if options.out is not None:
        print(options.out)
    return 0


def _predict(options: argparse.Namespace) -> int:
    with imports():
        from ssast.engine.evaluation.predict import predict
        from ssast.engine.formats.open import open_classifier
        from ssast.kernels.memory import keep_freed_memory

    keep_freed_memory()
    if options.top < 1:
        raise ConfigError(f"--top must be at least 1, got {options.top}")
    if options.out is not None:
        check_new([options.out], options.sources)
        check_writable(options.out)
    loaded = open_classifier(options.checkpoint, missing_metadata(options), options.weights)
    if options.window_s is not None or options.hop_s is not None or options.out is not None:
        return _predict_windows(loaded, options)
    predictions = predict(
        loaded,
        options.sources,
        options.top,
        precision=options.precision,
        table=table_format(options),
        progress=not options.quiet,
    )
    for found in predictions:
        if options.json:
            print(json.dumps(dataclasses.asdict(found)))
        else:
            print(printable(found.path), _shown(found.reason, found.classes), sep="  ")
    read = [found for found in predictions if found.reason is None]
    return files_status(len(read), len(predictions))


def _predict_windows(loaded: "LoadedModel", options: argparse.Namespace) -> int:
    from ssast.engine.evaluation.timeline import TimelineWriter, timelines

    num_read = total = 0
    # Where the lines come on a terminal, they are the progress.
    progress = not options.quiet and not is_terminal(sys.stdout)
    windows = timelines(
        loaded,
        options.sources,
        options.window_s,
        options.hop_s,
        precision=options.precision,
        table=table_format(options),
        progress=progress,
    )
    writer = None if options.out is None else TimelineWriter(options.out, options.top)
    for timeline in windows:
        for line in timeline.lines(options.top):
            if options.json:
                print(json.dumps(line))
            else:
                classes = _shown(line.get("reason"), line.get("classes", ()))
                shown = [printable(line["path"]), classes]
                if "start_s" in line:
                    shown.insert(1, f"{line['start_s']:.2f}-{line['end_s']:.2f} s")
                print(*shown, sep="  ", flush=True)
        num_read, total = num_read + (timeline.reason is None), total + 1
        if writer is not None:
            writer.put(timeline)
    for path in () if writer is None else writer.written:
        print(path)
    return files_status(num_read, total)


def _shown(reason: str | None, classes: Sequence[tuple[str, float]]) -> str:
    if reason is not None:
        return f"cannot be read: {printable(reason)}"
    return "  ".join(f"{printable(name)} {probability:.1%}" for name, probability in classes)
