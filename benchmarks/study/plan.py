"""Plan of ``ssast bench reproduce``: models, settings and folders.

    pretrain/MODEL/                          a run of ssast pretrain
    pretrain/MODEL/weights/step1000/         kept weights, and final/
    finetune/MODEL/TASK/lr0.001-seed0/       a run of ssast finetune, and test/ of the chosen ones
    probe/MODEL/                             scores of ssast probe --layers
    plan.json                                the plan, which later calls keep

Models are in groups, the main comparison first: the page can be written before all are finished.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ssast.benchmarks.study.models import FAMILIES, MODELS, SHORT, Model
from ssast.benchmarks.study.store import KEPT_STEPS, weights_folder
from ssast.engine.config import Config, load_config
from ssast.engine.errors import ConfigError
from ssast.engine.monitoring.flops import step_flops_per_clip
from ssast.pipelines.clips.manifest import read_clips
from ssast.pipelines.clips.overlap import Contents, shared_recordings
from ssast.pipelines.errors import DataError
from ssast.pipelines.files import write_atomically

PUBLISHED_PATCHES = 512  # patches of the published input, 100, 250 or 400 of them masked
RATES = (3e-4, 1e-3, 3e-3)  # learning rates of fine-tuning, tried with seed 0
VALID_SHARE = 0.15  # fraction of a task's training clips: selects learning rate and epoch
PRETRAINING_TIME = 0.45  # fraction of the hours
LISTS = ("tasks", "ablation_tasks", "rates", "overrides")  # of a plan
STEP_TIME = 0.8  # fraction of the time in training steps; the rest is validation and start-up
IGNORE_PADDING = "audio.ignore_padding=true"  # of all models: many clips end early
BATCH = {"pretrain": 48, "finetune": 16}
LR = 1.4e-3  # of pretraining: the demo's at batch size 24, times the root of 2
SAVE_EVERY = 500  # steps; divides those whose weights are kept


@dataclass(frozen=True)
class Plan:
    """Data, tasks and durations of the study.

    Attributes:
        data: Folder with train.json and tasks/, as of ``ssast data demo``.
        tasks: Names of the labelled tasks, the most important first.
        steps: Pretraining steps of the patch and of the frame model.
        epochs: Epochs of each fine-tuning run.
        seeds: Number of fine-tuning seeds.
        replicas: Number of seeds of the ablations, each with a pretraining of its own.
        ablation_tasks: Tasks of the ablations, some of ``tasks``.
        rates: Learning rates to try.
        overrides: Overrides of all runs, ``section.key=value``.
        hours: Time that steps and epochs were chosen to fill; None if they were given.
        latent_time: Measured time of pretraining a clip with latent targets, as a multiple of that
            of the patch model; None before it was measured.
    """

    data: str
    tasks: tuple[str, ...]
    steps: int
    epochs: int
    seeds: int = 3
    replicas: int = 3
    ablation_tasks: tuple[str, ...] = ()
    rates: tuple[float, ...] = RATES
    overrides: tuple[str, ...] = ()
    hours: float | None = None
    latent_time: float | None = None

    def labelled(self, task: str, part: str) -> Path:
        """Return the manifest of a task; ``part`` is ``train`` or ``eval``."""
        return Path(self.data, "tasks", f"{task}_{part}.json")

    def tasks_of(self, model: Model) -> tuple[str, ...]:
        """Return the tasks that a model is fine-tuned on."""
        return self.ablation_tasks if model.replicated else self.tasks

    def seeds_of(self, model: Model) -> int:
        """Return the number of seeds of a model."""
        return self.replicas if model.replicated else self.seeds

    def check_same(
        self, given: Mapping[str, Any], out: Path, advice: str = "choose another --out"
    ) -> None:
        """Check what is given now against this plan, which is stored in the folder of the study.

        Args:
            given: Values by attribute.
            out: The folder.
            advice: End of the message, in which ``{key}`` is the attribute.

        Raises:
            ConfigError: A value differs.
        """
        for key, value in given.items():
            stored = getattr(self, key)
            if stored != value:
                raise ConfigError(
                    f"{out / 'plan.json'} has {key} {stored!r}, got {value!r}: "
                    f"{advice.format(key=key)}"
                )

    def write(self, out: Path) -> None:
        """Write the plan to the folder of the study."""
        write_atomically(out / "plan.json", json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, out: Path) -> "Plan | None":
        """Read the plan of a folder; None if there is none.

        Raises:
            DataError: The plan is damaged.
        """
        path = out / "plan.json"
        if not path.exists():
            return None
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            lists = {key: tuple(raw[key]) for key in LISTS}
            return cls(**{**raw, **lists})
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}: not a plan of ssast bench reproduce: {error}") from error


def stored_plan(out: Path) -> Plan:
    """Read the plan of a folder of runs.

    Raises:
        ConfigError: There is no plan.
        DataError: The plan is damaged.
    """
    plan = Plan.read(out)
    if plan is None:
        raise ConfigError(f"{out}: no runs of ssast bench reproduce there: plan.json is missing")
    return plan


@dataclass(frozen=True)
class FineTuning:
    """One run of ``ssast finetune``."""

    model: Model
    task: str
    rate: float
    seed: int

    def folder(self, out: Path) -> Path:
        """Return the folder of the run."""
        name = f"lr{self.rate:g}-seed{self.seed}"
        return out / "finetune" / self.model.name / self.task / name


def kept_models(plan: Plan) -> tuple[Model, ...]:
    """Return the models that have the weights kept during the pretraining of the main ones."""
    return tuple(
        replace(
            MODELS[family],
            name=f"{family}-step{step}",
            what=f"{MODELS[family].what}, step {step:,}",
            probed=False,
            step=step,
        )
        for step in KEPT_STEPS
        for family in FAMILIES
        if step < plan.steps
    )


def weights_of(out: Path, model: Model, seed: int = 0) -> Path:
    """Return the folder of pretrained weights that a seed of fine-tuning begins from.

    Kept ones, or a run without them.
    """
    run = out / "pretrain" / model.run(seed)
    kept = weights_folder(run, model.step)
    return kept if model.step is not None or kept.exists() else run


def pretraining_config(plan: Plan, model: Model, out: Path, seed: int = 0) -> Config:
    """Return the pretraining settings of a model: those of its recipe with the published masks.

    Args:
        plan: The plan.
        model: The model.
        out: Folder of the runs.
        seed: Seed of the pretraining.

    Raises:
        ConfigError: A setting is wrong, or the plan lacks the time of a step.
    """
    steps = max(1, round(model.share * plan.steps / cost(plan, model)))
    return _pretraining(plan, model, out, steps, seed)


def cost(plan: Plan, model: Model) -> float:
    """Return what a pretraining step costs of the model's budget, in steps of the patch model.

    Raises:
        ConfigError: The plan lacks the time of a step.
    """
    if model.budget == "steps":
        return 1.0
    ours, theirs = (_pretraining(plan, each, Path(), 1) for each in (model, MODELS["patch"]))
    clips = ours.train.batch_size / theirs.train.batch_size
    if model.budget == "flops":
        return clips * step_flops_per_clip(ours) / step_flops_per_clip(theirs)
    if plan.latent_time is None:
        raise ConfigError("plan.json: latent_time is missing, expected a measured one")
    return clips * plan.latent_time


def _pretraining(plan: Plan, model: Model, out: Path, steps: int, seed: int = 0) -> Config:
    settings = [
        f"data.train={Path(plan.data, 'train.json')}",
        "data.random_crop=true",  # else only the beginning of long clips is used
        IGNORE_PADDING,
        f"train.steps={steps}",
        f"train.batch_size={BATCH['pretrain']}",
        f"train.log_every={max(1, steps // 200)}",
        f"train.validate_every={max(1, math.ceil(steps / 20))}",
        f"train.save_every={SAVE_EVERY if steps >= KEPT_STEPS[0] else max(1, steps // 4)}",
        "train.keep_checkpoints=1",
        f"optim.lr={LR}",
        f"optim.warmup_steps={min(1000, steps // 10)}",
        *_objective(plan, model, steps),
        *model.changes,
        *plan.overrides,
        f"train.seed={seed}",
        f"run.folder={out / 'pretrain' / model.run(seed)}",
    ]
    rows, columns = load_config(model.recipe, [*settings, "objective.num_masked=2"]).grid
    num_masked = max(2, round(rows * columns * model.num_masked / PUBLISHED_PATCHES))
    return load_config(model.recipe, [*settings, f"objective.num_masked={num_masked}"])


def finetuning_config(plan: Plan, run: FineTuning, out: Path) -> Config:
    """Return the settings of a fine-tuning run: configs/demo_finetune.yaml without test clips.

    Raises:
        ConfigError: A setting is wrong.
    """
    pretrained = weights_of(out, run.model, run.seed) if run.model.share else "null"
    return load_config(
        "demo_finetune",
        [
            f"data.train={plan.labelled(run.task, 'train')}",
            IGNORE_PADDING,
            f"data.valid_share={VALID_SHARE}",
            f"data.cache_folder={out / 'filterbanks'}",
            f"finetune.checkpoint={pretrained}",
            "finetune.test=null",
            f"finetune.epochs={plan.epochs}",
            f"optim.lr={run.rate!r}",
            f"train.batch_size={BATCH['finetune']}",
            "train.keep_checkpoints=1",
            *_encoder(plan, run.model),
            *(c for c in run.model.changes if c.startswith(("audio.ignore_padding", "model."))),
            *plan.overrides,
            f"train.seed={run.seed}",
            f"run.folder={run.folder(out)}",
        ],
    )


def _objective(plan: Plan, model: Model, steps: int) -> list[str]:
    """Return the settings of objective and patches that are not those of the recipe."""
    if model.recipe == "eat_demo":  # the decay of the teacher rises over as much of a run
        recipe = load_config(model.recipe)
        share = recipe.objective.teacher_decay_steps / recipe.train.steps
        return [f"objective.teacher_decay_steps={max(1, round(share * steps))}"]
    mask = "official" if model.family == "patch" else "random"
    return [*_encoder(plan, model), f"objective.mask={mask}"]


def _encoder(plan: Plan, model: Model) -> list[str]:
    """Return the settings of the encoder that are not those of the recipe of the patch model.

    Patches of a frame model span all mel bins and 2 frames.
    """
    if model.family == "frame":
        n_mels = load_config("demo", [*plan.overrides, "objective.num_masked=2"]).audio.n_mels
        return [f"model.patch=[{n_mels}, 2]"]
    if model.recipe == "demo":
        return []
    ours, theirs = (load_config(recipe).model for recipe in (model.recipe, "demo"))
    return [
        f"model.{key}={value}" for key, value in vars(ours).items() if value != vars(theirs)[key]
    ]


def runs_of(plan: Plan, model: Model, seed: int) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Yield tasks, and the learning rates to try on them with this seed.

    Empty rates: the learning rate that was chosen before.
    """
    for task in plan.tasks_of(model):
        yield task, plan.rates if model.tuned and seed == 0 else ()


