"""Names of files and classes come out of every stage as they went in, whatever they hold."""

import contextlib
import csv
import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from finetune_runs import make_sounds, overrides
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from names import AWKWARD, CLASSES, FILES
from prepared import prepared

from ssast.engine.cli.main import main
from ssast.engine.config import Config, dump_config, load_config
from ssast.engine.data.labels import read_labelled
from ssast.engine.evaluation.embedding import ParquetWriter, _write_listing
from ssast.engine.evaluation.predict import predict
from ssast.engine.evaluation.report import read_predictions, write_predictions
from ssast.engine.evaluation.timeline import Timeline, TimelineWriter
from ssast.engine.finetune import FinetuneEngine
from ssast.engine.formats.huggingface import export_huggingface, import_huggingface
from ssast.engine.formats.open import open_classifier
from ssast.engine.model.classifier import Classifier
from ssast.engine.train.task import RejectLog
from ssast.pipelines.clips.manifest import (
    clip_columns,
    read_clips,
    read_manifest,
    write_manifest,
)
from ssast.pipelines.clips.segment import Segment
from ssast.pipelines.clips.shards import ShardClip

LABEL_SETS = st.lists(st.lists(CLASSES, max_size=3, unique=True), min_size=1, max_size=6)
in_a_folder = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder / "x", ignore_errors=True)
    (folder / "x").mkdir()
    return folder / "x"


@given(FILES, LABEL_SETS)
@in_a_folder
def test_labels_of_a_fine_tuning(tmp_path: Path, file: str, labels: list[list[str]]) -> None:
    path = fresh(tmp_path) / "m.json"
    write_manifest(path, [f"{n}{file}" for n in range(len(labels))], labels)
    classes = sorted({name for names in labels for name in names})
    clips = read_labelled(str(path), classes, one_label=False)
    assert [[classes[i] for i in row] for row in clips.labels()] == list(map(sorted, labels))
    assert [os.path.basename(str(p)) for p in clips.paths] == [
        f"{n}{file}" for n in range(len(clips))
    ]


@given(FILES, LABEL_SETS)
@in_a_folder
def test_predictions(tmp_path: Path, file: str, labels: list[list[str]]) -> None:
    """Their table is a manifest, where its names are text."""
    path = fresh(tmp_path) / "predictions.csv"
    classes = sorted({name for names in labels for name in names} | {"a", "b"})
    clips = [f"/x/{n}{file}" for n in range(len(labels))]
    scores = np.eye(len(classes))[np.arange(len(clips)) % len(classes)]
    write_predictions(path, clips, scores, classes, labels)
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as read:
        rows = list(csv.DictReader(read))
    assert [row["wav"] for row in rows] == clips
    assert [row["class1"] for row in rows] == [classes[n % len(classes)] for n in range(len(clips))]
    with contextlib.suppress(UnicodeDecodeError):
        path.read_bytes().decode()
        found = read_manifest(path, classes)
        assert found.paths == tuple(map(os.path.normpath, clips))
        assert found.labels == tuple(map(tuple, labels))
    if all(len(names) == 1 for names in labels):
        expected = [(label, row["class1"]) for (label,), row in zip(labels, rows, strict=True)]
        assert read_predictions(path) == expected


def test_predictions_of_segments(tmp_path: Path) -> None:
    """Their table is a manifest of the same segments, and of whole files among them."""
    clips = [Segment("/x/a.wav", 1.25, 0.5), "/x/b.wav", Segment("/x/a.wav", 3.0, math.inf)]
    labels = [["a"], ["b"], ["a"]]
    write_predictions(tmp_path / "p.csv", clips, np.eye(2)[[0, 1, 1]], ["a", "b"], labels)
    found = read_manifest(tmp_path / "p.csv", ["a", "b"])
    assert list(found.paths) == clips and found.labels == (("a",), ("b",), ("a",))


def test_listings_of_segments(tmp_path: Path) -> None:
    """They are manifests of the same segments, and of whole files among them."""
    clips = [Segment("/x/a.wav", 1.25, 0.1), "/x/b.wav", Segment("/x/a.wav", 3.0, math.inf)]
    _write_listing(tmp_path / "x.csv", clips, np.ones(3, np.int64))
    writer = ParquetWriter(tmp_path / "x.parquet", (3, 2), clips)
    writer.put(0, np.zeros((3, 2), np.float32), np.array([1, 0, 1]))
    writer.close()
    for name in ("x.csv", "x.parquet"):
        assert list(read_clips(tmp_path / name)) == clips


def test_a_clip_in_a_shard_behind_a_url_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardClip, "name", "a.flac")
    shown = "https://a.org/0.tar: a.flac"
    assert clip_columns(ShardClip("https://a.org/0.tar", 512, 9)) == {"wav": shown}


