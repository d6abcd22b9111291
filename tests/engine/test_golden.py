"""The model, its objective and its training against the numbers of the published code."""

import math

import pytest
import torch
from golden_model import (
    DTYPES,
    KINDS,
    NOISE,
    encoder_for,
    golden,
    gradients,
    joint_loss,
    pretraining_case,
    relative,
)

from ssast.engine.api import published_name
from ssast.engine.config import from_plain
from ssast.engine.model.classifier import Classifier, embed_clips
from ssast.engine.model.objective import MSPM, mean_losses
from ssast.kernels.matmul import fast_matmul
from ssast.kernels.patch_embed import take

OBJECTIVES = {"nce": "discriminative", "mse": "generative", "joint": "joint"}
OUTPUTS = (
    ("infonce_loss", "nce"),
    ("mse_loss", "mse"),
    ("pretext_accuracy", "acc"),
    ("loss", "joint"),
)
both = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True, params=[False, True], ids=["", "fast_matmul"])
def products(request):
    """PyTorch's own matrix products and attention; then those of a run on this CPU."""
    if not request.param:
        yield
        return
    with fast_matmul() as fast:
        if not fast:
            pytest.skip("PyTorch's own products are those of a run here")
        yield


@kinds
@both
def test_tokens_and_hidden_states(kind: str, dtype: torch.dtype) -> None:
    model, fbank, masks = pretraining_case(kind, dtype)
    expected = golden(kind)["expected"]
    tokens, *_ = model.encoder.embed(fbank, masks)
    hidden, _ = model.encoder(fbank, masks)
    # Stored as float32.
    exact = 3e-7 if dtype == torch.float64 else 1e-5
    assert (tokens - expected["tokens"]).abs().max() < exact
    assert (hidden - expected["hidden"]).abs().max() < exact * expected["hidden"].abs().max()


@kinds
@both
def test_losses(kind: str, dtype: torch.dtype) -> None:
    model, fbank, masks = pretraining_case(kind, dtype)
    expected, losses = golden(kind)["expected"], joint_loss(model, fbank, masks)
    for ours, theirs in OUTPUTS:
        want = pytest.approx(expected[theirs].item(), rel=relative(dtype, 5e-6))
        assert losses[ours].item() == want, ours


@kinds
@both
@pytest.mark.parametrize("loss", OBJECTIVES)
def test_gradients(kind: str, dtype: torch.dtype, loss: str) -> None:
    """Gradients of the three objectives, each with its own losses and heads."""
    model, fbank, masks = pretraining_case(kind, dtype, kind=OBJECTIVES[loss])
    expected = golden(kind)["expected"]
    losses = joint_loss(model, fbank, masks)
    assert losses["loss"].item() == pytest.approx(expected[loss].item(), rel=relative(dtype, 5e-6))
    assert set(losses) - {"loss"} == {
        "nce": {"infonce_loss", "pretext_accuracy", "pretext_chance"},
        "mse": {"mse_loss"},
        "joint": {"infonce_loss", "pretext_accuracy", "pretext_chance", "mse_loss"},
    }[loss]  # fmt: skip
    losses["loss"].backward()
    ours, norms = gradients(model), expected["grad_norms"][loss]
    trained = {published_name(n) for n, p in model.named_parameters() if p.requires_grad}
    assert set(norms) == set(ours) == trained
    for name, norm in norms.items():
        if name not in NOISE:
            want = pytest.approx(norm, rel=relative(dtype, 2e-5))
            assert ours[name].norm().item() == want, name


@kinds
@both
def test_whole_gradients_of_small_parameters(kind: str, dtype: torch.dtype) -> None:
    model, fbank, masks = pretraining_case(kind, dtype)
    joint_loss(model, fbank, masks)["loss"].backward()
    ours = gradients(model)
    for name, want in golden(kind)["expected"]["small_grads_joint"].items():
        if name in NOISE:
            continue
        error, largest = (ours[name] - want).abs(), want.abs().max()
        if name.endswith("qkv.bias"):
            third = len(want) // 3
            error[third : 2 * third] = 0  # the keys' share is rounding noise
        assert error.max() < relative(dtype, 5e-5) * largest, name


@kinds
@both
@pytest.mark.parametrize("fused", [False, True])
def test_five_steps_of_training(kind: str, dtype: torch.dtype, fused: bool) -> None:
    model, fbank, masks = pretraining_case(kind, dtype)
    trace = golden(kind)["expected"]["train_trace"]
    optimizer = torch.optim.Adam(
        model.parameters(),
        lr=trace["lr"],
        betas=tuple(trace["betas"]),
        eps=trace["eps"],
        weight_decay=trace["weight_decay_l2_in_grad"],
        fused=fused,
    )
    for want in trace["loss_nce_mse_acc"]:
        optimizer.zero_grad()
        losses = joint_loss(model, fbank, masks)
        got = [losses[name].item() for name in ("loss", "infonce_loss", "mse_loss")]
        *want, want_accuracy = want
        assert got == pytest.approx(want, rel=relative(dtype, 2e-3))  # Adam divides noise too
        # In float32 that may decide a near tie: one patch more or less is classified correctly.
        one_patch = 1 / masks.mask_ids.numel() if dtype == torch.float32 else 0.0
        assert losses["pretext_accuracy"].item() == pytest.approx(
            want_accuracy, abs=1e-9 + one_patch
        )
        losses["loss"].backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        norm = trace["param_norms_after"][published_name(name)]
        want = pytest.approx(norm, rel=relative(dtype, 2e-3))
        if published_name(name) not in NOISE:
            assert parameter.norm().item() == want, name
    error = (model.encoder.embed.mask_embed - trace["mask_embed_after"]).abs().max()
    assert error < relative(dtype, 2e-3)


