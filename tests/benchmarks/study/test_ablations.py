"""The ablations of the study: their seeds, their power, their table."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from study_runs import fake, small_plan

from ssast.benchmarks.study.ablations import Variation, ablations, told_apart, variation
from ssast.benchmarks.study.analysis import difference, gather, significant_sign
from ssast.benchmarks.study.models import ABLATIONS, MODELS
from ssast.benchmarks.study.plan import FineTuning, finetuning_config, pretraining_config
from ssast.benchmarks.study.significance import Cell


@pytest.fixture
def plan(tmp_path):
    return small_plan(tmp_path / "data")


def cell(rights) -> Cell:
    """Results of seeds on the same clips, as a [seeds, clips] array of bool."""
    return Cell(1e-3, {}, 0, tuple(range(len(rights))), rights)


def test_each_seed_has_a_pretraining_of_its_own(plan, tmp_path):
    model = MODELS["generative"]
    folders = [pretraining_config(plan, model, tmp_path, seed).run.folder for seed in (0, 1)]
    assert folders == [str(tmp_path / "pretrain" / n) for n in ("generative", "generative-seed1")]
    assert [pretraining_config(plan, model, tmp_path, s).train.seed for s in (0, 1)] == [0, 1]
    runs = [FineTuning(model, "pitch", 1e-3, seed) for seed in (0, 1)]
    assert [finetuning_config(plan, r, tmp_path).finetune.checkpoint for r in runs] == folders
    patch = finetuning_config(plan, FineTuning(MODELS["patch"], "pitch", 1e-3, 1), tmp_path)
    assert patch.finetune.checkpoint == str(tmp_path / "pretrain" / "patch")


@pytest.mark.parametrize("difference_shown", [0.01, 0.02, 0.05])
def test_so_many_seeds_show_the_difference(difference_shown):
    known = Variation(seeds=0.015, clips=0.01)
    seeds = known.seeds_for(difference_shown)
    assert known.shown_by(seeds, clips=False) <= difference_shown
    assert seeds == 2 or known.shown_by(seeds - 1, clips=False) > difference_shown
    # As often as it says, in draws, by the test of Student.
    draw = np.random.default_rng(0)
    ours, theirs = draw.normal([[[difference_shown]], [[0.0]]], 0.015, (2, 20_000, seeds))
    found = stats.ttest_ind(ours, theirs, axis=1).pvalue < 0.05
    assert found.mean() > 0.78
    assert known.shown_by(10**9, clips=True) == pytest.approx(2.8 * 0.01, rel=1e-3)


def test_the_spread_is_that_of_seeds_and_clips():
    draw, clips, tasks = np.random.default_rng(1), 4000, ("a", "b")
    hardness = draw.random((2, clips)) < 0.5
    cells = {}
    for name in ("patch", "joint", "patch-scratch"):
        for number, task in enumerate(tasks):
            own = draw.random(clips) < 0.3  # clips on which this model differs from the others
            right = hardness[number] ^ own
            cells[name, task] = cell(np.stack([right] * 3))
    found = variation(cells, ("patch", "joint", "patch-scratch"), tasks)
    assert found.seeds == 0
    # Two models differ on 2 x 0.3 x 0.7 of the clips, by one each; two tasks are averaged.
    assert found.clips == pytest.approx((2 * 0.3 * 0.7 / clips / 2) ** 0.5, rel=0.1)
    assert (
        variation(cells, ("patch",), tasks) is None
        and variation({}, ("patch", "joint"), tasks) is None
    )


def test_where_a_difference_holds():
    few, many = np.zeros((3, 40), bool), np.zeros((3, 40), bool)
    few[:, :10], many[:, 10:22] = True, True  # 25 and 30 %, on other clips
    ours, theirs = [cell(many)], [cell(few)]
    mean, spread = difference(ours, theirs)
    assert mean == pytest.approx(0.05) and spread.of_seeds == 0 and spread.of_clips > 0.1
    where = "{} on these test clips (over seeds alone; not shown for other clips) than"
    assert told_apart(ours, theirs) == where.format("better")
    assert told_apart(theirs, ours) == where.format("worse")
    assert significant_sign(ours, theirs) == 0
    few[:, :10], few[:, 10:11] = False, True
    assert told_apart(ours, [cell(few)]) == "significantly better than"
    assert told_apart(ours, [cell(many)]) == told_apart(ours, [cell(few[:1])])
    assert told_apart(ours, ours) == "not told apart from"


def test_the_table(plan, tmp_path):
    assert "--only short generative discriminative masked-100 masked-250` runs" in "\n".join(
        ablations(plan, {})
    )
    for rate in plan.rates:
        fake(plan, tmp_path, "patch", "pitch", rate, 0, 0.5, 8)
    for model, rights in ((ABLATIONS[0], (8, 8)), (ABLATIONS[1], (4, 6))):
        for seed, right in enumerate(rights):
            fake(plan, tmp_path, model.name, "pitch", plan.rates[0], seed, 0.5, right)
    text = "\n".join(ablations(plan, gather(plan, tmp_path)))
    plus_minus = "\N{PLUS-MINUS SIGN}"
    # Over seeds 2 x 0.1; over clips the seeds agree on 8 of 10, half on 1, and not on the others.
    assert f"| generative only | 50.0 {plus_minus} 14.1 | 50.0 {plus_minus} 14.1 | -30.0 " in text
    # 0.1, of two seeds: with one degree of freedom.
    assert f"-30.0 {plus_minus} {10 * stats.t.ppf(0.975, 1):.1f} | -30.0 {plus_minus}" in text
    assert "| ablations, seeds of both trainings | 10.0 |" in text
    assert "of 2 steps" in text and "shown by 2 seeds" in text
    # Of what is finished, not of what is planned.
    planned = replace(plan, replicas=3)
    assert "shown by 2 seeds" in "\n".join(ablations(planned, gather(planned, tmp_path)))


def test_pretraining_too_short_to_help_is_said(plan, tmp_path):
    for name in ("patch", "patch-scratch"):
        for rate in plan.rates:
            fake(plan, tmp_path, name, "pitch", rate, 0, 0.5 if rate == plan.rates[0] else 0.1, 6)
    for name in ("patch-scratch", ABLATIONS[0].name):
        for seed in range(2):
            fake(plan, tmp_path, name, "pitch", plan.rates[0], seed, 0.5, 6)
    said = "the first ablation is not better than training from scratch"
    assert said in "\n".join(ablations(plan, gather(plan, tmp_path)))
    for seed in range(2):
        fake(plan, tmp_path, ABLATIONS[0].name, "pitch", plan.rates[0], seed, 0.5, 10)
    assert said not in "\n".join(ablations(plan, gather(plan, tmp_path)))
