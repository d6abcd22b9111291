"""The store of the study: kept weights, a file for each run, and claims of processes."""

import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from study_runs import SMALL, fake, small_plan

from ssast.benchmarks.study import page, reproduce, runs, store
from ssast.benchmarks.study import plan as planning
from ssast.benchmarks.study.analysis import Gain, gain_curve, gather
from ssast.benchmarks.study.models import MODELS
from ssast.benchmarks.study.page import write_page
from ssast.benchmarks.study.plan import (
    FineTuning,
    finetuning_config,
    kept_models,
    pretraining_config,
)
from ssast.benchmarks.study.runs import Study
from ssast.benchmarks.study.store import Store
from ssast.benchmarks.study.tables import exceeding
from ssast.engine.checkpoints.weights import read_weights
from ssast.engine.errors import ConfigError
from ssast.pipelines.errors import DataError


def write(run: Path, *names: str) -> None:
    for name in names:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)


def test_a_run_is_carried(tmp_path) -> None:
    one, other = (Store(tmp_path / name, tmp_path / "store") for name in ("a", "b"))
    ours, theirs = (each.out / "finetune" / "patch" / "x" for each in (one, other))
    write(ours, "config.yaml", "checkpoints/step1/state", "classifier/state", ".lock")
    write(ours, "valid/metrics.json", "valid/predictions.csv")
    assert not one.has(ours)
    one.put(ours)
    assert one.has(ours) and [p.name for p in one.shared.iterdir()] == ["finetune-patch-x.tar"]
    other.fetch(theirs)
    found = {str(path.relative_to(theirs)) for path in theirs.rglob("*") if path.is_file()}
    assert found == {"config.yaml", "valid/metrics.json", "valid/predictions.csv"}
    assert other.has(theirs)
    with tarfile.open(one.shared / "finetune-patch-x.tar") as tar:
        assert tar.getnames()[-1] == "valid/metrics.json"  # last: it says that the run is finished
    write(theirs, "test/metrics.json")
    assert not other.has(theirs)  # it has grown
    (one.shared / "finetune-patch-x.tar").write_bytes(b"x" * 2000)
    with pytest.raises(DataError, match=r"finetune-patch-x.tar: damaged, expected the tar of a"):
        other.fetch(theirs)
    with tarfile.open(one.shared / "finetune-patch-x.tar", "w") as tar:
        tar.add(ours / "config.yaml", "../config.yaml")
    with pytest.raises(DataError, match=r"finetune-patch-x.tar: damaged, .* leads out of it"):
        other.fetch(theirs)
    assert not list(tmp_path.glob("*/.tmp-*"))
    alone = Store(tmp_path / "c")
    assert alone.has(ours) and alone.shared == alone.out


def test_a_run_is_claimed_by_one_process(tmp_path) -> None:
    shared = Store(tmp_path)
    run = tmp_path / "probe" / "patch"
    with shared.claim(run) as first, shared.claim(run) as second:
        assert first and not second
    code = (
        "import os, sys; from pathlib import Path; from ssast.pipelines.locks import FolderLock; "
        "FolderLock(Path(sys.argv[1]), 'x').acquire(); os._exit(1)"
    )
    folder = tmp_path / "claims" / "probe-patch"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=False)
    assert (folder / ".owner.json").exists()  # of a dead process
    with shared.claim(run) as taken:
        assert taken
    with pytest.raises(ConfigError, match="from the body"), shared.claim(run):
        raise ConfigError("from the body")
    with shared.claim(run) as again:
        assert again


def test_what_another_process_is_at_is_waited_for(tmp_path, monkeypatch, capsys) -> None:
    plan = replace(small_plan(tmp_path / "data"), tasks=("pitch",), seeds=1)
    out, name = tmp_path / "run", "patch-scratch"
    claimed = FineTuning(MODELS[name], "pitch", plan.rates[1], 0).folder(out)
    fake(plan, out, name, "pitch", plan.rates[0], 0, 0.5, 5)
    claim, slept = Store(out).claim(claimed), []
    claim.__enter__()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:  # the other process is done
            fake(plan, out, name, "pitch", plan.rates[1], 0, 0.4)
            claim.__exit__(None, None, None)

    monkeypatch.setattr(runs.time, "sleep", sleep)
    Study(plan, out).run([name])
    assert len(slept) == 2
    assert capsys.readouterr().out == "waiting for the runs of other processes\n"


def test_weights_are_kept_where_checkpoints_are_saved(tmp_path) -> None:
    plan = replace(small_plan(tmp_path), steps=12_000)
    kept = kept_models(plan)
    assert [model.name for model in kept if model.family == "patch"] == [
        f"patch-step{step}" for step in (1000, 3000, 10_000)
    ]
    for steps in (1100, 12_000):
        config = pretraining_config(replace(plan, steps=steps), MODELS["patch"], tmp_path)
        assert 1000 % config.train.save_every == 0
    run = FineTuning(kept[0], "pitch", 1e-3, 0)
    found = finetuning_config(plan, run, tmp_path).finetune.checkpoint
    assert found == str(tmp_path / "pretrain/patch/weights/step1000")


def test_gain_against_clips(tmp_path) -> None:
    plan = replace(small_plan(tmp_path / "data"), steps=3500, tasks=("pitch",), seeds=1)
    plan.write(tmp_path)
    rights = {"patch-scratch": 4, "patch": 8, "patch-step1000": 3}
    for name, right in rights.items():
        for rate in plan.rates:
            fake(plan, tmp_path, name, "pitch", rate, 0, 0.5, right)
        text = write_page(tmp_path, tmp_path / "docs").read_text()
        assert ("## Gain against clips" in text) == (name == "patch-step1000")
        assert (tmp_path / "docs/results/gain-by-clips.png").exists() == ("## Gain ag" in text)
    assert "| model, task | from scratch | 48,000 clips | 168,000 clips |" in text
    assert "| patch, pitch | 40.0 | 30.0 (-25.0) | 80.0 (+100.0) |" in text
    mean = "**patch, relative gain on average, %**"
    assert f"| {mean} |  | **-25.0** | **+100.0** |" in text  # one seed: no error is known
    assert "the 95 % interval of the mean gain lies above 0 at none of these points" in text


