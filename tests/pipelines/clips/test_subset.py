"""The clips of bounded validations: always the same, and each class or set has its share."""

import random
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from shards import make_recordings, prepare

from ssast.pipelines.clips.mix import MixedClips, select
from ssast.pipelines.clips.shards import ShardIndex
from ssast.pipelines.clips.subset import draw_clips

LABELS = st.lists(st.sets(st.integers(0, 6), max_size=3).map(tuple), min_size=1, max_size=80)
SINGLE = st.lists(st.integers(0, 6).map(lambda number: (number,)), min_size=1, max_size=80)


def names(count: int) -> list[str]:
    return [f"{number:03d}.wav" for number in range(count)]


@settings(max_examples=200, deadline=None)
@given(labels=LABELS | SINGLE, count=st.integers(1, 90), seed=st.integers(0, 99))
def test_classes_have_their_share_in_any_order(
    labels: list[tuple[int, ...]], count: int, seed: int
) -> None:
    total, paths = len(labels), names(len(labels))
    drawn = draw_clips(paths, count, labels)
    assert len(drawn) == len(set(drawn.tolist())) == min(count, total)
    count = len(drawn)
    order = random.Random(seed).sample(range(total), total)
    again = draw_clips([paths[row] for row in order], count, [labels[row] for row in order])
    assert sorted(order[row] for row in again) == drawn.tolist()
    groups: dict[int, set[int]] = {}
    for row, own in enumerate(labels):
        for label in own or (-1,):
            groups.setdefault(label, set()).add(row)
    kept = {label: len(rows & set(drawn.tolist())) for label, rows in groups.items()}
    if count >= len(groups):
        assert all(kept.values())
    if all(len(own) <= 1 for own in labels):
        # What the rarest classes have beyond their share, the most frequent ones lack.
        extra = sum(count * len(rows) < total for rows in groups.values())
        for label, rows in groups.items():
            assert count * len(rows) // total - extra <= kept[label]
            assert kept[label] <= max(1, count * len(rows) // total) + len(groups)


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5), count=st.integers(1, 200))
def test_each_set_of_a_mix_has_its_share(sizes: list[int], count: int) -> None:
    parts = [[f"{number}/{name}" for name in names(size)] for number, size in enumerate(sizes)]
    shares = [2.0**number for number in range(len(sizes))]
    clips = MixedClips(parts, shares)
    rows = draw_clips(clips, count)
    some = select(clips, rows)
    assert isinstance(some, MixedClips)
    assert list(some) == [clips[row] for row in rows] and len(some) == min(count, len(clips))
    assert len(some.parts) == (len(parts) if count >= len(parts) else count)
    for part, share in zip(some.parts, some.shares, strict=True):
        assert share == 2.0 ** int(str(part[0]).split("/")[0])
    assert set(some) <= set(clips)


def test_other_numbers_of_clips_are_of_the_whole_set() -> None:
    """Every tenth clip, wherever it stands in the manifest: no stretch of it is left out."""
    rows = draw_clips(names(1000), 100)
    halves = np.bincount(rows // 500, minlength=2)
    assert abs(halves[0] - halves[1]) < 30
    assert len(set(np.diff(rows).tolist())) > 5  # not equally spaced: recordings may be sorted


def test_recordings_have_their_share(tmp_path: Path) -> None:
    """Eight recordings of five clips: of ten clips, one or two are of each."""
    index = prepare_eight(tmp_path)
    drawn = select(index, draw_clips(index, 10))
    assert isinstance(drawn, ShardIndex)
    each = np.bincount(drawn.recordings(), minlength=8)
    assert each.sum() == 10 and each.min() == 1 and each.max() == 2
    mix = MixedClips([index, names(40)], [1.0, 1.0])
    some = select(mix, draw_clips(mix, 20))
    assert isinstance(some, MixedClips) and [len(part) for part in some.parts] == [10, 10]
    assert isinstance(some.parts[0], ShardIndex)
    assert np.bincount(some.parts[0].recordings(), minlength=8).max() == 2


def prepare_eight(folder: Path) -> ShardIndex:
    make_recordings(folder / "source", 8, seconds=6.0)
    return prepare(folder / "source", folder / "out", clip_s=2.0, hop_s=1.0)
