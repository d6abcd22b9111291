"""Latent targets against a reference in float64 and its golden numbers, clip by clip."""

import json

import latent_reference as plain
import pytest
import torch
from latent_reference import Case, Reference
from paths import GOLDEN
from torch import Tensor

from ssast.engine.config import from_plain
from ssast.engine.model.embedding import sincos_positions
from ssast.engine.model.latent import Latent, _content_std
from ssast.engine.model.objective import build_objective, with_masks
from ssast.kernels.masking import Masks, masks_from_ids

SMALL = Case(grid=(3, 5), decoder_depth=1)
CASES = {
    "published": (Case(), "inverse_blocks", 2),
    "one clone, learned positions, cls and dist": (
        Case(grid=(3, 5), learned=True, dist=True, decoder_depth=1),
        "random",
        1,
    ),
    "pre-norm, odd patches": (Case(grid=(2, 3), patch=(20, 7), post=False), "uniform", 3),
    "frame patches": (Case(grid=(1, 9), patch=(32, 2), dist=True), "inverse_blocks", 2),
    "frame patches, pre-norm": (
        Case(grid=(1, 7), patch=(32, 2), learned=True, post=False, depth=1),
        "official",
        2,
    ),
}


def build(case: Case, mask: str = "random", clones: int = 2, **changes: object) -> Latent:
    """The engine's model of a case in float64, with the weights of the reference."""
    rows, columns = case.grid
    config = from_plain(
        {
            "audio": {
                "n_mels": rows * case.patch[0],
                "num_frames": columns * case.patch[1],
                "mean": case.mean,
                "std": case.std,
                "ignore_padding": bool(changes.pop("ignore_padding", False)),
            },
            "model": {
                "size": "tiny",
                "depth": case.depth,
                "patch": list(case.patch),
                "positions": "learned" if case.learned else "sincos",
                "extra_tokens": "cls_dist" if case.dist else "cls",
                "norm": "post" if case.post else "pre",
            },
            "objective": {
                "kind": "latent",
                "num_masked": rows * columns * 3 // 4,
                "mask": mask,
                "clones": clones,
                "decoder_depth": case.decoder_depth,
                **changes,
            },
            "optim": {"schedule": "constant"},
        }
    )
    model = build_objective(config).double()
    assert isinstance(model, Latent)
    model.load_state_dict(plain.weights(case))
    if not case.learned:  # a float32 buffer otherwise
        embed = model.encoder.embed
        embed.pos_embed = sincos_positions(case.grid, case.width, case.extra)
    teacher = model.build_teacher()
    wanted = plain.weights(case, seed=1).items()
    teacher.load_state_dict(
        {n.removeprefix("encoder."): x for n, x in wanted if n.startswith("encoder.")}
    )
    return model


def references(case: Case) -> tuple[Reference, Reference, dict[str, Tensor]]:
    """Student and teacher of a case, and the student's weights, which have gradients."""
    own = {name: x.requires_grad_() for name, x in plain.weights(case).items()}
    return Reference(case, own), Reference(case, plain.weights(case, seed=1)), own


def test_golden_numbers() -> None:
    case, golden = Case(), json.loads((GOLDEN / "latent.json").read_text())
    clips, masks, noise = plain.golden_inputs(case)
    model = build(case)
    N = case.grid[0] * case.grid[1]
    model.noise = torch.cat([table.flatten(0, 1) for table in noise])
    rows = torch.arange(4 * N).view(4, N)
    ids = torch.tensor([ids for clones in masks for ids in clones])
    losses = model(clips, masks_from_ids(ids, N), rows)
    for name, wanted in golden["losses"].items():
        assert losses[name].tolist() == pytest.approx(wanted, rel=1e-12)
    means = model.mean_losses(losses, torch.ones(2, dtype=torch.bool))
    for name in ("target_std", "prediction_std"):
        assert means[name].item() == pytest.approx(golden[name], rel=1e-10)
    assert model.targets(clips)[1, 5, ::24].tolist() == pytest.approx(golden["targets"], rel=1e-10)
    means["loss"].backward()
    found = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
    assert found == pytest.approx(golden["gradient_norms"], rel=1e-10)
    for step, wanted in golden["decays"].items():
        assert model.ema_decay(int(step)) == pytest.approx(wanted, rel=1e-15)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_the_reference(name: str) -> None:
    case, mask, clones = CASES[name]
    model = build(case, mask, clones)
    student, teacher, weights = references(case)
    clips = plain.golden_inputs(case)[0]
    masks, rows = model.draw_masks(torch.tensor([3, 8]), torch.tensor([0, 1]))
    losses = model(clips, masks, rows)
    losses["loss"].mean().backward()
    wanted = []
    for b, clip in enumerate(clips):
        own = slice(b * clones, (b + 1) * clones)
        noise = list(model.noise[rows[own]])
        wanted.append(student.losses(teacher, clip, masks.mask_ids[own].tolist(), noise))
    torch.stack([x["loss"] for x in wanted]).mean().backward()
    for key in ("loss", "latent_loss", "cls_loss"):
        expected = torch.stack([x[key].detach() for x in wanted])
        torch.testing.assert_close(losses[key].detach(), expected, rtol=1e-10, atol=1e-12)
    gradients_agree(model, weights)


