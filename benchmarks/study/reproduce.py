"""Reproduce the claims of the paper at small scale: pretraining against scratch, and ablations.

Tiny patch and frame models are pretrained on real recordings and fine-tuned on labelled tasks.
Models from scratch are trained for the same number of epochs, with their own learning rate,
selected on validation clips. Test clips are evaluated once per seed. The study can be stopped at
any time: the same command resumes it.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ssast.benchmarks.study.models import MODELS
from ssast.benchmarks.study.page import OUT, write_page
from ssast.benchmarks.study.plan import (
    RATES,
    FineTuning,
    Plan,
    check_no_leak,
    finetuning_config,
    num_runs,
    pretraining_config,
    steps_and_epochs,
)
from ssast.benchmarks.study.runs import Interrupted, Study
from ssast.engine.config import Config
from ssast.engine.errors import ConfigError
from ssast.engine.planning.trial import try_out
from ssast.pipelines.clips.manifest import read_clips
from ssast.pipelines.demo.corpora import fetch_sounds
from ssast.pipelines.files import write_atomically
from ssast.pipelines.locks import in_turn

DATA = Path("data/sounds")
HOURS = 8.0
EPOCHS = 10
TASKS = ("events", "drums", "voice", "zh_initial", "language")
ABLATION_TASKS = ("events", "voice", "language")  # those with the smallest spread, and sounds
MEASURED_S = 20.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or resume the study and write the page; return 0, or 128 + the signal that stopped it."""
    options = _parser().parse_args(arguments)
    shared, names = options.store or options.out, options.only or tuple(MODELS)
    with in_turn(shared, "another process makes the plan"):
        plan = _agree(options, shared, names)
    try:
        Study(plan, options.out, options.store, options.kept).run(names)
    except Interrupted as stopped:
        print("run the same command again to resume; ssast bench results writes the page so far")
        return 128 + stopped.number
    print(write_page(options.out, options.docs))
    return 0


def _agree(options: argparse.Namespace, shared: Path, names: Sequence[str]) -> Plan:
    """Return the plan of all processes, made by the first; write it beside the runs."""
    stored = Plan.read(options.out)
    if shared != options.out:
        theirs = Plan.read(shared)
        ours, other = (plan and replace(plan, latent_time=None) for plan in (stored, theirs))
        if ours is not None and other is not None and ours != other:
            raise ConfigError(
                f"{shared / 'plan.json'} differs from {options.out / 'plan.json'}: choose another "
                "--out or --store"
            )
        stored = theirs or stored
    if options.data is None and (stored is None or stored.data == str(DATA)):
        fetch_sounds(DATA)
    plan = make_plan(options, stored)
    if plan.latent_time is None and any(MODELS[name].budget == "time" for name in names):
        plan = replace(plan, latent_time=measure_latent_time(plan, options.out))
    compared = check_no_leak(plan)
    print(f"no test clip ({compared['test']}) is a pretraining clip ({compared['pretraining']})")
    for folder in (options.out, shared):
        plan.write(folder)
    write_atomically(options.out / "leaks.json", json.dumps(compared) + "\n")
    return plan


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("ssast bench reproduce", description=__doc__)
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--hours", type=float, help=f"time for the study on this machine (default: {HOURS:g})"
    )
    length.add_argument("--steps", type=int, help="pretraining steps, instead of --hours")
    parser.add_argument(
        "--epochs", type=int, help=f"fine-tuning epochs, with --steps (default: {EPOCHS})"
    )
    parser.add_argument("--seeds", type=int, help="fine-tuning seeds (default: 3)")
    parser.add_argument(
        "--tasks", nargs="+", metavar="NAME", help=f"tasks (default: {' '.join(TASKS)})"
    )
    parser.add_argument(
        "--replicas",
        type=int,
        help="seeds of the ablations, each with a pretraining of its own (default: 3)",
    )
    parser.add_argument(
        "--ablation-tasks",
        nargs="+",
        metavar="NAME",
        help=f"tasks of the ablations (default: {' '.join(ABLATION_TASKS)})",
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        help=f"learning rates (default: {' '.join(map(str, RATES))})",
    )
    parser.add_argument(
        "--data", type=Path, help=f"data of ssast data demo --sounds, or the like (default: {DATA})"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(MODELS),
        metavar="MODEL",
        help="run only these models: %(choices)s",
    )
    parser.add_argument(
        "--store",
        type=Path,
        help="folder of a file for each run, with weights in float16: go on from what is there, "
        "also on another machine; processes with one --out or --store share the work",
    )
    parser.add_argument(
        "--kept",
        action="store_true",
        help="also fine-tune from the weights kept at 1,000, 3,000, 10,000, ... steps; this comes "
        "on top of --hours",
    )
    parser.add_argument(
        "--out", type=Path, default=OUT, help=f"folder of the runs (default: {OUT})"
    )
    parser.add_argument(
        "--docs", type=Path, default=Path("docs"), help="folder of the page (default: docs)"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        dest="overrides",
        metavar="section.key=value",
        help="overrides of all runs",
    )
    return parser


