"""`ssast bench tuning`: its variations, its tasks and its table."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from prepared import prepared
from sounds import tone, write
from study_runs import fake_scores, small_plan

from ssast.benchmarks.study.plan import FineTuning, pretraining_config
from ssast.benchmarks.study.tuning import (
    VARIATIONS,
    check_plan,
    evenly,
    kit_label,
    main,
    scores,
    write_data,
)
from ssast.engine.config import load_config
from ssast.engine.errors import ConfigError
from ssast.pipelines.clips.manifest import read_manifest, write_manifest

KITS = "hydrogen-drumkits/usr/share/hydrogen/data/drumkits"


def test_a_kit_is_told_from_other_pieces():
    found = kit_label(f"{KITS}/Millo/Snare-3.wav")
    assert found is not None and (found.label, found.group) == (
        "Millo",
        kit_label(f"{KITS}/Millo/Snare-4.flac").group,
    )
    assert kit_label("sonic-pi-samples/usr/share/samples/bd_808.flac") is None


def test_each_variation_changes_what_it_says(tmp_path):
    plan = replace(small_plan(tmp_path / "data"), overrides=())
    pretrained = {name: model for name, model in VARIATIONS.items() if model.share}
    assert {name for name in VARIATIONS if name not in pretrained} == {
        f"{family}-scratch" for family in ("patch", "frame", "latent")
    }
    configs = {n: pretraining_config(plan, m, tmp_path) for n, m in pretrained.items()}
    for family in ("patch", "frame", "latent"):
        base, plain = configs[family], configs[f"{family}-padding"]
        assert base.audio == replace(plain.audio, ignore_padding=True)
        assert not plain.audio.ignore_padding
        assert (base.objective, base.optim, base.model) == (
            plain.objective,
            plain.optim,
            plain.model,
        )
    long = configs["patch-long"]  # as many frames in each step, and the same share is masked
    assert long.audio.num_frames * long.train.batch_size == 128 * 24
    assert long.objective.num_masked == 2 * configs["patch"].objective.num_masked
    assert {config.train.steps for config in configs.values()} == {plan.steps}


def test_the_data(tmp_path):
    packages = {f"{KITS}/{kit}": 30 for kit in ("One", "Two")} | {"scratch/sounds": 3}
    for number, (folder, count) in enumerate(packages.items()):
        (tmp_path / "in" / folder).mkdir(parents=True)
        for n in range(count):
            path = tmp_path / "in" / folder / f"{'abcdefghij'[n % 10]}{n}.wav"
            write(path, tone(3200, seed=100 * number + n), subtype="PCM_16")
    index = prepared(tmp_path / "in", tmp_path / "sounds")
    write_manifest(tmp_path / "sounds/train.json", index)
    data = write_data(tmp_path / "run/data", tmp_path / "sounds", tmp_path / "sounds")
    assert len(read_manifest(data / "train.json")) == 63
    tasks = {path.stem: read_manifest(path) for path in (data / "tasks").iterdir()}
    assert set(tasks) == {"kit_train", "kit_eval"}  # of the others there are too few clips
    assert sum(map(len, tasks.values())) == 60
    assert set(tasks["kit_eval"].labels) == {("One",), ("Two",)}
    none, mix = evenly(data)
    config = load_config("demo", [none, mix, "objective.num_masked=2"])
    assert config.data.train is None
    weights = {Path(path).stem: weight for path, weight in config.data.mix.items()}
    assert weights == {"hydrogen-drumkits": pytest.approx(7.75), "scratch": pytest.approx(1.73)}


def test_the_table(tmp_path):
    plan = replace(small_plan(tmp_path / "data"), seeds=2)
    model = VARIATIONS["patch-half"]
    for seed, task in ((0, "pitch"), (1, "pitch"), (0, "tone")):
        for rate in plan.rates:
            run = FineTuning(model, task, rate, seed).folder(tmp_path)
            fake_scores(run, valid=rate, test=(0.4 + 0.2 * seed) * rate / plan.rates[-1])
    log = tmp_path / "pretrain" / model.name / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text(json.dumps({"step": 8, "valid/pretext_accuracy": 0.125}) + "\n")
    text = "\n".join(scores(plan, tmp_path))
    assert "| pretraining | pretext accuracy | pitch | tone | mean |" in text
    assert "| 32 of 64 masked | 12.5 | 50.0 | 40.0 | 45.0 |" in text
    assert "rate 5e-4" not in text  # not finished


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"run: no runs of ssast bench reproduce there"):
        main(["--out", str(tmp_path / "run"), "--page"])


def test_runs_of_another_plan_are_not_taken_for_this_one(tmp_path, monkeypatch):
    plan = small_plan(tmp_path / "data")
    check_plan(plan, tmp_path)  # nothing is there
    plan.write(tmp_path)
    check_plan(replace(plan, seeds=plan.seeds + 1), tmp_path)
    with pytest.raises(ConfigError, match=r"plan\.json has steps 80, got 9: choose another --out"):
        check_plan(replace(plan, steps=9), tmp_path)
    monkeypatch.setattr("ssast.benchmarks.study.tuning.fetch_sounds", None)
    with pytest.raises(ConfigError, match=r"plan\.json has tasks"):  # before any work
        main(["--out", str(tmp_path)])