def gradients_agree(model: Latent, weights: dict[str, Tensor]) -> None:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(weights) - set(trained) == {"encoder.embed.mask_embed"}
    for name, parameter in trained.items():
        expected = weights[name].grad
        scale = max(expected.abs().max().item(), 1e-3)  # the gradients of key biases are rounding
        assert (parameter.grad - expected).abs().max().item() < 1e-10 * scale, name


@pytest.mark.parametrize("case", [Case(), Case(grid=(1, 9), patch=(32, 2))], ids=["patch", "frame"])
def test_padding_is_left_out(case: Case) -> None:
    """A padded clip has the losses and gradients of its own columns alone."""
    clones, width = 2, case.patch[1]
    model = build(case, "inverse_blocks", clones, ignore_padding=True)
    student, teacher, weights = references(case)
    clips = plain.golden_inputs(case)[0].repeat(2, 1, 1)[:3].clone()
    lengths = [case.grid[1] * width, 4 * width + 1, 2 * width]
    for clip, length in zip(clips, lengths, strict=True):
        clip[length:] = 1e3  # not to be looked at
    arguments = torch.tensor([5, 6, 7]), torch.zeros(3).long(), torch.tensor(lengths)
    masks, rows = model.draw_masks(*arguments)
    losses = model(clips, masks, rows)
    valid = with_masks(torch.ones(3, dtype=torch.bool), [masks, rows])
    assert valid.tolist() == [True] * 3
    means = model.mean_losses(losses, valid)  # with weights in float32
    (losses["loss"].sum() / 3).backward()
    wanted = []
    for b, (clip, length) in enumerate(zip(clips, lengths, strict=True)):
        own = slice(b * clones, (b + 1) * clones)
        ids = [
            row[:count].tolist()
            for row, count in zip(masks.mask_ids[own], masks.num_masked[own], strict=True)
        ]
        found = student.losses(teacher, clip, ids, list(model.noise[rows[own]]), length // width)
        wanted.append(found)
    loss = sum(x["loss"] for x in wanted) / 3
    loss.backward()
    assert losses["loss"].tolist() == pytest.approx([x["loss"].item() for x in wanted], rel=1e-10)
    gradients_agree(model, weights)
    for name in ("target", "prediction"):
        expected = plain.spread([x[f"{name}s"].detach() for x in wanted])
        assert means[f"{name}_std"].item() == pytest.approx(expected, rel=1e-6)


def test_a_clip_without_masked_patches_counts_nothing() -> None:
    model = build(Case(grid=(1, 9), patch=(32, 2)), "official", 2, ignore_padding=True)
    masks, rows = model.draw_masks(torch.arange(2), torch.zeros(2).long(), torch.tensor([18, 3]))
    assert masks.num_masked.tolist() == [6, 6, 0, 0]
    valid = with_masks(torch.ones(2, dtype=torch.bool), [masks, rows])
    assert valid.tolist() == [True, False]
    losses = model(torch.randn(2, 18, 32, dtype=torch.float64), masks, rows)
    means = model.mean_losses(losses, valid)
    assert means["loss"].item() == pytest.approx(losses["loss"][0].item())
    means["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_the_average_is_that_of_the_reference() -> None:
    model = build(SMALL, teacher_decay=[0.5, 0.9], teacher_decay_steps=4)
    decays = [plain.decay(step, 0.5, 0.9, 4) for step in range(6)]
    assert [model.ema_decay(step) for step in range(6)] == pytest.approx(decays, rel=1e-15)
    assert decays == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 0.9])


