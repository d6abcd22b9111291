"""Reproduces the method's claims at small scale: pretrained against from scratch, and ablations.

Tiny patch and frame models are pretrained on real recordings, then fine-tuned on each labelled
task, and so are models from scratch, with as many steps and a learning rate of their own, chosen on
held-out clips. The test clips are looked at once for each seed. Stop it at any time: the same
command goes on where it was.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ssast.benchmarks.study.page import OUT, write_page
from ssast.benchmarks.study.plan import (
    GROUPS,
    MODELS,
    RATES,
    FineTuning,
    Model,
    Plan,
    accuracy,
    check_no_leak,
    chosen_rate,
    diverged,
    finetuning_config,
    num_runs,
    pretraining_config,
    runs_of,
    steps_and_epochs,
)
from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.cli.data import PACKAGE_CACHE
from ssast.engine.errors import ConfigError, TrainingError
from ssast.engine.evaluation.reconstructions import visualize
from ssast.engine.finetune import FinetuneEngine, finetune
from ssast.engine.planning.trial import try_out
from ssast.engine.pretrain import pretrain
from ssast.engine.train.finetuning import finished_at
from ssast.pipelines.clips.manifest import read_manifest
from ssast.pipelines.demo.corpora import fetch_sounds
from ssast.pipelines.files import write_atomically

DATA = Path("data/sounds")
HOURS = 8.0
EPOCHS = 10
# Sounds, speakers, words and languages, as the paper's; sounds first, as its ablations are on them.
# The others of `ssast data demo` ask similar questions.
TASKS = ("events", "drums", "voice", "zh_initial", "language")
MEASURED_S = 20.0


class Stopped(Exception):
    """A run was stopped by a signal, after it had saved a checkpoint."""

    def __init__(self, number: int):
        super().__init__(f"signal {number}")
        self.number = number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or go on with everything, then write the page; 128 + the signal that stopped it."""
    options = _parser().parse_args(arguments)
    stored = Plan.read(options.out)
    if options.data is None and (stored is None or stored.data == str(DATA)):
        fetch_sounds(DATA, PACKAGE_CACHE.expanduser())
    plan = make_plan(options, stored)
    compared = check_no_leak(plan)
    print(f"none of {compared['test']} test clips is among {compared['pretraining']} for training")
    plan.write(options.out)
    write_atomically(options.out / "leaks.json", json.dumps(compared) + "\n")
    try:
        Study(plan, options.out).run(options.only or tuple(MODELS))
    except Stopped as stopped:
        print("run the same command again to go on; ssast bench results shows what is finished")
        return 128 + stopped.number
    print(write_page(options.out, options.docs))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("ssast bench reproduce", description=__doc__)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--hours", type=float, help=f"for everything, on this machine ({HOURS:g})")
    length.add_argument("--steps", type=int, help="of pretraining instead")
    parser.add_argument("--epochs", type=int, help=f"of each fine-tuning, with --steps ({EPOCHS})")
    parser.add_argument("--seeds", type=int, help="fine-tunings of each kind (3)")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help=f"({' '.join(TASKS)})")
    parser.add_argument(
        "--rates", nargs="+", type=float, help=f"learning rates ({' '.join(map(str, RATES))})"
    )
    parser.add_argument(
        "--data", type=Path, help=f"a folder like that of ssast data demo --sounds, {DATA}"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(MODELS),
        metavar="MODEL",
        help="do these alone, so that several calls share the work and --out: %(choices)s",
    )
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of the runs ({OUT})")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the page (docs)")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        dest="overrides",
        metavar="section.key=value",
        help="settings of all runs",
    )
    return parser


def make_plan(options: argparse.Namespace, stored: Plan | None) -> Plan:
    """The plan in the folder of the runs, or a new one.

    Args:
        options: Of the command line.
        stored: The plan in the folder.

    Raises:
        ConfigError: Other options than those of the stored plan, or wrong ones.
        DataError: A manifest is wrong.
    """
    given = {
        "data": options.data and str(options.data),
        "hours": options.hours,
        "steps": options.steps,
        "epochs": options.epochs,
        "seeds": options.seeds,
        "tasks": options.tasks and tuple(options.tasks),
        "rates": options.rates and tuple(sorted(set(options.rates))),
        "overrides": tuple(options.overrides) or None,
    }
    given = {key: value for key, value in given.items() if value is not None}
    for name in ("hours", "steps", "epochs", "seeds"):
        if given.get(name, 1) <= 0:
            raise ConfigError(f"--{name} must be positive, got {given[name]:g}")
    if any(rate <= 0 for rate in given.get("rates", ())):
        raise ConfigError(f"--rates must be positive, got {min(given['rates']):g}")
    if stored is not None:
        for key, value in given.items():
            if getattr(stored, key) != value:
                raise ConfigError(
                    f"{options.out / 'plan.json'} has {key} {getattr(stored, key)!r}, got "
                    f"{value!r}: go on without the option, or choose another --out"
                )
        return stored
    if "epochs" in given and "steps" not in given:
        raise ConfigError("--epochs goes with --steps: --hours chooses both")
    data = options.data or DATA
    there = tuple(task for task in TASKS if _exists(data, task))
    plan = Plan(**{"data": str(data), "tasks": there, "epochs": EPOCHS, "steps": 1, **given})
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
    """Every run's settings can be made.

    Raises:
        ConfigError: Those of one cannot.
    """
    for model in MODELS.values():
        if model.share:
            pretraining_config(plan, model, out)
        finetuning_config(plan, FineTuning(model, plan.tasks[0], plan.rates[0], 0), out)


