"""Differences of models: intervals that hold the truth as often as they say."""

from pathlib import Path

import numpy as np
import pytest
from study_runs import small_plan

from ssast.benchmarks.study.analysis import difference, gain, groups_of
from ssast.benchmarks.study.significance import Cell, over_tasks, spread_of


def cell(right, groups=(), seeds=None) -> Cell:
    return Cell(1e-3, {}, 0, seeds or tuple(range(len(right))), np.asarray(right), tuple(groups))


def drawn(draw, skill, hardness, groups, *, seeds, of_seeds, of_group, of_clip) -> Cell:
    """Results whose seeds, groups of clips and clips all have a part of their own."""
    own = skill + draw.normal(0, of_seeds, (seeds, 1))
    own = own + draw.normal(0, of_group, max(groups) + 1)[groups]
    own = own + draw.normal(0, of_clip, len(groups))
    return cell(draw.random((seeds, len(groups))) < 1 / (1 + np.exp(hardness - own)), groups)


@pytest.mark.parametrize("each", [1, 6])
@pytest.mark.parametrize("of_seeds", [0.0, 0.2])
def test_a_difference_that_is_none_is_rarely_shown(each, of_seeds):
    draw, rounds, shown = np.random.default_rng(0), 600, 0
    groups = np.repeat(np.arange(40), each)
    for _ in range(rounds):
        hardness = draw.normal(0, 1, 40)[groups]
        ours, theirs = (
            drawn(
                draw, 0.0, hardness, groups, seeds=3, of_seeds=of_seeds, of_group=0.8, of_clip=0.3
            )
            for _ in range(2)
        )
        mean, spread = difference([ours], [theirs])
        shown += abs(mean) > spread.margin
    assert 0.015 < shown / rounds < 0.085  # 5 %, but for the draw and for linear terms


def test_the_interval_of_a_gain_holds_it():
    draw, rounds, held = np.random.default_rng(1), 600, 0
    groups = np.arange(150)
    skills = {"patch": 0.5, "patch-scratch": -0.4}
    many = np.random.default_rng(2).normal(0, (0.7**2 + 0.25**2 + 0.4**2) ** 0.5, 400_000)
    true = [np.mean(1 / (1 + np.exp(many - skill))) for skill in skills.values()]
    for _ in range(rounds):
        hardness = draw.normal(0, 0.7, len(groups))
        cells = {
            (name, "x"): drawn(
                draw, skill, hardness, groups, seeds=4, of_seeds=0.25, of_group=0.4, of_clip=0.0
            )
            for name, skill in skills.items()
        }
        found = gain(cells, "patch", "patch", ["x"])
        held += abs(found.mean - (true[0] / true[1] - 1)) < found.margin
    assert 0.92 < held / rounds < 0.985


def test_a_group_counts_once():
    """Whether its clips are of one task or of two."""
    draw = np.random.default_rng(3)
    right, other = draw.random((2, 3, 30)) < 0.5
    each = [spread_of([cell(r)], [cell(o)], [1], [1]) for r, o in ((right, other),)]
    twice = [cell(np.repeat(r, 2, 1), np.repeat(np.arange(30), 2)) for r in (right, other)]
    found = spread_of([twice[0]], [twice[1]], [1], [1])
    assert found.of_clips == pytest.approx(each[0].of_clips)
    groups = tuple(range(30))
    same = spread_of([cell(right, groups)] * 2, [cell(other, groups)] * 2, [0.5, 0.5], [0.5, 0.5])
    assert same.margin == pytest.approx(each[0].margin)
    apart = spread_of([cell(right)] * 2, [cell(other)] * 2, [0.5, 0.5], [0.5, 0.5])
    assert apart.of_clips < 0.8 * each[0].of_clips


def test_clips_of_one_group_are_one_draw():
    right = np.random.default_rng(4).random((3, 20)) < 0.5
    one = [cell(r, [0] * 20) for r in (right, ~right)]
    spread = spread_of([one[0]], [one[1]], [1], [1])
    assert spread.of_clips == 0 and spread.margin == pytest.approx(spread.seeds_margin)


def test_a_task_of_few_groups_is_a_stratum_of_its_own():
    """Beside a task of many groups: what is not known of three is not known of the mean."""
    draw, rounds, held = np.random.default_rng(5), 500, 0
    groups = [np.arange(200), np.repeat(np.arange(3), 50)]
    for _ in range(rounds):
        ours, theirs = [], []
        for number, kinds in enumerate(groups):
            # Of either model, so that there is no difference: what a group favours is drawn.
            favours = draw.normal(0, (0.3, 0.9)[number], kinds.max() + 1)[kinds]
            for cells, sign in ((ours, 1), (theirs, -1)):
                rate = 1 / (1 + np.exp(-sign * favours))
                right = draw.random((3, len(kinds))) < rate
                cells.append(cell(right, [(number, kind) for kind in kinds]))
        mean, spread = difference(ours, theirs)
        held += abs(mean) < spread.margin
    assert held / rounds > 0.87  # as one stratum of 203 groups 0.74


def test_seeds_are_paired_by_their_numbers():
    a, b = cell([[1, 1], [0, 0]], seeds=(1, 2)), cell([[1, 0], [1, 1]], seeds=(0, 1))
    assert over_tasks([a, b]) == [1.0]  # of seed 1
    assert difference([a, b], [a, b]) is None


def test_groups_of_other_tasks_are_recordings(tmp_path: Path):
    plan = small_plan(tmp_path / "data")
    groups = groups_of(plan, "pitch")
    assert len(groups) == len(set(groups)) == 8
