"""Tables of the results page, in Markdown."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from ssast.benchmarks.study.analysis import (
    PUBLISHED,
    Cell,
    Cells,
    Gain,
    gain,
    gain_curve,
    published_gain,
)
from ssast.benchmarks.study.models import COMPARISON, FAMILIES, MODELS, SHORT, Model
from ssast.benchmarks.study.plan import FineTuning, Plan, finetuning_config, pretraining_config
from ssast.engine.config import load_config
from ssast.engine.data.labels import find_classes, read_labelled
from ssast.engine.monitoring.monitor import read_metrics, scalars
from ssast.pipelines.demo.sounds import STUDY_TASKS

NOT_FINISHED = "not finished"
PLUS_MINUS = " \N{PLUS-MINUS SIGN} "


def mean_and_std(values: Sequence[float]) -> str:
    """Format mean and standard deviation in percent."""
    if not values:
        return ""
    numbers = [statistics.mean(values), *([statistics.stdev(values)] if len(values) > 1 else [])]
    return PLUS_MINUS.join(f"{100 * number:.1f}" for number in numbers)


def with_error(found: Gain) -> str:
    """Format a mean relative gain in percent, with half of its 95 % interval."""
    error = [] if found.margin is None else [f"{100 * found.margin:.1f}"]
    return PLUS_MINUS.join([f"{100 * found.mean:+.1f}", *error])


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Format a Markdown table; all columns but the first are right-aligned."""
    marks = [":--", *["--:"] * (len(header) - 1)]
    return [f"| {' | '.join(line)} |" for line in (header, marks, *rows)] + [""]


def what(task: str) -> str:
    """Return the description of a task."""
    return next((known.what for known in STUDY_TASKS if known.name == task), task)


def listed(text: str, names: Sequence[str]) -> str:
    """Return a sentence that lists names, to go on with; nothing without names."""
    return f" {text}: {', '.join(names)}." if names else ""


def headline(plan: Plan, cells: Cells) -> list[str]:
    """Tabulate test accuracies from scratch and pretrained, ours and the published ones."""
    rows = []
    for task in plan.tasks:
        chance, num_clips = chance_of(plan, task)
        row = [f"{task}: {what(task)}", str(num_clips), f"{100 * chance:.1f}"]
        for family in FAMILIES:
            for name in (f"{family}-scratch", family):
                row.append(of_seeds(plan, cells.get((name, task)), MODELS[name]))
            found = gain(cells, family, family, [task])
            row.append("" if found is None else with_error(found))
        rows.append(row)
    row = ["**relative gain on average, %**", "", ""]
    for family in FAMILIES:
        average = gain(cells, family, family, plan.tasks)
        row += ["", "", "" if average is None else f"**{with_error(average)}**"]
    columns = [f"{f}, {kind}" for f in FAMILIES for kind in ("scratch", "pretrained", "gain %")]
    lines = table(["task", "test clips", "largest class", *columns], [*rows, row])
    lines += [
        "Published results of base models (the paper gives 60.9 % on average; from scratch it has "
        "a patch model only):",
        "",
    ]
    published = [
        [name, f"{row['scratch']}"]
        + [
            cell
            for family in FAMILIES
            for cell in (f"{row[family]}", f"{100 * (row[family] / row['scratch'] - 1):+.1f}")
        ]
        for name, row in PUBLISHED.items()
    ]
    means = [f"**{published_gain(family):+.1f}**" for family in FAMILIES]
    published.append(["**relative gain on average, %**", "", "", means[0], "", means[1]])
    return lines + table(
        ["task", "scratch", "patch, pretrained", "gain %", "frame, pretrained", "gain %"],
        published,
    )


@cache
def chance_of(plan: Plan, task: str) -> tuple[float, int]:
    """Return the fraction of the largest class among the test clips, and their number."""
    classes = find_classes(str(plan.labelled(task, "train")), None)
    clips = read_labelled(str(plan.labelled(task, "eval")), classes, one_label=True)
    return clips.counts().max() / len(clips), len(clips)


