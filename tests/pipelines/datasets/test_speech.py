"""Manifests of speech, from small copies in their official layouts."""

import shutil
from collections import Counter
from pathlib import Path

import dataset_trees
import numpy as np
import pytest
import soundfile
from dataset_files import classes, report, silent, written
from dataset_trees import RATE_HZ

from ssast.pipelines.clips.manifest import read_manifest
from ssast.pipelines.datasets.manifests import write_dataset


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
