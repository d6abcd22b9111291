"""The page on what ``ssast bench reproduce`` has found, written from the files of its runs.

It can be written at any moment: what is not finished is left out, and named.
"""

import argparse
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from ssast.benchmarks.study.outcomes import (
    PUBLISHED_ABLATIONS,
    Cells,
    comparison,
    gains,
    gather,
    on_tasks,
    published_gain,
)
from ssast.benchmarks.study.pictures import draw_gains, draw_learning, draw_pretraining
from ssast.benchmarks.study.plan import ABLATIONS, FAMILIES, MODELS, VALID_SHARE, FineTuning, Plan
from ssast.benchmarks.study.tables import (
    ablations,
    average_gain,
    chance_of,
    facts,
    headline,
    learning_rates,
    pretraining,
)
from ssast.engine.errors import ConfigError
from ssast.engine.monitoring.monitor import read_metrics, scalars
from ssast.pipelines.files import write_atomically

OUT = Path("runs/reproduce")
SOUND_TASKS = frozenset({"events", "drums"})  # the others are speech


def summary(plan: Plan, cells: Cells) -> list[str]:
    """The paper's claims and what became of them here."""
    lines = []
    for family in FAMILIES:
        found = gains(cells, family)
        if not found:
            lines.append(f"- *Pretraining lifts every task*, {family} model: not finished yet.")
            continue
        higher, lower, neither = _told_apart(cells, family, f"{family}-scratch", list(found))
        verdict = "**not reproduced**" if lower or neither else "**reproduced**"
        if higher and verdict.startswith("**not"):
            verdict = f"**reproduced on {len(higher)} of {len(found)} tasks**"
        if len(found) < len(plan.tasks):
            verdict += f" ({len(found)} of {len(plan.tasks)} tasks are finished)"
        lines.append(
            f"- *Pretraining lifts every task*, {family} model: {verdict}. Relative gain over "
            f"training from scratch: {average_gain(cells, family)} % on average (paper, other "
            f"tasks and base models: {published_gain(family):+.1f} %)."
            + _named("Better on", higher)
            + _named("Worse on", lower)
            + _named("Not told apart on", neither)
        )
    return [*lines, *_trade(cells), *_ablation_claims(plan, cells), ""]


def _told_apart(
    cells: Cells, one: str, other: str, tasks: Sequence[str]
) -> tuple[list[str], list[str], list[str]]:
    """Tasks on which a model is better than another, worse, and neither."""
    signs = {t: comparison([cells[one, t]], [cells[other, t]]) for t in tasks}
    higher, lower, neither = ([t for t in tasks if signs[t] == sign] for sign in (1, -1, 0))
    return higher, lower, neither


def _named(text: str, names: Sequence[str]) -> str:
    return f" {text}: {', '.join(names)}." if names else ""


def _trade(cells: Cells) -> list[str]:
    both = [task for name, task in cells if name == "patch" and ("frame", task) in cells]
    if not both:
        return []
    patch, frame, neither = _told_apart(cells, "patch", "frame", both)
    sounds = SOUND_TASKS & set(both)
    as_claimed = set(patch) == sounds and set(frame) == set(both) - sounds
    verdict = "**reproduced**" if as_claimed else "**not reproduced**"
    if not sounds:
        verdict = f"for speech {verdict}, for sounds there is no task"
    return [
        f"- *Patches are better for sounds, frames for speech*: {verdict}."
        + _named("Patch model better on", patch)
        + _named("Frame model better on", frame)
        + _named("Not told apart on", neither)
    ]


def _ablation_claims(plan: Plan, cells: Cells) -> list[str]:
    tasks = plan.tasks_of(ABLATIONS[0])
    reference = on_tasks(cells, ABLATIONS[0].name, tasks)
    lines = []
    for model in ABLATIONS[1:]:
        ours = on_tasks(cells, model.name, tasks)
        if not ours or not reference:
            continue
        sign = comparison(ours, reference)
        found = {1: "better than", -1: "worse than", 0: "not told apart from"}[sign]
        claim = f"- *{model.what}*: {found} the published setting here"
        if model.name in PUBLISHED_ABLATIONS:
            claimed, full = PUBLISHED_ABLATIONS[model.name], PUBLISHED_ABLATIONS["short"]
            agrees = "**reproduced**" if sign == -1 else "**not reproduced**"
            claim += f"; worse in the paper ({claimed} against {full}): {agrees}"
        lines.append(claim + ".")
    return lines


def curves_of(
    runs: Iterable[FineTuning], out: Path, epochs: int
) -> list[list[tuple[float, float]]]:
    """(epoch, accuracy on held-out clips) of fine-tunings."""
    curves = []
    for run in runs:
        lines = read_metrics(run.folder(out) / "metrics.jsonl")
        points = scalars(lines, "valid/accuracy")
        if points and points[-1][0]:
            curves.append([(epochs * step / points[-1][0], value) for step, value in points])
    return curves


