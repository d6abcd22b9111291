"""``ssast finetune``, ``ssast evaluate`` and ``ssast predict``."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssast.engine.cli.export import add_unsaid, unsaid_of

RECIPES = """recipes: classifier, demo_finetune,
audioset_20k_{patch,frame}, audioset_2m_{patch,frame},
esc50_{patch,frame}, speechcommands_v1_{patch,frame}, speechcommands_v2_{patch,frame},
voxceleb1_{patch,frame}, iemocap_{patch,frame}

  ssast finetune esc50_patch --checkpoint SSAST-Base-Patch-400.pth      five folds, one report
  ssast finetune classifier --checkpoint runs/mine data.train=train.json
  ssast finetune classifier --checkpoint runs/mine data.train=train.json --resume
  ssast finetune classifier data.train=train.json model.size=tiny         from scratch
"""


def add_finetune_commands(commands: Any) -> None:
    """Add the three commands to the parser's."""
    command = commands.add_parser(
        "finetune",
        help="train a classifier, from pretrained weights or from scratch",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=RECIPES,
    )
    command.add_argument("config", metavar="CONFIG", help="a YAML file, or a recipe (see below)")
    command.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="go before the file's"
    )
    command.add_argument(
        "--checkpoint",
        type=Path,
        metavar="CKPT",
        help="a published .pth, or the folder of a pretraining run; from scratch without it",
    )
    command.add_argument(
        "--resume", action="store_true", help="go on from the run's last checkpoint"
    )
    command.set_defaults(run=_finetune)

    command = commands.add_parser(
        "evaluate", help="score a classifier, or the features of a model, on labelled clips"
    )
    _add_classifier(command)
    command.add_argument("manifest", metavar="MANIFEST", help="clips with labels")
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="gets predictions.csv, metrics.json and pictures"
    )
    command.add_argument(
        "--probe",
        action="store_true",
        help="score the frozen encoder of any model by a linear and a nearest-neighbour classifier",
    )
    command.add_argument(
        "--train",
        type=Path,
        metavar="TRAIN",
        help="with --probe: clips to train on (else four fifths of MANIFEST in turn)",
    )
    command.set_defaults(run=_evaluate)

    command = commands.add_parser("predict", help="name what is in recordings")
    _add_classifier(command)
    command.add_argument(
        "sources", nargs="+", metavar="FILE_OR_FOLDER", help="audio files, folders, manifests"
    )
    command.add_argument("--top", type=int, default=3, help="how many classes (3)")
    command.add_argument("--json", action="store_true", help="one JSON object a line")
    long = command.add_argument_group("of long recordings, window by window")
    long.add_argument(
        "--window-s", type=float, metavar="S", help="length in seconds (the model's input)"
    )
    long.add_argument(
        "--hop-s", type=float, metavar="S", help="from window to window (half of one)"
    )
    long.add_argument(
        "--out", type=Path, metavar="DIR", help="gets windows.jsonl and a picture of each recording"
    )
    command.set_defaults(run=_predict)


def _add_classifier(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "checkpoint",
        metavar="RUN",
        type=Path,
        help="a fine-tuning run's folder, a published fine-tuned file, a folder of transformers",
    )
    add_unsaid(command, classifier=True)


def _finetune(options: argparse.Namespace) -> int:
    from ssast.engine.config import load_config
    from ssast.engine.finetune import finetune
    from ssast.engine.folds import are_asked_for, cross_validate

    config = load_config(options.config, options.overrides)
    train = cross_validate if are_asked_for(config, options.overrides) else finetune
    stopped = train(config, options.checkpoint, resume=options.resume)
    return 128 + stopped if stopped else 0


def _open(options: argparse.Namespace, *, named: bool = False) -> Any:
    from ssast.engine.finetune import FinetuneEngine
    from ssast.engine.formats.open import open_classifier

    found = open_classifier(options.checkpoint, unsaid_of(options), options.labels, named=named)
    return FinetuneEngine(found.config, trained=found)


def _evaluate(options: argparse.Namespace) -> int:
    if options.probe:
        return _probe(options)
    for name, value in _open(options, named=True).evaluate(options.manifest, options.out).items():
        print(f"{name:10}{value:8.4f}")
    if options.out is not None:
        print(options.out)
    return 0


def _probe(options: argparse.Namespace) -> int:
    from ssast.engine.evaluation.probe import format_scores, probe_model, write_scores
    from ssast.engine.formats.open import open_model

    opened = open_model(options.checkpoint, unsaid_of(options))
    scores = probe_model(opened, Path(options.manifest), options.train)
    print(format_scores(scores))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        print(write_scores(scores, options.out / "probe.json"))
    return 0


def _predict(options: argparse.Namespace) -> int:
    engine = _open(options)
    if options.window_s is not None or options.hop_s is not None or options.out is not None:
        return _predict_windows(engine, options)
    for found in engine.predict(options.sources, options.top):
        if options.json:
            print(json.dumps(dataclasses.asdict(found)))
        else:
            print(found.path, _shown(found.reason, found.classes), sep="  ")
    return 0


def _predict_windows(engine: Any, options: argparse.Namespace) -> int:
    from ssast.engine.evaluation.timeline import write_timelines

    found = []
    for timeline in engine.timelines(options.sources, options.window_s, options.hop_s):
        for line in timeline.lines(options.top):
            if options.json:
                print(json.dumps(line))
            else:
                shown = [line["path"], _shown(line.get("reason"), line.get("classes", ()))]
                if "start_s" in line:
                    shown.insert(1, f"{line['start_s']:.2f}-{line['end_s']:.2f} s")
                print(*shown, sep="  ", flush=True)
        if options.out is not None:
            found.append(timeline)
    if options.out is not None:
        for path in write_timelines(options.out, found, options.top):
            print(path)
    return 0


def _shown(reason: str | None, classes: Sequence[tuple[str, float]]) -> str:
    if reason is not None:
        return f"cannot be read: {reason}"
    return "  ".join(f"{name} {probability:.1%}" for name, probability in classes)
