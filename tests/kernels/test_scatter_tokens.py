"""Tokens shared by all clips: the operation, and the work it saves in the first block."""

import re

import pytest
import torch
from compare import DTYPES, assert_as_good_as_reference, random_inputs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ssast.engine.config import load_config
from ssast.engine.model.embedding import SharedTokens
from ssast.engine.model.objective import MSPM
from ssast.kernels.masking import Masks, draw_masks
from ssast.kernels.scatter_tokens import (
    _scatter_tokens,
    scatter_tokens,
    scatter_tokens_reference,
    visible_token_ids,
)

SHAPES = {  # B, grid, M, prefix tokens, D
    "usual": (3, (4, 8), 25, 2, 6),
    "one_masked": (2, (3, 5), 1, 2, 4),
    "one_visible": (2, (3, 5), 14, 1, 4),
    "all_masked": (2, (1, 5), 5, 2, 3),
    "one_clip": (1, (2, 2), 2, 0, 1),
}


def case(shape: str) -> tuple[list[Tensor], Masks]:
    B, grid, M, num_prefix, D = SHAPES[shape]
    clips = torch.arange(B)
    masks = draw_masks(clips, clips, seed=0, kind="random", grid=grid, num_masked=M)
    V = grid[0] * grid[1] - M
    return random_inputs((B, num_prefix + V, D), (grid[0] * grid[1], D), regime="unit"), masks


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape: str, dtype: torch.dtype) -> None:
    inputs, masks = case(shape)
    assert_as_good_as_reference(
        lambda visible, shared: scatter_tokens(visible, shared, masks),
        lambda visible, shared: scatter_tokens_reference(visible, shared, masks),
        inputs,
        dtype,
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_visible_tokens_are_at_their_positions(shape: str) -> None:
    (visible, shared), masks = case(shape)
    num_prefix = SHAPES[shape][3]
    tokens = scatter_tokens(visible, shared, masks)
    places = visible_token_ids(masks, num_prefix)[..., None].expand(-1, -1, visible.shape[2])
    assert torch.equal(tokens.gather(1, places), visible)


@pytest.mark.parametrize("shape", SHAPES)
def test_opcheck(shape: str) -> None:
    inputs, masks = case(shape)
    leaves = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(_scatter_tokens, (*leaves, *masks[:2]))


def test_compiles_without_a_graph_break() -> None:
    inputs, masks = case("usual")
    leaves = [x.requires_grad_() for x in inputs]
    compiled = torch.compile(scatter_tokens, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(scatter_tokens(*leaves, masks).square().sum(), leaves)
    got = torch.autograd.grad(compiled(*leaves, masks).square().sum(), leaves)
    torch.testing.assert_close(got, want)


def test_fake_tensors_on_a_gpu() -> None:
    with FakeTensorMode(), torch.no_grad():
        ids = [torch.empty(2, n, dtype=torch.int64, device="cuda") for n in (5, 3)]
        visible = torch.empty(2, 5, 4, dtype=torch.bfloat16, device="cuda")
        shared = torch.empty(8, 4, dtype=torch.bfloat16, device="cuda")
        out = scatter_tokens(visible, shared, Masks(*ids))
    assert (tuple(out.shape), out.dtype, out.device.type) == ((2, 10, 4), torch.bfloat16, "cuda")


def test_error_messages() -> None:
    (visible, shared), masks = case("usual")
    with pytest.raises(ValueError, match=re.escape("3 clips with 7 of 32 patches visible")):
        scatter_tokens(visible, shared[1:], masks)


@pytest.mark.parametrize("patch", ["patch", "frame"])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("masked_only", [True, False])
def test_the_cut_of_the_first_block_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, patch: str, depth: int, masked_only: bool
) -> None:
    """Forward and all gradients, float64, beside the uncut model."""
    changes = [f"model.depth={depth}", "audio.num_frames=128", "objective.num_masked=40"]
    config = load_config(f"tiny_{patch}", changes)
    torch.manual_seed(0)
    model = MSPM(config).double()
    fbank = torch.randn(4, 128, 128, dtype=torch.float64)
    masks = model.draw_masks(torch.arange(4), torch.zeros(4, dtype=torch.int64))

    def values(cut: bool) -> tuple[list[Tensor], list[str]]:
        monkeypatch.setattr(SharedTokens, "saves_work", property(lambda self: cut))
        model.zero_grad()
        states, targets = model.encoder(fbank, masks[0], masked_only=masked_only)
        weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
        (states * weights).sum().backward()
        named = [(n, p.grad) for n, p in model.encoder.named_parameters() if p.grad is not None]
        return [states.detach(), targets, *(g for _, g in named)], [n for n, _ in named]

    (want, names), (got, same) = values(False), values(True)
    assert names == same and "embed.mask_embed" in names
    for name, a, b in zip(["states", "targets", *names], got, want, strict=True):
        scale = max(1.0, b.abs().max().item())
        assert (a - b).abs().max() <= 1e-10 * scale, name


def test_is_worthwhile_where_masked_patches_repeat() -> None:
    ids = torch.zeros(2, 5, dtype=torch.int64)
    tokens = torch.zeros(8, 3)
    assert SharedTokens(tokens, Masks(ids, ids[:, :3]), 2).saves_work
    assert not SharedTokens(tokens, Masks(ids[:1], ids[:1, :3]), 2).saves_work