def pictures(plan: Plan, out: Path, cells: Cells, folder: Path) -> dict[str, list[Path]]:
    """Draw everything there is something to draw of; PNGs by section of the page."""
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier page, with other runs
    folder.mkdir(parents=True)
    found: dict[str, list[Path]] = {
        "gains": [], "learning": [], "pretraining": [], "reconstructions": [], "ablations": []
    }  # fmt: skip
    headline = [f"{family}{kind}" for family in FAMILIES for kind in ("-scratch", "")]
    bars = {
        task: {MODELS[n].what: cells[n, task].accuracies for n in headline if (n, task) in cells}
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
                        for seed in range(plan.seeds)
                    ),
                    out,
                    plan.epochs,
                )
                for name in headline
                if (name, task) in cells
            }
            for task in plan.tasks
        }
        found["learning"].append(draw_learning(folder / "learning.png", curves))
    short = {model.name for model in ABLATIONS}
    for section, names in (("pretraining", set(FAMILIES)), ("ablations", short)):
        logs = {
            MODELS[name].what: read_metrics(out / "pretrain" / name / "metrics.jsonl")
            for name in MODELS
            if name in names
        }
        logs = {title: lines for title, lines in logs.items() if lines}
        if logs:
            found[section].append(draw_pretraining(folder / f"{section}.png", logs))
    for name in (*FAMILIES, "generative"):
        drawn = out / "pretrain" / name / "reconstructions.png"
        if drawn.exists():
            copy = folder / f"reconstructions-{name}.png"
            found["reconstructions"].append(Path(shutil.copyfile(drawn, copy)))
    return found


def stored_plan(out: Path) -> Plan:
    """The plan of a folder of runs.

    Raises:
        ConfigError: There is none.
        DataError: It is damaged.
    """
    plan = Plan.read(out)
    if plan is None:
        raise ConfigError(f"{out}: no runs of ssast bench reproduce there: plan.json is missing")
    return plan


def write_page(out: Path, docs: Path) -> Path:
    """Write results.md and its pictures.

    Args:
        out: Folder of the runs.
        docs: Gets results.md and, in results/, PNGs.

    Returns:
        The page.

    Raises:
        ConfigError: There are no runs.
        DataError: The plan or a manifest is damaged.
    """
    plan = stored_plan(out)
    cells = gather(plan, out)
    drawn = pictures(plan, out, cells, docs / "results")
    images = {
        name: [line for path in paths for line in (f"![{path.stem}](results/{path.name})", "")]
        for name, paths in drawn.items()
    }
    waiting = [
        f"{model.name}, {task}"
        for model in MODELS.values()
        for task in plan.tasks_of(model)
        if (model.name, task) not in cells
    ]
    sections = [
        ("# Results", [
            "What becomes of the method's claims with tiny models, a few hours of recordings and a "
            "few hours of training. `make reproduce` repeats all of it, `ssast bench results` "
            "writes this page from the files of the runs; no number is typed by hand.", "",
            *([f"Not finished yet: {'; '.join(waiting)}.", ""] if waiting else []),
        ]),
        ("## The claims", [
            "A model is called better where the difference is more than two standard errors, of "
            "the seeds of fine-tuning and of the test clips.", "", *summary(plan, cells),
        ]),
        ("## What was run", facts(plan, out)),
        ("## Pretrained and from scratch", [
            "Accuracy on test clips in percent, mean and standard deviation over the seeds of "
            "fine-tuning. Both have as many steps, and the learning rate that is best for them on "
            f"held-out clips ({VALID_SHARE:.0%} of the training clips).", "",
            *headline(plan, cells), *images["gains"],
        ]),
        ("## Learning curves", images["learning"]),
        ("## Pretraining", [
            "On held-out clips. Chance is that of telling a patch from the others that are hidden "
            "in a clip.", "", *pretraining(out), *images["pretraining"],
        ]),
        ("## Reconstructions", images["reconstructions"]),
        ("## Ablations", [
            "All with as few steps, and the learning rates chosen for the patch model: comparable "
            "with each other. The last line has all of the steps.", "",
            *ablations(plan, cells), *images["ablations"],
        ]),
        ("## Learning rates", [
            "Accuracy on held-out clips in percent, seed 0; the chosen one is bold.", "",
            *learning_rates(plan, cells),
        ]),
        ("## What this does not show", [
            "- Each model is pretrained once: the spread is that of fine-tuning.",
            "- Held-out clips are drawn clip by clip, test clips by syllable, utterance, "
            "sound or drum kit: the first are easier.",
            "- The recordings are of a few voices and many channels: `voice` and `language` can in "
            "part be told from the channel.",
            "- Models, recordings and training are thousands of times smaller than the published "
            "ones: a claim that is not seen here is not refuted.", "",
        ]),
    ]  # fmt: skip
    return write_sections(docs / "results.md", sections)


def write_sections(page: Path, sections: Iterable[tuple[str, Sequence[str]]]) -> Path:
    """Write Markdown from headings and the lines below them; what has no lines is left out."""
    text = "\n".join(line for title, lines in sections if lines for line in (title, "", *lines))
    write_atomically(page, text.rstrip() + "\n")
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page from what is finished."""
    parser = argparse.ArgumentParser("ssast bench results", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of the runs ({OUT})")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the page (docs)")
    options = parser.parse_args(arguments)
    print(write_page(options.out, options.docs))
    return 0
