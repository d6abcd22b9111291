"""``ssast plan`` and ``ssast tune``."""

import argparse
import json
from pathlib import Path
from typing import Any

from ssast.engine.errors import ConfigError

PLAN_EXAMPLES = """examples:
  ssast plan base_patch --gpus 64 --gpu h100
  ssast plan giant --gpus 512 --gpu a100 --price 1.5 --png scaling.png train.compile=true
  ssast plan tiny_patch --calibrate machine.yaml
  ssast plan base_patch --gpu machine.yaml
  ssast plan base_patch --gpus 4096 --gpu h100 --order 20000000
"""
TUNE_EXAMPLES = """examples:
  ssast tune base_patch --seconds 120 --out tuned.yaml
  ssast tune tiny_patch data.train=clips.json --out tuned.yaml
  ssast pretrain tuned.yaml data.train=clips.json
"""


def add_plan_commands(commands: Any) -> None:
    """Add both commands to the parser's."""
    raw = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(
        "plan",
        help="memory, speed, traffic, days and cost of a run, before it is started",
        formatter_class=raw,
        epilog=PLAN_EXAMPLES,
    )
    _add_config(command)
    command.add_argument("--gpus", type=int, default=1, metavar="N", help="how many (1)")
    command.add_argument(
        "--gpu", default="h100", metavar="NAME", help="h100 (default), a100, ..., cpu, a YAML file"
    )
    command.add_argument("--batch", type=int, metavar="B", help="clips of a GPU and micro-step")
    command.add_argument("--clips", type=float, metavar="N", help="to train on, with repetitions")
    command.add_argument("--price", type=float, metavar="P", help="of a GPU hour")
    command.add_argument(
        "--loader", type=Path, metavar="FILE", help="what ssast bench data --json printed"
    )
    command.add_argument(
        "--calibrate",
        type=Path,
        nargs="?",
        const=Path("machine.yaml"),
        metavar="FILE",
        help="measure this machine for a minute, write FILE (machine.yaml), plan with it",
    )
    command.add_argument(
        "--order",
        type=int,
        metavar="CLIPS",
        help="also work out who reads which of so many clips, for all GPUs, and check it",
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--png", type=Path, metavar="FILE", help="draw the scaling")
    command.set_defaults(run=_plan)

    command = commands.add_parser(
        "tune",
        help="find the fastest settings on this machine by short runs",
        formatter_class=raw,
        epilog=TUNE_EXAMPLES,
    )
    _add_config(command)
    command.add_argument(
        "--seconds", type=float, default=120.0, metavar="S", help="for all runs together (120)"
    )
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="gets the configuration with the fastest settings"
    )
    command.set_defaults(run=_tune)


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG", help="a YAML file, or a recipe's name")
    command.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="go before the file's"
    )


def _plan(options: argparse.Namespace) -> int:
    from ssast.engine.config import load_config
    from ssast.engine.monitoring.gpus import load_gpu
    from ssast.engine.planning.calibrate import calibrate, plain_cpu, write_gpu
    from ssast.engine.planning.report import (
        Wish,
        clips_per_core,
        draw_scaling,
        format_plan,
        make_plan,
    )

    for name in ("gpus", "batch", "clips", "price", "order"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name} must be positive, got {value:g}")
    config = load_config(options.config, options.overrides)
    if options.calibrate is not None:
        gpu = calibrate(lambda text: print(text, flush=True) if not options.json else None)
        write_gpu(gpu, options.calibrate)
    else:
        gpu = plain_cpu() if options.gpu == "cpu" else load_gpu(options.gpu)
    wish = Wish(
        gpus=options.gpus,
        gpu=gpu,
        batch=options.batch,
        clips=options.clips,
        price=options.price,
        clips_per_core=clips_per_core(options.loader, gpu) if options.loader else None,
    )
    plan = make_plan(config, wish)
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


def _tune(options: argparse.Namespace) -> int:
    from ssast.engine.config import load_config
    from ssast.engine.planning.tune import format_results, tune, write_tuned

    config = load_config(options.config, options.overrides)
    results = tune(config, seconds=options.seconds, say=lambda text: print(text, flush=True))
    print(format_results(results))
    if options.out is not None:
        write_tuned(config, results, options.out)
        print(options.out)
    return 0
