"""The labels of a user's own recordings as a task."""

from pathlib import Path

import numpy as np
from sounds import tone, write

from ssast.pipelines.audio.convert import Recipe
from ssast.pipelines.clips.manifest import read_manifest, write_manifest
from ssast.pipelines.clips.shards import ShardIndex
from ssast.pipelines.demo.publish import publish_labels
from ssast.pipelines.prepare.pack import Packing, prepare_shards


def own(folder: Path, labels: list[list[str]] | None) -> tuple[Path, list[str]]:
    """Prepare recordings of two clips each; what to pretrain on, and what is logged."""
    paths = []
    (folder / "in").mkdir(parents=True, exist_ok=True)
    for n in range(12 if labels is None else len(labels)):
        paths.append(folder / f"in/{n:02d}.wav")
        if not paths[-1].exists():
            write(paths[-1], tone(16000, seed=n), subtype="PCM_16")
    write_manifest(folder / "m.json", paths, labels)
    packing = Packing(Recipe(clip_s=0.5))
    prepare_shards(folder / "m.json", folder / "out", packing, progress=False, log=[].append)
    said: list[str] = []
    return publish_labels(folder / "out", log=said.append), said


def test_a_labelled_source_is_a_task(tmp_path: Path) -> None:
    labels = [["dog" if n % 3 else "cat"] for n in range(30)]
    train, [said] = own(tmp_path, labels)
    assert train == tmp_path / "out/train.json"
    parts = {n: read_manifest(tmp_path / f"out/tasks/labels_{n}.json") for n in ("train", "eval")}
    clips = {name: set(part.paths) for name, part in parts.items()}
    assert clips["train"] == set(read_manifest(train).paths)
    assert not clips["train"] & clips["eval"] and len(clips["train"] | clips["eval"]) == 60
    held = parts["eval"].paths
    assert isinstance(held, ShardIndex) and isinstance(parts["train"].paths, ShardIndex)
    assert not set(held.recordings()) & set(parts["train"].paths.recordings())
    assert parts["eval"].labels is not None
    names, counts = np.unique(parts["eval"].labels, return_counts=True)
    assert dict(zip(names, counts, strict=True)) == {"cat": 4, "dog": 8}
    for recording, label in zip(held.recordings(), parts["eval"].labels, strict=True):
        assert list(label) == labels[recording]
    assert said == "task labels: 2 classes, 48 + 12 clips"


def test_a_class_of_one_recording_is_pretrained_on_alone(tmp_path: Path) -> None:
    train, _ = own(tmp_path, [["ab"[n % 2]] for n in range(10)] + [["lonely"]])
    for kind in ("train", "eval"):
        labels = read_manifest(tmp_path / f"out/tasks/labels_{kind}.json").labels
        assert labels is not None and set(labels) == {("a",), ("b",)}
    assert len(read_manifest(train)) == 2 * (11 - 2)


def test_without_labels_no_task_is_left_behind(tmp_path: Path) -> None:
    own(tmp_path, [["ab"[n % 2]] for n in range(12)])
    assert (tmp_path / "out/tasks").is_dir()
    train, said = own(tmp_path, None)
    assert (train, said) == (tmp_path / "out", [])
    assert not (tmp_path / "out/tasks").exists()


def test_labels_that_are_no_task(tmp_path: Path) -> None:
    for name, labels, why in (
        ("several", [["a", "b"], ["a"], ["b"], ["b"]], "clips have several labels"),
        ("one class", [["a"]] * 6, "1 classes can be split"),
        ("single", [[c] for c in "abcd"], "no class has two recordings"),
    ):
        train, [said] = own(tmp_path / name, labels)
        assert said.startswith("task labels: left out, ") and why in said
        assert train == tmp_path / name / "out"


def test_folders_are_labels(tmp_path: Path) -> None:
    """Where all sounds are in folders, two or more."""
    found = []
    source = tmp_path / "in"
    for folders in (["one"], ["one", "t $wo/deep"], [".", "one", "t $wo/deep"]):
        for name in folders:
            (source / name).mkdir(parents=True, exist_ok=True)
            for n in range(5):
                sound = tone(8000, seed=len(name) + n)
                write(source / name / f"{n}.wav", sound, subtype="PCM_16")
        said: list[str] = []
        out = tmp_path / str(len(folders))
        prepare_shards(source, out, Packing(Recipe()), progress=False, log=[].append)
        found.append((publish_labels(out, source, said.append), said))
    assert found[0] == (tmp_path / "1", []) and found[2] == (tmp_path / "3", [])
    assert found[1] == (tmp_path / "2/train.json", ["task labels: 2 classes, 8 + 2 clips"])
    labels = read_manifest(tmp_path / "2/tasks/labels_eval.json").labels
    assert labels is not None and set(labels) == {("one",), ("t $wo",)}
    assert publish_labels(tmp_path / "2") == tmp_path / "2"  # nothing says where they were