def of_seeds(plan: Plan, cell: Cell | None, model: Model) -> str:
    """Format the test accuracies of a cell, and how many seeds diverged or are not finished."""
    if cell is None:
        return NOT_FINISHED
    finished, seeds = len(cell.accuracies), plan.seeds_of(model)
    notes = [f"{cell.num_diverged} diverged"] if cell.num_diverged else []
    notes += [f"{finished} of {seeds}"] if finished + cell.num_diverged < seeds else []
    return mean_and_std(cell.accuracies) + (f" ({', '.join(notes)})" if notes else "")


def pretraining(out: Path) -> list[str]:
    """Tabulate the last validation losses of each pretrained model."""
    rows = []
    for model in MODELS.values():
        lines = read_metrics(out / "pretrain" / model.name / "metrics.jsonl")
        validations = [line for line in lines if "valid/loss" in line]
        if not model.share or not validations:
            continue
        config = load_config(out / "pretrain" / model.name / "config.yaml")
        last, objective = validations[-1], config.objective
        values = [
            f"{last[name]:.{digits}f}" if name in last else ""
            for name, digits in (
                ("valid/loss", 3),
                ("valid/infonce_loss", 3),
                ("valid/mse_loss", 4),
            )
        ]
        accuracy = chance = ""
        if "valid/pretext_accuracy" in last:
            accuracy = f"{100 * last['valid/pretext_accuracy']:.1f}"
        if "valid/pretext_chance" in last:
            chance = f"{100 * last['valid/pretext_chance']:.1f}"
        rows.append(
            [
                f"{model.name}: {model.what}",
                f"{last['step']:,} of {config.train.steps:,}",
                f"{objective.num_masked} of {config.grid[0] * config.grid[1]}",
                *values,
                accuracy,
                chance,
            ]
        )
    header = [
        "model",
        "steps",
        "masked",
        "loss",
        "InfoNCE",
        "MSE",
        "pretext accuracy %",
        "chance %",
    ]
    return table(header, rows)


def accuracy_and_gain(found: Gain | None, task: str) -> str:
    """Format the accuracy of a pretrained model on a task, with its relative gain, in percent."""
    if found is None or task not in found.accuracies:
        return NOT_FINISHED
    return f"{100 * found.accuracies[task][1]:.1f} ({100 * found.by_task[task]:+.1f})"


def gains_by_clips(plan: Plan, cells: Cells) -> list[str]:
    """Tabulate accuracies and relative gains at the kept steps; nothing without any."""
    curves = {family: dict(gain_curve(plan, cells, family)) for family in FAMILIES}
    clips = sorted({number for curve in curves.values() for number in curve})
    rows = []
    for family, curve in curves.items():
        if not curve:
            continue
        for task in plan.tasks:
            scratch = cells.get((f"{family}-scratch", task))
            row = [f"{family}, {task}", f"{100 * scratch.mean:.1f}" if scratch else NOT_FINISHED]
            row += [accuracy_and_gain(curve.get(number), task) for number in clips]
            rows.append(row)
        means = [curve.get(n) for n in clips]
        shown = ["" if mean is None else f"**{with_error(mean)}**" for mean in means]
        rows.append([f"**{family}, relative gain on average, %**", "", *shown])
    header = ["model, task", "from scratch", *(f"{n:,} clips" for n in clips)]
    seen = [exceeding(family, list(curve.items())) for family, curve in curves.items() if curve]
    return [*seen, "", *table(header, rows)] if rows else []


def exceeding(family: str, curve: Sequence[tuple[int, Gain]]) -> str:
    """Say at how many clips the mean gain of a family is told apart from zero."""
    found = [f"{n:,}" for n, gain in curve if gain.margin is not None and gain.mean > gain.margin]
    where = f"after {', '.join(found)} clips" if found else "at none of these points"
    return f"- {family} model: the 95 % interval of the mean gain lies above 0 {where}."


