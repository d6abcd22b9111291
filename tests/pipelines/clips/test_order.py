"""The order of the clips: complete, disjoint over ranks, the same for every batch size."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssast.pipelines.clips.order import (
    Weights,
    clips_at,
    crop_position,
    permutation,
    rank_positions,
    read_weights,
)
from ssast.pipelines.errors import DataError


@settings(max_examples=50, deadline=None)
@given(
    start=st.integers(0, 10**12),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 9),
    iterations=st.integers(1, 5),
)
def test_ranks_partition_the_stream(
    start: int, batch_size: int, world_size: int, iterations: int
) -> None:
    parts = [
        rank_positions(start, i, batch_size, rank, world_size)
        for i in range(iterations)
        for rank in range(world_size)
    ]
    everything = np.sort(np.concatenate(parts))
    count = iterations * batch_size * world_size
    np.testing.assert_array_equal(everything, np.arange(start, start + count))


@settings(max_examples=50, deadline=None)
@given(num_clips=st.integers(1, 40), seed=st.integers(0, 2**63 - 1), epochs=st.integers(1, 5))
def test_every_epoch_holds_every_clip_once(num_clips: int, seed: int, epochs: int) -> None:
    clip_ids, passes = clips_at(np.arange(num_clips * epochs), num_clips, seed)
    assert clip_ids.dtype == passes.dtype == np.int64
    for epoch in range(epochs):
        assert sorted(clip_ids[passes == epoch]) == list(range(num_clips))
        np.testing.assert_array_equal(
            clip_ids[passes == epoch], permutation(seed, epoch, num_clips)
        )


@settings(max_examples=50, deadline=None)
@given(positions=st.lists(st.integers(0, 10**6), max_size=20), num_clips=st.integers(1, 100))
def test_a_position_does_not_depend_on_its_company(positions: list[int], num_clips: int) -> None:
    together = clips_at(np.array(positions, dtype=np.int64), num_clips, 7)
    alone = [clips_at(np.array([p]), num_clips, 7) for p in positions]
    assert together[0].tolist() == [int(a[0][0]) for a in alone]
    assert together[1].tolist() == [p // num_clips for p in positions]


def test_seeds_and_epochs_differ() -> None:
    orders = {tuple(permutation(seed, epoch, 50)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_the_order_is_written_in_stone() -> None:
    """A change here would make old checkpoints go on with other clips."""
    assert permutation(1, 2, 8).tolist() == [7, 0, 5, 4, 6, 2, 3, 1]
    assert permutation(0, 0, 5).tolist() == [4, 1, 2, 0, 3]


def test_uniform() -> None:
    """Each clip is equally often at each place: chi-square over 2000 epochs of 5 clips."""
    counts = np.zeros((5, 5))
    for epoch in range(2000):
        counts[np.arange(5), permutation(3, epoch, 5)] += 1
    assert ((counts - 400) ** 2 / 400).sum() < 45  # 16 degrees of freedom: p < 2e-4


@pytest.mark.parametrize(
    ("positions", "num_clips", "seed", "message"),
    [
        ([0], 0, 0, "at least one clip"),
        ([0], 3, -1, "seed must be 0 or more"),
        ([4, -1], 3, 0, "positions must be 0 or more, got -1"),
    ],
)
def test_wrong_arguments(positions: list[int], num_clips: int, seed: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clips_at(np.array(positions), num_clips, seed)


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.floats(0, 100), min_size=1, max_size=40).filter(lambda w: sum(w) > 1e-3),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 1000),
)
def test_a_weighted_epoch_holds_each_clip_as_its_share_says(
    weights: list[float], seed: int, epoch: int
) -> None:
    count = len(weights)
    order = Weights(np.array(weights)).order(seed, epoch)
    often = np.bincount(order, minlength=count)
    share = count * np.array(weights) / sum(weights)
    assert len(order) == count and (np.abs(often - share) < 1 + 1e-6).all()


def shares_and_draws(num_epochs: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Weights in blocks of neighbours, and how often each clip is drawn in each epoch, [E, n]."""
    values = np.tile([1.0, 0.0, 1.0, 0.5], 6)
    weights = Weights(values)
    draws = [np.bincount(weights.order(7, e), minlength=24) for e in range(num_epochs)]
    return 24 * values / values.sum(), np.array(draws)


