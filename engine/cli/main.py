"""The ``ssast`` command."""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ssast.engine.cli.data import PACKAGE_CACHE, add_data_commands
from ssast.engine.cli.export import add_export_commands
from ssast.engine.cli.finetune import add_finetune_commands
from ssast.engine.cli.plan import add_plan_commands
from ssast.engine.config import CONFIGS
from ssast.engine.errors import CheckpointError, ConfigError, LostPeer, TrainingError
from ssast.engine.monitoring.watchdog import STUCK

DESCRIPTION = (
    "Pretrain audio spectrogram transformers without labels, and make classifiers of them."
)
EXAMPLES = """examples:
  ssast demo                                  fetch real recordings, pretrain, show the results
  ssast data demo                             only fetch the recordings
  ssast data prepare /my/recordings data/mine
  ssast data manifests esc50 /my/ESC-50-master --out data/esc50
  ssast pretrain demo                         only pretrain on them
  ssast pretrain base_patch data.train=/my/recordings train.steps=10000
  ssast pretrain base_patch --resume          go on where a run was stopped
  torchrun --nproc-per-node 8 -m ssast.engine.cli pretrain base_patch data.train=clips.json
  ssast finetune esc50_patch --checkpoint SSAST-Base-Patch-400.pth data.train=train.json
  ssast predict runs/esc50_patch dog.wav /my/recordings
  ssast plan base_patch --gpus 64 --gpu h100  memory, speed, days, before it is started
  ssast tune base_patch --out tuned.yaml      the fastest settings on this machine
  ssast probe runs/demo --tasks data/demo/tasks
  ssast visualize runs/demo
  ssast export runs/demo --to published SSAST-Demo.pth
  ssast embed runs/demo /my/recordings --out embeddings.npy
"""
STATUSES = """exit status:
  0      done
  2      something that only you can mend; the message says what
  75     a process hung or was lost: start again with --resume
  128+n  stopped by signal n (INT 130, TERM 143, USR1 138) after saving: start again with --resume
"""
USER_ERROR = 2
BENCHMARKS = {  # modules below ssast.benchmarks
    "kernels": "operations.kernels",
    "step": "training.step",
    "data": "loading.data",
    "faults": "faults",
    "reproduce": "study.reproduce",
    "results": "study.page",
    "release": "study.release",
    "performance": "performance.performance",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no settings behind an option, as in: pretrain demo --resume train.steps=9
    if rest and not (hasattr(options, "overrides") and all("=" in r and r[0] != "-" for r in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    # Imported here, so that --help and a mistyped command answer at once.
    from ssast.pipelines.errors import DataError

    try:
        return options.run(options)
    except (ConfigError, DataError, CheckpointError, TrainingError, OSError) as error:
        print(f"ssast: error: {error}", file=sys.stderr)
        return USER_ERROR
    except LostPeer as error:
        print(f"ssast: error: {error}", file=sys.stderr, flush=True)
        os._exit(STUCK)  # leaving the group in order could wait for who is gone
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "ssast", description=DESCRIPTION, epilog=EXAMPLES + STATUSES, formatter_class=raw
    )
    # The deepspeed launcher puts this before everything else; the rank comes from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    command = commands.add_parser(
        "pretrain",
        help="pretrain a model",
        formatter_class=raw,
        epilog="configurations: " + ", ".join(_recipes()),
    )
    command.add_argument("config", metavar="CONFIG", help="a YAML file, or a name (see below)")
    command.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="go before the file's"
    )
    command.add_argument(
        "--resume", action="store_true", help="go on from the run's last checkpoint"
    )
    command.set_defaults(run=_pretrain)

    command = commands.add_parser("demo", help="fetch real recordings, pretrain, show the results")
    command.add_argument("--source", type=Path, metavar="DIR", help="your own audio instead")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings")
    command.set_defaults(run=_demo)

    command = commands.add_parser("probe", help="score frozen features on labelled tasks")
    command.add_argument(
        "run_folder", metavar="RUN", type=Path, help="a run's folder, or a checkpoint"
    )
    command.add_argument(
        "--tasks", type=Path, required=True, metavar="DIR", help="<task>_{train,eval}.json"
    )
    command.set_defaults(run=_probe)

    command = commands.add_parser("visualize", help="draw curves and reconstructed spectrograms")
    command.add_argument("run_folder", metavar="RUN", type=Path, help="a run's folder")
    command.add_argument("--clips", type=int, default=4, help="how many held-out clips (4)")
    command.set_defaults(run=_visualize)

    add_finetune_commands(commands)
    add_export_commands(commands)
    add_data_commands(commands)
    add_plan_commands(commands)

    command = commands.add_parser("bench", help="measure this machine", add_help=False)
    command.add_argument("what", choices=BENCHMARKS)
    command.add_argument("arguments", nargs=argparse.REMAINDER, help="see ssast bench WHAT --help")
    command.set_defaults(run=_bench)

    command = commands.add_parser("env", help="print the machine, versions and backends")
    command.set_defaults(run=_env)
    return parser


def _recipes() -> list[str]:
    """Names of the configurations that pretrain."""
    paths = sorted(CONFIGS.glob("*.yaml"))
    return [p.stem for p in paths if "\nfinetune:" not in p.read_text(encoding="utf-8")]


def _pretrain(options: argparse.Namespace) -> int:
    from ssast.engine.config import load_config
    from ssast.engine.pretrain import pretrain

    stopped = pretrain(load_config(options.config, options.overrides), resume=options.resume)
    return _status(stopped)


def _status(stopped: int) -> int:
    return 128 + stopped if stopped else 0


def _probe(options: argparse.Namespace) -> int:
    from ssast.engine.evaluation.probe import format_scores, probe_run

    scores, written = probe_run(options.run_folder, options.tasks)
    print(format_scores(scores))
    print(written)
    return 0


def _visualize(options: argparse.Namespace) -> int:
    from ssast.engine.evaluation.reconstructions import visualize

    for path in visualize(options.run_folder, num_clips=options.clips):
        print(path)
    return 0


def _demo(options: argparse.Namespace) -> int:
    from ssast.engine.cli.demo import demo

    return _status(demo(options.source, PACKAGE_CACHE.expanduser(), options.overrides))


def _bench(options: argparse.Namespace) -> int:
    module = importlib.import_module(f"ssast.benchmarks.{BENCHMARKS[options.what]}")
    return module.main(options.arguments) or 0


def _env(options: argparse.Namespace) -> int:
    import torch

    from ssast.engine.monitoring.monitor import environment
    from ssast.engine.parallel.ranks import World
    from ssast.kernels.attention import attention_backend, attention_trials

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    world = World(0, 0, 1, "single", device)
    passed_over = [f"{b}: {why}" for b, why in attention_trials(device, dtype).items() if why]
    facts = environment(
        world,
        attention=attention_backend(device, dtype),
        attention_passed_over="; ".join(passed_over),
    )
    print(json.dumps(facts, indent=1))
    return 0
