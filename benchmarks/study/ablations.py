"""Section of the results page on the ablations: what they can show, and what they showed."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ssast.benchmarks.study.analysis import (
    PUBLISHED,
    PUBLISHED_ABLATIONS,
    Cell,
    Cells,
    Difference,
    difference,
    on_tasks,
    over_tasks,
)
from ssast.benchmarks.study.models import ABLATIONS, MODELS
from ssast.benchmarks.study.plan import Plan
from ssast.benchmarks.study.tables import PLUS_MINUS, mean_and_std, of_seeds, table

SHOWN = 0.02  # a difference in accuracy that is worth showing
POWER = 1.96 + 0.84  # standard errors: two-sided 5 %, shown in 80 % of all cases
BEFORE = ("patch-scratch", "patch", "joint")  # models whose spread is known before the ablations


@dataclass(frozen=True)
class Spread:
    """How much the mean accuracy over some tasks varies.

    Attributes:
        seeds: Standard deviation over seeds.
        clips: Standard error, over test clips, of the difference between two models.
    """

    seeds: float
    clips: float

    def seeds_for(self, difference: float) -> int:
        """Return how many seeds of each model show a difference on these test clips."""
        return max(2, math.ceil(2 * (POWER * self.seeds / difference) ** 2))

    def shown_by(self, seeds: int, *, clips: bool) -> float:
        """Return the smallest difference that so many seeds show.

        Args:
            seeds: Seeds of each model.
            clips: On other test clips of the same kind; else on these.
        """
        return POWER * math.hypot(self.seeds * (2 / seeds) ** 0.5, self.clips if clips else 0.0)


def spread(cells: Cells, names: Sequence[str], tasks: Sequence[str]) -> Spread | None:
    """Pool the spread of some models; None unless two of them have two seeds on all tasks."""
    found = [each for name in names if (each := on_tasks(cells, name, tasks))]
    seeds = [over_tasks(cell.accuracies for cell in each) for each in found]
    pairs = [difference(one, other) for one, other in pairwise(found)]
    known = [pair.of_clips**2 for pair in pairs if pair is not None]
    if not known:
        return None
    variances = [statistics.variance(values) for values in seeds if len(values) > 1]
    return Spread(statistics.mean(variances) ** 0.5, statistics.mean(known) ** 0.5)


def ablations(plan: Plan, cells: Cells) -> list[str]:
    """Describe the power of the ablations, and tabulate what they showed."""
    tasks = plan.ablation_tasks
    lines = [
        "Test accuracy in percent. Each seed of an ablation has a pretraining of its own, of "
        f"{max(1, round(ABLATIONS[0].share * plan.steps)):,} steps, and the learning rates chosen "
        "for the patch model; the last row is pretrained once, for all steps. Differences to the "
        "first ablation with two standard errors: over seeds on these test clips, and over seeds "
        "and test clips.",
        "",
        *_power(plan, cells),
    ]
    reference = on_tasks(cells, ABLATIONS[0].name, tasks)
    rows = []
    for model in (MODELS["patch-scratch"], *ABLATIONS, MODELS["patch"]):
        ours = on_tasks(cells, model.name, tasks)
        row = [f"{model.what}, all steps" if model.name == "patch" else model.what]
        row += [of_seeds(plan, cells.get((model.name, task)), model) for task in tasks]
        row.append(mean_and_std(over_tasks(cell.accuracies for cell in ours)))
        compared = model in ABLATIONS[1:] and ours and reference
        row += _differences(difference(ours, reference) if compared else None)
        published = PUBLISHED_ABLATIONS.get(model.name)
        if model.name == "patch-scratch":
            published = PUBLISHED["AudioSet-20K"]["scratch"]
        rows.append([*row, "" if published is None else f"{published}"])
    columns = ["mean", "difference, seeds", "seeds and clips", "paper, AudioSet-20K"]
    return lines + table(["pretraining", *tasks, *columns], rows)


def _differences(found: Difference | None) -> list[str]:
    if found is None:
        return ["", ""]
    return [
        f"{100 * found.mean:+.1f}{PLUS_MINUS}{200 * error:.1f}"
        for error in (found.of_seeds, found.error)
    ]


def _power(plan: Plan, cells: Cells) -> list[str]:
    tasks, n, rows = plan.ablation_tasks, plan.replicas, []
    for what, names in (
        ("main models, seeds of fine-tuning", BEFORE),
        ("ablations, seeds of both trainings", tuple(model.name for model in ABLATIONS)),
    ):
        found = spread(cells, names, tasks)
        if found is not None:
            here, elsewhere = (found.shown_by(n, clips=clips) for clips in (False, True))
            rows.append([
                what,
                f"{100 * found.seeds:.1f}",
                f"{100 * found.clips:.1f}",
                str(found.seeds_for(SHOWN)),
                f"{100 * here:.1f}",
                f"{100 * elsewhere:.1f}",
            ])  # fmt: skip
    if not rows:
        return []
    header = ["mean over the tasks, points", "spread over seeds", "standard error of clips"]
    header += [f"seeds for {100 * SHOWN:.0f} points", f"shown by {n} seeds", "on other clips"]
    return [
        "What can be shown, with a power of 80 %: differences below that are not told apart here. "
        "Masks at uniformly distributed positions and the softmax over targets (equation 1) are "
        "left out: nothing suggests that they differ by as much.",
        "",
        *table(header, rows),
    ]


def told_apart(ours: Sequence[Cell], theirs: Sequence[Cell]) -> str:
    """Return in words how two models differ."""
    found = difference(ours, theirs)
    if found is None or abs(found.mean) <= 2 * found.of_seeds:
        return "not told apart from"
    where = "" if abs(found.mean) > 2 * found.error else " on these test clips, not on others,"
    return f"significantly {'better' if found.mean > 0 else 'worse'}{where} than"
