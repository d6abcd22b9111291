"""Masks: the same as their definition, the same for every batch, distributed as they should be."""

import random
import re
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_triton import on_triton
from paths import GOLDEN
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ssast.kernels.masking import (
    MaskKind,
    Masks,
    _draw_masks,
    draw_masks,
    draw_masks_reference,
    masks_from_ids,
    no_masks,
    philox,
    valid_patches,
)

KINDS: list[MaskKind] = ["official", "uniform", "random", "inverse_blocks"]
REFERENCE = torch.load(GOLDEN / "masks.pt", weights_only=True)


def draw(
    clips: Tensor, kind: MaskKind, grid: tuple[int, int], num_masked: int, *, seed: int = 0
) -> Tensor:
    epochs = torch.zeros_like(clips)
    return draw_masks(
        clips, epochs, seed=seed, kind=kind, grid=grid, num_masked=num_masked
    ).mask_ids


def share_masked(mask_ids: Tensor, num_patches: int) -> Tensor:
    """How often each patch is hidden, [N]."""
    counts = torch.bincount(mask_ids.flatten().long(), minlength=num_patches)
    return counts.double() / len(mask_ids)


def published_masks(count: int, rows: int, columns: int, num_masked: int) -> Tensor:
    """The rules of the published generator, written down a second time, [count, M]."""
    rng, N, masks = random.Random(0), rows * columns, []
    for _ in range(count):
        side, ids = rng.randrange(3) + 3, set()
        while len(ids) <= num_masked:
            start = rng.randrange(N)
            block = (start + columns * i + j for i in range(side) for j in range(side))
            ids.update(i for i in block if 0 < i < N)
        masks.append(sorted(ids)[:num_masked])
    return torch.tensor(masks)


# Known answers of Random123: Philox4x32, 10 rounds.
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    block, clip, epoch, stream = counter
    got = philox(
        key[0] | key[1] << 32, torch.tensor(block), torch.tensor(clip), torch.tensor(epoch), stream
    )
    assert got.tolist() == words


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_equals_the_definition(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 12))
    most = rows * columns - (2 if kind == "official" else 0)
    if most < 1:
        return
    M, seed = data.draw(st.integers(1, most)), data.draw(st.integers(0, 2**63 - 1))
    clips = data.draw(st.lists(st.integers(0, 2**40), min_size=1, max_size=3))
    epochs = data.draw(st.lists(st.integers(0, 2**33), min_size=len(clips), max_size=len(clips)))
    streams = data.draw(st.lists(st.integers(0, 63), min_size=len(clips), max_size=len(clips)))
    shared = len(set(streams)) == 1
    got = draw_masks(
        torch.tensor(clips), torch.tensor(epochs), seed=seed, kind=kind, grid=(rows, columns),
        num_masked=M, stream=streams[0] if shared else torch.tensor(streams),
    )  # fmt: skip
    for clip, epoch, stream, masked, visible in zip(
        clips, epochs, streams, got.mask_ids.tolist(), got.visible_ids.tolist(), strict=True
    ):
        # The reference multiplies whole counters too: they count modulo 2**32.
        want = draw_masks_reference(clip, epoch, seed, stream, kind, (rows, columns), M)
        assert masked == want
        assert visible == [i for i in range(rows * columns) if i not in set(want)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("grid", "num_masked"), [((8, 64), 400), ((1, 512), 400), ((8, 16), 126)])
def test_equals_the_definition_at_full_size(
    kind: MaskKind, grid: tuple[int, int], num_masked: int
) -> None:
    got = draw(torch.arange(3), kind, grid, num_masked, seed=7)
    want = [draw_masks_reference(c, 0, 7, 0, kind, grid, num_masked) for c in range(3)]
    assert got.tolist() == want


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_depends_on_its_clip_alone(kind: MaskKind) -> None:
    clips = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    together = draw(clips, kind, (8, 16), 100)
    halves = [draw(part, kind, (8, 16), 100) for part in clips.split(25)]
    alone = [draw(clips[i : i + 1], kind, (8, 16), 100) for i in range(50)]
    assert together.equal(torch.cat(halves)) and together.equal(torch.cat(alone))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on", ["torch", "triton"])
