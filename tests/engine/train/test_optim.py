import math

import pytest
import torch
from torch import nn

from ssast.engine.config import from_plain
from ssast.engine.model.objective import MSPM
from ssast.engine.settings import Optim
from ssast.engine.train.optim import Plateau, build_optimizer, learning_rate


def test_warm_up_reaches_the_peak_at_its_end():
    optim = Optim(lr=1e-3, warmup_steps=10, schedule="constant")
    rates = [learning_rate(step, optim, steps=100) for step in range(20)]
    assert rates[:10] == pytest.approx([1e-4 * (k + 1) for k in range(10)])
    assert rates[10:] == [1e-3] * 10
    assert learning_rate(0, Optim(lr=1e-3, warmup_steps=0, schedule="constant"), steps=1) == 1e-3


def test_cosine_ends_at_the_lowest_rate():
    optim = Optim(lr=1e-3, warmup_steps=10, schedule="cosine", min_lr=1e-5)
    assert learning_rate(10, optim, steps=110) == 1e-3
    assert learning_rate(60, optim, steps=110) == pytest.approx((1e-3 + 1e-5) / 2)
    assert learning_rate(110, optim, steps=110) == pytest.approx(1e-5)
    assert learning_rate(500, optim, steps=110) == pytest.approx(1e-5)


def test_only_the_plateau_schedule_is_scaled():
    for schedule, rate in (("plateau", 5e-4), ("constant", 1e-3)):
        optim = Optim(lr=1e-3, warmup_steps=0, schedule=schedule)
        assert learning_rate(3, optim, steps=9, plateau_scale=0.5) == rate


@pytest.mark.parametrize("seed", range(5))
def test_the_plateau_rule_is_that_of_torch(seed):
    optim = Optim(lr=1.0, plateau_factor=0.5, plateau_patience=2)
    torch_optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        torch_optimizer, mode="max", factor=0.5, patience=2
    )
    ours = Plateau()
    generator = torch.Generator().manual_seed(seed)
    for step in range(60):
        score = float(1 - math.exp(-step / 9) + 0.05 * torch.randn((), generator=generator))
        ours.update(score, optim)
        theirs.step(score)
        assert ours.scale == torch_optimizer.param_groups[0]["lr"]
    assert ours.scale < 1


def test_a_score_below_zero_can_be_the_best():
    plateau = Plateau()
    for score in (-5.0, -4.0, -3.0, -2.0, -1.0):
        plateau.update(score, Optim(plateau_patience=0))
    assert (plateau.best, plateau.scale) == (-1.0, 1.0)


def tiny(**sections):
    return MSPM(
        from_plain(
            {
                "model": {"size": "tiny", "depth": 1},
                "audio": {"num_frames": 64},
                "objective": {"num_masked": 10, **sections.pop("objective", {})},
                **sections,
            }
        )
    )


def test_adam_is_one_group_with_l2():
    model = tiny()
    optimizer = build_optimizer(model, Optim())
    assert type(optimizer) is torch.optim.Adam
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 5e-7
    assert group["betas"] == (0.95, 0.999)
    assert len(group["params"]) == len(list(model.parameters()))


def test_adamw_decays_matrices_only():
    model = tiny()
    decayed, kept = build_optimizer(model, Optim(name="adamw", weight_decay=0.1)).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 1)[-1] for p in decayed["params"]} == {"weight"}
    assert "encoder.embed.pos_embed" in {names[id(p)] for p in kept["params"]}
    assert "encoder.norm.weight" in {names[id(p)] for p in kept["params"]}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_a_head_that_is_not_trained_is_left_out():
    model = tiny(objective={"kind": "generative"})
    given = {id(p) for g in build_optimizer(model, Optim()).param_groups for p in g["params"]}
    assert not given & {id(p) for p in model.discriminative_head.parameters()}
    assert given >= {id(p) for p in model.generative_head.parameters()}
