"""Training, skipping, saving and resuming over one and two ranks."""

import math

import pytest
import rank_jobs
import torch
from rank_pool import RankPool
from torch import nn
from toy import build_adam, build_engine, build_toy, clips, loss_of, lr_at, train

from ssast.engine.parallel.deepspeed_engine import TrainEngine, deepspeed_config
from ssast.engine.parallel.sharded_state import KINDS

STAGES = [1, 2, 3]
PRECISIONS = ["fp32", "bf16"]


def plain_training(steps: int, clip: float | None) -> tuple[list[float], list[float], nn.Module]:
    """Losses, gradient norms and the module of the same training in torch alone."""
    module = build_toy()
    adam = build_adam(module)
    losses, norms = [], []
    for step in range(steps):
        x, y = clips(step)
        for group in adam.param_groups:
            group["lr"] = lr_at(step)
        loss = loss_of(module(x), y)
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(module.parameters(), clip or math.inf).item())
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    return losses, norms, module


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_one_rank_trains_like_torch(device, world, stage, clip):
    expected, norms, module = plain_training(5, clip)
    engine = build_engine(world, stage=stage, clip=clip)
    losses = train(engine, range(5))
    state, adam_step = engine.state()
    rounding = 1 if device.type == "cpu" else 100  # of a GPU against a CPU
    assert float(engine.grad_norm) == pytest.approx(norms[-1], rel=1e-5 * rounding)
    engine.close()
    # Not to the last bit: the vector units take a flat buffer in other pieces than its parameters.
    assert losses == pytest.approx(expected, rel=1e-6 * rounding)
    assert adam_step == 5
    for name, param in module.named_parameters():
        torch.testing.assert_close(
            state[f"weight/{name}"], param.detach(), rtol=1e-5 * rounding, atol=1e-6 * rounding
        )


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_accumulated_micro_batches_are_one_batch(device, world, stage, precision):
    losses = []
    for accumulate in (1, 4):
        engine = build_engine(world, stage=stage, precision=precision, accumulate=accumulate)
        losses.append(train(engine, range(4)))
        assert engine.skipped_steps == 0
        engine.close()
    rel = 1e-5 if precision == "fp32" else 2e-2
    assert losses[1] == pytest.approx(losses[0], rel=rel)


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("stage", STAGES)
def test_bf16_sums_the_gradients_of_many_micro_batches_in_fp32(device, world, stage, offload):
    """In bf16 the sum stops growing: at 512 micro-batches its norm is 17 % too small."""
    exact = rank_jobs.accumulated(world, 1, "fp32", 512)
    found = rank_jobs.accumulated(world, stage, "bf16", 512, offload)
    assert (found - exact).norm() / exact.norm() < 0.015
    assert abs(found.norm() / exact.norm() - 1) < 0.005


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_sum_micro_batches_in_fp32(device, two_ranks, stage):
    exact, _ = two_ranks.run(rank_jobs.accumulated, 1, "fp32", 256)
    found, _ = two_ranks.run(rank_jobs.accumulated, stage, "bf16", 256)
    assert (found - exact).norm() / exact.norm() < 0.015


def test_step_says_when_the_weights_change(device, world):
    engine = build_engine(world, accumulate=2, clip=None)
    x, y = (t.to(device) for t in clips(0))
    for expected in (False, True, False, True):
        engine.backward(loss_of(engine(x[:4]), y[:4]))
        assert engine.step(0.1) is expected
        if not expected:
            with pytest.raises(RuntimeError, match="between optimizer steps"):
                engine.state()
            with pytest.raises(RuntimeError, match="between optimizer steps"):
                engine.load_state({}, 0)
    engine.close()


def test_the_learning_rate_reaches_every_group(device, world):
    engine = build_engine(world)
    before, _ = engine.state()
    x, y = (t.to(device) for t in clips(0))
    engine.backward(loss_of(engine(x), y))
    engine.step(0.0)
    after, _ = engine.state()
    engine.close()
    for name in before:
        if name.startswith("weight/"):
            assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_starts_from_the_exact_weights(device, world, stage):
    module = build_toy()
    expected = {name: p.detach().clone() for name, p in module.named_parameters()}
    engine = build_engine(world, stage=stage, precision="bf16")
    state, adam_step = engine.state()
    assert adam_step == 0
    assert engine.module.scale.dtype == torch.float32
    outputs = engine(clips(0)[0].to(device))
    assert torch.isfinite(outputs["logits"]).all()
    engine.close()
    for name, value in expected.items():
        if not name.startswith("frozen"):
            assert torch.equal(state[f"weight/{name}"], value), name
            assert not state[f"exp_avg/{name}"].any()
    torch.testing.assert_close(
        state["weight/frozen.weight"], expected["frozen.weight"], rtol=0, atol=2**-9
    )