def test_each_clip_is_drawn_as_its_share_says_over_the_epochs() -> None:
    shares, draws = shares_and_draws()
    error = np.sqrt(0.25 / len(draws))  # at most, of a mean of values that differ by 1
    assert np.abs(draws.mean(0) - shares).max() < 5 * error
    assert (draws[:, shares == 0] == 0).all()


def test_two_clips_are_drawn_as_often_together_as_any_two_are() -> None:
    """And not in step with neighbours, nor with the same clip in the epoch before."""
    shares, draws = shares_and_draws()
    drawn = shares > 0
    centred = (draws - draws.mean(0))[:, drawn]
    error = 1 / np.sqrt(len(draws))
    correlation = np.corrcoef(centred.T)
    pairs = correlation[~np.eye(len(correlation), dtype=bool)]
    # The number of all draws is fixed, so any two are a little less often drawn together.
    assert np.abs(pairs).max() < 1 / (len(correlation) - 1) + 5 * error
    variance = centred.var(0)
    later = (centred[1:] * centred[:-1]).mean(0) / variance
    assert np.abs(later).max() < 5 * error


@pytest.mark.parametrize("seed", range(5))
def test_a_block_of_left_out_clips_does_not_choose_among_the_others(seed: int) -> None:
    """Three microphones in turn, of which the second is left out in blocks of the manifest."""
    values = np.tile([1.0, 0.0, 1.0], 1333)
    order = Weights(values).order(seed, 0)
    first, second, third = (np.isin(order, np.arange(m, len(values), 3)).sum() for m in range(3))
    assert second == 0
    assert abs(first - third) < 5 * np.sqrt(len(values) / 9)


@pytest.mark.parametrize("seed", range(20))
def test_each_epoch_hears_another_part_of_a_set(seed: int) -> None:
    weights = Weights(np.repeat([1.0, 3.0], [600, 200]))  # two thirds of the first set an epoch
    heard = np.zeros(800, dtype=bool)
    for epoch in range(6):
        heard[weights.order(seed, epoch)] = True
        expected = (1 / 3) ** (epoch + 1)
        assert abs((~heard[:600]).mean() - expected) < 5 * np.sqrt(expected / 600)


def test_a_clip_of_weight_zero_at_the_end_is_never_drawn() -> None:
    values = np.append(np.full(999, 0.1), 0.0)
    assert all(Weights(values).order(1, epoch).max() < 999 for epoch in range(50))


def test_a_weighted_stream_is_a_function_of_seed_and_position() -> None:
    weights = Weights(np.array([0.0, 1.0, 5.0, 2.0]))
    ids, draws = clips_at(np.arange(4000), 4, 7, weights)
    np.testing.assert_allclose(np.bincount(ids) / 4000, [0, 1 / 8, 5 / 8, 2 / 8], atol=0.02)
    assert draws.tolist() == list(range(4000))
    some = np.array([3999, 5, 17])
    assert clips_at(some, 4, 7, weights)[0].tolist() == ids[some].tolist()
    assert clips_at(np.arange(4000), 4, 8, weights)[0].tolist() != ids.tolist()


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, -1.0], [1.0, np.nan], [np.inf, 1.0]])
def test_wrong_weights(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite, 0 or more"):
        Weights(np.array(values))


def test_crops_are_spread_evenly_and_repeatable() -> None:
    places = [crop_position(3, clip, epoch) for clip in range(40) for epoch in range(40)]
    assert min(places) >= 0 and max(places) < 1 and len(set(places)) == 1600
    counts = np.histogram(places, bins=10, range=(0, 1))[0]
    assert (np.abs(counts - 160) < 5 * np.sqrt(160)).all()
    assert crop_position(3, 5, 7) == places[5 * 40 + 7] != crop_position(4, 5, 7)


def test_weights_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.csv"
    path.write_text("1.5\n0\n2e-1\n")
    assert set(read_weights(path, 3).order(0, 0).tolist()) <= {0, 2}
    for text, message in (
        ("1\n2\n", "2 weights, but there are 3 training clips"),
        ("1\nx\n2\n", "expected a number a line: could not convert string to float: 'x'"),
        ("1\n-2\n3\n", "finite, 0 or more"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_weights(path, 3)
    with pytest.raises(DataError, match="No such file"):
        read_weights(tmp_path / "missing", 3)
