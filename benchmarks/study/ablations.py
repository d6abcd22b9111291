"""Section of the results page on the ablations: what they can show, and what they showed."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from scipy import stats

from ssast.benchmarks.study.analysis import (
    PUBLISHED,
    PUBLISHED_ABLATIONS,
    Cells,
    difference,
    on_tasks,
    significant_sign,
)
from ssast.benchmarks.study.models import ABLATIONS, MODELS
from ssast.benchmarks.study.plan import Plan
from ssast.benchmarks.study.significance import CONFIDENCE, Cell, Spread, over_tasks
from ssast.benchmarks.study.tables import PLUS_MINUS, mean_and_std, of_seeds, table

SHOWN = 0.02  # a difference in accuracy that is worth showing
POWER = 0.8  # share of cases in which it is to be shown
BEFORE = ("patch-scratch", "patch", "joint")  # models whose spread is known before the ablations


@dataclass(frozen=True)
class Variation:
    """How much the mean accuracy over some tasks varies.

    Attributes:
        seeds: Standard deviation over seeds.
        clips: Standard error, over test clips, of the difference between two models.
    """

    seeds: float
    clips: float

    def seeds_for(self, difference: float) -> int:
        """Return how many seeds of each model show a difference on these test clips."""
        seeds = 2
        while self.shown_by(seeds, clips=False) > difference:
            seeds += 1
        return seeds

    def shown_by(self, seeds: int, *, clips: bool) -> float:
        """Return the smallest difference that so many seeds show.

        Args:
            seeds: Seeds of each model.
            clips: On other test clips of the same kind; else on these.
        """
        freedom = 2 * seeds - 2
        errors = stats.t.ppf((1 + CONFIDENCE) / 2, freedom) + stats.t.ppf(POWER, freedom)
        error = math.hypot(self.seeds * (2 / seeds) ** 0.5, self.clips if clips else 0.0)
        return float(errors) * error


def variation(cells: Cells, names: Sequence[str], tasks: Sequence[str]) -> Variation | None:
    """Pool the variation of some models; None unless two of them have two seeds on all tasks."""
    found = [each for name in names if (each := on_tasks(cells, name, tasks))]
    seeds = list(map(over_tasks, found))
    pairs = [difference(one, other) for one, other in pairwise(found)]
    known = [pair[1].of_clips ** 2 for pair in pairs if pair is not None]
    if not known:
        return None
    variances = [statistics.variance(values) for values in seeds if len(values) > 1]
    return Variation(statistics.mean(variances) ** 0.5, statistics.mean(known) ** 0.5)


def begun(cells: Cells) -> bool:
    """Return whether something of an ablation is finished."""
    return bool({model.name for model in ABLATIONS} & {name for name, _ in cells})


def ablations(plan: Plan, cells: Cells) -> list[str]:
    """Describe the power of the ablations, and tabulate what they showed; say so if nothing."""
    if not begun(cells):
        names = " ".join(model.name for model in ABLATIONS)
        return [
            f"Not run with this plan; `ssast bench reproduce --only {names}` runs them. An earlier "
            "study, with one to three seeds on two tasks, told none of them apart from the "
            "published setting.",
            "",
        ]
    tasks = plan.ablation_tasks
    lines = [
        "Test accuracy in percent. Each seed of an ablation has a pretraining of its own, of "
        f"{max(1, round(ABLATIONS[0].share * plan.steps)):,} steps, and the learning rates chosen "
        "for the patch model; the last row is pretrained once, for all steps. Differences to the "
        "first ablation with half of their 95 % interval: over seeds on these test clips, and over "
        "seeds and groups of test clips.",
        "",
        *_power(plan, cells),
    ]
    reference = on_tasks(cells, ABLATIONS[0].name, tasks)
    scratch = on_tasks(cells, "patch-scratch", tasks)
    if reference and scratch and significant_sign(reference, scratch) < 1:
        lines += [
            "After so few steps the first ablation is not better than training from scratch: what "
            "the others change where pretraining helps is not shown.",
            "",
        ]
    rows = []
    for model in (MODELS["patch-scratch"], *ABLATIONS, MODELS["patch"]):
        ours = on_tasks(cells, model.name, tasks)
        row = [f"{model.what}, all steps" if model.name == "patch" else model.what]
        row += [of_seeds(plan, cells.get((model.name, task)), model) for task in tasks]
        row.append(mean_and_std(over_tasks(ours)))
        compared = model in ABLATIONS[1:] and ours and reference
        row += _differences(difference(ours, reference) if compared else None)
        published = PUBLISHED_ABLATIONS.get(model.name)
        if model.name == "patch-scratch":
            published = PUBLISHED["AudioSet-20K"]["scratch"]
        rows.append([*row, "" if published is None else f"{published}"])
    columns = ["mean", "difference, seeds", "seeds and clips", "paper, AudioSet-20K"]
    return lines + table(["pretraining", *tasks, *columns], rows)


def _differences(found: tuple[float, Spread] | None) -> list[str]:
    if found is None:
        return ["", ""]
    mean, spread = found
    return [
        f"{100 * mean:+.1f}{PLUS_MINUS}{100 * margin:.1f}"
        for margin in (spread.seeds_margin, spread.margin)
    ]


def _power(plan: Plan, cells: Cells) -> list[str]:
    tasks, rows = plan.ablation_tasks, list[list[str]]()
    finished = [over_tasks(each) for m in ABLATIONS if (each := on_tasks(cells, m.name, tasks))]
    n = min(map(len, finished), default=plan.replicas)  # of a study that is not finished
    for what, names in (
        ("main models, seeds of fine-tuning", BEFORE),
        ("ablations, seeds of both trainings", tuple(model.name for model in ABLATIONS)),
    ):
        found = variation(cells, names, tasks)
        if found is not None:
            shown = [f"{100 * found.shown_by(n, clips=clips):.1f}" if n > 1 else ""
                     for clips in (False, True)]  # fmt: skip
            rows.append([
                what,
                f"{100 * found.seeds:.1f}",
                f"{100 * found.clips:.1f}",
                str(found.seeds_for(SHOWN)),
                *shown,
            ])  # fmt: skip
    if not rows:
        return []
    header = ["mean over the tasks, points", "spread over seeds", "standard error of clips"]
    header += [f"seeds for {100 * SHOWN:.0f} points", f"shown by {n} seeds", "on other clips"]
    return [
        "What can be shown, with a power of 80 %: differences below that are not told apart here. "
        "Masks at uniformly distributed positions and the softmax over targets (equation 1) are "
        "left out. An earlier study, with two seeds and other tasks, found them 4.5 and 3.7 points "
        "lower, the second significantly so; the time went into seeds of the others.",
        "",
        *table(header, rows),
    ]


def told_apart(ours: Sequence[Cell], theirs: Sequence[Cell]) -> str:
    """Return in words how two models differ."""
    mean, spread = difference(ours, theirs) or (0.0, None)
    if spread is None or abs(mean) <= spread.seeds_margin:
        return "not told apart from"
    better = "better" if mean > 0 else "worse"
    if abs(mean) > spread.margin:
        return f"significantly {better} than"
    return f"{better} on these test clips (over seeds alone; not shown for other clips) than"