@pytest.mark.parametrize("stage", STAGES)
def test_state_holds_everything_once(device, world, stage):
    engine = build_engine(world, stage=stage)
    train(engine, range(2))
    state, _ = engine.state()
    module = build_toy()
    expected = {f"{kind}/{n}" for n, p in module.named_parameters() for kind in KINDS}
    expected -= {f"{k}/frozen.{n}" for k in KINDS[1:] for n in ("weight", "bias")}
    assert set(state) == expected | {"buffer/seen"}
    assert state["buffer/seen"].item() == 2
    assert all(t.device.type == "cpu" and t.is_contiguous() for t in state.values())
    for name, param in module.named_parameters():
        assert state[f"weight/{name}"].shape == param.shape
    copy = {name: tensor.clone() for name, tensor in state.items()}
    train(engine, range(2, 3))
    assert all(torch.equal(state[name], copy[name]) for name in state), "state is a view"
    engine.close()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_resumes_bit_for_bit(device, world, tmp_path, stage, precision):
    check_resumed(rank_jobs.resume(world, stage, precision, tmp_path))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_resume_bit_for_bit(device, two_ranks, tmp_path, stage, precision):
    main, other = two_ranks.run(rank_jobs.resume, stage, precision, tmp_path)
    check_resumed(main)
    assert other["losses"] == main["losses"]
    assert other["tensors"] == 0


