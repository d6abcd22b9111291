"""Noise at the masked places: its rows by Philox on any device, and the grid that it fills."""

import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from compare import DTYPES, assert_as_good_as_reference, random_inputs
from on_triton import on_triton
from scipy import stats
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ssast.kernels.fill_masked import (
    _fill_masked,
    _noise_rows,
    fill_masked,
    fill_masked_reference,
    noise_rows,
)
from ssast.kernels.masking import Masks, draw_masks, philox, valid_patches

CLIPS = torch.tensor([3, 3, 3, 2**32 + 5])
EPOCHS = torch.tensor([0, 0, 1, -1])
STREAMS = torch.tensor([0, 15, 0, 63])


def rows_of(**changes: Any) -> Tensor:
    settings = {"seed": 7, "num_patches": 37, "table_rows": 100} | changes
    return noise_rows(CLIPS, EPOCHS, STREAMS, **settings)


@pytest.mark.parametrize("on", ["torch", "triton"])
@pytest.mark.parametrize("num_patches", [1, 37, 600])
@pytest.mark.parametrize("table_rows", [1, 100, 2**31 - 1])
def test_each_row_is_drawn_by_its_counter(on: str, num_patches: int, table_rows: int) -> None:
    with on_triton(_noise_rows) if on == "triton" else nullcontext():
        rows = rows_of(num_patches=num_patches, table_rows=table_rows, seed=2**62 + 1)
    assert rows.shape == (4, num_patches)
    for r in range(4):
        for n in {0, num_patches // 2, num_patches - 1}:
            counter = (torch.tensor(n // 4), CLIPS[r], EPOCHS[r], 2**31 + int(STREAMS[r]))
            word = int(philox(2**62 + 1, *counter)[n % 4])
            assert int(rows[r, n]) == word * table_rows >> 32


@pytest.mark.parametrize("num_patches", [5, 512, 700])
def test_the_kernel_draws_the_same_bits(num_patches: int) -> None:
    want = rows_of(num_patches=num_patches)
    with on_triton(_noise_rows):
        assert torch.equal(rows_of(num_patches=num_patches), want)


def test_rows_are_drawn_in_a_vmap_too() -> None:
    clips = torch.stack((CLIPS, CLIPS + 1))
    settings: dict[str, Any] = {"seed": 7, "num_patches": 9, "table_rows": 100}
    got = torch.vmap(lambda ids: noise_rows(ids, EPOCHS, STREAMS, **settings))(clips)
    want = [noise_rows(ids, EPOCHS, STREAMS, **settings) for ids in clips]
    assert torch.equal(got, torch.stack(want))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_the_same_bits() -> None:
    settings: dict[str, Any] = {"seed": 7, "num_patches": 700, "table_rows": 4096}
    got = noise_rows(CLIPS.cuda(), EPOCHS.cuda(), STREAMS.cuda(), **settings)
    assert torch.equal(got.cpu(), noise_rows(CLIPS, EPOCHS, STREAMS, **settings))


def test_rows_are_uniform_and_those_of_clones_independent() -> None:
    clips = torch.arange(100).repeat_interleave(2)
    streams = torch.tensor([0, 1]).repeat(100)
    rows = noise_rows(clips, clips * 0, streams, seed=0, num_patches=500, table_rows=8)
    assert stats.chisquare(rows.flatten().bincount(minlength=8)).pvalue > 1e-3
    pairs = (8 * rows[::2] + rows[1::2]).flatten().bincount(minlength=64)
    assert stats.chisquare(pairs).pvalue > 1e-3


def test_noise_is_not_the_key_of_the_mask() -> None:
    """The patches that a random mask takes are those of the smallest draws of its own stream."""
    clips = torch.arange(200)
    masks = draw_masks(clips, clips, seed=0, kind="random", grid=(1, 64), num_masked=32)
    rows = noise_rows(
        clips, clips, torch.zeros_like(clips), seed=0, num_patches=64, table_rows=1000
    )
    masked, visible = (rows.gather(1, ids).double().mean() for ids in masks[:2])
    assert abs(masked - visible) < 20  # from the same draws 500


SHAPES = {  # R, grid, M, D, valid columns
    "usual": (3, (4, 8), 25, 6, None),
    "padded": (4, (4, 8), 25, 6, [8, 1, 5, 7]),
    "one_masked": (2, (3, 5), 1, 4, None),
    "one_visible": (2, (3, 5), 14, 4, None),
    "all_masked": (2, (1, 5), 5, 3, None),
    "one_row": (1, (2, 2), 2, 1, None),
}


def case(shape: str) -> tuple[list[Tensor], Tensor, Masks]:
    R, grid, M, D, columns = SHAPES[shape]
    clips, N = torch.arange(R), grid[0] * grid[1]
    masks = draw_masks(
        clips, clips, seed=0, kind="random", grid=grid, num_masked=M,
        valid_columns=None if columns is None else torch.tensor(columns),
    )  # fmt: skip
    rows = noise_rows(clips, clips, clips, seed=0, num_patches=N, table_rows=9)
    return random_inputs((R, N - M, D), (9, D), regime="unit"), rows, masks


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape: str, dtype: torch.dtype) -> None:
    (visible, table), rows, masks = case(shape)
    assert_as_good_as_reference(
        lambda x: fill_masked(x, table.to(dtype), rows, masks),
        lambda x: fill_masked_reference(x, table, rows, masks),
        [visible],
        dtype,
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_every_place_has_its_token(shape: str) -> None:
    """Written down as a loop."""
    (visible, table), rows, masks = case(shape)
    out = fill_masked(visible.requires_grad_(), table, rows, masks)
    weights = torch.rand(out.shape, dtype=out.dtype)
    (gradient,) = torch.autograd.grad((out * weights).sum(), visible)
    valid = valid_patches(masks)
    for r in range(len(rows)):
        ranks = {n: v for v, n in enumerate(masks.visible_ids[r].tolist())}
        for n in range(rows.shape[1]):
            want = visible[r, ranks[n]] if n in ranks else table[rows[r, n]]
            if valid is not None and not valid[r, n]:
                want = torch.zeros_like(want)
            assert torch.equal(out[r, n], want)
            if n in ranks:
                taken = valid is None or bool(valid[r, n])
                assert torch.equal(gradient[r, ranks[n]], weights[r, n] * taken)


@pytest.mark.parametrize("shape", ["usual", "padded"])
def test_opcheck(shape: str) -> None:
    (visible, table), rows, masks = case(shape)
    torch.library.opcheck(_fill_masked, (visible.requires_grad_(), table, rows, *masks))
    torch.library.opcheck(_noise_rows, (CLIPS, EPOCHS, STREAMS, 1, 10, 20))


def test_a_table_of_another_dtype_is_rounded() -> None:
    (visible, table), rows, masks = case("usual")
    out = fill_masked(visible.bfloat16(), table.float() / 3, rows, masks)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, fill_masked(visible.bfloat16(), (table / 3).bfloat16(), rows, masks))


@pytest.mark.parametrize("shape", ["usual", "padded"])
def test_compiles_without_a_graph_break(shape: str) -> None:
    (visible, table), _, masks = case(shape)

    def run(x: Tensor) -> Tensor:
        clips = torch.arange(len(x))
        N = masks.mask_ids.shape[1] + masks.visible_ids.shape[1]
        rows = noise_rows(clips, clips, clips, seed=0, num_patches=N, table_rows=9)
        return fill_masked(x, table, rows, masks)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    leaf = visible.requires_grad_()
    (want,) = torch.autograd.grad(run(leaf).square().sum(), leaf)
    (got,) = torch.autograd.grad(compiled(leaf).square().sum(), leaf)
    torch.testing.assert_close(got, want)


def test_fake_tensors_on_a_gpu() -> None:
    with FakeTensorMode(), torch.no_grad():
        masked, visible = (torch.empty(2, n, dtype=torch.int64, device="cuda") for n in (5, 3))
        clips = torch.empty(2, dtype=torch.int64, device="cuda")
        rows = noise_rows(clips, clips, clips, seed=0, num_patches=8, table_rows=9)
        tokens = torch.empty(2, 3, 4, dtype=torch.bfloat16, device="cuda")
        table = torch.empty(9, 4, dtype=torch.bfloat16, device="cuda")
        out = fill_masked(tokens, table, rows, Masks(masked, visible))
    assert (tuple(rows.shape), rows.dtype, rows.device.type) == ((2, 8), torch.int64, "cuda")
    assert (tuple(out.shape), out.dtype, out.device.type) == ((2, 8, 4), torch.bfloat16, "cuda")


def test_error_messages() -> None:
    (visible, table), rows, masks = case("usual")
    for wrong in ((visible[:, 1:], table, rows), (visible, table[:, 1:], rows)):
        with pytest.raises(ValueError, match=re.escape("3 rows with 7 of 32 patches visible")):
            fill_masked(*wrong, masks)
    with pytest.raises(ValueError, match=re.escape("do not match tokens")):
        fill_masked(visible, table, rows[:, 1:], masks)
    with pytest.raises(ValueError, match=re.escape("clips, epochs and streams [R], got [4]")):
        noise_rows(CLIPS, EPOCHS[1:], STREAMS, seed=0, num_patches=3, table_rows=3)
    with pytest.raises(ValueError, match="got 3 patches and 0 rows"):
        rows_of(num_patches=3, table_rows=0)


def test_the_table_gets_no_gradient_by_the_formula() -> None:
    """In training the table is data; where it needs a gradient, the plain form gives it one."""
    (visible, table), rows, masks = case("padded")
    out = fill_masked(visible.requires_grad_(), table, rows, masks)
    assert "Generated" in type(out.grad_fn).__name__
    table = table.requires_grad_()
    want = torch.autograd.grad(fill_masked_reference(visible, table, rows, masks).sum(), table)
    got = torch.autograd.grad(fill_masked(visible, table, rows, masks).sum(), table)
    assert torch.equal(got[0], want[0])
