"""Reproduce the claims of the paper at small scale: pretraining against scratch, and ablations.

Tiny patch and frame models are pretrained on real recordings and fine-tuned on labelled tasks.
Models from scratch are trained for the same number of epochs, with their own learning rate,
selected on validation clips. Test clips are evaluated once per seed. The study can be stopped at
any time: the same command resumes it.
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
    probe_folder,
    runs_of,
    steps_and_epochs,
)
from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.config import Config
from ssast.engine.errors import ConfigError, TrainingError
from ssast.engine.evaluation.layer_probe import REPORTS, probe_layers, write_reports
from ssast.engine.evaluation.reconstructions import visualize
from ssast.engine.finetune import FinetuneEngine, finetune
from ssast.engine.formats.open import open_model
from ssast.engine.planning.trial import try_out
from ssast.engine.pretrain import pretrain
from ssast.engine.train.finetuning import is_finished
from ssast.pipelines.clips.manifest import read_clips
from ssast.pipelines.demo.corpora import fetch_sounds
from ssast.pipelines.files import write_atomically

DATA = Path("data/sounds")
HOURS = 8.0
EPOCHS = 10
# Sounds, speakers, words and languages, as in the paper; sounds first, for the ablations.
TASKS = ("events", "drums", "voice", "zh_initial", "language")
MEASURED_S = 20.0


class Stopped(Exception):
    """A run was stopped by a signal, after it had saved a checkpoint."""

    def __init__(self, number: int):
        super().__init__(f"signal {number}")
        self.number = number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or resume the study and write the page; return 0, or 128 + the signal that stopped it."""
    options = _parser().parse_args(arguments)
    stored = Plan.read(options.out)
    if options.data is None and (stored is None or stored.data == str(DATA)):
        fetch_sounds(DATA)
    plan = make_plan(options, stored)
    names = options.only or tuple(MODELS)
    if plan.latent_time is None and any(MODELS[name].budget == "time" for name in names):
        plan = replace(plan, latent_time=measure_latent_time(plan, options.out))
    compared = check_no_leak(plan)
    print(f"no test clip ({compared['test']}) is a pretraining clip ({compared['pretraining']})")
    plan.write(options.out)
    write_atomically(options.out / "leaks.json", json.dumps(compared) + "\n")
    try:
        Study(plan, options.out).run(names)
    except Stopped as stopped:
        print("run the same command again to resume; ssast bench results writes the page so far")
        return 128 + stopped.number
    print(write_page(options.out, options.docs))
    return 0


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
        help="run only these models, to split the work among processes with one --out: %(choices)s",
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
                    f"{value!r}: resume without --{key}, or choose another --out"
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
    steps, epochs = steps_and_epochs(plan.hours or HOURS, rates, clips, runs)
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


class Study:
    """Runs all unfinished runs, the most important first."""

    def __init__(self, plan: Plan, out: Path):
        self.plan, self.out = plan, out

    def run(self, only: Sequence[str]) -> None:
        """Pretrain and fine-tune the named models.

        Raises:
            Stopped: A signal stopped a run.
            ConfigError, DataError, CheckpointError, TrainingError: A run failed; fine-tuning runs
                that diverge are recorded as such.
        """
        for group in ([model for model in group if model.name in only] for group in GROUPS):
            for model in group:
                if model.share:
                    self.pretrain(model)
            for seed in range(self.plan.seeds):
                for model in group:
                    for task, rates in runs_of(self.plan, model, seed):
                        self.score(model, task, rates, seed)
            for model in group:
                if model.probed:
                    self.probe(model)

    def pretrain(self, model: Model) -> None:
        """Pretrain a model and plot reconstructions of validation clips."""
        config = pretraining_config(self.plan, model, self.out)
        folder = Path(str(config.run.folder))
        latest = Checkpoints(folder / "checkpoints").latest()
        if latest is None or int(latest.name[4:]) < config.train.steps:
            _go(f"pretrain {model.name}", lambda: pretrain(config, resume=True))
        if not (folder / "pictures.txt").exists():
            pictures = visualize(folder)
            write_atomically(folder / "pictures.txt", "".join(f"{p.name}\n" for p in pictures))

    def probe(self, model: Model) -> None:
        """Probe the layers of a pretrained model, and those of an untrained one like it."""
        folder = probe_folder(self.out, model)
        if (folder / REPORTS).exists():
            return
        print(f"\n{time.strftime('%H:%M:%S')}  probe {model.name}", flush=True)
        tasks: dict[str, tuple[Path, Path | None]] = {
            task: (self.plan.labelled(task, "train"), self.plan.labelled(task, "eval"))
            for task in self.plan.tasks
        }
        loaded = open_model(self.out / "pretrain" / model.name)
        reports = list(probe_layers(loaded, tasks, progress=False))
        folder.mkdir(parents=True, exist_ok=True)
        write_reports(reports, folder / REPORTS)

    def score(self, model: Model, task: str, rates: Sequence[float], seed: int) -> None:
        """Fine-tune with a seed, trying all these learning rates, and evaluate the test clips."""
        for rate in rates:
            self.finetune(FineTuning(model, task, rate, seed))
        chosen = chosen_rate(self.plan, model, task, self.out)
        if chosen is None:
            raise ConfigError(
                f"--only {model.name}: needs the learning rates of patch, which is not finished"
            )
        run = FineTuning(model, task, chosen, seed)
        self.finetune(run)
        folder = run.folder(self.out)
        if accuracy(folder, "test") is None and not diverged(folder):
            engine = FinetuneEngine.from_checkpoint(folder)
            values = engine.evaluate(self.plan.labelled(task, "eval"), folder / "test")
            print(f"{model.name}, {task}, seed {seed}: test accuracy {values['accuracy']:.4f}")

    def finetune(self, run: FineTuning) -> None:
        """Fine-tune once; a finished run keeps only the selected weights."""
        folder = run.folder(self.out)
        if diverged(folder):
            return
        if not is_finished(folder):
            config = finetuning_config(self.plan, run, self.out)
            try:
                _go(str(folder), lambda: finetune(config, resume=True))
            except TrainingError as error:  # divergence is a result of a learning rate
                print(error)
                write_atomically(folder / "diverged.txt", f"{error}\n")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _go(name: str, train: Callable[[], int]) -> None:
    print(f"\n{time.strftime('%H:%M:%S')}  {name}", flush=True)
    stopped = train()
    if stopped:
        raise Stopped(stopped)