def test_each_clone_of_a_clip_has_the_mask_of_its_stream(kind: MaskKind, on: str) -> None:
    clips, streams = torch.tensor([4, 4, 4, 9, 9]), torch.tensor([0, 1, 2**31 - 1, 0, 1])
    columns = torch.tensor([7, 7, 7, 3, 3])
    settings: dict[str, Any] = {"seed": 5, "kind": kind, "grid": (4, 7), "num_masked": 16}
    with on_triton(_draw_masks) if on == "triton" else nullcontext():
        together = draw_masks(clips, clips, stream=streams, valid_columns=columns, **settings)
    alone = [
        draw_masks(
            clips[i : i + 1], clips[i : i + 1], stream=int(streams[i]),
            valid_columns=columns[i : i + 1], **settings,
        )
        for i in range(5)
    ]  # fmt: skip
    assert together.mask_ids.equal(torch.cat([m.mask_ids for m in alone]))
    assert together.visible_ids.equal(torch.cat([m.visible_ids for m in alone]))
    assert len({tuple(ids) for ids in together.mask_ids.tolist()}) == 5
    with pytest.raises(ValueError, match=re.escape("one stream for each of 5 clips, got [4]")):
        draw_masks(clips, clips, stream=streams[:4], **settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changed", ["clip", "epoch", "seed", "stream"])
def test_a_mask_changes_with_its_key(kind: MaskKind, changed: str) -> None:
    masks = []
    for value in range(20):
        key = {name: value if name == changed else 0 for name in ("clip", "epoch")}
        seed, stream = (value if changed == name else 0 for name in ("seed", "stream"))
        clip, epoch = torch.tensor([key["clip"]]), torch.tensor([key["epoch"]])
        mask = draw_masks(
            clip, epoch, seed=seed, kind=kind, grid=(8, 16), num_masked=60, stream=stream
        )
        masks.append(tuple(mask.mask_ids[0].tolist()))
    assert len(set(masks)) == len(masks)


def test_official_masks_are_distributed_as_published() -> None:
    mask_ids = draw(torch.arange(2000), "official", (8, 64), 400)
    share = share_masked(mask_ids, 512)
    assert share[0] == share[511] == 0
    by_row = share.view(8, 64).mean(1)
    published = share_masked(published_masks(1500, 8, 64, 400), 512).view(8, 64)
    assert (by_row - published.mean(1)).abs().max() < 0.01
    assert (share.view(8, 64) - published).abs().max() < 0.08
    # The ends, left by the rule that keeps the smallest ids.
    assert by_row[0] == pytest.approx(0.41, abs=0.015)
    assert by_row[3:7].tolist() == pytest.approx([0.88] * 4, abs=0.02)
    assert by_row[7] == pytest.approx(0.82, abs=0.015)


def is_official(ids: list[int], N: int, columns: int) -> bool:
    """Whether these are the smallest ids of a union of square blocks."""
    held, last = set(ids), max(ids)

    def whole(start: int, side: int) -> bool:
        cells = (start + columns * i + j for i in range(side) for j in range(side))
        return start >= 0 and all(c in held or c > last or not 0 < c < N for c in cells)

    def covered(i: int, side: int) -> bool:
        corners = (i - columns * a - b for a in range(side) for b in range(side))
        return any(whole(corner, side) for corner in corners)

    return any(all(covered(i, side) for i in ids) for side in (3, 4, 5))


def test_masks_obey_the_published_rules() -> None:
    for clip, case in enumerate(REFERENCE):
        N, columns, M = case["n_patches"], case["n_time"], case["n_masked"]
        ours = draw(torch.tensor([clip]), "official", (N // columns, columns), M)
        for ids in (case["first_sorted"].tolist(), ours[0].tolist()):
            assert len(ids) == M and all(a < b for a, b in pairwise(ids))
            assert ids[0] > 0 and ids[-1] < N - 1
            assert is_official(ids, N, columns)
    assert not is_official([1, 2, 3, 65, 66, 67, 130], 512, 64)


@pytest.mark.parametrize("kind", ["uniform", "random"])
def test_no_place_is_favoured(kind: MaskKind) -> None:
    count, N, M = 3000, 8 * 16, 96
    share = share_masked(draw(torch.arange(count), kind, (8, 16), M), N)
    p = M / N
    noise = (p * (1 - p) / count) ** 0.5
    tolerance = 5 * noise + (0.01 if kind == "uniform" else 0)
    assert (share - p).abs().max() < tolerance


def test_uniform_masks_are_clusters() -> None:
    def neighbours(kind: MaskKind) -> float:
        hidden = torch.zeros(200, 512)
        hidden.scatter_(1, draw(torch.arange(200), kind, (8, 64), 150), 1)
        rows = hidden.view(200, 8, 64)
        return (rows[..., 1:] * rows[..., :-1]).sum().item() / hidden.sum().item()

    assert neighbours("uniform") > 0.6 > 0.4 > neighbours("random")


def test_random_masks_are_all_subsets() -> None:
    masks = draw(torch.arange(6000), "random", (1, 4), 2)
    counts = masks.unique(dim=0, return_counts=True)[1]
    assert len(counts) == 6
    assert (counts.double() / 6000 - 1 / 6).abs().max() < 0.025


@pytest.mark.parametrize("kind", KINDS)
def test_too_many_masked_patches(kind: MaskKind) -> None:
    most = 126 if kind == "official" else 128
    assert draw(torch.arange(2), kind, (8, 16), most).shape == (2, most)
    message = f"draw_masks: {kind} masks of a 8 x 16 grid cover 1 to {most} patches"
    for wrong in (0, most + 1):
        with pytest.raises(ValueError, match=re.escape(message)):
            draw(torch.arange(2), kind, (8, 16), wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"kind": "clusters"},
            "kind must be one of official, uniform, random, inverse_blocks, got",
        ),
        ({"epochs": torch.zeros(1).long()}, "one epoch for each of 2 clips, got [1]"),
        ({"valid_columns": torch.ones(2, 1).long()}, "one number of valid columns for each of 2"),
        ({"clip_ids": torch.zeros(1, 2).long()}, "clip_ids must be [B], got [1, 2]"),
    ],
)
def test_error_messages(wrong: dict[str, Any], message: str) -> None:
    good = {"clip_ids": torch.arange(2), "epochs": torch.arange(2), "kind": "random"}
    with pytest.raises(ValueError, match=re.escape(message)):
        draw_masks(**good | wrong, seed=0, grid=(2, 4), num_masked=3)