def num_runs(plan: Plan, task: str) -> int:
    """Return the number of fine-tuning runs of a task."""
    return sum(
        max(1, len(rates))
        for model in MODELS.values()
        for seed in range(plan.seeds_of(model))
        for name, rates in runs_of(plan, model, seed)
        if name == task
    )


def best_rate(accuracies: Mapping[float, float]) -> float:
    """Return the learning rate with the best validation accuracy, the lowest in a tie.

    Raises:
        ConfigError: Training diverged with every one.
    """
    if not accuracies:
        raise ConfigError("--rates: training diverged with every one of them, try lower ones")
    return min(accuracies, key=lambda rate: (-accuracies[rate], rate))


def chosen_rate(plan: Plan, model: Model, task: str, out: Path) -> float | None:
    """Return the learning rate chosen for a model on a task; None before all were tried."""
    tuned = model if model.tuned else MODELS["patch"]
    runs = [FineTuning(tuned, task, rate, 0) for rate in plan.rates]
    accuracies = {}
    for run in runs:
        if diverged(run.folder(out)):
            continue
        value = accuracy(run.folder(out), "valid")
        if value is None:
            return None
        accuracies[run.rate] = value
    return best_rate(accuracies)


def accuracy(run: Path, split: str) -> float | None:
    """Return the accuracy of a fine-tuning run on ``valid`` or ``test``; None if not finished."""
    path = run / split / "metrics.json"
    return json.loads(path.read_text())["accuracy"] if path.exists() else None