@pytest.mark.parametrize("stage", STAGES)
def test_offloading_changes_no_number(device, world, tmp_path, stage):
    result = rank_jobs.resume(world, stage, "fp32", tmp_path / "one", offload="cpu")
    check_resumed(result)
    plain = rank_jobs.resume(world, stage, "fp32", tmp_path / "plain")
    # The weights are views of other buffers: BLAS may round by where these begin.
    ours, theirs = (torch.tensor(found["losses"]) for found in (result, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-6 if device.type == "cpu" else 1e-4, atol=0)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_resume_with_offloading(device, two_ranks, tmp_path, stage):
    main, _ = two_ranks.run(rank_jobs.resume, stage, "bf16", tmp_path / "two", "cpu")
    check_resumed(main)


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_travel_in_the_type_that_is_asked_for(two_ranks, tmp_path, stage):
    losses = {}
    for dtype in ("auto", "fp32", "bf16"):
        result, _ = two_ranks.run(rank_jobs.resume, stage, "fp32", tmp_path / dtype, "none", dtype)
        check_resumed(result)
        losses[dtype] = result["losses"]
    assert losses["auto"] == losses["fp32"] != losses["bf16"]
    assert losses["bf16"][1] == pytest.approx(losses["fp32"][1], rel=1e-3)


def check_resumed(result):
    first, second, again = result["losses"]
    assert first[1] < first[0]
    assert again == second
    assert result["differ"] == []
    assert result["tensors"] > 20
    assert result["adam_step"] == 4


@pytest.mark.parametrize("stages", [(1, 1), (3, 2), (2, 3), (3, 3)], ids=str)
def test_resume_on_another_number_of_ranks_and_stage(world, two_ranks, tmp_path, stages):
    expected = rank_jobs.train_from(world, tmp_path / "whole", 0, 6, 1, "fp32")
    folder = tmp_path / "changing"
    losses = rank_jobs.train_from(world, folder, 0, 2, stages[0], "fp32")
    losses += two_ranks.run(rank_jobs.train_from, folder, 2, 4, stages[1], "fp32")[0]
    losses += rank_jobs.train_from(world, folder, 4, 6, stages[0], "fp32")
    assert losses == pytest.approx(expected, rel=2e-6)


@pytest.mark.slow
def test_four_ranks_train_as_one_and_go_on_where_two_have_stopped(world, two_ranks, tmp_path):
    expected = rank_jobs.train_from(world, tmp_path / "whole", 0, 6, 1, "fp32")
    four_ranks = RankPool(4)
    try:
        for stage in STAGES:
            losses = four_ranks.run(
                rank_jobs.train_from, tmp_path / f"{stage}", 0, 6, stage, "fp32"
            )
            assert losses[0] == pytest.approx(expected, rel=2e-6)
        for first, second, third in ((1, 3, 2), (3, 1, 3), (2, 2, 1)):
            folder = tmp_path / f"{first}{second}{third}"
            losses = two_ranks.run(rank_jobs.train_from, folder, 0, 2, first, "fp32")[0]
            losses += four_ranks.run(rank_jobs.train_from, folder, 2, 4, second, "fp32")[0]
            losses += rank_jobs.train_from(world, folder, 4, 6, third, "fp32")
            assert losses == pytest.approx(expected, rel=2e-6)
    finally:
        four_ranks.close()


@pytest.mark.parametrize(("ranks", "stage"), [(1, 3), (2, 1), (2, 2), (2, 3)])
def test_a_load_changes_no_bit_on_any_stage_and_number_of_ranks(
    world, two_ranks, tmp_path, ranks, stage
):
    rank_jobs.train_from(world, tmp_path, 0, 3, 1, "fp32")
    before, _ = rank_jobs.Checkpoints.load(tmp_path / "step000000003")
    if ranks == 1:
        rank_jobs.train_from(world, tmp_path, 3, 3, stage, "bf16")
    else:
        two_ranks.run(rank_jobs.train_from, tmp_path, 3, 3, stage, "bf16")
    after, meta = rank_jobs.Checkpoints.load(tmp_path / "step000000003")
    assert meta["adam_step"] == 3
    for name in before:
        if "frozen" not in name:  # has no master weight: bf16 rounds it
            assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_all(
    device, two_ranks, stage, precision
):
    for result in two_ranks.run(rank_jobs.skip, stage, precision, 2):
        assert result["changed"] == []
        assert result["adam_step"] == 1
        assert result["skipped"] == 1
        assert math.isinf(result["norms"][0]) and math.isfinite(result["norms"][1])
        assert result["finite"]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_state_that_does_not_fit_is_refused_on_every_rank(two_ranks, stage):
    main, other = two_ranks.run(rank_jobs.load_misfit, stage)
    assert main == other
    assert [error.removeprefix("checkpoint does not fit the model: ") for error in main] == [
        "missing: exp_avg/head.bias (1 in all)",
        "unknown: weight/extra (1 in all)",
        "weight/norm.bias has shape [3], expected [13]",
    ]


def test_a_full_disk_stops_every_rank_with_the_same_words(two_ranks, tmp_path):
    main, other = two_ranks.run(rank_jobs.save_without_space, tmp_path)
    assert main == other
    assert main[0].startswith(f"cannot write checkpoint {tmp_path}/step000000002: ")
    assert main[1] == "step000000001"
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_every_group_has_the_time_limit_of_the_run(two_ranks):
    for timeouts in two_ranks.run(rank_jobs.group_timeouts):
        assert set(timeouts) == {60.0}
        assert len(timeouts) > 1


def test_nothing_is_printed(two_ranks):
    two_ranks.run(rank_jobs.group_timeouts)
    assert two_ranks.printed() == ""


def test_close_leaves_torch_as_it_was(world):
    linear = nn.functional.linear
    engine = build_engine(world, stage=3)
    engine.close()
    assert nn.functional.linear is linear


@pytest.mark.parametrize("fused", [True, False])
def test_either_form_of_adam_resumes(device, world, fused):
    engine = build_engine(world, fused=fused)
    train(engine, range(2))
    state = engine.state()
    expected = train(engine, range(2, 4))
    engine.close()
    engine = build_engine(world, fused=not fused, seed=5)
    engine.load_state(*state)
    assert train(engine, range(2, 4)) == pytest.approx(expected, rel=1e-5)
    engine.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_stage": 0}, "zero_stage: expected 1, 2 or 3, found 0"),
        ({"precision": "fp16"}, "precision: expected fp32 or bf16, found 'fp16'"),
        ({"optimizer": lambda m: torch.optim.SGD(m.parameters(), lr=1)}, "found SGD"),
        ({"optimizer": lambda m: build_adam(m, amsgrad=True, fused=False)}, "amsgrad"),
        (
            {"optimizer": lambda m: torch.optim.Adam(m.head.parameters())},
            "expected the 10 trainable parameters of the module, each once; found 2, of which 2",
        ),
    ],
)
def test_what_is_not_offered_is_refused(world, change, message):
    module = build_toy()
    optimizer = change.pop("optimizer", build_adam)(module)
    with pytest.raises(ValueError, match=message):
        TrainEngine(module, optimizer, world=world, batch_size=1, **change)


@pytest.mark.parametrize("num_params", [1, 10**6, 87 * 10**6 + 1, 3 * 10**9])
@pytest.mark.parametrize("stage", STAGES)
def test_buckets_fit_the_model(num_params, stage):
    config = deepspeed_config(
        world_size=4,
        batch_size=3,
        accumulate=2,
        zero_stage=stage,
        precision="bf16",
        max_grad_norm=None,
        num_params=num_params,
        cuda=True,
    )
    assert config["train_batch_size"] == 24
    zero = config["zero_optimization"]
    assert zero["stage"] == stage and zero["overlap_comm"]
    assert zero["allgather_bucket_size"] % 2 == zero["reduce_bucket_size"] % 2 == 0
    assert zero["reduce_bucket_size"] <= 50_000_000
    assert config["gradient_clipping"] == 0.0
