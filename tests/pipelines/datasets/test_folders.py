"""Folders that are classes, with and without folders of splits above them."""

from pathlib import Path

import pytest
from dataset_files import classes, silent
from dataset_trees import folders, sound

from ssast.pipelines.clips.manifest import read_manifest
from ssast.pipelines.datasets.manifests import write_dataset
from ssast.pipelines.errors import DataError


def found(manifest: Path, source: Path) -> list[tuple[str, tuple[str, ...]]]:
    read = read_manifest(manifest)
    names = [str(path).removeprefix(f"{source}/") for path in read.paths]
    return list(zip(names, read.labels or (), strict=True))


def test_folders_of_splits(tmp_path: Path) -> None:
    folders(tmp_path / "in")
    paths = write_dataset("folders", tmp_path / "in", tmp_path / "out", silent)
    assert [path.name for path in paths] == ["test.json", "train.json"]
    assert found(tmp_path / "out/test.json", tmp_path / "in") == [("test/dog/a.wav", ("dog",))]
    assert found(tmp_path / "out/train.json", tmp_path / "in") == [
        ("train/cat, wild/c.wav", ("cat, wild",)),
        ("train/dog/a.wav", ("dog",)),
        ("train/dog/more/b.wav", ("dog",)),
    ]
    assert [row[1] for row in classes(tmp_path / "out")[1:]] == ["cat, wild", "dog"]


def test_folders_of_classes(tmp_path: Path) -> None:
    for name in ("test/a", "exam/b", "exam/test/c", "loose"):  # test is a class beside another
        sound(tmp_path / "in" / f"{name}.wav")
    lines: list[str] = []
    (path,) = write_dataset("folders", tmp_path / "in", tmp_path / "out", lines.append)
    expected = [
        ("exam/b.wav", ("exam",)),
        ("exam/test/c.wav", ("exam",)),
        ("test/a.wav", ("test",)),
    ]
    assert (path.name, found(path, tmp_path / "in")) == ("clips.json", expected)
    assert lines[-1] == "1 sounds in no folder of a class are left out"


def test_splits_beside_other_folders(tmp_path: Path) -> None:
    """Two that are named like splits are no classes: the data set would be of train and test."""
    for name in ("train/dog/a", "test/dog/b", "extra/dog/c", "unused/d"):
        sound(tmp_path / "in" / f"{name}.wav")
    with pytest.raises(DataError, match=r"in: test, train are splits, .* 'extra', 'unused'"):
        write_dataset("folders", tmp_path / "in", tmp_path / "out", silent)
    assert not (tmp_path / "out/clips.json").exists()


def test_validate_is_a_split(tmp_path: Path) -> None:
    for name in ("train/dog/a", "validate/dog/b", "validation/dog/c"):
        sound(tmp_path / "in" / f"{name}.wav")
    paths = write_dataset("folders", tmp_path / "in", tmp_path / "out", silent)
    assert [path.name for path in paths] == ["train.json", "validate.json", "validation.json"]


def test_no_folders(tmp_path: Path) -> None:
    sound(tmp_path / "in" / "a.wav")
    with pytest.raises(DataError, match="expected folders of sounds, one for each class, found no"):
        write_dataset("folders", tmp_path / "in", tmp_path / "out", silent)