def test_a_point_with_seeds_to_come_is_not_drawn(tmp_path) -> None:
    plan = replace(small_plan(tmp_path / "data"), steps=3500, tasks=("pitch",), seeds=2)
    names = ("patch-scratch", "patch", "patch-step1000")
    for seed in (0, 1):
        for name in names:
            cells = gather(plan, tmp_path)
            assert not gain_curve(plan, cells, "patch")
            for rate in plan.rates:
                fake(plan, tmp_path, name, "pitch", rate, seed, 0.5, 5 + seed)
    points = gain_curve(plan, gather(plan, tmp_path), "patch")
    assert [clips for clips, _ in points] == [48_000, 168_000]


def test_the_page_of_a_store(tmp_path) -> None:
    plan = replace(small_plan(tmp_path / "data"), tasks=("pitch",), seeds=1)
    here, there, shared = (tmp_path / name for name in ("here", "there", "store"))
    plan.write(shared)
    for name, right in {"patch-scratch": 4, "patch": 8}.items():
        for rate in plan.rates:
            fake(plan, there, name, "pitch", rate, 0, 0.5, right)
            Store(there, shared).put(FineTuning(MODELS[name], "pitch", rate, 0).folder(there))
    others = tmp_path / "docs" / "results" / "mine.png"
    write(others.parent, "mine.png", "ablations.png")
    where = ["--out", str(here), "--docs", str(tmp_path / "docs")]
    assert page.main([*where, "--store", str(shared)]) == 0
    assert "| 40.0 | 80.0 | +100.0 |" in (tmp_path / "docs" / "results.md").read_text()
    # Pictures of an earlier page go, what others wrote there stays.
    assert others.exists() and not others.with_name("ablations.png").exists()
    with pytest.raises(ConfigError, match=r"plan.json is missing"):
        page.main(["--out", str(tmp_path / "x"), "--store", str(tmp_path / "y")])


def test_rates_chosen_on_another_machine_are_fetched(tmp_path, monkeypatch) -> None:
    plan = replace(small_plan(tmp_path / "data"), tasks=("pitch",))
    here, there, shared = (tmp_path / name for name in ("here", "there", "store"))
    monkeypatch.setattr(Study, "_round", lambda self: True)
    study = Study(plan, here, shared)
    with pytest.raises(ConfigError, match="--only short: needs the learning rates of patch"):
        study.run(["short"])
    for rate in plan.rates:
        fake(plan, there, "patch", "pitch", rate, 0, 0.5)
        Store(there, shared).put(FineTuning(MODELS["patch"], "pitch", rate, 0).folder(there))
    study.run(["short"])


def test_a_gain_that_is_told_apart_from_zero() -> None:
    scores = {"pitch": (0.4, 0.6)}
    curve = [(24, Gain(scores, 0.6)), (72, Gain(scores, 0.4)), (240, Gain(scores, 0.2))]
    assert exceeding("frame", curve).endswith("above 0 after 72, 240 clips.")
    assert exceeding("frame", [(24, Gain(scores, None))]).endswith(
        "above 0 at none of these points."
    )


@pytest.mark.slow
def test_the_study_goes_on_elsewhere(tmp_path, monkeypatch) -> None:
    for module in (planning, store):
        monkeypatch.setattr(module, "KEPT_STEPS", (2,))
    monkeypatch.setattr(planning, "SAVE_EVERY", 1)
    data = small_plan(tmp_path / "data").data
    length = ["--steps", "4", "--epochs", "1", "--seeds", "1", "--rates", "1e-3"]
    given = ["--data", data, "--only", "patch", "patch-scratch", "--kept"]
    given += ["--store", str(tmp_path / "store")]
    first = [*given, *length, "--tasks", "pitch", "--set", *SMALL]
    places = [["--out", str(tmp_path / n), "--docs", str(tmp_path / n / "docs")] for n in "ab"]
    assert reproduce.main([*first, *places[0]]) == 0
    tars = sorted(path.name for path in (tmp_path / "store").glob("*.tar"))
    assert tars == [
        *(f"finetune-{n}-pitch-lr0.001-seed0.tar" for n in ("patch", "patch-scratch")),
        "finetune-patch-step2-pitch-lr0.001-seed0.tar",
        "pretrain-patch.tar",
        "probe-patch.tar",
    ]
    kept = (tmp_path / "a/pretrain/patch/weights").iterdir()
    assert sorted(path.name for path in kept) == ["final", "step2"]
    weights, meta, _ = read_weights(tmp_path / "a/pretrain/patch/weights/step2")
    assert meta["step"] == 2 and {value.dtype for value in weights.values()} == {torch.float16}
    used = tmp_path / "a/finetune/patch-step2/pitch/lr0.001-seed0/config.yaml"
    assert "weights/step2" in used.read_text()

    def never(*_: object, **__: object) -> int:
        raise AssertionError("trained again")

    for name in ("pretrain", "finetune", "probe_layers"):
        monkeypatch.setattr(runs, name, never)
    assert reproduce.main([*given, *places[1]]) == 0
    pages = [(tmp_path / name / "docs/results.md").read_text() for name in "ab"]
    assert pages[0] == pages[1] and "## Gain against clips" in pages[0]
