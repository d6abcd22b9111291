"""The gradient of a step is that of the mean over its valid clips, wherever the others are."""

import math
from pathlib import Path

import pytest
import torch
from runs import lines, overrides
from sounds import write_clips
from toy_task import expected_gradient, one_step

from ssast.engine.config import load_config
from ssast.engine.data.clips import find_clips
from ssast.engine.pretrain import pretrain
from ssast.pipelines.clips.order import permutation

# Ranks take the clips in turn: of 2 ranks and 2 micro-batches, 0 2 | 4 6 and 1 3 | 5 7.
BROKEN = {
    "none": (),
    "one": (2,),
    "three": (0, 3, 6),
    "one micro-batch": (1, 3),
    "one rank": (1, 3, 5, 7),
    "the last micro-batches": (4, 5, 6, 7),
    "all but one": (0, 1, 2, 3, 4, 6, 7),
}


def check(found, broken, rel):
    expected, loss = expected_gradient(broken)
    assert found["updated"] and found["adam_step"] == 1
    whole = torch.cat([g.flatten() for g in expected.values()])
    ours = torch.cat([found["gradient"][name].flatten() for name in expected]).double()
    assert (ours - whole).norm() / whole.norm() < rel
    assert found["norm"] == pytest.approx(whole.norm().item(), rel=rel)
    return loss


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_two_ranks_with_two_micro_batches_are_one_batch(two_ranks, stage, broken):
    main, other = two_ranks.run(one_step, stage, "fp32", 2, broken)
    loss = check(main, broken, 1e-6)
    # What is logged are means over the valid clips of each micro-batch.
    parts = main["losses"] + other["losses"]
    count = sum(number for _, number in parts)
    assert count == 8 - len(broken)
    assert sum(mean * number for mean, number in parts) / count == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_one_rank_accumulates_to_one_batch(world, accumulate, offload):
    check(one_step(world, 2, "fp32", accumulate, (0, 3, 6), offload=offload), (0, 3, 6), 1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_is_as_close_as_its_rounding(two_ranks, stage):
    main, _ = two_ranks.run(one_step, stage, "bf16", 2, (1, 3, 4))
    check(main, (1, 3, 4), 2e-2)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_whole_gradient_is_clipped(two_ranks, stage):
    broken = (0, 1, 2, 3, 4, 6)
    whole, _ = expected_gradient(broken)
    norm = torch.cat([g.flatten() for g in whole.values()]).norm().item()
    # Between the gradient and what is accumulated of it, a quarter: clipped, but not twice.
    main, _ = two_ranks.run(one_step, stage, "fp32", 2, broken, norm / 2)
    assert main["norm"] == pytest.approx(norm, rel=1e-6)
    for name, gradient in whole.items():
        found = main["gradient"][name].double()
        torch.testing.assert_close(found, gradient / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_without_a_valid_clip_is_skipped(two_ranks, stage, precision):
    for result in two_ranks.run(one_step, stage, precision, 2, range(8)):
        assert not result["updated"] and result["adam_step"] == 0
        assert result["changed"] == [] and math.isinf(result["norm"])


def test_a_run_says_which_steps_have_no_valid_clip(config_file, data, tmp_path, capsys):
    settings = overrides(train__steps=3, data__max_rejected=1.0)
    folder, run = tmp_path / "train", tmp_path / "run"
    folder.mkdir()
    write_clips(folder, 8, samples=9000)
    paths = [data[1], f"data.train={folder}", f"run.folder={run}"]
    config = load_config(config_file, [*settings, *paths])
    clips, _ = find_clips(config)
    for row in permutation(config.train.seed, 0, 8)[4:]:  # those of the second step of four
        Path(clips[int(row)]).write_bytes(b"no sound")
    assert pretrain(config) == 0
    printed = capsys.readouterr().out
    assert printed.count("it has no valid clip") == 1
    assert "step 2 is skipped: it has no valid clip" in printed
    assert [line["skipped_steps"] for line in lines(run, "train")] == [0, 1, 0]
    assert not (run / "skipped.jsonl").exists()  # no clip of it is to blame