@kinds
@pytest.mark.parametrize("number", [0, 1, 2])
@both
def test_fine_tuning(kind: str, number: int, dtype: torch.dtype) -> None:
    """Overlapping patches, positions cut or interpolated, both poolings, the classifier."""
    cases = golden(kind)["finetune"]
    if number >= len(cases):
        return
    case = cases[number]
    encoder = encoder_for(kind, case, dtype)
    assert list(encoder.embed.grid) == case["grid_f_t"]
    pos_embed = encoder.embed.pos_embed.double()
    want = case["pos_embed_checksum"]
    checksum = [pos_embed.sum().item(), pos_embed.abs().sum().item()]
    assert checksum == pytest.approx(want, abs=1e-9 * want[1])
    for pooling in ("avgtok", "cls"):
        classifier = Classifier(encoder, case["label_dim"], pooling).to(dtype)
        head = {name: value.to(dtype) for name, value in case["mlp_head"].items()}
        classifier.head.load_state_dict(head)
        logits, want = classifier(case["input"].to(dtype)), case[f"ft_{pooling}"]
        # The published code interpolated in float32, over eight equal rows in the frame model.
        exact = 1e-8 if encoder.embed.grid == (1, 150) else 1e-10
        tolerance = exact if dtype == torch.float64 else 2e-5
        assert (logits - want).abs().max() < tolerance * want.abs().max()
        vector = embed_clips(encoder, case["input"].to(dtype), pooling)
        assert classifier.head(vector).equal(logits)


@pytest.mark.parametrize("axis", ["official", "paper"])
def test_two_passes_are_two_separate_passes(axis: str) -> None:
    both_heads, fbank, first = pretraining_case("patch", torch.float64, softmax_axis=axis)
    two_pass, _, _ = pretraining_case("patch", torch.float64, softmax_axis=axis, two_pass=True)
    first, second = two_pass.draw_masks(torch.arange(2), torch.zeros(2, dtype=torch.int64))
    assert not first.mask_ids.equal(second.mask_ids)
    joint_loss(two_pass, fbank, first, second)["loss"].backward()
    contrast, rebuild = joint_loss(both_heads, fbank, first), joint_loss(both_heads, fbank, second)
    (contrast["infonce_loss"] + 10 * rebuild["mse_loss"]).backward()
    losses = two_pass(fbank, first, second)
    assert losses["infonce_loss"].mean().item() == pytest.approx(
        contrast["infonce_loss"].item(), rel=1e-12
    )
    assert losses["pretext_accuracy"].mean().item() == pytest.approx(
        contrast["pretext_accuracy"].item()
    )
    assert losses["mse_loss"].mean().item() == pytest.approx(rebuild["mse_loss"].item(), rel=1e-12)
    want = gradients(both_heads)
    for name, gradient in gradients(two_pass).items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-10, atol=1e-14)


@kinds
def test_the_cut_of_the_last_block_is_exact(kind: str) -> None:
    """Forward and all gradients equal those of the whole model, read at the masked tokens."""
    model, fbank, masks = pretraining_case(kind, torch.float64)
    encoder, results = model.encoder, []
    upstream = torch.randn(2, 100, 192, generator=torch.Generator().manual_seed(0)).double()
    for masked_only in (False, True):
        hidden, targets = encoder(fbank, masks, masked_only=masked_only)
        if not masked_only:
            hidden = take(hidden, masks.mask_ids + encoder.num_extra_tokens)
        gradients = torch.autograd.grad(hidden, list(encoder.parameters()), upstream)
        results.append((hidden, targets, *gradients))
    for whole, cut in zip(*results, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-11, atol=1e-12 * whole.abs().max().item())


def test_masks_of_a_model_follow_its_configuration() -> None:
    model, _, _ = pretraining_case("frame", torch.float32, mask="random", num_masked=7)
    clips, epochs = torch.tensor([3, 9, 3]), torch.tensor([0, 0, 1])
    (masks,) = model.draw_masks(clips, epochs)
    assert masks.mask_ids.shape == (3, 7) and masks.visible_ids.shape == (3, 121)
    assert not masks.mask_ids[0].equal(masks.mask_ids[2])
    (again,) = model.draw_masks(clips[:1], epochs[:1])
    assert again.mask_ids[0].equal(masks.mask_ids[0])


def test_invalid_clips_count_nothing() -> None:
    losses = {
        "infonce_loss": torch.tensor([1.0, math.inf, 3.0]),
        "mse_loss": torch.tensor([0.5, math.nan, 1.5]),
    }
    means = mean_losses(losses, torch.tensor([True, False, True]), 10.0)
    assert {k: v.item() for k, v in means.items()} == {
        "infonce_loss": 2.0,
        "mse_loss": 1.0,
        "loss": 12.0,
    }
    nothing = mean_losses(losses, torch.zeros(3, dtype=torch.bool), 10.0)
    assert {v.item() for v in nothing.values()} == {0.0}


@pytest.mark.parametrize(
    ("size", "count"), [("tiny", 5_660_288), ("small", 22_084_352), ("base", 87_225_344)]
)
def test_number_of_parameters(size: str, count: int) -> None:
    with torch.device("meta"):
        model = MSPM(from_plain({"model": {"size": size}}))
    assert sum(p.numel() for p in model.parameters()) == count
