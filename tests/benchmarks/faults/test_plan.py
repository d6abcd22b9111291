"""Plans of faults, and what is made of their results."""

from collections import Counter

import pytest

from ssast.benchmarks.faults.inject import INJECTORS
from ssast.benchmarks.faults.plan import KINDS, draw_plan
from ssast.benchmarks.faults.report import Result, table
from ssast.benchmarks.faults.trial import first_difference


def test_a_plan_has_every_kind_equally_often_and_in_each_of_its_moments():
    plan = draw_plan(list(KINDS), 200, seed=3)
    assert plan == draw_plan(list(KINDS), 200, seed=3) != draw_plan(list(KINDS), 200, seed=4)
    assert [fault.number for fault in plan] == list(range(1, 201))
    assert {12, 13} >= set(Counter(fault.kind for fault in plan).values())
    for kind in KINDS.values():
        assert {fault.moment for fault in plan if fault.kind == kind.name} == set(kind.moments)
    for sharded in (False, True):
        kinds = [KINDS[fault.kind] for fault in plan if fault.sharded == sharded]
        changes = [kind.changes_data for kind in kinds]
        assert changes == sorted(changes)
    assert KINDS.keys() == INJECTORS.keys()


@pytest.mark.parametrize(
    ("ours", "unlogged", "step"),
    [
        ({1: 0.5, 2: 0.25}, (), None),
        ({1: 0.5, 2: 0.26}, (), 2),
        ({1: 0.5}, (), 2),
        ({2: 0.25}, (1,), None),
        ({2: 0.26}, (1, 2), 2),
        ({1: 0.5, 2: 0.25, 3: 0.1}, (), 3),
    ],
)
def test_losses_differ_from_a_step_on(ours, unlogged, step):
    whole = {("train/loss", 1): 0.5, ("train/loss", 2): 0.25}
    found = {("train/loss", step): loss for step, loss in ours.items()}
    assert first_difference(found, whole, unlogged) == step


def test_a_table_has_a_row_for_each_kind():
    results = [
        Result(1, "kill", "save", 2, 8, [-9, 75], 0.25, lost=0, equal=True),
        Result(2, "kill", "steps", 1, 9, [-9], 0.75, lost=1, equal=False),
        Result(3, "clock", "save", 1, 12, [None], None, lost=0, equal=True),
        Result(4, "clip", "steps", 1, 40, [2], 0.1, lost=0),
    ]
    lines = table(results).splitlines()
    assert lines[2] == ("| kill | SIGKILL to a rank | 2 | 2 x -9, 1 x 75 | 0.5, 0.8 | 1 | 1 of 2 |")
    assert lines[3].endswith("| 1 | 1 x goes on | - | 0 | 1 of 1 |")
    assert lines[4].endswith("| 1 | 1 x 2 | 0.1, 0.1 | 0 | other data |")
    assert results[0].line().split() == ["1", "kill", "save", "2", "8", "-9", "75", "0.25"]
