import json

import pytest
import torch
from runs import overrides
from sounds import tone, write, write_clips

from ssast.engine.checkpoints.weights import export_weights
from ssast.engine.cli.demo import demo
from ssast.engine.cli.main import main
from ssast.engine.formats.open import load_pretrained
from ssast.engine.monitoring.monitor import read_metrics
from ssast.pipelines.clips.manifest import write_manifest
from ssast.pipelines.demo.publish import DemoData


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "my sounds"
    source.mkdir()
    write_clips(source, 12, samples=9000)
    write(source / "long.wav", tone(16000 * 12), subtype="PCM_16")
    (source / "bad.flac").write_bytes(b"no audio")
    return source


def test_any_folder_of_audio(folder, tmp_path, capsys):
    arguments = ["demo", "--source", str(folder), *overrides(train__steps=3)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "1 recordings cannot be used (1 cannot be decoded)" in shown
    assert "bad.flac" in (tmp_path / "data/demo-my_sounds/rejected.jsonl").read_text()
    assert "Pretext (InfoNCE) accuracy on held-out clips: " in shown
    run = tmp_path / "runs" / "demo-my_sounds"
    for name in ("curves.png", "reconstructions.png", "metrics.jsonl"):
        assert (run / name).exists() and f"runs/demo-my_sounds/{name}" in shown
    first = read_metrics(run / "metrics.jsonl")
    assert main(arguments) == 0  # again: everything is there already
    assert read_metrics(run / "metrics.jsonl") == first


def test_labelled_recordings_are_probed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "data" / "demo"
    out.mkdir(parents=True)
    clips = write_clips(out, 12, samples=9000)
    write_manifest(out / "train.json", clips[:8])
    labels = [(("a", "b")[k % 2],) for k in range(12)]
    write_manifest(out / "tasks" / "kind_train.json", clips[:8], labels[:8])
    write_manifest(out / "tasks" / "kind_eval.json", clips[8:], labels[8:])
    data = DemoData(out / "train.json", {}, 8, 0.0)
    monkeypatch.setattr("ssast.engine.cli.demo.fetch_demo", lambda *_: data)
    run = tmp_path / "runs" / "demo"

    def probed() -> list[tuple[str, str, int]]:
        assert demo(None, overrides(train__steps=2)) == 0
        scores = json.loads((run / "probe.json").read_text())
        return [(s["task"], s["weights"], s["num_eval"]) for s in scores]

    monkeypatch.setattr("ssast.engine.cli.demo.RELEASED", tmp_path / "released")
    found = [("kind", "untrained", 4), ("kind", "pretrained", 4)]
    assert probed() == found
    shown = capsys.readouterr().out
    assert "untrained" in shown and "pretrained" in shown and "released" not in shown
    export_weights(*load_pretrained(run), 2, tmp_path / "released", torch.float16)
    assert probed() == [*found, ("kind", "released", 4)]


def test_a_labelled_manifest_is_probed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    clips = write_clips(tmp_path / "in", 20, samples=9000)
    write_manifest(tmp_path / "m.json", clips, [(("a", "b")[k % 2],) for k in range(20)])
    assert main(["demo", "--source", str(tmp_path / "m.json"), *overrides(train__steps=2)]) == 0
    shown = capsys.readouterr().out
    assert "task labels: 2 classes, 16 + 4 clips" in shown
    [line] = [line for line in shown.splitlines() if "pretrained" in line]
    assert line.split()[:8] == ["labels", "2", "16", "of", "16", "4", "of", "4"]


def test_a_folder_without_audio_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--source", str(tmp_path)]) == 2
    assert f"{tmp_path}: no audio files" in capsys.readouterr().err
    assert main(["demo", "--source", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
