"""The moving average of the weights: against float64, sharded, evaluated with, begun, dropped."""

import pytest
import rank_jobs
import torch
from torch import nn
from toy import DECAY, build_engine, build_toy, clips, train

from ssast.engine.errors import Stopped
from ssast.engine.parallel.sharded_state import KINDS

SKIPPED = 2  # step whose gradient is not finite
ONE_RANK = [(1, "fp32", 2, "none"), (2, "bf16", 1, "none"), (3, "bf16", 2, "cpu")]
TWO_RANKS = [(1, "bf16", 1, "cpu"), (2, "fp32", 1, "none"), (3, "fp32", 1, "none")]


def check(result):
    """The average against a plain one in float64, and the pass with it against a plain module's."""
    history = result["history"]
    trained = [n.removeprefix("exp_avg/") for n in history[0] if n.startswith("exp_avg/")]
    assert {n for n in history[0] if n.startswith("ema/")} == {f"ema/{name}" for name in trained}
    for name in trained:
        average, taken = history[0][f"weight/{name}"].double(), 0
        for step, state in enumerate(history[1:]):
            if step != SKIPPED:
                decay = min(0.3, (1 + taken) / (10 + taken))
                average = decay * average + (1 - decay) * state[f"weight/{name}"].double()
                taken += 1
            found = state[f"ema/{name}"].double()
            torch.testing.assert_close(found, average, rtol=1e-5, atol=1e-7)
            assert not torch.equal(state[f"ema/{name}"], state[f"weight/{name}"])
    check_copies(result["copies"], history, result["part"])
    module, weights = build_toy(), history[-1]
    for name, param in module.named_parameters():
        param.data = weights.get(f"ema/{name}", weights[f"weight/{name}"])
    return module(clips(0)[0])["logits"]


def check_copies(copies, history, part):
    """After each step and a load a copy has the rounded averages, and the rest as it is."""
    states = [*history, history[-1]]
    for number, (copy, state) in enumerate(zip(copies, states, strict=True)):
        for name, value in copy.items():
            known = [f"{kind}/{name}" for kind in ("ema", "weight", "buffer")]
            expected = next((state[key] for key in known if key in state), torch.tensor(0.5))
            if name == "seen" and number == SKIPPED + 1:  # counts every pass
                expected = states[SKIPPED]["buffer/seen"]
            assert torch.equal(value, expected.to(value.dtype)), (number, name)
    assert all(torch.equal(value, copies[-1][f"blocks.{name}"]) for name, value in part.items())
    assert not torch.equal(copies[1]["head.bias"], copies[2]["head.bias"])


@pytest.mark.parametrize(("stage", "precision", "accumulate", "offload"), ONE_RANK)
def test_one_rank_averages_as_float64_does(device, world, stage, precision, accumulate, offload):
    result = rank_jobs.averages(world, stage, precision, accumulate, offload)
    check_pass(result, check(result), precision)


@pytest.mark.parametrize(("stage", "precision", "accumulate", "offload"), TWO_RANKS)
def test_two_ranks_average_as_float64_does(
    device, two_ranks, stage, precision, accumulate, offload
):
    main, other = two_ranks.run(rank_jobs.averages, stage, precision, accumulate, offload)
    expected = check(main)
    for result in (main, other):
        check_pass(result, expected, precision)
    for mine, theirs in zip(main["copies"], other["copies"], strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def check_pass(result, expected, precision):
    """The module had the averages inside alone; the training is the same with them and without."""
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if precision == "fp32" else {"rtol": 0.1, "atol": 0.03}
    torch.testing.assert_close(result["outputs"], expected, **tolerance)
    assert result["module"] and result["changed"] == [] and result["in_place"]
    found, expected = result["losses"]
    assert found == expected


@pytest.mark.parametrize("stage", [1, 3])
def test_averages_begin_from_the_weights_of_a_state_without(device, world, stage):
    engine = build_engine(world, stage=stage)
    train(engine, range(2))
    without = engine.state()
    engine.close()
    engine = build_engine(world, stage=stage, averages=True, seed=5)
    train(engine, range(1))
    assert engine.load_state(*without) is False
    state, _ = engine.state()
    for name in without[0]:
        assert torch.equal(state[name], without[0][name]), name
        if name.startswith("exp_avg/"):
            name = name.removeprefix("exp_avg/")
            assert torch.equal(state[f"ema/{name}"], state[f"weight/{name}"]), name
    train(engine, range(2, 3))
    after, _ = engine.state()
    engine.close()
    expected = torch.lerp(state["ema/head.bias"], after["weight/head.bias"], 1 - DECAY(2))
    torch.testing.assert_close(after["ema/head.bias"], expected)


def test_averages_that_are_not_kept_are_left_out(device, world):
    engine = build_engine(world, averages=True)
    train(engine, range(2))
    state = engine.state()
    expected = train(engine, range(2, 4))
    engine.close()
    engine = build_engine(world, seed=5)
    assert engine.load_state(*state) is True
    assert {name.partition("/")[0] for name in engine.state()[0]} == {*KINDS, "buffer"}
    assert train(engine, range(2, 4)) == expected
    for use in (engine.averaged, lambda: engine.average_into(build_toy(), "")):
        with pytest.raises(RuntimeError, match="no average of the weights is kept"):
            use()
    engine.close()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(13, 4), r"head.weight: expected shape \(3, 13\), found \(4, 13\)"),
        (nn.Sequential(nn.Linear(13, 3)), r"head.0.weight: expected shape None, found"),
    ],
)
def test_a_module_of_another_form_is_no_copy(world, module, message):
    engine = build_engine(world, averages=True)
    with pytest.raises(ValueError, match=message):
        engine.average_into(module, "head.")
    engine.close()


@pytest.mark.parametrize("stage", [2, 3])
def test_the_state_is_right_after_an_error_in_an_evaluation(device, world, stage):
    engine = build_engine(world, stage=stage, averages=True)
    train(engine, range(2))
    before, _ = engine.state()
    with pytest.raises(Stopped), engine.averaged():
        raise Stopped("a validation was abandoned")
    after, _ = engine.state()
    engine.close()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_averages_are_updated_in_one_operation(world, monkeypatch):
    calls, honest = [], torch._foreach_lerp_

    def lerp(averages, weights, weight):
        calls.append((len(averages), weight))
        honest(averages, weights, weight)

    monkeypatch.setattr(torch, "_foreach_lerp_", lerp)
    engine = build_engine(world, averages=True, accumulate=2)
    train(engine, range(2))
    engine.close()
    assert calls == [(2, 1 - DECAY(0)), (2, 1 - DECAY(1))]  # the groups of the optimizer
