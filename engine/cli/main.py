"""The ``ssast`` command."""

import argparse
import contextlib
import importlib
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ssast.engine.cli.data import add_data_commands
from ssast.engine.cli.export import add_export_commands, add_weights_command
from ssast.engine.cli.finetune import add_finetune_commands
from ssast.engine.cli.imports import imports
from ssast.engine.cli.options import (
    NAMED,
    add_config,
    add_input_metadata,
    add_overrides,
    add_resume,
    add_weights,
    missing_metadata,
)
from ssast.engine.cli.plan import add_plan_commands
from ssast.engine.cli.probe import add_probe_command
from ssast.engine.cli.status import (
    CLOSED_OUTPUT,
    USER_ERROR,
    discard_output,
    os_error_status,
    out_of_memory,
)
from ssast.engine.config import CONFIGS
from ssast.engine.errors import (
    CheckpointError,
    ConfigError,
    LostPeer,
    ReportError,
    SaveError,
    TrainingError,
)
from ssast.engine.monitoring.watchdog import EX_TEMPFAIL
from ssast.pipelines.cores import prepare_threads
from ssast.pipelines.text import print_error, printable

DESCRIPTION = (
    "Pretrain audio spectrogram transformers on unlabelled audio and fine-tune them as classifiers."
)
EXAMPLES = """examples:
  ssast demo                                  download a small corpus, pretrain, show the results
  ssast data prepare /my/recordings data/mine
  ssast data manifests esc50 /my/ESC-50-master --out data/esc50
  ssast pretrain base_patch data.train=/my/recordings train.steps=10000
  ssast pretrain runs/base_patch/config.yaml --resume
  torchrun --nproc-per-node 8 -m ssast.engine.cli pretrain base_patch data.train=clips.json
  ssast finetune classifier --checkpoint runs/base_patch data.train=train.json
  ssast finetune esc50_patch --checkpoint SSAST-Base-Patch-400
  ssast evaluate runs/classifier test.json
  ssast predict runs/classifier dog.wav /my/recordings
  ssast embed runs/base_patch /my/recordings --out embeddings.npy
  ssast export runs/base_patch --to hf folder
  ssast plan base_patch --gpus 64 --gpu h100  estimate memory, throughput and days
  ssast tune base_patch --out tuned.yaml      find the fastest settings for this machine
"""
EXIT_STATUS = """exit status:
  0      success
  1      ssast data check found problems in the data
  2      user error, or no file could be read; the message says what to change
  3      ssast predict, ssast embed: some files could not be read; the output covers the others
  75     a process hung or was lost, storage kept failing, memory or open files ran out, or another
         process uses the folder: run the same command again with --resume
  141    what read the output closed it, such as head: nothing is said
  128+n  stopped by signal n (SIGINT 130, SIGTERM 143, SIGUSR1 138) after a checkpoint was saved:
         run the same command again with --resume
"""
BENCHMARKS = {  # name: module in ssast.benchmarks
    "kernels": "operations.kernels",
    "step": "training.step",
    "waiting": "training.waiting",
    "data": "loading.data",
    "lists": "loading.lists",
    "faults": "faults.run",
    "fuzz": "fuzz",
    "reproduce": "study.reproduce",
    "results": "study.page",
    "release": "study.release",
    "performance": "performance.performance",
    "gpu": "gpu.session",
    "batches": "study.batches",
    "continued": "study.continued",
    "dropping": "study.dropping",
    "tuning": "study.tuning",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status."""
    prepare_threads()  # before torch is imported, which is done where it is used
    try:
        try:
            return _run(arguments)
        finally:  # at the end of Python an error would be a traceback; help ends by SystemExit
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        status = os_error_status(error)
        if status != CLOSED_OUTPUT:
            print_error(f"ssast: error: {printable(error)}")
        discard_output()
        return status


def _run(arguments: Sequence[str] | None) -> int:
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse stops collecting overrides at an option: pretrain demo --resume train.steps=9
    if rest and not (hasattr(options, "overrides") and all("=" in r and r[0] != "-" for r in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    # Heavy modules are imported where they are used: --help and errors must be fast.
    from ssast.pipelines.errors import DataError, FolderInUse, StorageError

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names that it cannot show are escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        return options.run(options)
    except (LostPeer, StorageError) as error:
        _end_at_once(str(error), EX_TEMPFAIL)
    except (FolderInUse, SaveError) as error:
        print_error(f"ssast: error: {printable(error)}")
        return EX_TEMPFAIL
    except (ConfigError, DataError, CheckpointError, TrainingError, ReportError) as error:
        print_error(f"ssast: error: {printable(error)}")
        return USER_ERROR
    except (MemoryError, RuntimeError) as error:
        lack = out_of_memory(error)
        if lack is None:
            raise
        _end_at_once(*lack)
    except KeyboardInterrupt:
        return 130


def _end_at_once(message: str, status: int) -> NoReturn:
    """End the process: an orderly exit could wait for a lost process, or for memory."""
    with contextlib.suppress(OSError, AttributeError):  # None where it is closed
        sys.stdout.flush()
    print_error(f"ssast: error: {printable(message)}")
    os._exit(status)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "ssast", description=DESCRIPTION, epilog=f"{EXAMPLES}\n{EXIT_STATUS}", formatter_class=raw
    )
    # The deepspeed launcher puts this first; the rank is read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    command = commands.add_parser(
        "demo",
        help="download a small corpus, pretrain, and fine-tune from scratch and from weights",
    )
    command.add_argument(
        "--source", type=Path, metavar="DIR", help="use your own audio files instead"
    )
    add_overrides(command)
    command.set_defaults(run=_demo)

    command = commands.add_parser(
        "pretrain",
        help="pretrain a model on unlabelled audio",
        formatter_class=raw,
        epilog="recipes: " + ", ".join(_recipes()),
    )
    add_config(command)
    command.add_argument(
        "--checkpoint",
        metavar="CKPT",
        help="weights to continue from: folder of a run, a published .pth, a transformers "
        f"folder, {NAMED}; heads that it lacks are fresh (default: from scratch)",
    )
    add_resume(command)
    add_weights(command)
    add_input_metadata(command)
    command.set_defaults(run=_pretrain)

    add_finetune_commands(commands)
    add_weights_command(commands)

    add_probe_command(commands)

    command = commands.add_parser(
        "visualize", help="plot metrics and reconstructed spectrograms of a pretraining run"
    )
    command.add_argument("run_folder", metavar="RUN", type=Path, help="folder of the run")
    command.add_argument(
        "--clips", type=int, default=4, metavar="N", help="number of validation clips (default: 4)"
    )
    command.set_defaults(run=_visualize)

    add_export_commands(commands)
    add_data_commands(commands)
    add_plan_commands(commands)

    command = commands.add_parser(
        "bench",
        help="run a benchmark on this machine",
        epilog="ssast bench WHAT --help explains each.",
    )
    command.add_argument("what", choices=BENCHMARKS, metavar="WHAT", help=", ".join(BENCHMARKS))
    command.add_argument("arguments", nargs=argparse.REMAINDER, help="see ssast bench WHAT --help")
    command.set_defaults(run=_bench)

    command = commands.add_parser("env", help="print hardware, package versions and backends")
    command.set_defaults(run=_env)
    return parser


def _recipes() -> list[str]:
    """Return the names of the pretraining recipes."""
    paths = sorted(CONFIGS.glob("*.yaml"))
    return [p.stem for p in paths if "\nfinetune:" not in p.read_text(encoding="utf-8")]


def _pretrain(options: argparse.Namespace) -> int:
    with imports():
        from ssast.engine.config import load_config
        from ssast.engine.pretrain import pretrain

    config = load_config(options.config, options.overrides)
    stopped = pretrain(
        config,
        options.checkpoint,
        resume=options.resume,
        metadata=missing_metadata(options),
        weights=options.weights,
    )
    return _status(stopped)


def _status(stopped: int) -> int:
    return 128 + stopped if stopped else 0


def _visualize(options: argparse.Namespace) -> int:
    from ssast.engine.evaluation.reconstructions import visualize

    if options.clips < 1:
        raise ConfigError(f"--clips must be at least 1, got {options.clips}")
    for path in visualize(options.run_folder, num_clips=options.clips):
        print(path)
    return 0


def _demo(options: argparse.Namespace) -> int:
    from ssast.engine.cli.demo import demo

    return _status(demo(options.source, options.overrides))


def _bench(options: argparse.Namespace) -> int:
    module = importlib.import_module(f"ssast.benchmarks.{BENCHMARKS[options.what]}")
    return module.main(options.arguments) or 0


def _env(options: argparse.Namespace) -> int:
    with imports():
        import torch

        from ssast.engine.monitoring.monitor import environment
        from ssast.engine.parallel.ranks import World
        from ssast.kernels.attention import attention_backend, attention_trials

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    world = World(0, 0, 1, "single", device)
    unavailable = [f"{b}: {why}" for b, why in attention_trials(device, dtype).items() if why]
    facts = environment(
        world,
        attention=attention_backend(device, dtype),
        attention_unavailable="; ".join(unavailable),
    )
    print(json.dumps(facts, indent=1))
    return 0