def make_plan(options: argparse.Namespace, stored: Plan | None) -> Plan:
    """Return the stored plan, or make a new one.

    Args:
        options: Parsed command line.
        stored: The plan in the folder of the runs, if there is one.

    Raises:
        ConfigError: Options differ from the stored plan, or are wrong.
        DataError: A manifest is wrong.
    """
    given = {
        "data": options.data and str(options.data),
        "hours": options.hours,
        "steps": options.steps,
        "epochs": options.epochs,
        "seeds": options.seeds,
        "replicas": options.replicas,
        "tasks": options.tasks and tuple(options.tasks),
        "ablation_tasks": options.ablation_tasks and tuple(options.ablation_tasks),
        "rates": options.rates and tuple(sorted(set(options.rates))),
        "overrides": tuple(options.overrides) or None,
    }
    given = {key: value for key, value in given.items() if value is not None}
    for name in ("hours", "steps", "epochs", "seeds", "replicas"):
        if given.get(name, 1) <= 0:
            raise ConfigError(f"--{name} must be positive, got {given[name]:g}")
    if any(rate <= 0 for rate in given.get("rates", ())):
        raise ConfigError(f"--rates must be positive, got {min(given['rates']):g}")
    if stored is not None:
        stored.check_same(given, options.out, "resume without --{key}, or choose another --out")
        return stored
    if "epochs" in given and "steps" not in given:
        raise ConfigError("--epochs goes with --steps: --hours chooses both")
    data = options.data or DATA
    there = tuple(task for task in TASKS if _exists(data, task))
    plan = Plan(**{"data": str(data), "tasks": there, "epochs": EPOCHS, "steps": 1, **given})
    if "ablation_tasks" not in given:
        few = tuple(task for task in ABLATION_TASKS if task in plan.tasks) or plan.tasks[:1]
        plan = replace(plan, ablation_tasks=few)
    if unknown := sorted(set(plan.ablation_tasks) - set(plan.tasks)):
        raise ConfigError(
            f"--ablation-tasks: {', '.join(unknown)} is not among the tasks {', '.join(plan.tasks)}"
        )
    missing = [task for task in plan.tasks if not _exists(data, task)]
    if missing or not plan.tasks:
        found = sorted(p.name.removesuffix("_eval.json") for p in data.glob("tasks/*_eval.json"))
        raise ConfigError(
            f"--tasks: {data / 'tasks'} has {', '.join(found) or 'none'}, not "
            f"{', '.join(missing or TASKS)}"
        )
    check_settings(plan, options.out)
    if options.steps is None:
        plan = _fill(replace(plan, hours=options.hours or HOURS), options.out)
    return plan


def _exists(data: Path, task: str) -> bool:
    return (data / "tasks" / f"{task}_eval.json").is_file()


def check_settings(plan: Plan, out: Path) -> None:
    """Check the settings of every run.

    Raises:
        ConfigError: A setting is wrong.
    """
    for model in MODELS.values():
        if model.share and model.budget != "time":  # its settings are those of equal FLOPs
            pretraining_config(plan, model, out)
        finetuning_config(plan, FineTuning(model, plan.tasks[0], plan.rates[0], 0), out)


def _fill(plan: Plan, out: Path) -> Plan:
    """Choose steps and epochs that fill the plan's hours, from measured throughput."""
    run = FineTuning(MODELS["patch-scratch"], plan.tasks[0], plan.rates[0], 0)
    configs = {
        "pretrain": pretraining_config(plan, MODELS["patch"], out),
        "finetune": finetuning_config(plan, run, out),
    }
    rates = {name: _clips_per_s(name, config) for name, config in configs.items()}
    clips = {task: len(read_clips(plan.labelled(task, "train"))) for task in plan.tasks}
    runs = {task: num_runs(plan, task) for task in plan.tasks}
    steps, epochs = steps_and_epochs(plan.hours or HOURS, rates, clips, runs, plan.replicas)
    print(f"{plan.hours:g} hours: {steps} steps of pretraining, {epochs} epochs of fine-tuning")
    return replace(plan, steps=steps, epochs=epochs)


def measure_latent_time(plan: Plan, out: Path) -> float:
    """Measure a pretraining step with latent targets, as a multiple of that of the patch model.

    Raises:
        ConfigError: A trial failed.
    """
    rates = [
        _clips_per_s(f"pretrain {name}", pretraining_config(plan, MODELS[name], out))
        for name in ("patch", "latent-flops")
    ]
    return rates[0] / rates[1]


def _clips_per_s(name: str, config: Config) -> float:
    trial = try_out(config, seconds=MEASURED_S)
    if trial.outcome != "ok":
        raise ConfigError(f"a trial {name} run failed ({trial.outcome}): {trial.reason}")
    print(f"{name}: {trial.clips_per_s:.1f} clips/s")
    return trial.clips_per_s
