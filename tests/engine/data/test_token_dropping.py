"""Which patches fine-tuning keeps: how many, uniform, the same for a clip in any batch."""

from dataclasses import replace

import pytest
import torch
from scipy import stats

from ssast.engine.data.augment import Draw
from ssast.engine.data.token_dropping import KeptPatches, keep_patches
from ssast.engine.finetune_settings import Finetune

GRID = (4, 10)


def draw(count: int, *, seed: int = 0, epoch: int = 0) -> Draw:
    clips = torch.arange(count)
    return Draw(seed, clips, torch.full_like(clips, epoch))


def flags(kept: KeptPatches, grid: tuple[int, int] = GRID) -> torch.Tensor:
    """Which patches are kept, [B, rows, columns] bool."""
    result = torch.zeros(len(kept.ids), grid[0] * grid[1], dtype=torch.bool)
    valid = kept.valid()
    result.scatter_(1, kept.ids, torch.ones_like(kept.ids, dtype=torch.bool))
    if valid is not None:
        result = torch.zeros_like(result)
        for b, count in enumerate(kept.num_valid.tolist()):
            result[b, kept.ids[b, :count]] = True
    return result.view(-1, *grid)


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        (Finetune(drop_tokens=0.2), 32),
        (Finetune(drop_tokens=0.99), 1),
        (Finetune(drop_tokens=1e-6), 40),
        (Finetune(drop_columns=4, drop_rows=1), 18),
        (Finetune(drop_columns=9, drop_rows=3), 1),
        (Finetune(drop_columns=4, drop_rows=1, drop_tokens=0.5), 9),
    ],
)
def test_how_many_are_kept(settings: Finetune, want: int) -> None:
    kept = keep_patches(draw(50), settings, GRID)
    assert kept.ids.shape == (50, want) and kept.num_valid is None
    assert (kept.ids[:, 1:] > kept.ids[:, :-1]).all()
    on = flags(kept)
    rows, columns = on.any(2), on.any(1)
    if not settings.drop_tokens:
        assert torch.equal(on, rows[:, :, None] & columns[:, None])
        assert (rows.sum(1) == 4 - settings.drop_rows).all()
    assert (rows.sum(1) <= 4 - settings.drop_rows).all()
    assert (columns.sum(1) <= 10 - settings.drop_columns).all()
    assert (len(on.flatten(1).unique(dim=0)) > 20) == (want < 40)


@pytest.mark.parametrize(
    "settings", [Finetune(drop_tokens=0.3), Finetune(drop_columns=4, drop_rows=1, drop_tokens=0.2)]
)
def test_no_patch_is_favoured(settings: Finetune) -> None:
    on = flags(keep_patches(draw(4000), settings, GRID)).double()
    share = settings.kept_patches(4, 10, 10) / 40
    noise = (share * (1 - share) / 4000) ** 0.5
    assert (on.mean(0) - share).abs().max() < 4.5 * noise
    assert stats.chisquare(on.sum((0, 2)).numpy()).pvalue > 1e-3
    assert stats.chisquare(on.sum((0, 1)).numpy()).pvalue > 1e-3


def test_a_clip_keeps_the_same_in_any_batch_and_others_in_each_epoch() -> None:
    settings = Finetune(drop_columns=3, drop_rows=1, drop_tokens=0.2)
    together = keep_patches(draw(20), settings, GRID).ids
    every = draw(20)
    for clip in (0, 7, 19):
        alone = Draw(0, every.clips[clip : clip + 1], every.epochs[clip : clip + 1])
        assert torch.equal(keep_patches(alone, settings, GRID).ids[0], together[clip])
    for other in (draw(20, seed=1), draw(20, epoch=1)):
        assert not torch.equal(keep_patches(other, settings, GRID).ids, together)


@pytest.mark.parametrize(
    "settings",
    [
        Finetune(drop_tokens=0.4),
        Finetune(drop_columns=6, drop_rows=2),
        Finetune(drop_columns=9, drop_rows=3, drop_tokens=0.9),
        Finetune(drop_columns=1, drop_tokens=0.01),
    ],
)
def test_a_clip_with_padding_keeps_its_own_patches(settings: Finetune) -> None:
    own = torch.arange(1, 11).repeat(20)
    kept = keep_patches(draw(200), settings, GRID, own)
    assert kept.num_valid is not None and kept.num_valid.min() >= 1
    assert kept.ids.shape == (200, settings.kept_patches(4, 10, 10))
    on = flags(kept)
    assert torch.equal(on.sum((1, 2)), kept.num_valid)
    assert not on[torch.arange(10).expand(200, 4, 10) >= own[:, None, None]].any()
    for b, columns in enumerate(own.tolist()):
        left = columns - settings.drop_columns * columns // 10
        patches = (4 - settings.drop_rows) * left
        assert kept.num_valid[b] == patches - int(patches * settings.drop_tokens + 1e-9)
        assert on[b].any(0).sum() <= left
    whole = keep_patches(draw(200), settings, GRID, torch.full((200,), 10))
    assert torch.equal(whole.ids, keep_patches(draw(200), settings, GRID).ids)


def test_settings_that_drop_nothing_and_all() -> None:
    assert not Finetune().drops
    for change in ({"drop_tokens": 0.1}, {"drop_columns": 1}, {"drop_rows": 1}):
        assert replace(Finetune(), **change).drops
