"""Masks around visible blocks: how many, how often each patch, how clustered, as published."""

import random

import pytest
import torch
from torch import Tensor

from ssast.kernels.masking import draw_masks


def visible_patches(count: int, grid: tuple[int, int], num_visible: int, clones: int = 1) -> Tensor:
    """Which patches are visible, [count * clones, rows, columns] float64."""
    clips = torch.arange(count).repeat_interleave(clones)
    masks = draw_masks(
        clips, torch.zeros_like(clips), seed=3, kind="inverse_blocks", grid=grid,
        num_masked=grid[0] * grid[1] - num_visible, stream=torch.arange(clones).repeat(count),
    )  # fmt: skip
    flags = torch.zeros(len(clips), grid[0] * grid[1], dtype=torch.float64)
    return flags.scatter_(1, masks.visible_ids, 1).view(-1, *grid)


def published(count: int, rows: int, columns: int, num_visible: int) -> Tensor:
    """The rules of the published generator, written down a second time; its area is always 25."""
    rng, flags = random.Random(0), torch.zeros(count, rows, columns, dtype=torch.float64)
    for shown in flags:
        share = num_visible / (rows * columns)
        area = min(5, rows) * min(5, columns)
        for _ in range(max(1, int(rows * columns * (share + 0.07) / area))):
            f, t = rng.randrange(rows), rng.randrange(columns)
            shown[max(0, f - 2) : f + 3, max(0, t - 2) : t + 3] = 1
        cells = shown.view(-1)
        covered, others = (cells == 1).nonzero().flatten(), (cells == 0).nonzero().flatten()
        surplus = len(covered) - num_visible
        if surplus > 0:
            cells[rng.sample(covered.tolist(), surplus)] = 0
        else:
            cells[rng.sample(others.tolist(), -surplus)] = 1
    return flags


def neighbours(flags: Tensor) -> float:
    """Share of visible patches whose right neighbour is visible."""
    return float((flags[..., 1:] * flags[..., :-1]).sum() / flags[..., :-1].sum())


@pytest.mark.parametrize(
    ("grid", "num_visible"),
    [((8, 64), 102), ((8, 16), 26), ((8, 16), 100), ((1, 512), 102), ((3, 7), 5), ((1, 2), 1)],
    ids=str,
)
def test_masks_are_distributed_as_published(grid: tuple[int, int], num_visible: int) -> None:
    ours = visible_patches(2000, grid, num_visible)
    theirs = published(2000, *grid, num_visible)
    assert (ours.sum((1, 2)) == num_visible).all()
    share = num_visible / (grid[0] * grid[1])
    noise = (share * (1 - share) / 2000) ** 0.5
    assert (ours.mean(0) - theirs.mean(0)).abs().max() < 5 * 2**0.5 * noise
    assert neighbours(ours) == pytest.approx(neighbours(theirs), abs=0.01)


def test_masks_leave_clusters_visible_and_favour_the_middle() -> None:
    flags = visible_patches(1000, (8, 64), 102)
    assert neighbours(flags) > 0.5 > 0.2
    share = flags.mean(0)  # a block around a corner is cut off
    assert share[3:5, 8:-8].mean() > 0.2 > share[[0, 0, -1, -1], [0, -1, 0, -1]].mean() + 0.05


def test_clones_of_a_clip_differ_as_clips_do() -> None:
    """Two clones have as many visible patches in common as two clips: they are independent."""
    flags = visible_patches(200, (8, 32), 52, clones=4).flatten(1).view(200, 4, 256)
    clones = (flags[:, 0] * flags[:, 1:].mean(1)).sum(1).mean()
    clips = (flags[1:, 0] * flags[:-1, 0]).sum(1).mean()
    assert clones == pytest.approx(float(clips), abs=0.9)
    assert len({tuple(row) for row in flags.flatten(0, 1).tolist()}) == 800