def learning_rates(plan: Plan, cells: Cells) -> list[str]:
    """Tabulate validation accuracies by learning rate, seed 0, the chosen one in bold."""
    rows = []
    for (name, task), cell in cells.items():
        if cell.tried:
            marked = {True: "**{}**", False: "{}"}
            shown = [
                marked[rate == cell.rate].format("diverged" if math.isnan(v) else f"{100 * v:.1f}")
                for rate, v in cell.tried.items()
            ]
            rows.append([f"{name}, {task}", *shown])
    return table(["model, task", *(f"{rate:g}" for rate in plan.rates)], rows)


def facts(plan: Plan, out: Path) -> list[str]:
    """Tabulate machine, code version, durations and data of the runs."""
    environments = [json.loads(p.read_text()) for p in sorted(out.glob("*/**/environment.json"))]
    machines = sorted(
        {
            f"{e['device']}, {e['cores']} core{'s' if e['cores'] > 1 else ''} per process, "
            f"{e['precision']}"
            for e in environments
        }
    )
    codes = sorted({str(e["code"]) for e in environments})
    metrics = [*out.glob("pretrain/*/metrics.jsonl"), *out.glob("finetune/*/*/*/metrics.jsonl")]
    config = next((load_config(p) for p in sorted(out.glob("pretrain/*/config.yaml"))), None)
    patch = MODELS["patch"]
    trainings = (
        pretraining_config(plan, patch, out),
        finetuning_config(plan, FineTuning(patch, plan.tasks[0], plan.rates[0], 0), out),
    )
    batches = [training.train.batch_size for training in trainings]
    rows = [
        ("machine", "; ".join(machines)),
        ("code", ", ".join(codes)),
        ("training time, hours", f"{sum(map(training_s, metrics)) / 3600:.2f}"),
        ("runs", f"{len(metrics)}, {len(list(out.glob('pretrain/*')))} of them pretraining"),
        (
            "pretraining",
            f"{plan.steps:,} steps, batch size {batches[0]}; "
            f"objectives {COMPARISON:.0%}, ablations {SHORT:.0%} of the steps",
        ),
        (
            "fine-tuning",
            f"{plan.epochs} epochs, batch size {batches[1]}, {plan.seeds} seeds, "
            f"{plan.replicas} of ablations",
        ),
    ]
    rows += [
        ("masks", "patches: clusters, as published; frames and latent targets: single patches"),
        ("padding", "ignored in all runs (`audio.ignore_padding`); the published code takes it in"),
    ]
    if config is not None:
        audio, model = config.audio, config.model
        depth = "" if model.depth is None else f", model.depth {model.depth}"
        rows.append(("model", f"{model.size}{depth}, {audio.num_frames} frames of 10 ms"))
    report = Path(plan.data, "demo.json")
    if report.exists():
        made = json.loads(report.read_text(encoding="utf-8"))
        rows.append(("recordings", f"{made['hours']:.1f} h, {', '.join(made['packages'])}"))
    leaks = out / "leaks.json"
    if leaks.exists():
        compared = json.loads(leaks.read_text())
        rows.append(
            (
                "test clips in pretraining",
                f"0 ({compared['test']:,} compared with {compared['pretraining']:,} by content)",
            )
        )
    if plan.overrides:
        rows.append(("overrides of all runs", f"`{' '.join(plan.overrides)}`"))
    return table(["", "this study"], rows)


def training_s(metrics: Path) -> float:
    """Return the time in training steps of a run in s, from its metrics.jsonl."""
    points = scalars(read_metrics(metrics), "perf/step_s")
    steps = [step for step, _ in points]
    return sum(
        (step - before) * step_s
        for before, (step, step_s) in zip([0, *steps], points, strict=False)
    )
