"""Probes of the study's main models, beside fine-tuning."""

from study_runs import fake, report, small_plan, write_probe

from ssast.benchmarks.study.analysis import gather
from ssast.benchmarks.study.probes import probes, read_reports


def test_the_section_says_which_layer_to_take(tmp_path) -> None:
    plan = small_plan(tmp_path / "data")
    assert probes(plan, {}, {}) == []
    write_probe(tmp_path, "joint", report("pitch", "untrained", 0.5, 0.4))
    section = "\n".join(probes(plan, {}, read_reports(tmp_path)))
    assert "| pitch, patch, untrained | 30.0 | 50.0 (1) | 40.0 | not finished |" in section
    assert "is best over the tasks together" not in section

    tasks = {"pitch": 0.9, "tone": 0.6}
    write_probe(
        tmp_path, "patch", *(report(task, "checkpoint", best, 0.8) for task, best in tasks.items())
    )
    for task in tasks:
        for rate in plan.rates:
            fake(plan, tmp_path, "patch", task, rate, 0, 0.5, 7)
    section = "\n".join(probes(plan, gather(plan, tmp_path), read_reports(tmp_path)))
    assert "| pitch, patch, pretrained | 70.0 | 90.0 (1) | 80.0 | 70.0 (1 of 2) |" in section
    assert "- patch model: layer 1 is best over the tasks together, on training clips. " in section
    assert "75.0 %, fine-tuning 70.0 % on average; the probe is above on 1 of 2 tasks." in section
    assert "frame model" not in section
