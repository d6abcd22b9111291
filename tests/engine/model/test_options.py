"""The encoder's options (positions, extra tokens, norms) beside a plain one, in float64."""

import itertools

import pytest
import torch
from plain_encoder import plain_blocks, plain_positions, plain_tokens
from torch import Tensor, nn

from ssast.engine.config import Config, from_plain, load_config
from ssast.engine.errors import ConfigError
from ssast.engine.model.embedding import SharedTokens, sincos_positions
from ssast.engine.model.encoder import SpectrogramTransformer, layer_states
from ssast.engine.model.objective import MSPM
from ssast.engine.registry import BACKBONES
from ssast.engine.settings import EXTRA_TOKENS, SIZES
from ssast.kernels.masking import Masks
from ssast.kernels.patch_embed import take

POSITIONS, EXTRA, NORMS = ("learned", "sincos"), tuple(EXTRA_TOKENS), ("pre", "post")
COMBINATIONS = list(itertools.product(POSITIONS, EXTRA, NORMS))
HEADS = SIZES["tiny"].num_heads
options = pytest.mark.parametrize(("positions", "extra", "norm"), COMBINATIONS)


def configuration(positions: str, extra: str, norm: str, *changes: str) -> Config:
    chosen = [f"model.positions={positions}", f"model.extra_tokens={extra}", f"model.norm={norm}"]
    small = ["model.depth=2", "audio.num_frames=80", "audio.n_mels=48", "objective.num_masked=9"]
    return load_config("tiny_patch", [*chosen, *small, *changes])


def build(config: Config) -> MSPM:
    torch.manual_seed(0)
    model = MSPM(config).double()
    with torch.no_grad():  # nothing at 0 or 1, where a wrong place would not be seen
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    embed = model.encoder.embed
    if config.model.positions == "sincos":  # not rounded to float32
        embed.pos_embed = sincos_positions(embed.grid, 192, embed.num_extra_tokens)
    return model


def clips(config: Config, number: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (number, config.audio.num_frames, config.audio.n_mels)
    return 3 * torch.randn(shape, generator=generator, dtype=torch.float64) - 4


def masks_of(model: MSPM, number: int = 3) -> Masks:
    return model.draw_masks(torch.arange(number), torch.zeros(number, dtype=torch.int64))[0]


def plain_states(
    encoder: SpectrogramTransformer, config: Config, fbank: Tensor, masks: Masks
) -> tuple[Tensor, Tensor, list[list[Tensor]], list[list[Tensor]]]:
    """Hidden states and targets of a batch, and by clip all states and outputs of MLPs."""
    weights = dict(encoder.named_parameters())
    found = []
    for clip, ids in zip(fbank, masks.mask_ids, strict=True):
        tokens, targets = plain_tokens(weights, config.model, config.audio, clip, ids.tolist())
        found.append((*plain_blocks(weights, config.model, tokens, HEADS), targets))
    hidden, states, outputs, targets = zip(*found, strict=True)
    return torch.stack(hidden), torch.stack(targets), list(states), list(outputs)


def gradients(value: Tensor, encoder: nn.Module) -> list[Tensor]:
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(2)).double()
    found = torch.autograd.grad((value * weights).sum(), list(encoder.parameters()))
    return list(found)


def assert_same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10 * want.abs().max().item())


@options
@pytest.mark.parametrize("how", ["all", "masked_only", "recomputed", "frame", "one block"])
def test_forward_and_gradients_are_those_of_a_plain_encoder(
    positions: str, extra: str, norm: str, how: str
) -> None:
    changes = {"frame": ["model.patch=[48, 2]"], "one block": ["model.depth=1"]}.get(how, [])
    config = configuration(positions, extra, norm, *changes)
    model = build(config)
    encoder, fbank, masks = model.encoder, clips(config), masks_of(model)
    encoder.activation_checkpoint_every = 1 if how == "recomputed" else None
    masked_only = how != "all"
    hidden, targets = encoder(fbank, masks, masked_only=masked_only)
    want, patches, _, _ = plain_states(encoder, config, fbank, masks)
    if masked_only:
        want = take(want, masks.mask_ids + EXTRA_TOKENS[extra])
    assert_same(hidden, want)
    assert_same(targets, patches)
    for got, expected in zip(gradients(hidden, encoder), gradients(want, encoder), strict=True):
        assert_same(got, expected)


