"""The clips of a fine-tuning: what is held out, and what two splits must not share."""

import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from finetune_runs import load, manifest
from shards import make_recordings, prepare

from ssast.engine.config import Config, from_plain
from ssast.engine.data.labels import read_labelled
from ssast.engine.data.splits import find_splits
from ssast.engine.finetune import finetune
from ssast.pipelines.clips.manifest import write_manifest
from ssast.pipelines.clips.overlap import shared_recordings
from ssast.pipelines.clips.shards import ClipPaths, ShardClip, ShardIndex
from ssast.pipelines.errors import DataError


def config_of(train: Path, valid: Path | None = None, *, loss: str = "ce", **data: float) -> Config:
    paths = {"train": str(train), "valid": None if valid is None else str(valid)}
    return from_plain({"data": paths | data, "finetune": {"loss": loss}})


def labelled(folder: Path, count: int, labels: list[str], *, first: int = 0) -> Path:
    """A manifest of recordings of 6 s, which have the labels in turn."""
    paths = make_recordings(folder, first + count, seconds=6.0)[first:]
    names = [labels[k % len(labels)].split(",") for k in range(count)]
    write_manifest(folder / f"from_{first}.json", paths, names)
    return folder / f"from_{first}.json"


def recordings(clips: ClipPaths) -> set[int]:
    assert isinstance(clips, ShardIndex)
    return set(clips.recordings().tolist())


def test_no_recording_is_trained_on_and_held_out(tmp_path: Path) -> None:
    """Half-overlapping clips of eight recordings."""
    source = labelled(tmp_path / "source", 8, ["low", "high"])
    index = prepare(source, tmp_path / "out", clip_s=2.0, hop_s=1.0)
    assert len(index) == 8 * 5
    splits = find_splits(config_of(tmp_path / "out", valid_share=0.1))
    trained, held = recordings(splits.train.paths), recordings(splits.valid.paths)
    assert not trained & held and len(trained | held) == 8
    assert len(splits.train) + len(splits.valid) == len(index)
    for clips in (splits.train, splits.valid):
        assert (clips.counts() > 0).all()
    assert len(held) == 2  # one of each class: a tenth of 20 clips is less than a recording
    again = find_splits(config_of(tmp_path / "out", valid_share=0.1))
    assert recordings(again.valid.paths) == held


def test_every_class_of_clips_with_several_labels_is_trained_on(tmp_path: Path) -> None:
    """Also one that is nowhere the first label."""
    source = labelled(tmp_path / "source", 12, ["a,rare", "a", "b,rare", "b", "a,b", "b"])
    prepare(source, tmp_path / "out", clip_s=2.0)
    splits = find_splits(config_of(tmp_path / "out", loss="bce", valid_share=0.4))
    assert not recordings(splits.train.paths) & recordings(splits.valid.paths)
    assert splits.classes == ("a", "b", "rare")
    assert (splits.train.counts() > 0).all() and (splits.valid.counts() > 0).all()


def test_clips_without_a_label_are_held_out_like_a_class(tmp_path: Path) -> None:
    """From the manifest through the shards to the splits."""
    paths = make_recordings(tmp_path / "source", 12, seconds=6.0)
    write_manifest(tmp_path / "m.json", paths, [[], ["a"], ["a", "b"]] * 4)
    prepare(tmp_path / "m.json", tmp_path / "out", clip_s=2.0)
    splits = find_splits(config_of(tmp_path / "out", loss="bce", valid_share=0.25))
    assert splits.classes == ("a", "b")
    for clips, count in ((splits.train, 9), (splits.valid, 3)):
        assert (np.diff(clips.offsets) == 0).sum() == count and not clips.single
    for labels, message in (([[]] * 12, "two classes or more, found 0"), (None, "has no labels")):
        write_manifest(tmp_path / "m.json", paths, labels)
        with pytest.raises(DataError, match=message):
            find_splits(config_of(tmp_path / "m.json", loss="bce"))


def test_held_out_clips_that_no_metric_can_rank_are_refused(tmp_path: Path) -> None:
    paths = make_recordings(tmp_path / "source", 6)
    write_manifest(tmp_path / "m.json", paths[:4], [["a"], ["b"], [], []])
    for labels, found in (([[], []], "of no class"), ([["a", "b"]] * 2, "of one class")):
        write_manifest(tmp_path / "v.json", paths[4:], labels)
        with pytest.raises(DataError, match=rf"v\.json: the 2 held-out clips are all {found}"):
            find_splits(config_of(tmp_path / "m.json", tmp_path / "v.json", loss="bce"))
    write_manifest(tmp_path / "v.json", paths[4:], [["a"], []])
    assert find_splits(config_of(tmp_path / "m.json", tmp_path / "v.json", loss="bce")).classes


def test_single_files_are_recordings(tmp_path: Path) -> None:
    """The order of a manifest does not matter."""
    source = labelled(tmp_path / "source", 20, ["low", "high"])
    clips = read_labelled(str(source), ("high", "low"), one_label=True)
    held = find_splits(config_of(source, valid_share=0.2)).valid
    assert Counter(held.indices.tolist()) == {0: 2, 1: 2}
    order = np.random.default_rng(0).permutation(20)
    names = [[clips.classes[clips.indices[row]]] for row in order]
    write_manifest(tmp_path / "other.json", [clips.paths[row] for row in order], names)
    other = find_splits(config_of(tmp_path / "other.json", valid_share=0.2)).valid
    assert sorted(map(str, other.paths)) == sorted(map(str, held.paths))


