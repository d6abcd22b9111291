import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import overrides
from sounds import tone, write, write_clips

from ssast.engine.checkpoints.weights import export_weights
from ssast.engine.cli.demo import demo
from ssast.engine.cli.main import main
from ssast.engine.config import CONFIGS, load_config
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


def check_comparison(shown, run, num_test):
    """The last lines are two accuracies and a picture."""
    *_, scratch, released, picture = shown.splitlines()
    found = [
        json.loads((run / f"finetuning/{name}/test/metrics.json").read_text())
        for name in ("from_scratch", "from_released_weights")
    ]
    assert [values["num_scored"] for values in found] == [num_test] * 2
    accuracies = [f"{values['accuracy']:.1%}" for values in found]
    assert scratch.split() == ["from", "scratch", accuracies[0]]
    assert released.split() == ["from", "released", "weights", accuracies[1]]
    assert picture.strip().endswith("finetuning.png") and (run / "finetuning.png").is_file()


@pytest.fixture
def small(monkeypatch):
    """Released weights of a small model, and a recipe for it."""

    def prepare(folder, run):
        model, config = load_pretrained(run)
        audio = replace(config.audio, ignore_padding=True)  # as the released weights have it
        config = replace(config, audio=audio)
        export_weights(model, config, 2, folder / "released", torch.float16)
        monkeypatch.setattr(
            "ssast.engine.cli.demo.ours", lambda: {"tiny_patch": folder / "released"}
        )
        recipe = (CONFIGS / "demo_finetune.yaml").read_text()
        old = "audio: {num_frames: 128, n_mels: 128, mean: -6.51, std: 5.47}"
        assert old in recipe
        recipe = recipe.replace(
            old, "audio: {num_frames: 48, n_mels: 32, mean: -6.51, std: 5.47}"
        ).replace("size: tiny", "size: tiny, depth: 1")
        path = folder / "small.yaml"
        path.write_text(recipe)
        monkeypatch.setattr(
            "ssast.engine.cli.comparison.load_config", lambda _, given: load_config(path, given)
        )

    return prepare


def test_a_task_is_fine_tuned_twice(tmp_path, monkeypatch, capsys, small):
    """By the same settings; a stopped demo goes on where it was."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "data" / "demo"
    out.mkdir(parents=True)
    clips = write_clips(out, 16, samples=9000)
    write_manifest(out / "train.json", clips[:12])
    labels = [(("a", "b")[k % 2],) for k in range(16)]
    for task in ("kind", "voice"):
        write_manifest(out / "tasks" / f"{task}_train.json", clips[:12], labels[:12])
        write_manifest(out / "tasks" / f"{task}_eval.json", clips[12:], labels[12:])
    data = DemoData(out / "train.json", {}, 8, 0.0)
    monkeypatch.setattr("ssast.engine.cli.demo.fetch_demo", lambda *_: data)
    monkeypatch.setattr("ssast.engine.cli.demo.ours", dict)
    run = tmp_path / "runs" / "demo"
    assert demo(None, overrides(train__steps=2)) == 0
    assert "fine-tuning on voice: left out, checkpoints/tiny_patch comes" in capsys.readouterr().out
    small(tmp_path, run)
    with monkeypatch.context() as stopping:
        stopping.setattr("ssast.engine.cli.comparison.finetune", lambda *_, **__: 15)
        assert demo(None, overrides(train__steps=2)) == 15
    assert capsys.readouterr().out.endswith("run the same command again to go on\n")
    assert demo(None, overrides(train__steps=2)) == 0
    shown = capsys.readouterr().out
    check_comparison(shown, run, 4)
    assert "test clips of the task voice" in shown
    configs = [
        (run / f"finetuning/{name}/config.yaml").read_text()
        for name in ("from_scratch", "from_released_weights")
    ]
    lines = [set(text.splitlines()) for text in configs]
    differing = {line.split(":")[0].strip() for line in lines[0] ^ lines[1]}
    assert differing <= {"checkpoint", "folder"}
    first = [read_metrics(run / f"finetuning/{n}/metrics.jsonl") for n in ("from_scratch",)]
    assert demo(None, overrides(train__steps=2)) == 0  # everything is there already
    check_comparison(capsys.readouterr().out, run, 4)
    assert first == [read_metrics(run / f"finetuning/{n}/metrics.jsonl") for n in ("from_scratch",)]


def test_folders_are_classes(tmp_path, monkeypatch, capsys, small):
    monkeypatch.chdir(tmp_path)
    for name in ("dog", "cat $1"):
        (tmp_path / "in" / name).mkdir(parents=True)
    clips = write_clips(tmp_path / "in", 20, samples=9000)
    for number, path in enumerate(clips):
        folder = ("dog", "cat $1")[number % 2]
        Path(path).rename(tmp_path / "in" / folder / Path(path).name)
    monkeypatch.setattr("ssast.engine.cli.demo.ours", dict)
    arguments = ["demo", "--source", str(tmp_path / "in"), *overrides(train__steps=2)]
    assert main(arguments) == 0
    assert "task labels: 2 classes, 16 + 4 clips" in capsys.readouterr().out
    small(tmp_path, tmp_path / "runs/demo-in")
    assert main(arguments) == 0
    check_comparison(capsys.readouterr().out, tmp_path / "runs/demo-in", 4)


def test_too_few_recordings_are_not_fine_tuned(tmp_path, monkeypatch, capsys):
    """One of each class is left to train on after the test clips: none can be held out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    clips = write_clips(tmp_path / "in", 4, samples=9000)
    write_manifest(tmp_path / "m.json", clips, [(("a", "b")[k % 2],) for k in range(4)])
    arguments = ["demo", "--source", str(tmp_path / "m.json"), *overrides(train__steps=2)]
    assert main([*arguments, "train.batch_size=1"]) == 0
    assert "fine-tuning on labels: left out, " in capsys.readouterr().out


def test_a_folder_without_audio_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--source", str(tmp_path)]) == 2
    assert f"{tmp_path}: no audio files" in capsys.readouterr().err
    assert main(["demo", "--source", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
