"""How far apart two models are, over seeds and over groups of test clips.

    a value           v = sum over tasks t of w[t] a[t],   a[t] the accuracy, the mean of r[s, i]
    r[s, i]           1 where seed s names test clip i rightly, else 0
    its variance      over seeds s, over groups of clips g, and once less that of both together,
                      which is in either: a two-way analysis of variance with random effects,
                      for each stratum of tasks that share groups
    95 % interval     Student's t, with the degrees of freedom of Welch and Satterthwaite

Clips of a group (takes of a syllable, pieces of a drum kit) are held out together and are alike, so
they count as one draw. A group may have clips of several tasks. Strata are drawn independently: of
three drum kits little is known, however many voices there are.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True, eq=False)
class Cell:
    """Results of a model on a task.

    Attributes:
        rate: The chosen learning rate.
        tried: Validation accuracy by learning rate, NaN where training diverged.
        num_diverged: Number of seeds whose training diverged.
        seeds: The seeds that are finished.
        right: Whether each of them names each test clip rightly, [seeds, clips] bool.
        groups: Group of each test clip; none: each clip is one of its own.
    """

    rate: float
    tried: Mapping[float, float]
    num_diverged: int
    seeds: tuple[int, ...]
    right: np.ndarray
    groups: tuple[Hashable, ...] = ()

    @property
    def accuracies(self) -> tuple[float, ...]:
        """Test accuracy of each seed."""
        return tuple(self.right.mean(1).tolist())

    @property
    def mean(self) -> float:
        """Mean test accuracy over the seeds."""
        return float(self.right.mean())


@dataclass(frozen=True)
class Spread:
    """Standard errors of a difference, and half of its confidence intervals.

    Attributes:
        of_seeds: Standard error over seeds, on these test clips.
        of_clips: That over groups of test clips.
        seeds_margin: Half of the interval over seeds.
        margin: Half of the interval over seeds and groups of test clips.
    """

    of_seeds: float
    of_clips: float
    seeds_margin: float
    margin: float


def common_seeds(cells: Sequence[Cell]) -> list[int]:
    """Return the seeds that all of these results have."""
    return sorted(set.intersection(*(set(cell.seeds) for cell in cells))) if cells else []


def over_tasks(cells: Sequence[Cell]) -> list[float]:
    """Average the accuracies over the tasks, for each seed that all of them have."""
    seeds = common_seeds(cells)
    rows = [[cell.accuracies[cell.seeds.index(seed)] for seed in seeds] for cell in cells]
    return np.mean(rows, 0).tolist() if cells else []


class _Side:
    """One model of a difference: its values by seed, and what each group adds to them."""

    def __init__(self, cells: Sequence[Cell], weights: Sequence[float]) -> None:
        seeds = common_seeds(cells)
        self.values = np.zeros(len(seeds))
        self.groups: dict[Hashable, np.ndarray] = defaultdict(lambda: np.zeros(len(seeds)))
        self.tasks: dict[Hashable, set[int]] = defaultdict(set)  # of each group
        for task, (cell, weight) in enumerate(zip(cells, weights, strict=True)):
            right = cell.right[[cell.seeds.index(seed) for seed in seeds]].astype(float)
            means = right.mean(1, keepdims=True)
            self.values += weight * means[:, 0]
            # Less the accuracy: what is left of a group of clips that are like all others is 0.
            residues = weight * (right - means) / right.shape[1]
            groups = cell.groups or tuple((task, i) for i in range(right.shape[1]))
            for group, column in zip(groups, residues.T, strict=True):
                self.groups[group] = self.groups[group] + column
                self.tasks[group].add(task)

    @property
    def seed_variance(self) -> float:
        """Variance of the mean over the seeds."""
        return float(self.values.var(ddof=1)) / len(self.values)

    def interaction(self, groups: Iterable[Hashable]) -> float:
        """Variance of the mean by what a seed does on a group, which is in both other terms."""
        each = np.array([self.groups[group] for group in groups])
        own = each - each.mean(1, keepdims=True)
        return float((own**2).sum()) / (len(self.values) * (len(self.values) - 1))


def spread_of(
    ours: Sequence[Cell],
    theirs: Sequence[Cell],
    weights: Sequence[float],
    their_weights: Sequence[float],
) -> Spread | None:
    """Return the spread of sum(weights * ours) - sum(their_weights * theirs).

    Args:
        ours: Results of a model, a task each.
        theirs: Those of the other on the same tasks.
        weights: Weight of each task.
        their_weights: That of each for the other model.

    Returns:
        None with fewer than two seeds of either.
    """
    sides = _Side(ours, weights), _Side(theirs, their_weights)
    if min(len(side.values) for side in sides) < 2:
        return None
    clips = []
    for groups in _strata(sides[0].tasks):
        each = [sides[0].groups[group].mean() - sides[1].groups[group].mean() for group in groups]
        own = float(np.square(each).sum()) - sum(side.interaction(groups) for side in sides)
        count = len(groups)
        if count > 1:
            clips.append((max(0.0, own) * count / (count - 1), count - 1))
    variances = [(side.seed_variance, len(side.values) - 1) for side in sides]
    of_seeds, of_clips = (sum(variance for variance, _ in each) for each in (variances, clips))
    seeds_margin = _margin(variances)
    # More that is drawn cannot narrow it: with two seeds, the many clips would hide them.
    margin = max(seeds_margin, _margin([*variances, *clips]))
    return Spread(of_seeds**0.5, of_clips**0.5, seeds_margin, margin)


def _strata(tasks_of: Mapping[Hashable, set[int]]) -> list[list[Hashable]]:
    """Divide groups so that those of one task, and of tasks that share some, are together."""
    strata: list[tuple[set[int], list[Hashable]]] = []
    for group, tasks in tasks_of.items():
        touched = [stratum for stratum in strata if stratum[0] & tasks]
        strata = [stratum for stratum in strata if not stratum[0] & tasks]
        joined = [member for _, members in touched for member in members]
        strata.append((tasks.union(*(others for others, _ in touched)), [*joined, group]))
    return [groups for _, groups in strata]


def _margin(variances: Sequence[tuple[float, int]]) -> float:
    """Return half of the confidence interval of a sum, by variances and degrees of freedom."""
    total = sum(variance for variance, _ in variances)
    uncertain = sum(variance**2 / freedom for variance, freedom in variances)
    if not uncertain:
        return 0.0
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, total**2 / uncertain) * total**0.5)
