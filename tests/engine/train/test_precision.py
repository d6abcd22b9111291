"""What ``train.precision: auto`` stands for on a CPU: tried, stored, and kept by a resumed run."""

import json

import devices
import pytest
import torch
from precision_jobs import NATIVE, build, choose
from runs import lines, overrides

from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.config import load_config
from ssast.engine.model.objective import MSPM
from ssast.engine.pretrain import pretrain
from ssast.engine.train import precision
from ssast.engine.train.precision import choose_precision

honest_forward = MSPM.forward

if devices.current() != devices.CPU:
    pytest.skip("a GPU uses bf16", allow_module_level=True)


@pytest.fixture(autouse=True)
def native(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: NATIVE)


@pytest.fixture
def times(monkeypatch):
    """Let passes take so many milliseconds under fp32 and bf16, one after the other."""

    def set_times(fp32_ms, bf16_ms):
        found = iter([fp32_ms, bf16_ms] * 3)
        monkeypatch.setattr(precision, "_milliseconds", lambda work: work() and next(found))

    return set_times


@pytest.mark.parametrize("finetune", [False, True])
@pytest.mark.parametrize(
    ("fp32_ms", "bf16_ms", "chosen"), [(10, 9.5, "fp32"), (10, 8, "bf16"), (10, 12, "fp32")]
)
def test_the_faster_one_is_used(finetune, fp32_ms, bf16_ms, chosen, world, times):
    times(fp32_ms, bf16_ms)
    task = build(world, finetune)
    before = {name: p.clone() for name, p in task.module.named_parameters()}
    rng = torch.get_rng_state()
    choice = choose_precision(task, None)
    assert choice.precision == task.context.precision == chosen
    assert choice.reason == f"a trial took {bf16_ms:.0f} ms under bf16 and 10 ms under fp32"
    assert torch.equal(torch.get_rng_state(), rng)
    for name, weight in task.module.named_parameters():
        assert weight.grad is None and torch.equal(weight, before[name])


def test_a_real_trial(world):
    choice = choose_precision(build(world), None)
    assert choice.reason.startswith("a trial took ")


@pytest.mark.parametrize(
    ("changed", "cpu", "reason"),
    [
        ({}, {"avx512_f": True}, "this CPU has no instructions for bf16"),
        ({"train__steps": 50, "train__accumulation_steps": 2}, NATIVE, "100 passes are too few"),
    ],
)
def test_nothing_is_tried_where_that_would_not_pay(changed, cpu, reason, world, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    monkeypatch.setattr(MSPM, "forward", None)
    task = build(world, **changed)
    choice = choose_precision(task, None)
    assert choice.precision == task.context.precision == "fp32"
    assert choice.reason.startswith(reason)


@pytest.mark.parametrize("given", ["fp32", "bf16"])
def test_what_is_set_is_used(given, world):
    task = build(world, train__precision=given)
    assert choose_precision(task, None) is None and task.context.precision == given


def wrong_loss(losses):
    return {name: 1.1 * value for name, value in losses.items()}


def wrong_gradient(losses):
    return {name: value.detach() + 3 * (value - value.detach()) for name, value in losses.items()}


def nothing(losses):
    return {name: value * torch.nan for name, value in losses.items()}


def fail(losses):
    raise RuntimeError("no kernel for\nbf16")


@pytest.mark.parametrize(
    ("plant", "reason"),
    [
        (wrong_loss, "under bf16 the loss has a relative error of 1.0e-01"),
        (wrong_gradient, "under bf16 the gradient has a relative error of "),
        (nothing, "under bf16 the loss has a relative error of nan"),
        (fail, "RuntimeError: no kernel for"),
    ],
)
def test_what_is_wrong_under_bf16_is_refused(plant, reason, world, monkeypatch):
    def forward(self, *inputs):
        losses = honest_forward(self, *inputs)
        weight = next(p for p in self.parameters() if p.ndim > 1)
        return plant(losses) if weight.dtype == torch.bfloat16 else losses

    monkeypatch.setattr(MSPM, "forward", forward)
    choice = choose_precision(build(world), None)
    assert choice.precision == "fp32" and choice.reason.startswith(reason)


def test_a_small_matrix_with_a_wrong_gradient_is_found(world):
    """It hardly changes the gradient as a whole."""
    task = build(world)
    trained = [(name, p) for name, p in task.module.named_parameters() if p.requires_grad]
    exact = [torch.tensor(1.0), *(torch.ones_like(p) for _, p in trained)]
    row = min((p.numel(), row) for row, (_, p) in enumerate(trained, 1) if p.ndim > 1)[1]
    rounded = [found.bfloat16() for found in exact]
    assert precision._wrong(task, exact, rounded) == ""
    rounded[row] *= -1
    found = precision._wrong(task, exact, rounded)
    assert found.startswith(f"under bf16 the gradient of {trained[row - 1][0]} has")


def test_ranks_agree(two_ranks):
    one, other = two_ranks.run(choose, 1)
    assert one == other == ("fp32", "this CPU has no instructions for bf16")
    one, other = two_ranks.run(choose, 2)
    assert one == other and one[0] == "bf16"


def test_a_resumed_run_keeps_its_precision(config_file, data, tmp_path, times, monkeypatch, capsys):
    monkeypatch.setattr(precision, "LEAST_PASSES", 1)

    def run(folder, steps, *, resume=False):
        given = overrides(train__precision="auto", train__steps=steps, optim__warmup_steps=2)
        config = load_config(config_file, [*given, *data, f"run.folder={tmp_path / folder}"])
        assert pretrain(config, resume=resume) == 0
        facts = json.loads((tmp_path / folder / "environment.json").read_text())
        return facts["precision"], capsys.readouterr().out

    times(10.0, 5.0)
    chosen, printed = run("whole", 8)
    assert chosen == "bf16"
    assert (
        "train.precision auto: bf16: a trial took 5 ms under bf16 and 10 ms under fp32" in printed
    )
    times(10.0, 5.0)
    run("parts", 4)
    times(5.0, 10.0)  # what a trial would find now
    chosen, printed = run("parts", 8, resume=True)
    assert chosen == "bf16" and "train.precision auto: bf16: as in the checkpoint" in printed
    whole, parts = (Checkpoints(tmp_path / n / "checkpoints", keep=3) for n in ("whole", "parts"))
    (weights, meta), (others, _) = (c.load(c.latest()) for c in (whole, parts))
    assert meta["precision"] == "bf16" and devices.same(weights, others)
    assert lines(tmp_path / "parts", "train") == lines(tmp_path / "whole", "train")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # another machine
    assert run("parts", 9, resume=True)[0] == "fp32"
