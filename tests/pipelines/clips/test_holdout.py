"""What is held out: whole recordings, of every class, whatever the order of the clips."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sounds import tone, write

from ssast.pipelines.audio.convert import Recipe
from ssast.pipelines.clips.holdout import assign_folds, hold_out, hold_out_clips, recordings_of
from ssast.pipelines.clips.order import permutation
from ssast.pipelines.clips.shards import ShardIndex
from ssast.pipelines.errors import DataError
from ssast.pipelines.prepare.pack import Packing, prepare_shards

SHARES = st.floats(0.01, 0.5)
SINGLE = st.lists(  # recordings: how many clips, and the one class of all of them
    st.tuples(st.integers(1, 12), st.integers(0, 5).map(lambda k: (k,))), min_size=1, max_size=60
)
SEVERAL = st.lists(
    st.tuples(st.integers(1, 12), st.sets(st.integers(0, 5), min_size=1, max_size=4).map(tuple)),
    min_size=1,
    max_size=60,
)


def clips_of(found: list[tuple[int, tuple[int, ...]]]) -> tuple[list[str], list[tuple[int, ...]]]:
    """Recording and labels of each clip."""
    rows = [(f"r{n}", labels) for n, (count, labels) in enumerate(found) for _ in range(count)]
    return [name for name, _ in rows], [labels for _, labels in rows]


def recordings_by_class(
    recordings: list[str], labels: list[tuple[int, ...]], rows: np.ndarray
) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for row in rows:
        for label in labels[row]:
            found.setdefault(label, set()).add(recordings[row])
    return found


def split(
    recordings: list[str], share: float, labels: list[tuple[int, ...]] | None
) -> tuple[np.ndarray, np.ndarray]:
    held = hold_out(recordings, share, labels)
    return np.flatnonzero(~held), np.flatnonzero(held)


@settings(max_examples=300, deadline=None)
@given(found=SINGLE | SEVERAL, share=SHARES, labelled=st.booleans(), seed=st.integers(0, 99))
def test_recordings_stay_together_in_any_order(
    found: list[tuple[int, tuple[int, ...]]], share: float, labelled: bool, seed: int
) -> None:
    recordings, names = clips_of(found)
    labels = names if labelled else None
    try:
        train, held = split(recordings, share, labels)
    except DataError:
        each = recordings_by_class(recordings, names, np.arange(len(names)))
        assert len(found) < 2 or (labelled and not all(len(group) > 1 for group in each.values()))
        return
    assert len(train) and len(held) and len(train) + len(held) == len(recordings)
    assert not {recordings[row] for row in train} & {recordings[row] for row in held}
    order = random.Random(seed).sample(range(len(recordings)), len(recordings))
    again = hold_out(
        [recordings[row] for row in order],
        share,
        [names[row] for row in order] if labelled else None,
    )
    assert sorted(order[row] for row in np.flatnonzero(again)) == list(held)


@settings(max_examples=300, deadline=None)
@given(found=SINGLE, share=SHARES)
def test_every_class_of_two_recordings_is_on_both_sides(
    found: list[tuple[int, tuple[int, ...]]], share: float
) -> None:
    recordings, labels = clips_of(found)
    every = recordings_by_class(recordings, labels, np.arange(len(labels)))
    assume(any(len(group) > 1 for group in every.values()))
    train, held = split(recordings, share, labels)
    trained = recordings_by_class(recordings, labels, train)
    kept = recordings_by_class(recordings, labels, held)
    sizes = Counter(recordings)
    for label, group in every.items():
        assert trained[label]
        assert (label in kept) == (len(group) > 1)
        if label not in kept:
            continue
        of_class = [sizes[name] for name in group]
        wanted = max(1, round(share * sum(of_class)))
        count = sum(sizes[name] for name in kept[label])
        # At most twice the share, or one recording, the smallest.
        assert count <= 2 * wanted or (len(kept[label]) == 1 and count == min(of_class))
        # Too few only if every other one is too large, or must be trained on.
        others = [sizes[name] for name in group - kept[label]]
        assert count >= wanted or len(others) == 1 or min(others) + count > 2 * wanted


@settings(max_examples=300, deadline=None)
@given(found=SEVERAL, share=SHARES)
def test_with_several_labels_every_class_is_trained_on(
    found: list[tuple[int, tuple[int, ...]]], share: float
) -> None:
    recordings, labels = clips_of(found)
    every = recordings_by_class(recordings, labels, np.arange(len(labels)))
    assume(all(len(group) > 1 for group in every.values()))
    train, _ = split(recordings, share, labels)
    assert recordings_by_class(recordings, labels, train).keys() == every.keys()


@settings(max_examples=100, deadline=None)
@given(count=st.integers(2, 300), share=SHARES)
def test_of_single_clips_exactly_the_share_is_held_out(count: int, share: float) -> None:
    held = hold_out(np.arange(count), share)
    wanted = max(1, round(share * count))
    assert sorted(np.flatnonzero(held)) == sorted(permutation(0, 0, count)[:wanted])


@settings(max_examples=50, deadline=None)
@given(recordings=st.lists(st.integers(0, 40), min_size=2, max_size=60), share=SHARES)
def test_without_labels_all_clips_are_of_one_class(recordings: list[int], share: float) -> None:
    """Nothing is sorted then: the same clips are held out, whatever numbers or names are given."""
    assume(len(set(recordings)) > 1)
    numbers = np.array(recordings)
    held = hold_out(numbers, share).tolist()
    assert held == hold_out(numbers, share, [("all",)] * len(numbers)).tolist()
    assert held == hold_out(10**12 * (numbers - 20), share).tolist()  # too far apart to count


def test_rare_classes_come_first() -> None:
    """Clips of 40 recordings, a few of which have a second, rare label."""
    labels = [("speech", "dog") if k in (3, 17) else ("speech",) for k in range(40)]
    held = hold_out(np.arange(40), 0.1, labels)
    assert held.sum() == 4
    assert sum("dog" in labels[row] for row in np.flatnonzero(held)) == 1


def test_a_rare_class_does_not_take_a_common_one_along() -> None:
    """Of two recordings with the rare class, one has most windows of the common one."""
    for seed in range(20):
        names = random.Random(seed).sample(range(1000), 20)
        sizes = [1500, *[50] * 19]
        recordings = np.repeat(names, sizes)
        labels = [("quiet",)] * len(recordings)
        labels[0] = labels[1500] = ("quiet", "rare")
        held = hold_out(recordings, 0.1, labels)
        assert held.mean() <= 0.2 and held[0] + held[1500] == 1


def test_a_large_recording_is_not_held_out() -> None:
    for seed in range(20):
        sizes = [98, 1, 1]
        random.Random(seed).shuffle(sizes)
        held = hold_out(np.repeat(np.arange(3), sizes), 0.02)
        assert held.sum() == 2


@pytest.mark.parametrize(
    ("recordings", "labels", "message"),
    [
        ([], None, "holds 0 recording, expected"),
        (["a"], None, "holds 1 recording, expected two or more"),
        (["a", "a", "a"], None, "holds 1 recording, expected two or more"),
        (["a", "a"], [("x",), ("y",)], "holds 1 recording, expected two or more"),
        (["a", "b"], [("x",), ("y",)], "no class has two recordings, expected"),
    ],
)
def test_what_cannot_be_split(
    recordings: list[str], labels: list[tuple[str]] | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        hold_out(recordings, 0.1, labels)


@settings(max_examples=200, deadline=None)
@given(found=SINGLE, num_folds=st.integers(2, 5), seed=st.integers(0, 99))
def test_folds_hold_whole_recordings_of_every_class(
    found: list[tuple[int, tuple[int, ...]]], num_folds: int, seed: int
) -> None:
    recordings, labels = clips_of(found)
    folds = assign_folds(recordings, labels, num_folds)
    assert len(set(zip(recordings, folds, strict=True))) == len(found)
    assert set(folds) <= set(range(num_folds))
    for label, group in recordings_by_class(recordings, labels, np.arange(len(labels))).items():
        here = Counter(int(f) for f, of in zip(folds, labels, strict=True) if of == (label,))
        if len(group) >= num_folds:
            assert len(here) == num_folds
            largest = max(Counter(recordings)[name] for name in group)
            assert max(here.values()) - min(here.values()) <= largest
    order = random.Random(seed).sample(range(len(recordings)), len(recordings))
    again = assign_folds([recordings[r] for r in order], [labels[r] for r in order], num_folds)
    assert list(again) == [folds[row] for row in order]


def prepared(tmp_path: Path, num_recordings: int, **recipe: float) -> ShardIndex:
    """Shards of recordings of 3 s."""
    (tmp_path / "source").mkdir()
    for number in range(num_recordings):
        samples = tone(48000, seed=number)
        write(tmp_path / f"source/{number}.wav", samples, subtype="PCM_16")
    prepare_shards(
        tmp_path / "source",
        tmp_path / "out",
        Packing(Recipe(**recipe)),  # type: ignore[arg-type]
        progress=False,
        log=lambda line: None,
    )
    return ShardIndex(tmp_path / "out")


def test_shards_know_their_recordings(tmp_path: Path) -> None:
    index = prepared(tmp_path, 4, clip_s=1.0, hop_s=0.5)
    assert recordings_of(index).tolist() == np.repeat(np.arange(4), 5).tolist()
    held = hold_out_clips(index, 0.1)
    assert held.sum() == 5
    assert len(np.unique(recordings_of(index.subset(np.flatnonzero(held))))) == 1
    assert recordings_of(["b.wav", "a.wav", "c.wav"]).tolist() == [1, 0, 2]


def test_clips_of_one_recording_are_split_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = prepared(tmp_path, 1, clip_s=0.5)
    held = hold_out_clips(index, 0.2)
    assert (held.sum(), len(held)) == (1, 6)
    assert "one recording alone: clips of it are held out" in caplog.text


def test_overlapping_clips_of_one_recording_are_not_split(tmp_path: Path) -> None:
    index = prepared(tmp_path, 1, clip_s=1.0, hop_s=0.5)
    with pytest.raises(DataError, match="clips of one recording that overlap cannot be held out"):
        hold_out_clips(index, 0.2)
