"""A padded clip gives exactly the numbers that it gives alone and without padding."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ssast.engine.config import Config, load_config
from ssast.engine.model.classifier import Classifier
from ssast.engine.model.objective import MSPM, mean_losses, with_masks
from ssast.engine.settings import EXTRA_TOKENS
from ssast.kernels.masking import Masks, valid_patches

FRAMES = 128
LENGTHS = [128, 79, 33, 16]  # frames; whole columns of 16 x 16 patches: 8, 4, 2, 1


def configuration(patch: str, frames: int, num_masked: int, *changes: str) -> Config:
    settings = [
        "model.depth=2",
        "audio.ignore_padding=true",
        f"audio.num_frames={frames}",
        f"objective.num_masked={num_masked}",
    ]
    return load_config(f"tiny_{patch}", [*settings, *changes])


def padded_batch(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    fbank = torch.randn(len(lengths), FRAMES, 128, generator=generator, dtype=torch.float64)
    num_frames = torch.tensor(lengths)
    fbank[torch.arange(FRAMES) >= num_frames[:, None]] = 1e3  # not to be looked at
    return fbank, num_frames


NUM_EXTRA_TOKENS = EXTRA_TOKENS["cls_dist"]


def cut_positions(pos_embed: Tensor, grid: tuple[int, int], columns: int) -> Tensor:
    extra, patches = pos_embed[:, :NUM_EXTRA_TOKENS], pos_embed[:, NUM_EXTRA_TOKENS:]
    return torch.cat((extra, patches.unflatten(1, grid)[:, :, :columns].flatten(1, 2)), 1)


def alone(model: torch.nn.Module, small: torch.nn.Module, prefix: str, grid, columns: int):
    """``small`` with the weights of ``model``, its positions those of the first columns."""
    weights = dict(model.state_dict())
    weights[f"{prefix}pos_embed"] = cut_positions(weights[f"{prefix}pos_embed"], grid, columns)
    small.load_state_dict(weights)
    return small


@pytest.mark.parametrize(
    ("patch", "mask", "axis"),
    [
        ("patch", "official", "official"),
        ("patch", "uniform", "paper"),
        ("frame", "random", "official"),
        ("frame", "official", "paper"),
        ("patch", "inverse_blocks", "official"),
        ("frame", "inverse_blocks", "official"),
    ],
)
def test_pretraining(patch: str, mask: str, axis: str) -> None:
    changes = [f"objective.mask={mask}", f"objective.softmax_axis={axis}"]
    torch.manual_seed(0)
    model = MSPM(configuration(patch, FRAMES, 45, *changes)).double()
    rows, columns = model.grid
    fbank, num_frames = padded_batch(LENGTHS)
    clips, epochs = torch.tensor([3, 1, 4, 15]), torch.tensor([0, 1, 2, 3])
    masks = model.draw_masks(clips, epochs, num_frames)
    losses = model(fbank, *masks)
    (losses["infonce_loss"] + 10 * losses["mse_loss"]).sum().backward()
    want = {n: torch.zeros_like(p) for n, p in model.named_parameters() if p.requires_grad}
    width = model.encoder.embed.patch[1]
    for b, length in enumerate(LENGTHS):
        own, count = length // width, int(masks[0].num_masked[b])
        assert masks[0].num_visible[b] == rows * own - count
        small = MSPM(configuration(patch, own * width, count, *changes)).double()
        alone(model, small, "encoder.embed.", model.grid, own)
        small_masks = small.draw_masks(clips[b : b + 1], epochs[b : b + 1])
        assert small_masks[0].mask_ids.shape[1] == count > 0
        got = small(fbank[b : b + 1, : own * width], *small_masks)
        for name in losses:
            torch.testing.assert_close(losses[name][b], got[name][0], rtol=1e-10, atol=1e-12)
        (got["infonce_loss"] + 10 * got["mse_loss"]).sum().backward()
        for name, parameter in small.named_parameters():
            if name.endswith("pos_embed"):
                full = want[name][:, NUM_EXTRA_TOKENS:].unflatten(1, (rows, columns))
                full[:, :, :own] += parameter.grad[:, NUM_EXTRA_TOKENS:].unflatten(1, (rows, own))
                want[name][:, :NUM_EXTRA_TOKENS] += parameter.grad[:, :NUM_EXTRA_TOKENS]
            elif name in want:
                want[name] += parameter.grad
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = want[name].abs().max().item()
            error = (parameter.grad - want[name]).abs().max().item()
            assert error <= 1e-10 * max(scale, 1e-3), name


@pytest.mark.parametrize("pooling", ["avgtok", "cls"])
@pytest.mark.parametrize("patch", ["patch", "frame"])
def test_classification(patch: str, pooling: str) -> None:
    config = configuration(patch, FRAMES, 45)
    torch.manual_seed(0)
    classifier = Classifier(MSPM(config).encoder, 5, pooling).double().eval()
    grid, width = classifier.encoder.embed.grid, classifier.encoder.embed.patch[1]
    fbank, num_frames = padded_batch([*LENGTHS, 7])
    logits = classifier(fbank, num_frames)
    for b, length in enumerate([*LENGTHS, 7]):
        own = max(1, length // width)
        small = Classifier(MSPM(configuration(patch, own * width, 2)).encoder, 5, pooling).double()
        alone(classifier, small.eval(), "encoder.embed.", grid, own)
        torch.testing.assert_close(logits[b], small(fbank[b : b + 1, : own * width])[0])


def test_a_clip_too_short_for_a_mask_counts_nothing() -> None:
    model = MSPM(configuration("frame", FRAMES, 45, "objective.mask=official")).double()
    fbank, num_frames = padded_batch([128, 5])  # 64 and 2 patches; official masks leave out id 0
    masks = model.draw_masks(torch.arange(2), torch.zeros(2, dtype=torch.int64), num_frames)
    assert masks[0].num_masked.tolist() == [45, 0]
    valid = with_masks(torch.ones(2, dtype=torch.bool), masks)
    assert valid.tolist() == [True, False]
    losses = model(fbank, *masks)
    means = mean_losses(losses, valid, 10.0)
    assert means["infonce_loss"] == losses["infonce_loss"][0] and means["loss"].isfinite()
    means["loss"].backward()


def test_padding_counts_as_sound_unless_it_is_ignored() -> None:
    config = configuration("patch", FRAMES, 45, "audio.ignore_padding=false")
    model = MSPM(config)
    masks = model.draw_masks(torch.arange(4), torch.zeros(4).long(), torch.tensor(LENGTHS))
    assert masks[0].num_masked is None and valid_patches(masks[0]) is None


def test_real_patches() -> None:
    masks = Masks(
        torch.tensor([[0, 3, 2]]), torch.tensor([[1, 4, 5]]), torch.tensor([2]), torch.tensor([1])
    )
    assert valid_patches(masks).tolist() == [[True, True, False, True, False, False]]