@given(st.lists(FILES, min_size=1, max_size=5, unique=True))
@in_a_folder
def test_listings_of_embeddings(tmp_path: Path, files: list[str]) -> None:
    folder = fresh(tmp_path)
    paths = [f"/x/{file}" for file in files]
    _write_listing(folder / "x.csv", paths, np.ones(len(paths), np.int64))
    with (folder / "x.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == paths
    writer = ParquetWriter(folder / "x.parquet", (len(paths), 2), paths)
    writer.put(0, np.zeros((len(paths), 2), np.float32), np.ones(len(paths), np.int64))
    writer.close()
    found = pyarrow.parquet.read_table(folder / "x.parquet")["path"].to_pylist()
    assert found == [p.encode(errors="backslashreplace").decode() for p in paths]
    assert len(set(found)) == len(paths)


@given(st.lists(FILES, min_size=1, max_size=5, unique=True))
@in_a_folder
def test_clips_that_cannot_be_read(tmp_path: Path, files: list[str]) -> None:
    log = RejectLog(fresh(tmp_path) / "rejected.jsonl", "train")
    for _ in range(2):
        for number, file in enumerate(files):
            log(number, file, f"{file}: no sound")
    lines = (tmp_path / "x/rejected.jsonl").read_bytes().decode().splitlines(keepends=False)
    text = (tmp_path / "x/rejected.jsonl").read_bytes().decode()
    found = [json.loads(line) for line in text.split("\n")[:-1]]
    assert [line["path"] for line in found] == files
    assert len(lines) >= len(files)


@given(FILES)
@in_a_folder
def test_configurations_and_reports(tmp_path: Path, name: str) -> None:
    folder = fresh(tmp_path)
    config = Config()
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, train=f"/x/{name}"),
        run=dataclasses.replace(config.run, folder=f"runs/{name}"),
    )
    text = dump_config(config)
    (folder / "c.yaml").write_bytes(text.encode())
    assert load_config(folder / "c.yaml") == config


def test_long_names_of_recordings(tmp_path: Path) -> None:
    found = Timeline(
        path=f"/x/{'x' * 251}.wav",
        classes=("a" * 5000, "$\udce9\n"),
        starts_s=np.zeros(1),
        ends_s=np.ones(1),
        probabilities=np.full((1, 2), 0.5),
        spectrogram=np.zeros((2, 4)),
    )
    writer = TimelineWriter(tmp_path, 2)
    for _ in range(2):
        writer.put(found)
    assert len(writer.written) == 3 and all(path.is_file() for path in writer.written)
    lines = (tmp_path / "windows.jsonl").read_bytes().decode().split("\n")[:-1]
    assert {name for line in lines for name, _ in json.loads(line)["classes"]} == set(found.classes)


@pytest.fixture(scope="module")
def chain(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Path
) -> tuple[Path, list[Path], list[str]]:
    """A classifier of awkward classes, trained on prepared recordings of awkward names."""
    folder = tmp_path_factory.mktemp("chain")
    classes = [
        "Male speech, man speaking",
        "$\\nosuch{$",
        '=a|`b\n"c"',
        "caf\udce9",
        "\u05d0 \U0001f600",
    ]
    names = [name for name in AWKWARD if "/" not in name]
    sounds = make_sounds(folder / "sounds", len(classes), 8)
    paths = []
    for number, path in enumerate(sounds):
        paths.append(path.with_name(f"{number}{names[number % len(names)]}.wav"))
        path.rename(paths[-1])
    labels = [classes[number // 8] for number in range(len(paths))]
    write_manifest(folder / "all.json", paths, [[label] for label in labels])
    index = prepared(folder / "all.json", folder / "prepared")
    found = read_manifest(folder / "prepared")
    assert len(index) == len(paths) and found.labels is not None
    listed = {line["name"]: line["labels"] for _, line in index.sidecar_lines()}
    assert listed == {
        os.path.relpath(p, folder): [label] for p, label in zip(paths, labels, strict=True)
    }
    assert sorted(found.labels) == sorted((label,) for label in labels)
    run = folder / "run |$\n_"
    given = [
        *overrides(finetune__epochs=1),
        f"data.train={folder / 'prepared'}",
        "data.valid_share=0.4",
    ]
    config = folder / "plain.yaml"
    config.write_text("finetune: {}\n", encoding="utf-16")
    arguments = ["finetune", str(config), "--checkpoint", str(checkpoint), *given]
    assert main([*arguments, f"run.folder={folder}/\udce9"]) == 2  # refused before any work
    assert main([*arguments, f"run.folder={run}"]) == 0
    return run, paths, classes


def test_a_chain_of_all_stages(chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, paths, classes = chain
    loaded = open_classifier(run)
    assert sorted(loaded.classes) == sorted(classes)
    rows = read_predictions(run / "valid/predictions.csv")
    assert {name for row in rows for name in row} <= set(classes)
    assert (run / "report.md").read_text().startswith("# run \\|$\\\\n\\_\n")
    found = predict(loaded, paths, top=5)
    assert [p.path for p in found] == list(map(str, paths))
    assert all({name for name, _ in p.classes} == set(classes) for p in found)
    capsys.readouterr()
    assert main(["predict", str(run), *map(str, paths[:10])]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 10
    assert main(["embed", str(run), str(paths[0].parent), "--out", str(tmp_path / "e.npy")]) == 0
    with (tmp_path / "e.csv").open(errors="surrogateescape", newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == sorted(map(str, paths))
    assert main(["evaluate", str(run), str(paths[0].parents[1] / "all.json")]) == 0
    assert isinstance(loaded.classifier, Classifier)
    export_huggingface(loaded.classifier, tmp_path / "hf", loaded.audio, loaded.classes)
    assert import_huggingface(tmp_path / "hf")[2] == loaded.classes
    assert FinetuneEngine.from_checkpoint(run).trained is not None