def test_masks_from_ids() -> None:
    masks = masks_from_ids(torch.tensor([[4, 0], [1, 2]], dtype=torch.int16), 5)
    assert masks.mask_ids.tolist() == [[0, 4], [1, 2]]
    assert masks.visible_ids.tolist() == [[1, 2, 3], [0, 3, 4]]
    for wrong in ([[1, 1]], [[0, 5]], [[-1, 0]]):
        with pytest.raises(ValueError, match="distinct numbers from 0 to 4"):
            masks_from_ids(torch.tensor(wrong), 5)


def test_no_masks() -> None:
    masks = no_masks(3, (1, 5), torch.device("cpu"))
    assert masks.mask_ids.shape == (3, 0) and masks.num_visible is None
    assert masks.visible_ids.tolist() == [[0, 1, 2, 3, 4]] * 3
    masks = no_masks(2, (2, 3), torch.device("cpu"), torch.tensor([3, 1]))
    assert masks.visible_ids.tolist() == [[0, 1, 2, 3, 4, 5], [0, 3, 1, 2, 4, 5]]
    assert masks.num_visible.tolist() == [6, 2] and masks.num_masked.tolist() == [0, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("grid", "num_masked"), [((8, 16), 100), ((3, 7), 10), ((1, 40), 31), ((2, 2), 1)], ids=str
)
@pytest.mark.parametrize("on", ["torch", "triton"])
def test_a_clip_with_padding_has_the_mask_of_its_own_grid(
    grid: tuple[int, int], num_masked: int, kind: MaskKind, on: str
) -> None:
    (rows, columns), N = grid, grid[0] * grid[1]
    clips, epochs = torch.tensor([0, 5, 2**32 + 3, 8]), torch.tensor([0, 1, -1, 2])
    real = torch.tensor([columns, 1, max(1, columns // 2), columns - 1])
    with on_triton(_draw_masks) if on == "triton" else nullcontext():
        masks = draw_masks(
            clips, epochs, seed=3, kind=kind, grid=grid, num_masked=num_masked, valid_columns=real
        )
    everything = torch.cat(masks[:2], 1).sort(1).values
    assert torch.equal(everything, torch.arange(N).expand(4, -1))
    flags = valid_patches(masks).view(4, rows, columns)
    assert torch.equal(flags, (torch.arange(columns) < real[:, None])[:, None].expand_as(flags))
    for b, own in enumerate(real.tolist()):
        count = int(masks.num_masked[b])
        most = rows * own - 2 if kind == "official" else rows * own
        assert count == max(0, min(-(-num_masked * rows * own // N), most))
        want: list[int] = []
        if count:
            clip, epoch = int(clips[b]), int(epochs[b])
            want = draw_masks_reference(clip, epoch, 3, 0, kind, (rows, own), count)
        assert masks.mask_ids[b, :count].tolist() == [i // own * columns + i % own for i in want]
        for ids, first in ((masks.mask_ids[b], count), (masks.visible_ids[b], rows * own - count)):
            for part in (ids[:first], ids[first:]):
                assert torch.equal(part, part.sort().values)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: MaskKind) -> None:
    torch.library.opcheck(
        _draw_masks,
        (torch.arange(3), torch.arange(3), torch.arange(3), None, None, 1, 0, kind, 4, 8, 20),
    )


def test_fake_tensors_on_a_gpu() -> None:
    with FakeTensorMode():
        clips = torch.empty(3, dtype=torch.int64, device="cuda")
        masks = draw_masks(clips, clips, seed=0, kind="uniform", grid=(4, 8), num_masked=20)
    assert [tuple(ids.shape) for ids in masks[:2]] == [(3, 20), (3, 12)]
    assert {(ids.device.type, ids.dtype) for ids in masks[:2]} == {("cuda", torch.int64)}


def test_compiles_without_a_graph_break() -> None:
    def run(clips: Tensor) -> tuple[Tensor, Tensor]:
        masks = draw_masks(clips, clips, seed=3, kind="official", grid=(4, 8), num_masked=20)
        return masks.mask_ids + 2, masks.visible_ids

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    clips = torch.arange(5)
    for got, want in zip(compiled(clips), run(clips), strict=True):
        assert got.equal(want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 2**62 + 3])
@pytest.mark.parametrize(
    ("grid", "num_masked"),
    [((8, 16), 100), ((3, 7), 10), ((1, 37), 35), ((5, 5), 1), ((2, 16), 30), ((1, 3), 1)],
    ids=str,
)
def test_the_kernel_draws_the_same_bits(
    grid: tuple[int, int], num_masked: int, seed: int, kind: MaskKind
) -> None:
    clips = torch.tensor([0, 5, 123456789, 2**32 + 3, 77])[::2]  # strided
    epochs = torch.tensor([0, 7, -1])

    def run() -> Masks:
        return draw_masks(
            clips, epochs, seed=seed, kind=kind, grid=grid, num_masked=num_masked, stream=1
        )

    want = run()
    with on_triton(_draw_masks):
        got = run()
    assert torch.equal(got.mask_ids, want.mask_ids)
    assert torch.equal(got.visible_ids, want.visible_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_draws_the_same_bits_at_full_size(kind: MaskKind) -> None:
    clips = torch.tensor([12345])
    want = draw(clips, kind, (8, 64), 400)
    with on_triton(_draw_masks):
        assert torch.equal(draw(clips, kind, (8, 64), 400), want)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_draws_the_same_bits_with_few_valid_columns(kind: MaskKind) -> None:
    """Of fewer columns than a cluster is wide, a cluster wraps over several rows."""
    clips, own = torch.arange(16), torch.arange(16) % 4 + 1
    run = partial(draw_masks, clips, clips, seed=3, kind=kind, grid=(8, 16), num_masked=75)
    want = run(valid_columns=own)
    with on_triton(_draw_masks):
        got = run(valid_columns=own)
    assert torch.equal(torch.cat(got[:2], 1), torch.cat(want[:2], 1))


def test_the_kernel_of_an_empty_batch() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    with on_triton(_draw_masks):
        assert draw(none, "uniform", (3, 7), 10).shape == (0, 10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("grid", "num_masked"), [((8, 64), 400), ((1, 512), 400), ((3, 7), 10), ((8, 128), 900)]
)
def test_a_gpu_draws_the_same_bits(grid: tuple[int, int], num_masked: int, kind: MaskKind) -> None:
    clips = torch.arange(1000) * 12345
    got = draw(clips.cuda(), kind, grid, num_masked)
    assert torch.equal(got.cpu(), draw(clips, kind, grid, num_masked))
