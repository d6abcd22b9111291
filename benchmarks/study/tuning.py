"""Try settings of pretraining cheaply, before a long run: `ssast bench tuning`.

Each variation is pretrained as long on the study's recordings. Then it is fine-tuned on tasks that
the study does not report: voices of telephone prompts (other recordings), drum kits and Mandarin
tones. Runs that are finished are kept; processes with one folder share the work.
"""

import argparse
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ssast.benchmarks.study.models import LATENT_ENCODER, LATENT_MASKED, Model
from ssast.benchmarks.study.plan import FineTuning, Plan, accuracy, chosen_rate, stored_plan
from ssast.benchmarks.study.runs import Interrupted, Study
from ssast.benchmarks.study.tables import table
from ssast.engine.monitoring.monitor import read_metrics, scalars
from ssast.pipelines.clips.manifest import read_clips, write_manifest
from ssast.pipelines.clips.shards import ShardIndex
from ssast.pipelines.demo.corpora import fetch_demo, fetch_sounds
from ssast.pipelines.demo.prompts import PROMPT_PACKAGES, PROMPT_TASKS
from ssast.pipelines.demo.publish import clips_of, write_task
from ssast.pipelines.demo.sounds import without_number
from ssast.pipelines.demo.tasks import DEMO_TASKS, Label
from ssast.pipelines.demo.tasks import Task as Labelled
from ssast.pipelines.errors import DataError
from ssast.pipelines.files import replacing
from ssast.pipelines.locks import in_turn

STEPS, EPOCHS, RATES, LABELS = 1_200, 4, (3e-4, 1e-3), 250
BATCH, LR = 24, 1e-3
HALF = BATCH // 2
OUT = Path("runs/tuning")
_KIT = re.compile(r"^hydrogen-drumkits/.*/drumkits/([^/]+)/([^/]+)$")


def kit_label(name: str) -> Label | None:
    """Return the drum kit of a recording, grouped by what is hit."""
    match = _KIT.search(name)
    return Label(match[1], f"{match[1]}/{without_number(match[2])}") if match else None


KIT = Labelled("kit", "drum kit of an unseen piece", kit_label, 25, LABELS, even=True)
PROMPTS = replace(PROMPT_TASKS[0], max_clips=LABELS)
TONE = replace(next(task for task in DEMO_TASKS if task.name == "zh_tone"), max_clips=LABELS)
TASKS = (PROMPTS, KIT, TONE)


def _variation(
    name: str,
    what: str,
    *changes: str,
    num_masked: int | None = None,
    padding: bool = False,
    share: float = 1.0,
) -> Model:
    family = name.partition("-")[0]
    latent = family == "latent"
    changes = (f"train.batch_size={BATCH}", f"optim.lr={LR}", *changes)
    return Model(
        name,
        what,
        "frame" if family == "frame" else "patch",
        share,
        num_masked=num_masked or (LATENT_MASKED if latent else 400),
        changes=("audio.ignore_padding=false", *changes) if padding else changes,
        recipe="eat_demo" if latent else "demo",
    )


def _joint(family: str) -> list[Model]:
    long = ("audio.num_frames=256", f"train.batch_size={HALF}")
    return [
        _variation(family, f"{family}: 50 of 64 masked, rate 1e-3, 128 frames, batch 24"),
        _variation(f"{family}-padding", "padding as input, as published", padding=True),
        _variation(f"{family}-half", "32 of 64 masked", num_masked=256),
        _variation(f"{family}-most", "58 of 64 masked", num_masked=464),
        _variation(f"{family}-slow", "rate 5e-4", "optim.lr=5e-4"),
        _variation(f"{family}-fast", "rate 2e-3", "optim.lr=2e-3"),
        _variation(f"{family}-long", "256 frames, batch 12", *long),
        _variation(f"{family}-even", "packages drawn by the square root of their clips"),
        _variation(f"{family}-scratch", "not pretrained", share=0.0),
    ]


def _latent() -> list[Model]:
    """Return variations of latent targets that take about as long as the others."""
    half, decay = f"train.batch_size={HALF}", "objective.teacher_decay"
    blocks, few = "objective.mask=inverse_blocks", ("train.batch_size=20", "objective.clones=4")
    base = (
        "latent: 38 of 64 single patches masked, 8 clones, rate 1e-3, batch 12, decay 0.99 to 0.999"
    )
    return [
        _variation("latent", base, half),
        _variation("latent-padding", "padding as input, as published", half, padding=True),
        _variation("latent-most", "51 of 64 masked", half, num_masked=410),
        _variation("latent-blocks", "all but blocks, 51 of 64", half, blocks, num_masked=410),
        _variation(
            "latent-slow", "the same, rate 5e-4", half, blocks, "optim.lr=5e-4", num_masked=410
        ),
        _variation("latent-fast", "rate 2e-3", half, "optim.lr=2e-3"),
        _variation("latent-few", "4 clones, batch 20", *few),
        _variation("latent-still", "decay 0.999 to 0.9999", half, f"{decay}=[0.999, 0.9999]"),
        _variation("latent-scratch", "not pretrained", share=0.0),
    ]


VARIATIONS = {
    model.name: model
    for model in (
        *_joint("patch"),
        _variation("patch-random", "single masked patches", "objective.mask=random"),
        _variation("patch-encoder", "the encoder of latent targets", *LATENT_ENCODER),
        *_joint("frame"),
        _variation("frame-clusters", "clusters of masked frames", "objective.mask=official"),
        *_latent(),
    )
}


