"""The operations of a profiled step are those of the ledger, group by group."""

from types import SimpleNamespace

import pytest

from ssast.benchmarks.training.groups import (
    beside_ledger,
    format_groups,
    launch_of,
    measured_groups,
)
from ssast.benchmarks.training.ours import OurStep
from ssast.benchmarks.training.setting import Setting
from ssast.engine.monitoring.gpus import load_gpu
from ssast.engine.planning.ledger import BACKWARD, FORWARD, INPUTS, group_of

TOY = Setting("tiny", batch=2, frames=64, threads=1, default_memory=True)


@pytest.fixture(scope="module")
def step() -> OurStep:
    return OurStep(TOY.config(), TOY.fbank())


def test_the_groups_are_those_of_the_ledger(step: OurStep) -> None:
    config, h100 = step.task.context.config, load_gpu("h100")
    found_groups = beside_ledger(measured_groups(step, 1), config, h100, measured=True)
    groups = {g.group: g for g in found_groups}
    for name in ("matmul", "attention", "GELU, ReLU", "LayerNorm", "embedding", "losses"):
        found = groups[name]
        assert found.ms > 0 and found.launches > 0 and found.gigabytes > 0 and found.least_ms, name
    matmul = groups["matmul"]
    assert matmul.ms > 10 * groups["residual"].ms
    text = format_groups(list(groups.values()))
    assert "of least" in text and f"{matmul.least_ms:.3f}" in text


def test_elsewhere_there_is_no_least_time(step: OurStep) -> None:
    config, times = step.task.context.config, {"matmul": (1.0, 2.0), "unknown": (3.0, 4.0)}
    groups = beside_ledger(times, config, load_gpu("h100"), measured=False)
    assert {g.group: (g.ms, g.launches) for g in groups if g.ms} == times
    assert all(g.least_ms is None for g in groups)
    assert "of least" not in format_groups(groups)


def test_steps_are_averaged(step: OurStep) -> None:
    one, three = measured_groups(step, 1), measured_groups(step, 3)
    assert one["matmul"][1] == pytest.approx(three["matmul"][1]) and one["matmul"][1] > 100


def event(name: str, parent: SimpleNamespace | None = None) -> SimpleNamespace:
    return SimpleNamespace(name=name, cpu_parent=parent)


def test_an_operation_is_placed_by_what_it_lies_in() -> None:
    node = event("autograd::engine::evaluate_function: AddmmBackward0")
    sum_ = launch_of(event("aten::sum", node))  # on a thread of its own, outside of all marks
    assert (sum_.phase, sum_.node, group_of(sum_)) == (BACKWARD, "AddmmBackward0", "bias gradients")
    forward = event("phase: forward")
    ours = launch_of(event("aten::copy_", event("ssast::patch_embed", forward)))
    assert (ours.phase, group_of(ours)) == (FORWARD, "embedding")
    masks = launch_of(event("aten::sort", event("phase: inputs")))
    assert (masks.phase, group_of(masks)) == (INPUTS, "masks, targets")
    addmm = launch_of(event("aten::addmm", event("aten::linear", forward)))
    assert group_of(addmm) == "matmul"
