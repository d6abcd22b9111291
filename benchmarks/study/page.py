"""Results page of ``ssast bench reproduce``, written from the files of its runs.

It can be written at any time: unfinished runs are left out and listed.
"""

import argparse
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from ssast.benchmarks.study.ablations import ablations, begun, told_apart
from ssast.benchmarks.study.analysis import (
    PUBLISHED_ABLATIONS,
    Cells,
    compare,
    difference,
    gain,
    gain_curve,
    gather,
    groups_of,
    is_complete,
    on_tasks,
    published_gain,
    significant_sign,
)
from ssast.benchmarks.study.models import ABLATIONS, FAMILIES, MODELS, OBJECTIVES
from ssast.benchmarks.study.objectives import objectives
from ssast.benchmarks.study.pictures import (
    draw_gain_curves,
    draw_gains,
    draw_learning,
    draw_pretraining,
)
from ssast.benchmarks.study.plan import VALID_SHARE, FineTuning, Plan, kept_models, stored_plan
from ssast.benchmarks.study.probes import probes, read_reports
from ssast.benchmarks.study.runs import fetch_runs
from ssast.benchmarks.study.significance import Cell, common_seeds
from ssast.benchmarks.study.tables import (
    chance_of,
    facts,
    gains_by_clips,
    headline,
    learning_rates,
    listed,
    pretraining,
    with_error,
)
from ssast.engine.monitoring.monitor import read_metrics, scalars
from ssast.pipelines.demo.sounds import SOUND_TASKS
from ssast.pipelines.files import write_atomically
from ssast.pipelines.locks import in_turn

OUT = Path("runs/reproduce")
FEW_GROUPS = 10  # of test clips
FIGURES = (
    *("accuracy", "learning", "gain-by-clips", "pretraining", "ablations"),
    *(f"reconstructions-{name}" for name in FAMILIES),
)
SOUNDS = frozenset(task.name for task in SOUND_TASKS)  # the others are speech


def summary(plan: Plan, cells: Cells) -> list[str]:
    """List the claims of the paper, and whether they are reproduced."""
    lines = []
    for family in FAMILIES:
        found = gain(cells, family, family, plan.tasks)
        if found is None:
            lines.append(f"- *Pretraining improves every task*, {family} model: not finished yet.")
            continue
        told = compare(cells, family, f"{family}-scratch", list(found.by_task))
        higher, lower, neither = told
        number = sum(map(len, told))
        verdict = "**not reproduced**" if lower or neither else "**reproduced**"
        if higher and verdict.startswith("**not"):
            verdict = f"**reproduced on {len(higher)} of {number} tasks**"
        if not number:
            verdict = "not told, by fewer than two seeds"
        elif number < len(plan.tasks):
            verdict += f" ({number} of {len(plan.tasks)} tasks are finished)"
        lines.append(
            f"- *Pretraining improves every task*, {family} model: {verdict}. Relative gain over "
            f"training from scratch: {with_error(found)} % on average (paper, with other "
            f"tasks and base models: {published_gain(family):+.1f} %, over a patch model)."
            + without_chance(plan, cells, family)
            + listed("Significantly better on", higher)
            + listed("Significantly worse on", lower)
            + listed("Not significantly different on", neither)
        )
    return [*lines, *_trade(plan, cells), *_ablation_claims(plan, cells), ""]


def _trade(plan: Plan, cells: Cells) -> list[str]:
    both = [task for name, task in cells if name == "patch" and ("frame", task) in cells]
    if not both:
        return []
    patch, frame, neither = compare(cells, "patch", "frame", both)
    both = [task for task in both if task in {*patch, *frame, *neither}]
    if not both:
        return []
    sounds = SOUNDS & set(both)
    speech = set(both) - sounds
    as_claimed = set(patch) == sounds and set(frame) == speech
    verdict = "**reproduced**" if as_claimed else "**not reproduced**"
    if not sounds:
        verdict = f"for speech {verdict}, for sounds there is no task"
    if not speech:
        verdict = f"for sounds {verdict}, for speech there is no task"
    if len(both) < len(plan.tasks):
        verdict += f" ({len(both)} of {len(plan.tasks)} tasks are finished)"
    return [
        f"- *Patches are better for sounds, frames for speech*: {verdict}."
        + listed("Patch model significantly better on", patch)
        + listed("Frame model significantly better on", frame)
        + listed("Not significantly different on", neither)
    ]


def _ablation_claims(plan: Plan, cells: Cells) -> list[str]:
    tasks = plan.ablation_tasks
    reference = on_tasks(cells, ABLATIONS[0].name, tasks)
    lines = []
    for model in ABLATIONS[1:]:
        ours = on_tasks(cells, model.name, tasks)
        if not ours or not reference or difference(ours, reference) is None:
            continue
        claimed, full = (PUBLISHED_ABLATIONS[each] for each in (model.name, ABLATIONS[0].name))
        sign = significant_sign(ours, reference)
        verdict = {-1: "**reproduced**", 0: "not decided here", 1: "**not reproduced**"}[sign]
        lines.append(
            f"- *{model.what}*: {told_apart(ours, reference)} the published setting; worse in the "
            f"paper ({claimed} and {full}): {verdict}{seeds_so_far(plan, ours)}."
        )
    return lines


