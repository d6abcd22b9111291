"""Manifests of every data set: names, folders, earlier runs, the command."""

import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from dataset_files import classes, contents, report, silent
from dataset_trees import TREES, text

from ssast.engine.cli.main import main
from ssast.pipelines.clips.manifest import read_manifest
from ssast.pipelines.datasets import manifests
from ssast.pipelines.datasets.manifests import DATASETS, write_dataset
from ssast.pipelines.errors import DataError


def test_every_data_set_has_a_tree() -> None:
    assert list(DATASETS) == list(TREES)


@pytest.mark.parametrize("name", TREES)
def test_the_same_copy_gives_the_same_files(
    name: str, trees: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(name, trees[name], tmp_path / "out", silent)
    first = contents(tmp_path / "out")
    assert sorted(first) == sorted([*report(tmp_path / "out")["files"], "report.json"])
    real = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: sorted(real(path), reverse=True))
    monkeypatch.chdir(trees[name])
    write_dataset(name, Path("."), Path(os.path.relpath(tmp_path / "out")), silent)
    assert contents(tmp_path / "out") == first


@pytest.mark.parametrize("name", TREES)
def test_every_clip_exists_is_labelled_and_is_in_one_split_of_a_fold(
    name: str, trees: dict[str, Path], tmp_path: Path
) -> None:
    paths = write_dataset(name, trees[name], tmp_path, silent)
    known = {row[1] for row in classes(tmp_path)} if name != "librispeech" else set()
    splits = {path.stem: read_manifest(path) for path in paths}
    for split, manifest in splits.items():
        assert all(os.path.isabs(path) and os.path.isfile(path) for path in manifest.paths)
        if name == "librispeech":
            assert manifest.labels is None
        else:
            assert manifest.labels is not None
            assert {label for labels in manifest.labels for label in labels} <= known
        if (tmp_path / f"{split}_weight.csv").exists():
            weights = np.loadtxt(tmp_path / f"{split}_weight.csv", ndmin=1)
            assert weights.shape == (len(manifest),)
            assert (weights > 0).all()
    unions = {"train_2m", "train-960"}
    folds = {re.sub(r"\D*(\d?)$", r"\1", split) for split in splits} if "eval_1" in splits else {""}
    for fold in folds:
        members = [s for s in splits if s.endswith(fold) and s not in unions]
        counted = Counter(path for split in members for path in splits[split].paths)
        assert set(counted.values()) == {1}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("esc-50", "no data set 'esc-50'; did you mean esc50?"),
        ("SpeechCommands", "no data set 'SpeechCommands'; did you mean speechcommands_v"),
        ("xyz", "no data set 'xyz'; known: audioset, librispeech, "),
    ],
)
def test_unknown_names(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        write_dataset(name, tmp_path, tmp_path / "out", silent)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    text(tmp_path / "file", "x")
    for name in ("nowhere", "file"):
        with pytest.raises(DataError, match=f"{name}: expected the folder of esc50, found no fold"):
            write_dataset("esc50", tmp_path / name, tmp_path / "out", silent)


def test_the_folder_of_the_audio_is_not_written_to(trees: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="the manifests need a folder of their own"):
        write_dataset("fsd50k", trees["fsd50k"], trees["fsd50k"] / ".", silent)


@pytest.mark.parametrize(
    ("content", "found"),
    [('{"data_set": "esc50"}', "esc50"), ("[]", "something else"), ("{", "something else")],
)
def test_another_data_set_in_the_output_folder(
    content: str, found: str, trees: dict[str, Path], tmp_path: Path
) -> None:
    text(tmp_path / "report.json", content)
    message = f"expected an empty folder or manifests of fsd50k, found the report.json of {found}"
    with pytest.raises(DataError, match=message):
        write_dataset("fsd50k", trees["fsd50k"], tmp_path, silent)
    assert contents(tmp_path) == {"report.json": content.encode()}


def test_an_output_folder_that_cannot_be_written(trees: dict[str, Path], tmp_path: Path) -> None:
    text(tmp_path / "file", "x")
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "file"))) as caught:
        write_dataset("fsd50k", trees["fsd50k"], tmp_path / "file" / "out", silent)
    assert "\n" not in str(caught.value)


def raise_interrupt(*_: object) -> str:
    raise KeyboardInterrupt


@pytest.mark.parametrize("file", ["labels.csv", "train.json"])
def test_files_of_the_user_in_the_output_folder(
    file: str, trees: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text(tmp_path / file, "mine")
    with pytest.raises(DataError, match=f"{file}: exists already"):
        write_dataset("fsd50k", trees["fsd50k"], tmp_path, silent)
    assert contents(tmp_path) == {file: b"mine"}
    (tmp_path / file).unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(manifests, "_summary", raise_interrupt)
        write_dataset("fsd50k", trees["fsd50k"], tmp_path, silent)
    assert report(tmp_path)["unfinished"]
    write_dataset("fsd50k", trees["fsd50k"], tmp_path, silent)  # goes over what a killed run left
    assert "unfinished" not in report(tmp_path)


def test_what_an_earlier_run_left_is_replaced(trees: dict[str, Path], tmp_path: Path) -> None:
    source, out = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(trees["librispeech"], source)
    text(out / "mine.txt", "stays")
    write_dataset("librispeech", source, out, silent)
    shutil.rmtree(source / "LibriSpeech/dev-clean")
    content = report(out)
    content["files"] += ["../outside.txt", str(tmp_path / "absolute.txt")]
    text(out / "report.json", json.dumps(content))
    text(tmp_path / "outside.txt", "stays")
    text(tmp_path / "absolute.txt", "stays")
    write_dataset("librispeech", source, out, silent)
    assert not (out / "dev-clean.json").exists()
    assert "dev-clean.json" not in report(out)["files"]
    for file in (out / "mine.txt", tmp_path / "outside.txt", tmp_path / "absolute.txt"):
        assert file.read_text() == "stays"


def test_the_command(
    trees: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "manifests", "fsd50k", str(trees["fsd50k"]), "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        "train: 2 clips",
        "valid: 1 clips",
        "eval: 1 clips",
        *(str(tmp_path / f"{split}.json") for split in ("train", "valid", "eval")),
    ]
    assert main(["data", "manifests", "fsd", str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err == "ssast: error: no data set 'fsd'; did you mean fsd50k?\n"


def test_the_help_names_every_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "manifests", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in DATASETS)