@pytest.mark.parametrize(
    ("count", "labels", "loss", "message"),
    [
        (1, ["a,b"], "bce", "holds 1 recording, expected two or more: one is held out"),
        (2, ["a", "b"], "ce", "no class has two recordings, expected one to train on"),
    ],
)
def test_too_few_recordings(
    count: int, labels: list[str], loss: str, message: str, tmp_path: Path
) -> None:
    source = labelled(tmp_path / "source", count, labels)
    prepare(source, tmp_path / "out", clip_s=2.0, hop_s=1.0)
    with pytest.raises(DataError, match=f"out: {message}.*; set data.valid") as caught:
        find_splits(config_of(tmp_path / "out", loss=loss))
    assert "\n" not in str(caught.value)


def test_the_same_prepared_folder_is_a_leak(tmp_path: Path) -> None:
    """Also under another name."""
    source = labelled(tmp_path / "source", 4, ["low", "high"])
    prepare(source, tmp_path / "out", clip_s=2.0, hop_s=1.0)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(DataError, match=r"4 recordings of data.train .*also in data.valid"):
        find_splits(config_of(tmp_path / "out", tmp_path / "link"))


def test_recordings_are_compared_not_clips(tmp_path: Path) -> None:
    """Of one prepared folder: other clips of the same recording are a leak."""
    index = prepare(
        labelled(tmp_path / "source", 4, ["low", "high"]), tmp_path / "out", clip_s=2.0, hop_s=1.0
    )
    first, rest = index.subset(np.array([0, 1, 5])), index.subset(np.array([3, 12]))
    (pair,) = shared_recordings(first, rest)
    assert pair == (index[0], index[3])
    assert shared_recordings(first, index.subset(np.array([12, 17]))) == []


@pytest.mark.parametrize("codec", ["flac", "wav"])
def test_folders_that_share_recordings_are_a_leak(codec: str, tmp_path: Path) -> None:
    """Prepared twice, by other names and in another codec: the samples of the clips tell."""
    source = labelled(tmp_path / "source", 4, ["low", "high"])
    prepare(source, tmp_path / "train", clip_s=2.0, hop_s=1.0)
    others = labelled(tmp_path / "source", 4, ["low", "high"], first=4)
    shutil.copy(tmp_path / "source/2.wav", tmp_path / "source/5.wav")
    prepare(others, tmp_path / "valid", codec=codec, clip_s=2.0, hop_s=1.0)
    with pytest.raises(DataError, match=r"5 clips of data.train .*2-00000.flac and .*5-00000"):
        find_splits(config_of(tmp_path / "train", tmp_path / "valid"))
    make_recordings(tmp_path / "source", 8, seconds=6.0)
    prepare(others, tmp_path / "valid", codec=codec, clip_s=2.0, hop_s=1.0)
    assert len(find_splits(config_of(tmp_path / "train", tmp_path / "valid")).valid) == 20


def test_a_copy_in_the_same_folder_is_a_leak(tmp_path: Path) -> None:
    """Two recordings of equal samples, one on each side."""
    source = labelled(tmp_path / "source", 8, ["low", "high"])
    for number in range(2, 8):
        shutil.copy(tmp_path / f"source/{number % 2}.wav", tmp_path / f"source/{number}.wav")
    prepare(source, tmp_path / "out", clip_s=2.0)
    with pytest.raises(DataError, match=r"6 clips of data.train .*also in data.valid"):
        find_splits(config_of(tmp_path / "out", valid_share=0.1))


def test_prepared_clips_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(labelled(tmp_path / "source", 9, ["low", "high", "none"]), tmp_path / "out", clip_s=2.0)
    monkeypatch.setattr(ShardClip, "read", lambda self: pytest.fail(f"{self} was read"))
    monkeypatch.setattr(
        "ssast.pipelines.clips.overlap._digest", lambda *a, **k: pytest.fail("read")
    )
    assert find_splits(config_of(tmp_path / "out")).compared == ""


def test_damaged_sidecars_are_named(tmp_path: Path) -> None:
    source = labelled(tmp_path / "source", 4, ["low", "high"])
    prepare(source, tmp_path / "train", clip_s=2.0)
    shutil.copytree(tmp_path / "train", tmp_path / "valid")
    sidecar = tmp_path / "valid/shards/00000.jsonl"
    sidecar.unlink()
    with pytest.raises(DataError, match=re.escape(f"{sidecar}: cannot be read: No such file")):
        find_splits(config_of(tmp_path / "train", tmp_path / "valid"))
    (tmp_path / "train/report.json").write_text("{}")
    with pytest.raises(DataError, match=r"train/report.json: damaged: prepare the data again"):
        find_splits(config_of(tmp_path / "train"))


def test_a_copy_of_a_clip_is_a_leak(splits, checkpoint, recipe, tmp_path):
    copy = tmp_path / "0_copy.wav"
    copy.write_bytes((splits["train"].parent / "train" / "1_0.wav").read_bytes())
    others = sorted((splits["valid"].parent / "valid").glob("*.wav"))
    valid = manifest(tmp_path / "valid.json", [*others, copy])
    changed = {**splits, "valid": valid}
    with pytest.raises(DataError, match=r"1 clips of data.train .*1_0.wav and .*0_copy.wav"):
        finetune(load(recipe, changed, tmp_path / "run"), checkpoint)
    allowed = load(recipe, changed, tmp_path / "run", finetune__epochs=1,
                   finetune__allow_leakage=True)  # fmt: skip
    assert finetune(allowed, checkpoint) == 0