def without_chance(plan: Plan, cells: Cells, family: str) -> str:
    """Say what the mean gain is without tasks on which the model from scratch learned nothing."""
    scratch = f"{family}-scratch"
    both = [t for t in plan.tasks if {(family, t), (scratch, t)} <= cells.keys()]
    nothing = [t for t in both if cells[scratch, t].mean <= chance_of(plan, t)[0]]
    rest = gain(cells, family, family, [task for task in both if task not in nothing])
    if not nothing or rest is None:
        return ""
    return (
        f" From scratch it is not above the largest class on {', '.join(nothing)}, which gives no "
        f"scale for a gain; without, the mean is {with_error(rest)} %."
    )


def seeds_so_far(plan: Plan, cells: Sequence[Cell]) -> str:
    """Say how many seeds an ablation has, where that is not all."""
    number = len(common_seeds(cells))
    return "" if number >= plan.replicas else f" (with {number} of {plan.replicas} seeds)"


def small_samples(plan: Plan) -> list[str]:
    """Say of which tasks the test clips are too few groups for an interval over groups."""
    numbers = {task: len(set(groups_of(plan, task))) for task in plan.tasks}
    return [
        f"- The test clips of {task} are of {number} groups, hardly a sample: its intervals are in "
        "effect over seeds alone."
        for task, number in numbers.items()
        if number < FEW_GROUPS
    ]


def curves_of(
    runs: Iterable[FineTuning], out: Path, epochs: int
) -> list[list[tuple[float, float]]]:
    """Return (epoch, validation accuracy) curves of fine-tuning runs."""
    curves = []
    for run in runs:
        lines = read_metrics(run.folder(out) / "metrics.jsonl")
        points = scalars(lines, "valid/accuracy")
        if points and points[-1][0]:
            curves.append([(epochs * step / points[-1][0], value) for step, value in points])
    return curves


