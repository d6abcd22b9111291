"""Manifests of sound events, from small copies in their official layouts."""

import os
import shutil
from pathlib import Path

import dataset_trees
import numpy as np
import pytest
from dataset_files import classes, report, silent, written
from dataset_trees import sound, text

from ssast.pipelines.datasets.manifests import write_dataset
from ssast.pipelines.errors import DataError


def test_audioset(trees: dict[str, Path], tmp_path: Path) -> None:
    source, lines = trees["audioset"], []
    paths = write_dataset("audioset", source, tmp_path, lines.append)
    splits = ("balanced_train", "unbalanced_train", "train_2m", "eval")
    assert paths == [tmp_path / f"{split}.json" for split in splits]
    balanced = {
        "balanced/Y--PJHxphWEs.wav": ("/m/09x0r", "/t/dd00088"),
        "balanced/YY0aaaaaaaa__0.000.flac": ("/m/05zppz",),
    }
    unbalanced = {
        "unbalanced/part00/____________70.wav": ("/m/09x0r", "/m/05zppz"),
        "unbalanced/part01/bbbbbbbbb-1_30000_40000.flac": ("/m/09x0r",),
    }
    assert written(tmp_path, "balanced_train", source) == balanced
    assert written(tmp_path, "unbalanced_train", source) == unbalanced
    assert written(tmp_path, "train_2m", source) == balanced | unbalanced
    assert written(tmp_path, "eval", source) == {
        "eval/_/0/-0BIyqJj9ZU_30.000.flac": ("/t/dd00088",)
    }
    assert classes(tmp_path) == [
        ["index", "mid", "display_name"],
        ["0", "/m/09x0r", "Speech"],
        ["1", "/m/05zppz", "Male speech, man speaking"],
        ["2", "/t/dd00088", "Gush"],
    ]
    assert (tmp_path / "labels.csv").read_text() == dataset_trees.CLASSES_CSV
    assert (tmp_path / "missing.txt").read_text() == (
        "balanced_train\tgone0000000\ntrain_2m\tgone0000000\n"
    )
    assert report(tmp_path)["splits"] == {
        "balanced_train": {"clips": 2, "missing": 1},
        "unbalanced_train": {"clips": 2, "missing": 0},
        "train_2m": {"clips": 4, "missing": 1},
        "eval": {"clips": 1, "missing": 0},
    }
    missing = tmp_path / "missing.txt"
    assert lines[0] == f"balanced_train: 2 clips; 1 more are not on disk, see {missing}"
    assert lines[1:] == ["unbalanced_train: 2 clips", lines[2], "eval: 1 clips"]


def test_audioset_weights_count_the_clips_that_are_there(
    trees: dict[str, Path], tmp_path: Path
) -> None:
    write_dataset("audioset", trees["audioset"], tmp_path, silent)
    # of train_2m: Speech 3, Male speech 2, Gush 1
    speech, male, gush = 1000 / 3.01, 1000 / 2.01, 1000 / 1.01
    weights = np.loadtxt(tmp_path / "train_2m_weight.csv", delimiter=",")
    assert weights.tolist() == [speech + gush, male, speech + male, speech]
    weights = np.loadtxt(tmp_path / "balanced_train_weight.csv", delimiter=",")
    assert weights.tolist() == [2000 / 1.01, 1000 / 1.01]
    assert not (tmp_path / "eval_weight.csv").exists()


@pytest.mark.parametrize(
    ("file", "video"),
    [
        ("Yabcdefghij.wav", "Yabcdefghij"),
        ("YYabcdefghij.wav", "Yabcdefghij"),
        ("Yabcdefghij_30.flac", "Yabcdefghij"),
        ("Yabcdefghij_-12.wav", None),
        ("Yabcdefgh_5_30.wav", None),
        ("Yabcdefghi_5_30.wav", "abcdefghi_5"),
        ("abcdefghi_5_30.5_40.5.flac", "abcdefghi_5"),
        ("abcdefghijk_30000_40000.wav", "abcdefghijk"),
        ("abcdefghijk_30-40.wav", "abcdefghijk"),
        ("abcdefghijk.part.wav", None),
        ("abcdefghij.wav", None),
    ],
)
def test_audioset_file_names(
    trees: dict[str, Path], tmp_path: Path, file: str, video: str | None
) -> None:
    source = tmp_path / "copy"
    shutil.copytree(trees["audioset"], source, ignore=shutil.ignore_patterns("eval"))
    text(source / "eval_segments.csv", f"{video or 'abcdefghij0'}, 30.0, 40.0, /m/09x0r\n")
    sound(source / "new/elsewhere" / file)
    if video is None:
        with pytest.raises(DataError, match="split eval: found none of its 1 clips"):
            write_dataset("audioset", source, tmp_path / "out", silent)
    else:
        write_dataset("audioset", source, tmp_path / "out", silent)
        assert list(written(tmp_path / "out", "eval", source)) == [f"new/elsewhere/{file}"]


def test_audioset_without_the_unbalanced_part(trees: dict[str, Path], tmp_path: Path) -> None:
    source, lines = tmp_path / "copy", []
    shutil.copytree(trees["audioset"], source)
    (source / "unbalanced_train_segments.csv").unlink()
    paths = write_dataset("audioset", source, tmp_path / "out", lines.append)
    assert [path.stem for path in paths] == ["balanced_train", "eval"]
    assert lines[-1] == "unbalanced_train, train_2m: left out, no unbalanced_train_segments.csv"
    assert report(tmp_path / "out")["notes"] == lines[-1:]


def test_esc50(trees: dict[str, Path], tmp_path: Path) -> None:
    source = trees["esc50"]
    write_dataset("esc50", source, tmp_path, silent)
    for fold in range(1, 6):
        evaluated = written(tmp_path, f"eval_{fold}", source)
        trained = written(tmp_path, f"train_{fold}", source)
        assert evaluated == {
            f"ESC-50-master/audio/{fold}-{100000 + t}-A-{t}.wav": (f"/m/07rwj{t:02d}",)
            for t in range(50)
        }
        assert len(trained) == 200
        assert {os.path.basename(name)[0] for name in trained} == set("12345") - {str(fold)}
        assert set(trained.values()) == set(evaluated.values())
    assert classes(tmp_path)[1] == ["0", "/m/07rwj00", "dog"]
    assert classes(tmp_path)[50] == ["49", "/m/07rwj49", "category_49"]


def test_fsd50k(trees: dict[str, Path], tmp_path: Path) -> None:
    source = trees["fsd50k"]
    write_dataset("fsd50k", source, tmp_path, silent)
    assert written(tmp_path, "train", source) == {
        "FSD50K.dev_audio/64760.wav": ("/m/05tny_", "/m/0bt9lr"),
        "FSD50K.dev_audio/16401.wav": ("/m/0bt9lr",),
    }
    assert written(tmp_path, "valid", source) == {"FSD50K.dev_audio/16399.wav": ("/m/06mb1",)}
    assert written(tmp_path, "eval", source) == {
        "FSD50K.eval_audio/37199.wav": ("/m/05tny_", "/m/0bt9lr")
    }
    assert classes(tmp_path)[1:] == [
        ["0", "/m/05tny_", "Bark"],
        ["1", "/m/0bt9lr", "Dog"],
        ["2", "/m/06mb1", "Rain"],
    ]