def _fill(plan: Plan, out: Path) -> Plan:
    """The plan with steps and epochs for its hours, from how fast this machine is."""
    run = FineTuning(MODELS["patch-scratch"], plan.tasks[0], plan.rates[0], 0)
    configs = {
        "pretrain": pretraining_config(plan, MODELS["patch"], out),
        "finetune": finetuning_config(plan, run, out),
    }
    rates = {}
    for name, config in configs.items():
        trial = try_out(config, seconds=MEASURED_S)
        if trial.outcome != "ok":
            raise ConfigError(f"a short {name} run failed, {trial.outcome}: {trial.reason}")
        rates[name] = trial.clips_per_s
        print(f"{name}: {rates[name]:.1f} clips/s")
    clips = {task: len(read_manifest(plan.labelled(task, "train"))) for task in plan.tasks}
    runs = {task: num_runs(plan, task) for task in plan.tasks}
    steps, epochs = steps_and_epochs(plan.hours or HOURS, rates, clips, runs)
    print(f"{plan.hours:g} hours: {steps} steps of pretraining, {epochs} epochs of fine-tuning")
    return replace(plan, steps=steps, epochs=epochs)


class Study:
    """Runs what is not finished, in the order in which it matters."""

    def __init__(self, plan: Plan, out: Path):
        self.plan, self.out = plan, out

    def run(self, only: Sequence[str]) -> None:
        """Everything about the models that are named.

        Raises:
            Stopped: By a signal.
            ConfigError, DataError, CheckpointError, TrainingError: A run failed; a fine-tuning that
                diverges is passed over.
        """
        for group in ([model for model in group if model.name in only] for group in GROUPS):
            for model in group:
                if model.share:
                    self.pretrain(model)
            for seed in range(self.plan.seeds):
                for model in group:
                    for task, rates in runs_of(self.plan, model, seed):
                        self.score(model, task, rates, seed)

    def pretrain(self, model: Model) -> None:
        """Pretrain a model and draw what it makes of held-out clips."""
        config = pretraining_config(self.plan, model, self.out)
        folder = Path(str(config.run.folder))
        latest = Checkpoints(folder / "checkpoints").latest()
        if latest is None or int(latest.name[4:]) < config.train.steps:
            _go(f"pretrain {model.name}", lambda: pretrain(config, resume=True))
        if not (folder / "pictures.txt").exists():
            pictures = visualize(folder)
            write_atomically(folder / "pictures.txt", "".join(f"{p.name}\n" for p in pictures))

    def score(self, model: Model, task: str, rates: Sequence[float], seed: int) -> None:
        """Fine-tune with a seed, with all these learning rates if need be, and look at the test."""
        for rate in rates:
            self.finetune(FineTuning(model, task, rate, seed))
        chosen = chosen_rate(self.plan, model, task, self.out)
        if chosen is None:
            raise ConfigError(f"--only {model.name}: takes the learning rates of patch, finish it")
        run = FineTuning(model, task, chosen, seed)
        self.finetune(run)
        folder = run.folder(self.out)
        if accuracy(folder, "test") is None and not diverged(folder):
            engine = FinetuneEngine.from_checkpoint(folder)
            values = engine.evaluate(self.plan.labelled(task, "eval"), folder / "test")
            print(f"{model.name}, {task}, seed {seed}: test accuracy {values['accuracy']:.4f}")

    def finetune(self, run: FineTuning) -> None:
        """Fine-tune once; of a finished run only the weights that did best are kept."""
        folder = run.folder(self.out)
        if diverged(folder):
            return
        if finished_at(folder) is None:
            config = finetuning_config(self.plan, run, self.out)
            try:
                _go(str(folder), lambda: finetune(config, resume=True))
            except TrainingError as error:  # what too high a learning rate does is a result
                print(error)
                write_atomically(folder / "diverged.txt", f"{error}\n")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _go(name: str, train: Callable[[], int]) -> None:
    print(f"\n{time.strftime('%H:%M:%S')}  {name}", flush=True)
    stopped = train()
    if stopped:
        raise Stopped(stopped)