@options
def test_tokens_states_and_mlp_outputs(positions: str, extra: str, norm: str) -> None:
    config = configuration(positions, extra, norm)
    encoder, fbank = build(config).encoder, clips(config)
    tokens, masks = encoder.embed_tokens(fbank)
    want, _, states, outputs = plain_states(encoder, config, fbank, masks)
    hidden, mlp_outputs = encoder.encode_tokens(tokens, mlp_outputs=True)
    assert_same(hidden, want)
    assert_same(encoder.encode_tokens(tokens), want)
    assert len(mlp_outputs) == 2
    for index, got in enumerate(mlp_outputs):
        assert_same(got, torch.stack([of_clip[index] for of_clip in outputs]))
    found = layer_states(encoder, fbank)
    assert_same(found[0], torch.stack([of_clip[0] for of_clip in states]))
    assert_same(found[1], torch.stack([of_clip[1] for of_clip in states]))
    assert_same(found[2], want)
    # Some tokens of each clip, in any order, are encoded as if they were the whole.
    ids = torch.tensor([[0, 3, 1], [0, 9, 2], [0, 5, 14]])
    weights = dict(encoder.named_parameters())
    some = encoder.encode_tokens(take(tokens, ids))
    for row, got in enumerate(some):
        assert_same(got, plain_blocks(weights, config.model, tokens[row, ids[row]], HEADS)[0])


@options
def test_padding_is_left_out(positions: str, extra: str, norm: str) -> None:
    """A clip of 48 of 80 frames: as that clip with fixed positions, or learned ones cut off."""
    changes = ["audio.ignore_padding=true"]
    config = configuration(positions, extra, norm, *changes)
    frames = ["audio.num_frames=48", "objective.num_masked=3"]
    short = configuration(positions, extra, norm, *frames, *changes)
    encoder, small = build(config).encoder, build(short).encoder
    weights, E = dict(encoder.state_dict()), EXTRA_TOKENS[extra]
    if positions == "learned":
        learned = weights["embed.pos_embed"]
        image = learned[:, E:].unflatten(1, encoder.embed.grid)[:, :, :3].flatten(1, 2)
        weights["embed.pos_embed"] = torch.cat((learned[:, :E], image), 1)
    small.load_state_dict(weights)
    fbank, lengths = clips(config), torch.tensor([48, 80, 48])
    tokens, masks = encoder.embed_tokens(fbank, lengths)
    mask = encoder.padding_mask(masks)
    hidden, outputs = encoder.encode_tokens(tokens, mask, mlp_outputs=True)
    alone, of_alone = small.encode_tokens(small.embed_tokens(fbank[:, :48])[0], mlp_outputs=True)
    for got, want in zip((hidden, *outputs), (alone, *of_alone), strict=True):
        rows = got[:, E:].unflatten(1, encoder.embed.grid)[:, :, :3].flatten(1, 2)
        assert_same(torch.cat((got[:, :E], rows), 1)[::2], want[::2])


@options
def test_the_cut_of_the_first_block_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, positions: str, extra: str, norm: str
) -> None:
    config = configuration(positions, extra, norm)
    model = build(config)
    fbank, masks = clips(config), masks_of(model)
    found = []
    for cut in (False, True):
        monkeypatch.setattr(SharedTokens, "saves_work", property(lambda self, cut=cut: cut))
        hidden, _ = model.encoder(fbank, masks, masked_only=True)
        found.append((hidden, *gradients(hidden, model.encoder)))
    for whole, shared in zip(*found, strict=True):
        assert_same(shared, whole)


@pytest.mark.parametrize("grid", [(8, 64), (3, 5), (1, 150), (7, 1)])
def test_fixed_positions(grid: tuple[int, int]) -> None:
    got = sincos_positions(grid, 24, 1)
    assert got.dtype == torch.float64 and not got[:, 0].any()
    torch.testing.assert_close(got[0, 1:], plain_positions(*grid, 24), rtol=0, atol=1e-12)


def test_fixed_positions_are_in_no_state_dict() -> None:
    encoder = build(configuration("sincos", "cls", "post")).encoder
    assert set(encoder.embed.state_dict()) == {"weight", "bias", "cls_token", "mask_embed"}
    assert "embed.pos_embed" not in dict(encoder.named_parameters())
    assert {"embed_norm.weight", "embed_norm.bias"} <= set(encoder.state_dict())
    assert not any(name.startswith("norm.") for name in encoder.state_dict())


def test_post_norm_needs_the_blocks_of_the_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {"model": {"norm": "post", "backbone": "own"}}
    monkeypatch.setattr(BACKBONES, "check", lambda name: None)
    with pytest.raises(ConfigError, match=r"^model.norm post is of model.backbone transformer"):
        from_plain(plain)