def write_data(out: Path, sounds: Path, prompts: Path) -> Path:
    """Write the clips for pretraining, those of each package, and the tasks.

    Args:
        out: Folder to write.
        sounds: Data of :func:`fetch_sounds`.
        prompts: Data of :func:`fetch_demo` with the prompts.

    Returns:
        ``out``.
    """
    clips = read_clips(sounds / "train.json")
    if not isinstance(clips, ShardIndex):
        raise DataError(f"{sounds / 'train.json'}: expected clips of a prepared folder")
    write_manifest(out / "train.json", clips)
    rows = defaultdict[str, list[int]](list)
    for clip in clips_of(clips):
        rows[clip.name.partition("/")[0]].append(clip.row)
    for package, numbers in rows.items():
        write_manifest(out / "packages" / f"{package}.json", clips.subset(np.array(numbers)))
    for folder, tasks in ((sounds, (KIT, TONE)), (prompts, (PROMPTS,))):
        index = ShardIndex(folder)
        labelled = clips_of(index)
        for task in tasks:
            write_task(task, index, labelled, out / "tasks")
    return out


def evenly(data: Path) -> tuple[str, ...]:
    """Return the settings that draw packages by the square root of their clips."""
    files = sorted((data / "packages").glob("*.json"))
    weights = {str(path): round(len(read_clips(path)) ** 0.5, 2) for path in files}
    return "data.train=null", f"data.mix={json.dumps(weights)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and score what is missing, and print the table.

    Args:
        arguments: Command-line arguments without the program's name; None: those of the process.

    Returns:
        0, or 128 + the signal that stopped it.

    Raises:
        DataError: The recordings cannot be had.
        ConfigError: A setting is wrong, or a run in the folder had other settings.
    """
    options = _parser().parse_args(arguments)
    if options.page:
        print("\n".join(scores(stored_plan(options.out), options.out)))
        return 0
    data = options.out / "data"
    plan = Plan(
        str(data),
        tuple(task.name for task in TASKS),
        options.steps,
        EPOCHS,
        options.seeds,
        rates=RATES,
        overrides=tuple(options.overrides),
    )
    with in_turn(options.out, "another process makes the data"):
        plan = check_plan(plan, options.out)
        plan.write(options.out)
        if not data.exists():
            fetch_sounds(options.sounds)
            fetch_demo(options.prompts, packages=PROMPT_PACKAGES, tasks=PROMPT_TASKS)
            with replacing(data) as new:
                write_data(new, options.sounds, options.prompts)
    even = evenly(data)
    models = tuple(
        replace(model, changes=(*model.changes, *even)) if name.endswith("-even") else model
        for name, model in VARIATIONS.items()
    )
    study = Study(plan, options.out, groups=(models,))
    try:
        study.run(options.only or tuple(VARIATIONS))
    except Interrupted as stopped:
        return 128 + stopped.number
    print("\n".join(scores(plan, options.out)))
    return 0


def check_plan(plan: Plan, out: Path) -> Plan:
    """Check that earlier runs in the folder were of this plan; return it with all seeds so far.

    Raises:
        ConfigError: They had other settings.
    """
    stored = Plan.read(out)
    if stored is None:
        return plan
    stored.check_same({k: v for k, v in vars(plan).items() if k != "seeds"}, out)
    return replace(plan, seeds=max(plan.seeds, stored.seeds))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("ssast bench tuning", description=__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=STEPS, help="of pretraining (default: %(default)s)")
    add("--seeds", type=int, default=1, help="of fine-tuning (default: %(default)s)")
    add(
        "--only",
        nargs="+",
        choices=list(VARIATIONS),
        metavar="NAME",
        help="run only these variations: %(choices)s",
    )
    add("--sounds", type=Path, default=Path("data/sounds"), help="recordings (%(default)s)")
    add("--prompts", type=Path, default=Path("data/prompts"), help="prompts (%(default)s)")
    add("--out", type=Path, default=OUT, help="folder of the runs (default: %(default)s)")
    add("--page", action="store_true", help="train nothing")
    add(
        "--set",
        nargs="+",
        default=[],
        dest="overrides",
        metavar="section.key=value",
        help="overrides of all runs",
    )
    return parser


def scores(plan: Plan, out: Path) -> list[str]:
    """Tabulate the test accuracies of what is finished, in percent."""
    rows = []
    for model in VARIATIONS.values():
        found = [mean_accuracy(plan, model, task, out) for task in plan.tasks]
        tuned = [value for value in found if value is not None]
        if len(tuned) < len(found):
            continue
        log = read_metrics(out / "pretrain" / model.name / "metrics.jsonl")
        told = scalars(log, "valid/pretext_accuracy")
        rows.append([
            model.what,
            f"{100 * told[-1][1]:.1f}" if told else "",
            *(f"{100 * value:.1f}" for value in (*tuned, statistics.mean(tuned))),
        ])  # fmt: skip
    return table(["pretraining", "pretext accuracy", *plan.tasks, "mean"], rows)


def mean_accuracy(plan: Plan, model: Model, task: str, out: Path) -> float | None:
    """Return the mean over finished seeds, at the learning rate that held-out clips choose."""
    rate = chosen_rate(plan, model, task, out)
    if rate is None:
        return None
    runs = [FineTuning(model, task, rate, seed).folder(out) for seed in range(plan.seeds)]
    values = [value for run in runs if (value := accuracy(run, "test")) is not None]
    return statistics.mean(values) if values else None
