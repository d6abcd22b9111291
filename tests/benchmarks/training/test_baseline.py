"""The published step, written anew: the same losses and gradients as ours on the same masks."""

import random

import pytest
import torch
from golden_model import (
    DTYPES,
    KINDS,
    NOISE,
    PATCHES,
    config,
    golden,
    gradients,
    joint_loss,
    pretraining_case,
    relative,
)

from ssast.benchmarks.training.baseline import (
    Baseline,
    ClassifierBaseline,
    draw_published_mask,
    published_optimizer,
    train_step,
)
from ssast.engine.api import published_name
from ssast.engine.checkpoints.classifier import build_classifier
from ssast.engine.config import from_plain
from ssast.engine.model.classifier import LossClassifier

both = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.mark.parametrize("kind", KINDS)
@both
def test_equals_two_of_our_passes(kind: str, dtype: torch.dtype) -> None:
    ours, fbank, _ = pretraining_case(kind, dtype, two_pass=True)
    settings = config(kind)
    theirs = Baseline(settings, ours)
    masks = ours.draw_masks(torch.tensor([5, 6]), torch.tensor([1, 1]))
    want = theirs.losses(fbank, *(m.mask_ids for m in masks))
    got = joint_loss(ours, fbank, *masks)
    for name, value in want.items():
        assert got[name].item() == pytest.approx(value.item(), rel=relative(dtype, 5e-6)), name
    want["loss"].backward()
    got["loss"].backward()
    published = dict(theirs.named_parameters())
    for name, gradient in gradients(ours).items():
        if name not in NOISE:
            expected = published[name].grad
            assert expected is not None
            error, largest = (gradient - expected).abs().max(), expected.abs().max()
            assert error < relative(dtype, 5e-5) * largest, name


def test_equals_the_published_numbers() -> None:
    ours, fbank, masks = pretraining_case("patch", torch.float64)
    expected = golden("patch")["expected"]
    theirs = Baseline(config("patch"), ours)
    losses = theirs.losses(fbank, masks.mask_ids, masks.mask_ids)
    for name, key in (("infonce_loss", "nce"), ("mse_loss", "mse")):
        assert losses[name].item() == pytest.approx(expected[key].item(), rel=1e-10)
    assert losses["pretext_accuracy"].item() == pytest.approx(expected["acc"].item())


def test_a_step_lowers_the_loss() -> None:
    ours, fbank, _ = pretraining_case("patch", torch.float32)
    model = Baseline(config("patch"), ours)
    assert {published_name(n) for n, _ in ours.named_parameters()} == {
        n for n, _ in model.named_parameters()
    }
    random.seed(0)
    optimizer = published_optimizer(model, lr=1e-3)
    losses = [train_step(model, optimizer, fbank)["loss"].item() for _ in range(5)]
    assert losses[-1] < losses[0]


def test_masks_obey_the_published_rules() -> None:
    random.seed(0)
    masks = [draw_published_mask(8, 64, 400) for _ in range(50)]
    for ids in masks:
        assert len(set(ids)) == len(ids) == 400 and ids == sorted(ids)
        assert ids[0] > 0 and ids[-1] < 511
    low = sum(i < 64 for ids in masks for i in ids) / (50 * 64)
    assert low == pytest.approx(0.41, abs=0.08)


@pytest.mark.parametrize("kind", KINDS)
def test_the_classifier_equals_ours(kind: str) -> None:
    """Loss and gradients, with overlapping patches."""
    case = golden(kind)["finetune"][0]
    plain = {
        "model": {"size": "tiny", "depth": 2, "patch": list(PATCHES[kind])},
        "audio": {"num_frames": case["input_tdim"], "mean": 0.0, "std": 0.5},
        "finetune": {"stride": [case["fstride"], case["tstride"]], "loss": "bce"},
    }
    settings = from_plain(plain)
    ours = build_classifier(settings, case["label_dim"], LossClassifier).double()
    ours.loss = "bce"
    theirs = ClassifierBaseline(settings, ours).double()
    x = case["input"].double()
    targets = torch.eye(case["label_dim"], dtype=torch.float64)[: len(x)]
    mine = ours(x, targets)
    loss = theirs.losses(x, targets)["loss"]
    # Ours gives logits, and with them the loss, in float32.
    assert mine["loss"].mean().item() == pytest.approx(loss.item(), rel=1e-6)
    mine["loss"].mean().backward()
    loss.backward()
    published = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            expected = published[published_name(name)].grad
            assert expected is not None and parameter.grad is not None
            error, largest = (parameter.grad - expected).abs().max(), expected.abs().max()
            assert error < 1e-5 * largest + 1e-12, name
