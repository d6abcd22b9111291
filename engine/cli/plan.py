"""``ssast plan`` and ``ssast tune``."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssast.engine.cli.options import add_config
from ssast.engine.errors import ConfigError
from ssast.pipelines.files import check_new, check_writable

if TYPE_CHECKING:
    from ssast.engine.config import Config
    from ssast.engine.monitoring.gpus import Gpu

PLAN_EXAMPLES = """examples:
  ssast plan base_patch --gpus 64 --gpu h100
  ssast plan giant --gpus 512 --gpu a100 --price 1.5 --png scaling.png train.compile=true
  ssast plan tiny_patch --calibrate machine.yaml
  ssast plan base_patch --gpu machine.yaml
  ssast plan base_patch --gpus 4096 --gpu h100 --order 20000000
  ssast plan base_patch --gpu h100 --batch 64 --ledger
  ssast plan tiny_patch --gpu cpu --batch 8 --ledger
"""
TUNE_EXAMPLES = """examples:
  ssast tune base_patch --seconds 120 --out tuned.yaml
  ssast tune tiny_patch data.train=clips.json --out tuned.yaml
  ssast pretrain tuned.yaml data.train=clips.json
"""
NOT_OF_A_STEP = ("clips", "price", "loader", "order", "png")  # refused beside --ledger


def add_plan_commands(commands: Any) -> None:
    """Add both commands to the subparsers of ``ssast``."""
    raw = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(
        "plan",
        help="estimate memory, throughput, communication, time and cost of a pretraining run",
        formatter_class=raw,
        epilog=PLAN_EXAMPLES,
    )
    add_config(command)
    command.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="number of GPUs (default: 1)"
    )
    command.add_argument(
        "--gpu",
        default="h100",
        metavar="NAME",
        help="GPU type: h100, a100, ..., cpu, or a YAML file of --calibrate (default: h100)",
    )
    command.add_argument(
        "--batch",
        type=int,
        metavar="B",
        help="micro-batch size per GPU (default: chosen by the plan)",
    )
    command.add_argument(
        "--clips",
        type=float,
        metavar="N",
        help="clips to train on in total, all epochs (default: those of the configuration)",
    )
    command.add_argument("--price", type=float, metavar="P", help="price of one GPU hour")
    command.add_argument(
        "--loader",
        type=Path,
        metavar="FILE",
        help="data loading throughput: output of ssast bench data --json",
    )
    command.add_argument(
        "--calibrate",
        type=Path,
        nargs="?",
        const=Path("machine.yaml"),
        metavar="FILE",
        help="benchmark this machine (1 minute), write FILE (machine.yaml) and plan with it",
    )
    command.add_argument(
        "--order",
        type=int,
        metavar="CLIPS",
        help="also compute and verify the order in which all ranks read this many clips",
    )
    command.add_argument(
        "--ledger",
        action="store_true",
        help="print launches, bytes and FLOPs of one step on one device instead, by operation",
    )
    command.add_argument("--json", action="store_true", help="print the plan as JSON")
    command.add_argument(
        "--png", type=Path, metavar="FILE", help="plot the scaling with the number of GPUs"
    )
    command.set_defaults(run=_plan)

    command = commands.add_parser(
        "tune",
        help="find the fastest settings for this machine in short trial runs",
        formatter_class=raw,
        epilog=TUNE_EXAMPLES,
    )
    add_config(command)
    command.add_argument(
        "--seconds",
        type=float,
        default=120.0,
        metavar="S",
        help="time limit for all trials (default: 120)",
    )
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="write the configuration with the fastest settings"
    )
    command.set_defaults(run=_tune)


def _load(options: argparse.Namespace) -> "Config":
    """Load the configuration; what nobody set is that of the checkpoint it names, as in a run."""
    from ssast.engine.config import is_of_run, load_config
    from ssast.engine.formats.initial import begin_from

    config = load_config(options.config, options.overrides)
    begun = is_of_run(Path(options.config))
    _, config, lines = begin_from(config, None, None, None, begun=begun)
    for line in lines:
        print(line, file=sys.stderr if getattr(options, "json", False) else None, flush=True)
    return config


def _plan(options: argparse.Namespace) -> int:
    from ssast.engine.monitoring.gpus import CPU, load_gpu
    from ssast.engine.planning.calibrate import calibrate, plain_cpu, write_gpu
    from ssast.engine.planning.report import (
        PlanRequest,
        clips_per_core,
        draw_scaling,
        format_plan,
        make_plan,
    )

    for name in ("gpus", "batch", "clips", "price", "order"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name} must be positive and finite, got {value:g}")
    unused = [f"--{name}" for name in NOT_OF_A_STEP if getattr(options, name) is not None]
    if options.ledger and unused:
        raise ConfigError(
            f"--ledger lists one step on one device, expected no {', '.join(unused)} beside it"
        )
    if options.png is not None:
        if options.png.suffix.lower() != ".png":
            raise ConfigError(f"--png {options.png}: expected a name that ends in .png")
        check_new([options.png], [options.config])
        check_writable(options.png.parent)
    config = _load(options)
    if options.calibrate is not None:
        check_new([options.calibrate], [options.config])
        check_writable(options.calibrate.parent)
        gpu = calibrate(
            lambda text: print(text, flush=True) if not options.json else None,
            precision=config.train.precision,
        )
        write_gpu(gpu, options.calibrate)
    else:
        gpu = plain_cpu(config.train.precision) if options.gpu == CPU else load_gpu(options.gpu)
    if config.train.precision not in ("auto", gpu.precision):
        raise ConfigError(
            f"train.precision {config.train.precision}: {gpu.name} has its peak in "
            f"{gpu.precision} alone: expected a YAML file with precision {config.train.precision} "
            "and the peak_tflops of it"
        )
    if options.ledger:
        return _ledger(config, gpu, options)
    request = PlanRequest(
        gpus=options.gpus,
        gpu=gpu,
        batch=options.batch,
        clips=options.clips,
        price=options.price,
        clips_per_core=clips_per_core(options.loader, gpu) if options.loader else None,
    )
    plan = make_plan(config, request)
    if options.order is not None:
        from ssast.engine.planning.order import format_order, work_out_order

        plan["order"] = work_out_order(
            options.order, options.gpus, plan["choice"]["batch_per_gpu"], config.train.seed
        )
    if options.png is not None:
        draw_scaling(plan, options.png)
    if options.json:
        print(json.dumps(plan))
        return 0
    print(format_plan(plan))
    if options.order is not None:
        print(format_order(plan["order"]))
    for path in (options.png, options.calibrate):
        if path is not None:
            print(path)
    return 0


def _ledger(config: "Config", gpu: "Gpu", options: argparse.Namespace) -> int:
    from ssast.engine.planning.ledger import make_ledger
    from ssast.engine.planning.ledger_report import format_ledger, ledger_json

    train = config.train
    batch = options.batch or train.batch_size // (options.gpus * train.accumulation_steps)
    ledger = make_ledger(config, gpu, max(1, batch))
    print(json.dumps(ledger_json(ledger)) if options.json else format_ledger(ledger))
    return 0


def _tune(options: argparse.Namespace) -> int:
    from ssast.engine.config import check_paths
    from ssast.engine.planning.tune import check_seconds, format_results, tune, write_tuned
    from ssast.pipelines.cores import find_cores

    check_seconds(options.seconds)
    if options.out is not None:
        check_new([options.out], [options.config])
        check_writable(options.out.parent)
    config = _load(options)
    check_paths(config)
    cores = find_cores()
    print(f"{cores.number} cores ({cores.source})", flush=True)
    results = tune(config, seconds=options.seconds, say=lambda text: print(text, flush=True))
    print(format_results(results))
    if options.out is not None:
        write_tuned(config, results, options.out)
        print(options.out)
    return 0
