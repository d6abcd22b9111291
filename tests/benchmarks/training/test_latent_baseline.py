"""The published step of latent targets, written anew: our losses, gradients and averages."""

import pytest
import torch
from torch import Tensor

from ssast.benchmarks.training.latent_baseline import (
    LatentBaseline,
    draw_latent_masks,
    latent_step,
    own_masks,
)
from ssast.benchmarks.training.ours import OurStep
from ssast.benchmarks.training.setting import Setting
from ssast.engine.model.latent import Latent

SETTING = Setting("tiny", 2, 80, 1, False, objective="latent")


def both(dtype: torch.dtype) -> tuple[Latent, LatentBaseline, Tensor]:
    """Our model, whose teacher has moved away, the published model, and filterbanks."""
    torch.manual_seed(0)
    config, fbank = SETTING.config(), SETTING.fbank()
    ours = OurStep(config, fbank).task.module.to(dtype)
    assert isinstance(ours, Latent) and ours.teacher is not None
    for parameter in ours.teacher.to(dtype).parameters():
        parameter.mul_(1.2)
    return ours, LatentBaseline(config, ours), fbank.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_losses_and_gradients_equal_ours(dtype: torch.dtype) -> None:
    ours, theirs, fbank = both(dtype)
    masks, rows = ours.draw_masks(torch.tensor([5, 6]), torch.tensor([1, 1]))
    losses = ours.mean_losses(ours(fbank, masks, rows), torch.ones(2, dtype=torch.bool))
    losses["loss"].backward()
    x = ours.encoder.embed.normalise(fbank)
    wanted = theirs.losses(x, *own_masks(ours, masks, rows))
    wanted["loss"].backward()
    for name in ("loss", "latent_loss", "cls_loss"):
        assert losses[name].item() == pytest.approx(wanted[name].item(), rel=1e-5), name
    # Of all clones there, weighed by their masked patches; here of the first ones.
    for name in ("target_std", "prediction_std"):
        assert losses[name].item() == pytest.approx(wanted[name].item(), rel=0.1), name
    gradients = {
        name.replace("embed.cls_token", "cls_token"): p.grad
        for name, p in ours.named_parameters()
        if p.grad is not None
    }
    published = dict(theirs.named_parameters())
    trained = {n for n, p in published.items() if not n.startswith("teacher.")}
    assert set(gradients) == trained
    largest = max(g.abs().max().item() for g in gradients.values())
    for name, gradient in gradients.items():
        expected = published[name].grad
        assert expected is not None
        assert (gradient - expected).abs().max() < 1e-5 * largest, name


def test_masks_leave_as_many_patches_visible_as_published() -> None:
    torch.manual_seed(0)
    masks = draw_latent_masks(8, 64, 102, 64)
    assert masks.shape == (64, 512) and set(masks.unique().tolist()) == {0.0, 1.0}
    assert masks.sum(1).tolist() == [410] * 64
    assert len({tuple(row.tolist()) for row in masks}) == 64
    # Blocks: beside a visible patch, most are visible, where one in five is.
    visible = 1 - masks.view(64, 8, 64)
    beside = (visible[..., 1:] * visible[..., :-1]).sum() / visible[..., 1:].sum()
    assert beside > 0.6
    assert draw_latent_masks(1, 9, 3, 4).sum(1).tolist() == [6] * 4  # no block fits in


def test_a_step_lowers_the_loss_and_averages_the_weights() -> None:
    ours, model, fbank = both(torch.float32)
    x = ours.encoder.embed.normalise(fbank)
    optimizer = model.optimizer(SETTING.config().optim)
    before = model.teacher.cls_token.clone()
    losses = [latent_step(model, optimizer, x)["loss"].item()]
    expected = 0.9998 * before + 0.0002 * model.encoder.cls_token
    torch.testing.assert_close(model.teacher.cls_token.data, expected, rtol=0, atol=1e-7)
    assert not torch.equal(model.teacher.cls_token, before) and model.steps == 1
    losses += [latent_step(model, optimizer, x)["loss"].item() for _ in range(4)]
    assert losses[-1] < losses[0]