def pictures(plan: Plan, out: Path, cells: Cells, folder: Path) -> dict[str, list[Path]]:
    """Draw all figures that there is data for; return PNGs by section of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:  # an earlier page may have had others
        (folder / f"{name}.png").unlink(missing_ok=True)
    found: dict[str, list[Path]] = {
        "gains": [], "learning": [], "pretraining": [], "reconstructions": [], "ablations": [],
        "clips": [],
    }  # fmt: skip
    main = [f"{family}{kind}" for family in FAMILIES for kind in ("-scratch", "")]
    bars = {
        task: {MODELS[n].what: cells[n, task].accuracies for n in main if (n, task) in cells}
        for task in plan.tasks
    }
    if any(bars.values()):
        chances = {task: chance_of(plan, task)[0] for task in plan.tasks}
        found["gains"].append(draw_gains(folder / "accuracy.png", bars, chances))
        curves = {
            task: {
                MODELS[name].what: curves_of(
                    (
                        FineTuning(MODELS[name], task, cells[name, task].rate, seed)
                        for seed in cells[name, task].seeds
                    ),
                    out,
                    plan.epochs,
                )
                for name in main
                if (name, task) in cells
            }
            for task in plan.tasks
        }
        found["learning"].append(draw_learning(folder / "learning.png", curves))
    by_clips = {family: gain_curve(plan, cells, family) for family in FAMILIES}
    if any(by_clips.values()):
        found["clips"].append(draw_gain_curves(folder / "gain-by-clips.png", by_clips))
    short = {model.name for model in ABLATIONS}  # of each the pretraining with seed 0
    for section, names in (("pretraining", set(FAMILIES)), ("ablations", short)):
        logs = {
            MODELS[name].what: read_metrics(out / "pretrain" / name / "metrics.jsonl")
            for name in MODELS
            if name in names
        }
        logs = {title: lines for title, lines in logs.items() if lines}
        if logs:
            found[section].append(draw_pretraining(folder / f"{section}.png", logs))
    for name in FAMILIES:
        drawn = out / "pretrain" / name / "reconstructions.png"
        if drawn.exists():
            copy = folder / f"reconstructions-{name}.png"
            found["reconstructions"].append(Path(shutil.copyfile(drawn, copy)))
    return found


def write_page(out: Path, docs: Path) -> Path:
    """Write results.md and its figures.

    Args:
        out: Folder of the runs.
        docs: Folder for results.md and, in results/, the PNGs.

    Returns:
        Path of the page.

    Raises:
        ConfigError: There are no runs.
        DataError: The plan or a manifest is damaged.
    """
    plan = stored_plan(out)
    with in_turn(out, "another process writes the page"):
        return _write_page(plan, out, docs)


def _write_page(plan: Plan, out: Path, docs: Path) -> Path:
    cells = gather(plan, out)
    drawn = pictures(plan, out, cells, docs / "results")
    images = {
        name: [line for path in paths for line in (f"![{path.stem}](results/{path.name})", "")]
        for name, paths in drawn.items()
    }
    # Of the kept steps, those of which something is finished.
    kept = [model for model in kept_models(plan) if any(name == model.name for name, _ in cells)]
    own_marks = OBJECTIVES if begun(cells) else (*OBJECTIVES, *ABLATIONS)  # in their sections
    waiting = []
    for model in (*MODELS.values(), *kept):
        tasks = [
            task
            for task in plan.tasks_of(model)
            if not is_complete(plan, model, cells.get((model.name, task)))
        ]
        if tasks and model not in own_marks:
            waiting.append(f"{model.what} ({', '.join(tasks)})")
    clips, reports = gains_by_clips(plan, cells), read_reports(out)
    sections = [
        ("# Results", [
            "The claims of the paper, tested with tiny models, some hours of recordings and of "
            "training. `make reproduce` runs such a study; `ssast bench results` "
            "generates this page from the files of the runs.", "",
            *([f"Not finished yet: {'; '.join(waiting)}.", ""] if waiting else []),
        ]),
        ("## Claims", [
            "A difference is significant if its 95 % confidence interval (Student's t) does not "
            "hold 0, over fine-tuning seeds and groups of test clips, such as the takes of a "
            "syllable or the pieces of a drum kit; gains are given with half of that interval.",
            "",
            *summary(plan, cells),
        ]),
        ("## Setup", facts(plan, out)),
        ("## Pretrained and from scratch", [
            "Test accuracy in percent, mean and standard deviation over fine-tuning seeds. Both "
            "are trained for the same number of epochs, each with the learning rate that is best "
            f"on validation clips ({VALID_SHARE:.0%} of the training clips). Gains: with half of "
            "their 95 % interval.", "",
            *headline(plan, cells), *images["gains"],
        ]),
        ("## Gain against clips", clips and [
            "Test accuracy in percent after fine-tuning from weights kept during pretraining, each "
            "with its own learning rate; in brackets the relative gain in percent over training "
            "from scratch, whose mean is given with half of its 95 % interval. All points but the "
            "last are of one run whose learning rate had not fallen yet: a pretraining of that "
            "length may score higher. All share the runs from scratch and the test clips, so "
            "overlapping intervals do not say whether two points differ.", "",
            *clips, *images["clips"],
        ]),
        ("## Learning curves", images["learning"] and [
            "Accuracy on held-out clips: seeds thin, their mean thick.", "", *images["learning"],
        ]),
        ("## Pretraining", [
            "On validation clips, at the last step, with seed 0. Chance is the pretext accuracy of "
            "a random choice among the masked patches of a clip; blank where it was not logged.",
            "",
            *pretraining(out), *images["pretraining"],
        ]),
        ("## Reconstructions", images["reconstructions"] and [
            "Clips that were held out: grey is hidden, white is padding.", "",
            *images["reconstructions"],
        ]),
        ("## Frozen features", probes(plan, cells, reports)),
        ("## Joint objective and latent targets", objectives(plan, out, cells, reports)),
        ("## Ablations", [*ablations(plan, cells), *images["ablations"]]),
        ("## Learning rates", [
            "Validation accuracy in percent, seed 0; the chosen learning rate in bold.", "",
            *learning_rates(plan, cells),
        ]),
        ("## Limitations", [
            "- Each model but the ablations is pretrained once: standard deviations are over "
            "fine-tuning seeds only.",
            "- Validation clips are held out clip by clip, test clips by syllable, utterance, "
            "sound or drum kit: validation is easier.",
            "- The recordings have few voices and many recording channels: `voice` and `language` "
            "can in part be predicted from the channel.",
            *small_samples(plan),
            "- Models, data and training are far smaller than the published ones: a claim that is "
            "not reproduced here is not refuted.", "",
        ]),
    ]  # fmt: skip
    return write_sections(docs / "results.md", sections)


def write_sections(page: Path, sections: Iterable[tuple[str, Sequence[str]]]) -> Path:
    """Write a Markdown page from headings and their lines; empty sections are left out."""
    text = "\n".join(line for title, lines in sections if lines for line in (title, "", *lines))
    write_atomically(page, text.rstrip() + "\n")
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page from the finished runs."""
    parser = argparse.ArgumentParser("ssast bench results", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of the runs ({OUT})")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the page (docs)")
    parser.add_argument("--store", type=Path, help="folder of a store: fetch its runs first")
    options = parser.parse_args(arguments)
    if options.store:
        fetch_runs(options.out, options.store)
    print(write_page(options.out, options.docs))
    return 0