def probe_folder(out: Path, model: Model) -> Path:
    """Return the folder of a model's probe_layers.json."""
    return out / "probe" / model.name


def diverged(run: Path) -> bool:
    """Return whether a fine-tuning run diverged."""
    return (run / "diverged.txt").exists()


def steps_and_epochs(
    hours: float,
    rates: Mapping[str, float],
    clips: Mapping[str, int],
    runs: Mapping[str, int],
    replicas: int,
) -> tuple[int, int]:
    """Compute the pretraining steps and fine-tuning epochs that fill the hours.

    Args:
        hours: Time for the whole study.
        rates: Throughput of ``pretrain`` and ``finetune``, clips/s.
        clips: Number of training clips by task.
        runs: Number of fine-tuning runs by task.
        replicas: Number of seeds of the ablations.

    Raises:
        ConfigError: The time is too short for one epoch.
    """
    steps_s = hours * 3600 * STEP_TIME
    shares = sum(model.share * (replicas if model.replicated else 1) for model in MODELS.values())
    pretrained = PRETRAINING_TIME * steps_s * rates["pretrain"] / BATCH["pretrain"]
    epoch = sum(clips[task] * runs[task] for task in clips) / rates["finetune"]
    steps, epochs = int(pretrained / shares), int((1 - PRETRAINING_TIME) * steps_s / epoch)
    if steps < 1 / SHORT or epochs < 1:
        least = epoch / 3600 / STEP_TIME / (1 - PRETRAINING_TIME)
        raise ConfigError(
            f"--hours {hours:g} is too short: one epoch of every fine-tuning takes {least:.2g} "
            "hours on this machine, give more hours or fewer --tasks, --seeds and --rates"
        )
    return steps, epochs


def check_no_leak(plan: Plan) -> dict[str, int]:
    """Check by recording and content that no test clip is among the training or pretraining clips.

    Returns:
        Number of clips compared: ``pretraining`` and ``test``.

    Raises:
        DataError: A test clip is; or a manifest is missing or wrong.
    """
    contents, tests = Contents(), set()
    pretraining = len(read_clips(Path(plan.data, "train.json")))
    for task in plan.tasks:
        test = read_clips(plan.labelled(task, "eval"))
        tests |= set(test)
        for other in ("train.json", f"tasks/{task}_train.json"):
            trained = read_clips(Path(plan.data, other))
            for first, second in shared_recordings(test, trained) + contents.copies(test, trained):
                raise DataError(
                    f"{plan.labelled(task, 'eval')}: {first} is also in {other}, as {second}: "
                    "expected test clips that no model has been trained on"
                )
    return {"pretraining": pretraining, "test": len(tests)}