def test_masks_and_noise_follow_from_clip_epoch_and_clone_alone() -> None:
    model = build(Case(), "inverse_blocks", 3)
    clips, epochs = torch.tensor([3, 9, 3]), torch.tensor([0, 0, 1])
    masks, rows = model.draw_masks(clips, epochs)
    assert masks.mask_ids.shape == (9, 18) and rows.shape == (9, 24)
    assert len({tuple(row) for row in masks.mask_ids.tolist()}) == 9
    assert len({tuple(row) for row in rows.tolist()}) == 9
    alone, own = model.draw_masks(clips[1:2], epochs[1:2])
    assert alone.mask_ids.equal(masks.mask_ids[3:6]) and own.equal(rows[3:6])
    fewer = build(Case(), "inverse_blocks", 2).draw_masks(clips, epochs)[0]
    assert fewer.mask_ids[:2].equal(masks.mask_ids[:2])
    first, again = (model.held_out_masks(clips) for _ in range(2))
    assert first[0].mask_ids.equal(again[0].mask_ids) and first[1].equal(again[1])
    assert first[0].mask_ids[:3].equal(first[0].mask_ids[6:]), "of no epoch"
    other = build(Case(), "inverse_blocks", 3)
    assert other.noise.equal(model.noise) and 0.0099 < other.noise.std().item() < 0.0101
    assert "noise" not in model.state_dict()


def test_a_clip_has_the_mean_of_its_clones() -> None:
    model, single = build(SMALL, clones=3), build(SMALL, clones=1)
    clips = plain.golden_inputs(SMALL)[0]
    masks, rows = model.draw_masks(torch.arange(2), torch.zeros(2).long())
    losses = model(clips, masks, rows)
    for name in ("latent_loss", "cls_loss"):
        parts = []
        for c in range(3):
            own = Masks(masks.mask_ids[c::3], masks.visible_ids[c::3])
            parts.append(single(clips, own, rows[c::3])[name])
        torch.testing.assert_close(losses[name], torch.stack(parts).mean(0), rtol=1e-12, atol=0)


def test_recomputed_activations_change_nothing() -> None:
    results = []
    for every in (None, 1):
        model = build(SMALL).train()
        model.encoder.activation_checkpoint_every = every
        losses = model(
            plain.golden_inputs(SMALL)[0], *model.draw_masks(torch.arange(2), torch.zeros(2).long())
        )
        losses["loss"].sum().backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_lower_precision(device: torch.device) -> None:
    """Targets, losses and moments stay float32; bf16 costs little."""
    case, found = Case(), {}
    clips = plain.golden_inputs(case)[0].float().to(device)
    for dtype in (torch.float32, torch.bfloat16):
        model = build(case).to(device, dtype)
        model.teacher.to(device, dtype)
        masks, rows = model.draw_masks(*torch.zeros(2, 2, dtype=torch.int64, device=device))
        losses = model(clips, masks, rows)
        assert {value.dtype for value in losses.values()} == {torch.float32}
        assert model.targets(clips).dtype == torch.float32
        valid = torch.ones(2, dtype=torch.bool, device=device)
        means = model.mean_losses(losses, valid)
        means["loss"].backward()
        found[dtype] = means, model.decoder.layers[0].conv.weight.grad.float()
    (exact, gradient), (rounded, rough) = found.values()
    for name, value in exact.items():
        assert rounded[name].item() == pytest.approx(value.item(), rel=0.02), name
    assert (rough - gradient).norm() < 0.1 * gradient.norm()


def test_the_spread_is_over_valid_clips() -> None:
    model = build(SMALL)
    losses = {name: torch.tensor([1.0, torch.inf, 3.0]) for name in ("loss", "latent_loss")}
    rows = [torch.randn(40, 7).double() * 3 + 1 for _ in range(3)]
    losses |= {"targets": torch.stack(rows), "prediction_moments": torch.zeros(3, 2, 7)}
    losses["targets"][1] = torch.nan
    means = model.mean_losses(losses, torch.tensor([True, False, True]))
    expected = plain.spread([rows[0], rows[2]])
    assert means["target_std"].item() == pytest.approx(expected, rel=1e-9)
    assert means["prediction_std"].item() == 0.0 and means["loss"].item() == 2.0
    nothing = model.mean_losses(losses, torch.zeros(3, dtype=torch.bool))
    assert nothing["target_std"].item() == nothing["loss"].item() == 0.0


@pytest.mark.parametrize("padding", [False, True])
def test_content_is_what_differs_between_clips_at_a_patch(padding: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    position = 5 * torch.randn(1, 60, 8, generator=draw, dtype=torch.float64)
    content = 0.7 * torch.randn(50, 60, 8, generator=draw, dtype=torch.float64)
    clips = torch.arange(50) % 7 > 0
    patches = torch.rand(50, 60, generator=draw) < 0.8 if padding else None
    counted = clips[:, None] & (
        torch.ones(50, 60, dtype=torch.bool) if patches is None else patches
    )
    targets = (position + content).masked_fill(~counted[..., None], torch.nan)
    assert _content_std(targets, patches, clips).item() == pytest.approx(0.7, rel=0.02)
    alone = _content_std(targets, patches, torch.arange(50) == 1)  # nothing to compare it with
    assert alone.item() == 0.0
