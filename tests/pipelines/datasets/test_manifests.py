"""Manifests of the data sets of the paper, from small copies in their official layouts."""

import csv
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import dataset_trees
import numpy as np
import pytest
import soundfile
from dataset_trees import RATE_HZ, TREES, sound, text

from ssast.engine.cli.main import main
from ssast.pipelines.clips.manifest import read_manifest
from ssast.pipelines.datasets.manifests import DATASETS, write_dataset
from ssast.pipelines.errors import DataError


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    roots = {name: tmp_path_factory.mktemp(name) for name in TREES}
    for name, make in TREES.items():
        make(roots[name])
    return roots


def silent(line: str) -> None:
    pass


def written(out: Path, split: str, source: Path) -> dict[str, tuple[str, ...] | None]:
    """Labels by path, relative to the copy, or to the output folder with a leading '@'."""
    manifest = read_manifest(out / f"{split}.json")
    labels = manifest.labels or [None] * len(manifest)
    made = f"{out}{os.sep}"
    names = [
        f"@{path.removeprefix(made)}" if path.startswith(made) else os.path.relpath(path, source)
        for path in manifest.paths
    ]
    return dict(zip(names, labels, strict=True))


def classes(out: Path) -> list[list[str]]:
    with open(out / "labels.csv", encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_data_set_has_a_tree() -> None:
    assert list(DATASETS) == list(TREES)


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


def test_librispeech(trees: dict[str, Path], tmp_path: Path) -> None:
    source, lines = trees["librispeech"], []
    write_dataset("librispeech", source, tmp_path, lines.append)
    parts = {
        "train-clean-100": ["103/1240/103-1240-0000.flac", "103/1240/103-1240-0001.flac"],
        "train-clean-360": ["100/121669/100-121669-0000.flac"],
        "train-other-500": ["20/205/20-205-0000.flac"],
        "dev-clean": ["84/121123/84-121123-0000.flac"],
        "test-other": ["367/130732/367-130732-0000.flac"],
    }
    expected = {
        part: [f"LibriSpeech/{part}/{name}" for name in names] for part, names in parts.items()
    }
    expected["train-960"] = [n for p, names in expected.items() if p[:5] == "train" for n in names]
    assert {p.stem for p in tmp_path.glob("*.json")} == {*expected, "report"}
    for split, names in expected.items():
        assert written(tmp_path, split, source) == dict.fromkeys(names)
    assert not (tmp_path / "labels.csv").exists()
    assert lines[-2:] == [
        "dev-other: left out, there is no such folder",
        "test-clean: left out, there is no such folder",
    ]


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


def test_speechcommands_v2(trees: dict[str, Path], tmp_path: Path) -> None:
    source = trees["speechcommands_v2"]
    write_dataset("speechcommands_v2", source, tmp_path, silent)
    table = classes(tmp_path)
    assert len(table) == 36
    assert table[1] == ["0", "/m/spcmd00", "backward"]
    assert table[29] == ["28", "/m/spcmd28", "yes"]
    assert table[35] == ["34", "/m/spcmd34", "one"]
    label = {name: mid for _, mid, name in table[1:]}
    assert set(label) == set(dataset_trees.WORDS_V2.split())
    for split, speaker in (("train", "aa"), ("valid", "bb"), ("eval", "cc")):
        expected = {f"{w}/{speaker}_nohash_0.wav": (label[w],) for w in label}
        if split == "train":
            expected["yes/aa_nohash_1.wav"] = (label["yes"],)
        assert written(tmp_path, split, source) == expected


def test_speechcommands_v1(trees: dict[str, Path], tmp_path: Path) -> None:
    source = trees["speechcommands_v1"]
    write_dataset("speechcommands_v1", source, tmp_path, silent)
    commands, names = dataset_trees.COMMANDS, dataset_trees.CLASSES_V1
    assert classes(tmp_path)[1:] == [[str(i), name, name] for i, name in enumerate(names)]
    label = {w: w if w in commands else "_unknown_" for w in dataset_trees.WORDS_V1.split()}
    silence = {
        # 12 s: clips begin every 0.25 s in [0, 9.6), [9.6, 10.8), [10.8, 12) and end there, too;
        # 10 s: in [0, 8), [8, 9), [9, 10)
        "train": {"pink_noise": 35, "running_tap": 29},
        "valid": {"pink_noise": 1, "running_tap": 1},
        "eval": {"pink_noise": 1, "running_tap": 1},
    }
    for split, speaker in (("train", "aa"), ("valid", "bb"), ("eval", "cc")):
        expected = {f"speech_commands_v0.01/{w}/{speaker}_nohash_0.wav": (label[w],) for w in label}
        if split == "train":
            expected["speech_commands_v0.01/yes/aa_nohash_1.wav"] = ("yes",)
        for recording, count in silence[split].items():
            for n in range(count):
                expected[f"@silence/{split}/{recording}_{n:04d}.wav"] = ("_silence_",)
        assert written(tmp_path, split, source) == expected
    assert written(tmp_path, "eval_superb", source) == {
        f"speech_commands_test_set_v0.01/{name}/dd_nohash_0.wav": (name,) for name in names
    }


def test_silence_is_copied_and_no_sample_is_in_two_splits(
    trees: dict[str, Path], tmp_path: Path
) -> None:
    source = trees["speechcommands_v1"] / "speech_commands_v0.01"
    write_dataset("speechcommands_v1", source, tmp_path, silent)
    for recording in ("pink_noise", "running_tap"):
        noise, _ = soundfile.read(source / f"_background_noise_/{recording}.wav", dtype="int16")
        used: dict[str, set[int]] = {}
        for split in ("train", "valid", "eval"):
            used[split] = set()
            for path in sorted((tmp_path / "silence" / split).glob(f"{recording}_*.wav")):
                clip, rate_hz = soundfile.read(path, dtype="int16")
                assert (len(clip), rate_hz) == (RATE_HZ, RATE_HZ)
                starts = np.flatnonzero(noise[: len(noise) - RATE_HZ + 1] == clip[0])
                (start,) = (s for s in starts if np.array_equal(noise[s : s + RATE_HZ], clip))
                used[split] |= set(range(start, start + RATE_HZ))
        assert not used["train"] & used["valid"]
        assert not used["train"] & used["eval"]
        assert not used["valid"] & used["eval"]


def test_speechcommands_v1_weights_make_the_classes_equal(
    trees: dict[str, Path], tmp_path: Path
) -> None:
    write_dataset("speechcommands_v1", trees["speechcommands_v1"], tmp_path, silent)
    weights = np.loadtxt(tmp_path / "train_weight.csv")
    labels = read_manifest(tmp_path / "train.json").labels
    assert labels is not None
    shares: Counter[str] = Counter()
    for (label,), weight in zip(labels, weights, strict=True):
        shares[label] += weight
    assert len(shares) == 12
    assert list(shares.values()) == pytest.approx([len(labels)] * 12)


def test_speechcommands_v1_without_the_test_archive(trees: dict[str, Path], tmp_path: Path) -> None:
    source, lines = tmp_path / "copy", []
    shutil.copytree(trees["speechcommands_v1"] / "speech_commands_v0.01", source)
    paths = write_dataset("speechcommands_v1", source, tmp_path / "out", lines.append)
    assert [path.stem for path in paths] == ["train", "valid", "eval"]
    archive = tmp_path / "speech_commands_test_set_v0.01"
    assert lines[-1] == f"eval_superb: left out, there is no {archive}"


def test_voxceleb1(trees: dict[str, Path], tmp_path: Path) -> None:
    source = trees["voxceleb1"]
    write_dataset("voxceleb1", source, tmp_path, silent)
    assert written(tmp_path, "train", source) == {
        "dev/wav/id10003/tCq2LcKO6xY/00002.wav": ("id10003",),
        "dev/wav/id11251/K5zRxtXc27s/00001.wav": ("id11251",),
    }
    assert written(tmp_path, "valid", source) == {
        "dev/wav/id11251/K5zRxtXc27s/00002.wav": ("id11251",)
    }
    assert written(tmp_path, "eval", source) == {
        "test/wav/id10003/na8-QEFmj44/00003.wav": ("id10003",)
    }
    table = classes(tmp_path)
    assert len(table) == 1252
    assert table[1] == ["0", "id10001", "id10001"]
    assert table[1251] == ["1250", "id11251", "id11251"]
    assert report(tmp_path)["classes"] == 1251


def test_voxceleb1_in_one_folder(trees: dict[str, Path], tmp_path: Path) -> None:
    for layout in ("wav", "."):
        source, out = tmp_path / layout / "copy", tmp_path / layout / "out"
        shutil.copytree(trees["voxceleb1"] / "dev/wav", source / layout)
        shutil.copytree(trees["voxceleb1"] / "test/wav", source / layout, dirs_exist_ok=True)
        shutil.copy(trees["voxceleb1"] / "iden_split.txt", source)
        write_dataset("voxceleb1", source, out, silent)
        assert {s: c["clips"] for s, c in report(out)["splits"].items()} == {
            "train": 2,
            "valid": 1,
            "eval": 1,
        }


def test_iemocap(trees: dict[str, Path], tmp_path: Path) -> None:
    source = trees["iemocap"]
    write_dataset("iemocap", source, tmp_path, silent)
    turns = {"F000": "neu", "F001": "hap", "M001": "ang", "M002": "hap", "MXX0": "sad"}
    sessions = {}
    for k in range(1, 6):
        folder = f"IEMOCAP_full_release/Session{k}/sentences/wav/Ses0{k}F_script01_1"
        sessions[k] = {
            f"{folder}/Ses0{k}F_script01_1_{turn}.wav": (label,) for turn, label in turns.items()
        }
    for k in range(1, 6):
        assert written(tmp_path, f"eval_{k}", source) == sessions[k]
        others = {n: label for j, s in sessions.items() if j != k for n, label in s.items()}
        assert written(tmp_path, f"train_{k}", source) == others
    assert classes(tmp_path)[1:] == [
        ["0", "neu", "neutral"],
        ["1", "hap", "happy"],
        ["2", "ang", "angry"],
        ["3", "sad", "sad"],
    ]


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


def without(path: str):
    return lambda root: (root / path).unlink()


def replaced(path: str, old: str, new: str):
    def change(root: Path) -> None:
        content = (root / path).read_text(encoding="latin-1")
        assert old in content
        (root / path).write_text(content.replace(old, new, 1), encoding="latin-1")

    return change


def gone(path: str):
    return lambda root: shutil.rmtree(root / path)


def added(path: str, content: str):
    def change(root: Path) -> None:
        with open(root / path, "a") as file:
            file.write(content)

    return change


def noise_of(seconds: float):
    def change(root: Path) -> None:
        gone("speech_commands_v0.01/_background_noise_")(root)
        sound(root / "speech_commands_v0.01/_background_noise_/hum.wav", seconds)

    return change


def unreadable_noise(root: Path) -> None:
    text(root / "speech_commands_v0.01/_background_noise_/pink_noise.wav", "not a sound")


def without_the_last_class(root: Path) -> None:
    rows = (root / ESC).read_text().split("\n")
    text(root / ESC, "\n".join(row for row in rows if ",49," not in row))


def only_other_names(root: Path) -> None:
    for folder in ("balanced", "unbalanced", "eval"):
        shutil.rmtree(root / folder)
    sound(root / "rain.wav")


BAL, ESC, SC1 = (
    "balanced_train_segments.csv",
    "ESC-50-master/meta/esc50.csv",
    "speech_commands_v0.01",
)
DEV, VOC = "FSD50K.ground_truth/dev.csv", "FSD50K.ground_truth/vocabulary.csv"
IEM = "IEMOCAP_full_release/Session3/dialog/EmoEvaluation/Ses03F_script01_1.txt"
BAD = [
    (
        "audioset",
        without("class_labels_indices.csv"),
        "class_labels_indices.csv: expected this file of the data set, found none",
    ),
    ("audioset", without(BAL), f"{BAL}: expected this file of the data set, found none"),
    (
        "audioset",
        replaced("class_labels_indices.csv", "index,mid", "number,mid"),
        "class_labels_indices.csv: line 1: expected a header with index,mid,display_name, "
        "found 'number,mid,display_name'",
    ),
    (
        "audioset",
        replaced("class_labels_indices.csv", "1,/m", "7,/m"),
        "class_labels_indices.csv: line 3: expected index 1, found '7'",
    ),
    (
        "audioset",
        replaced("class_labels_indices.csv", "/m/05zppz", "/m/09x0r"),
        "class_labels_indices.csv: line 3: class /m/09x0r is listed already",
    ),
    (
        "audioset",
        lambda root: text(root / "class_labels_indices.csv", "index,mid,display_name\n"),
        "class_labels_indices.csv: expected a table of classes, found no rows",
    ),
    (
        "audioset",
        lambda root: (root / "class_labels_indices.csv").write_bytes(b"\xff\xfe"),
        "class_labels_indices.csv: not UTF-8 text: byte 0",
    ),
    (
        "audioset",
        replaced(BAL, ", 0.000, 10.000", ", 0.000"),
        f"{BAL}: line 5: expected 4 columns YTID,start_seconds,end_seconds,positive_labels, "
        "found 'Y0aaaaaaaa_, 0.000, \"/m/05zppz\"'",
    ),
    ("audioset", replaced(BAL, '/m/05zppz"', "/m/05zppz"), f"{BAL}: line 5: not CSV: "),
    (
        "audioset",
        replaced(BAL, "/m/05zppz", "/m/nothing"),
        f"{BAL}: line 5: expected labels of the 3 classes, found '/m/nothing'",
    ),
    (
        "audioset",
        replaced(BAL, "gone0000000", "gone"),
        f"{BAL}: line 6: expected a YouTube id of 11 characters, found 'gone'",
    ),
    (
        "audioset",
        replaced(BAL, "gone0000000", "--PJHxphWEs"),
        f"{BAL}: line 6: --PJHxphWEs is listed already at ",
    ),
    (
        "audioset",
        replaced("eval_segments.csv", "-0BIyqJj9ZU", "--PJHxphWEs"),
        "eval_segments.csv: line 4: --PJHxphWEs is listed already at ",
    ),
    ("audioset", gone("eval"), "split eval: found none of its 1 clips, as -0BIyqJj9ZU"),
    (
        "audioset",
        lambda root: text(root / "eval_segments.csv", dataset_trees.SEGMENTS_HEAD),
        "split eval: expected clips, found none listed",
    ),
    (
        "audioset",
        only_other_names,
        "expected audio named by YouTube id, as Y<id>.wav, <id>.flac or <id>_30.wav, "
        "found rain.wav",
    ),
    (
        "librispeech",
        gone("LibriSpeech/train-clean-360"),
        "LibriSpeech: expected train-clean-100, train-clean-360, train-other-500, "
        "found no train-clean-360",
    ),
    (
        "librispeech",
        gone("LibriSpeech"),
        ": expected a folder with train-clean-100, found nothing",
    ),
    ("librispeech", gone("LibriSpeech/dev-clean/84"), "dev-clean: no audio files in this folder"),
    (
        "librispeech",
        lambda root: (root / "LibriSpeech/dev-clean/84/121123/84-121123-0000.flac").rename(
            root / "LibriSpeech/dev-clean/x.wav"
        ),
        "dev-clean: expected .flac files, found none",
    ),
    ("esc50", without(ESC), ": expected a folder with meta/esc50.csv, found ESC-50-master"),
    (
        "esc50",
        replaced(ESC, "filename,fold", "filename,part"),
        "esc50.csv: line 1: expected a header with filename,fold,target,category, "
        "found 'filename,part,target",
    ),
    (
        "esc50",
        replaced(ESC, "wav,1,0,dog", "wav,6,0,dog"),
        "esc50.csv: line 2: expected a fold from 1 to 5, found '6'",
    ),
    (
        "esc50",
        replaced(ESC, "wav,1,0,dog", "wav,1,50,dog"),
        "esc50.csv: line 2: expected a target from 0 to 49, found '50'",
    ),
    (
        "esc50",
        replaced(ESC, "wav,2,0,dog", "wav,2,0,cat"),
        "esc50.csv: line 52: expected category dog of target 0, found 'cat'",
    ),
    (
        "esc50",
        replaced(ESC, "1-100001-A-1", "1-100000-A-0"),
        "esc50.csv: line 3: 1-100000-A-0.wav is listed already at ",
    ),
    (
        "esc50",
        without_the_last_class,
        "esc50.csv: expected 50 classes, found 49",
    ),
    ("esc50", gone("ESC-50-master/audio"), "split train_1: found none of its 200 clips, as 2-"),
    (
        "speechcommands_v2",
        gone("visual"),
        ": expected folders of 35 words, found no 'visual'",
    ),
    (
        "speechcommands_v2",
        without("testing_list.txt"),
        "testing_list.txt: expected this file of the data set, found none",
    ),
    (
        "speechcommands_v2",
        without("validation_list.txt"),
        ": expected a folder with validation_list.txt, found _background_noise_, backward, bed,",
    ),
    (
        "speechcommands_v2",
        added("testing_list.txt", "\nhello\n"),
        "testing_list.txt: line 37: expected <word>/<clip>.wav, found 'hello'",
    ),
    (
        "speechcommands_v2",
        added("testing_list.txt", "bed/bb_nohash_0.wav\n"),
        "testing_list.txt: line 36: bed/bb_nohash_0.wav is listed already at ",
    ),
    (
        "speechcommands_v1",
        lambda root: sound(root / SC1 / "visual/aa_nohash_0.wav"),
        f"{SC1}: expected folders of 30 words, found also 'visual'",
    ),
    (
        "speechcommands_v1",
        gone(f"{SC1}/_background_noise_"),
        "_background_noise_: expected this folder of the data set, found none",
    ),
    (
        "speechcommands_v1",
        noise_of(9.9),
        "_background_noise_: expected recordings of at least 10 s to cut silence from, "
        "found none for valid",
    ),
    ("speechcommands_v1", unreadable_noise, "pink_noise.wav: cannot be decoded: "),
    (
        "speechcommands_v1",
        gone("speech_commands_test_set_v0.01/_silence_"),
        "_silence_: expected this folder of the data set, found none",
    ),
    (
        "voxceleb1",
        without("iden_split.txt"),
        ": expected a folder with iden_split.txt, found dev, test",
    ),
    *(
        (
            "voxceleb1",
            replaced("iden_split.txt", "2 id11251/K5zRxtXc27s/00002.wav", bad),
            "iden_split.txt: line 4: expected 1, 2 or 3 and "
            f"<id10001 to id11251>/<video>/<clip>.wav, found '{bad}'",
        )
        for bad in ("4 id11251/K5/00002.wav", "2 id11252/K5/00002.wav", "2 00002.wav")
    ),
    (
        "voxceleb1",
        replaced("iden_split.txt", "2 id11251/K5zRxtXc27s/00002", "3 id11251/K5zRxtXc27s/00001"),
        "iden_split.txt: line 4: id11251/K5zRxtXc27s/00001.wav is listed already at ",
    ),
    ("voxceleb1", gone("test"), "split eval: found none of its 1 clips, as id10003/na8-"),
    (
        "iemocap",
        gone("IEMOCAP_full_release/Session3"),
        "Session3/dialog/EmoEvaluation: expected this folder of the data set, found none",
    ),
    ("iemocap", without(IEM), "split eval_3: expected clips, found none listed"),
    (
        "iemocap",
        replaced(IEM, "\tfru\t", "\t"),
        "Ses03F_script01_1.txt: line 10: expected [<start> - <end>] <turn> <emotion> [<V, A, D>], "
        "found '[14.8872 - 18.0175]",
    ),
    (
        "iemocap",
        replaced(IEM, "_F001", "_F000"),
        "Ses03F_script01_1.txt: line 7: Ses03F_script01_1_F000 is listed already at ",
    ),
    (
        "iemocap",
        gone("IEMOCAP_full_release/Session3/sentences"),
        "split eval_3: found none of its 5 clips, as Session3/sentences/wav/Ses03F_script01_1/",
    ),
    ("fsd50k", without(VOC), "vocabulary.csv: expected this file of the data set, found none"),
    (
        "fsd50k",
        replaced(VOC, "1,Dog,/m/0bt9lr", "1,Dog"),
        "vocabulary.csv: line 2: expected 3 columns index,label,mid, found '1,Dog'",
    ),
    ("fsd50k", replaced(VOC, "1,Dog", "2,Dog"), "vocabulary.csv: line 2: expected index 1"),
    (
        "fsd50k",
        replaced(DEV, ",val", ",test"),
        "dev.csv: line 3: expected split train or val, found 'test'",
    ),
    (
        "fsd50k",
        replaced(DEV, "Rain,/m/06mb1", "Rain,"),
        "dev.csv: line 3: expected labels of the 3 classes, found ''",
    ),
    (
        "fsd50k",
        replaced("FSD50K.ground_truth/eval.csv", "37199", "64760"),
        "eval.csv: line 2: 64760 is listed already at ",
    ),
    ("fsd50k", gone("FSD50K.eval_audio"), "split eval: found none of its 1 clips, as 37199.wav"),
]


@pytest.mark.parametrize("case", range(len(BAD)), ids=lambda n: f"{n}-{BAD[n][0]}")
def test_a_bad_copy_is_refused_in_one_line_and_nothing_is_written(
    case: int, trees: dict[str, Path], tmp_path: Path
) -> None:
    name, spoil, message = BAD[case]
    source, out = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(trees[name], source)
    write_dataset(name, source, out, silent)
    before = contents(out)
    spoil(source)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        write_dataset(name, source, out, silent)
    assert str(caught.value).startswith(str(source))
    assert "\n" not in str(caught.value)
    assert contents(out) == before


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
