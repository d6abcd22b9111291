"""Joint objective and latent targets side by side: settings, probes, and their section."""

from dataclasses import replace
from pathlib import Path

import pytest
from study_runs import SMALL, fake, report, small_plan, write_probe

from ssast.benchmarks.study import reproduce
from ssast.benchmarks.study.models import MODELS
from ssast.benchmarks.study.objectives import _apart, objectives
from ssast.benchmarks.study.page import write_page
from ssast.benchmarks.study.plan import (
    FineTuning,
    Plan,
    finetuning_config,
    pretraining_config,
)
from ssast.benchmarks.study.probes import read_reports
from ssast.benchmarks.study.runs import Study
from ssast.engine.config import load_config
from ssast.engine.errors import ConfigError
from ssast.engine.monitoring.flops import step_flops_per_clip
from ssast.engine.planning.trial import Trial
from ssast.pipelines.errors import DataError

LATENT = ("latent-flops", "latent-time", "latent-scratch")


def test_budgets_are_equal() -> None:
    plan = Plan("data/sounds", ("events",), 30_000, 3, overrides=SMALL[2:], latent_time=2.5)
    out, recipe = Path("runs/study"), load_config("eat_demo")
    joint, flops, time = (
        pretraining_config(plan, MODELS[name], out)
        for name in ("joint", "latent-flops", "latent-time")
    )
    spent = [step_flops_per_clip(c) * c.train.steps * c.train.batch_size for c in (joint, flops)]
    assert spent[1] == pytest.approx(spent[0], rel=1e-3)
    assert joint.train.steps == 3000 and time.train.steps == 3000 * 4 / 2.5
    for config in (flops, time):
        assert config.model == recipe.model and config.train.batch_size == 12
        rise = config.objective.teacher_decay_steps / config.train.steps
        assert rise == pytest.approx(400 / 500, rel=1e-2)
        assert replace(config.objective, teacher_decay_steps=400) == recipe.objective
    tuned = finetuning_config(plan, FineTuning(MODELS["latent-scratch"], "events", 1e-3, 0), out)
    assert tuned.model == recipe.model and tuned.finetune.checkpoint is None
    encoder = pretraining_config(plan, MODELS["joint-encoder"], out)
    assert (encoder.model, encoder.objective) == (recipe.model, joint.objective)
    unmeasured = replace(plan, latent_time=None)
    with pytest.raises(ConfigError, match=r"plan.json: latent_time is missing"):
        pretraining_config(unmeasured, MODELS["latent-time"], out)


def test_the_time_of_a_step_is_measured_once(tmp_path, monkeypatch) -> None:
    plan = small_plan(tmp_path / "data")
    rates, done = iter([60.0, 20.0]), []
    monkeypatch.setattr(
        reproduce, "try_out", lambda config, seconds: Trial("ok", clips_per_s=next(rates))
    )
    monkeypatch.setattr(Study, "run", lambda self, only: done.append(self.plan))
    replace(plan, latent_time=None).write(tmp_path / "run")
    where = ["--out", str(tmp_path / "run"), "--docs", str(tmp_path / "docs")]
    for names in (["patch"], ["latent-time"], ["patch", "latent-time"]):
        assert reproduce.main(["--data", plan.data, *where, "--only", *names]) == 0
    assert [each.latent_time for each in done] == [None, 3.0, 3.0]


def test_the_section_marks_what_is_not_finished(tmp_path) -> None:
    plan = small_plan(tmp_path / "data")
    plan.write(tmp_path)
    for rate in plan.rates:
        fake(plan, tmp_path, "patch-scratch", "pitch", rate, 0, 0.5, 5)
    page = write_page(tmp_path, tmp_path / "docs").read_text()
    section = page[page.index("## Joint objective and latent targets") :].split("\n## ")[0]
    assert "`ssast bench reproduce --only joint joint-encoder " in section
    assert "Not finished yet" in page and not any(name in page.split("##")[0] for name in LATENT)

    for rate in plan.rates:
        fake(plan, tmp_path, "joint", "pitch", rate, 0, 0.5, 5)
    for name in LATENT[::2]:
        for rate in plan.rates:
            fake(plan, tmp_path, name, "pitch", rate, 0, 0.5, 9 if name == LATENT[0] else 5)
    write_probe(tmp_path, "joint", report("pitch", "untrained", 0.5, 0.4))
    reports = [report("pitch", "untrained", 0.55, 0.45), report("pitch", "checkpoint", 0.9, 0.8)]
    write_probe(tmp_path, "latent-flops", *reports)
    page = write_page(tmp_path, tmp_path / "docs").read_text()
    section = page[page.index("## Joint objective and latent targets") :].split("\n## ")[0]
    for row in (
        "patch, from scratch | 50.0 (1 of 2) | 50.0 (1) | 40.0 |",
        "joint | 50.0 (1 of 2) | not finished | not finished |",
        "encoder of latent targets, from scratch | 50.0 (1 of 2) | 55.0 (1) | 45.0 |",
        "as many FLOPs | 90.0 (1 of 2) | 90.0 (1) | 80.0 |",
        "as much time | not finished | not finished | not finished |",
    ):
        assert row in section
    pair = "latent targets, as many FLOPs | encoder of latent targets, from scratch"
    assert f"| {pair} | fine-tuned | 1 of 2 | 90.0 and 50.0 |" in section
    assert f"| {pair} | probed, best layer | 1 of 2 | 90.0 and 55.0 | pitch |  |" in section
    assert "FLOPs | joint | probed, best layer | not finished |  |  |  |" in section


def test_intervals_that_do_not_overlap() -> None:
    assert _apart((0.6, 0.7), (0.4, 0.5)) == 1 and _apart((0.4, 0.5), (0.6, 0.7)) == -1
    assert _apart((0.4, 0.6), (0.5, 0.7)) == 0 and _apart(None, (0.5, 0.7)) == 0


def test_a_damaged_probe_is_named(tmp_path) -> None:
    write_probe(tmp_path, "latent-time", {"weights": "checkpoint"})
    with pytest.raises(DataError, match=r"latent-time/probe_layers.json: not the scores"):
        read_reports(tmp_path)


@pytest.mark.slow
def test_the_group_runs(tmp_path, capsys) -> None:
    plan = replace(small_plan(tmp_path / "data"), tasks=("pitch",), seeds=1, rates=(1e-3,))
    study = Study(plan, tmp_path / "run")
    study.run(["latent-time", "latent-scratch"])
    assert "probe latent-time" in capsys.readouterr().out
    study.run(["latent-time"])  # nothing is run again
    assert not capsys.readouterr().out
    tuned = load_config(tmp_path / "run/finetune/latent-time/pitch/lr0.001-seed0/config.yaml")
    assert (tuned.model.norm, tuned.model.extra_tokens) == ("post", "cls")
    found = read_reports(tmp_path / "run")
    section = "\n".join(objectives(plan, tmp_path / "run", {}, found))
    assert "| latent targets, as much time | 8 | 96 |" in section
    assert set(found) == {("latent-time", "pitch")}  # the untrained one is probed with another
