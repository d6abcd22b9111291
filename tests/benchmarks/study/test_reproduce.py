"""The study behind `make reproduce`: its runs, its choices, its page."""

import json
import shutil
from pathlib import Path

import pytest
from study_runs import SMALL, fake, report, small_plan, write_probe

from ssast.benchmarks.study.analysis import (
    gain,
    gather,
    published_gain,
    significant_sign,
)
from ssast.benchmarks.study.models import FAMILIES, GROUPS, MODELS
from ssast.benchmarks.study.page import write_page
from ssast.benchmarks.study.plan import (
    FineTuning,
    best_rate,
    check_no_leak,
    chosen_rate,
    finetuning_config,
    num_runs,
    pretraining_config,
    steps_and_epochs,
)
from ssast.benchmarks.study.release import main as release
from ssast.benchmarks.study.reproduce import main
from ssast.benchmarks.study.runs import Study
from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.config import to_plain
from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.formats.open import load_pretrained
from ssast.engine.model.objective import MSPM
from ssast.pipelines.errors import DataError


@pytest.fixture
def plan(tmp_path):
    return small_plan(tmp_path / "data")


def test_settings_are_the_published_ones_scaled(plan):
    out = Path("runs/study")
    configs = {n: pretraining_config(plan, m, out) for n, m in MODELS.items() if m.share}
    patches = 8 * 3
    hidden = {name: config.objective.num_masked for name, config in configs.items()}
    assert hidden["patch"] == hidden["frame"] == round(patches * 400 / 512)
    assert (hidden["masked-100"], hidden["masked-250"]) == (5, 12)
    assert configs["frame"].model.patch == (128, 2)
    assert configs["frame"].objective.mask == "random"
    assert configs["patch"].objective.mask == "official"
    assert {n: c.train.steps for n, c in configs.items()} == {
        name: {"patch": 80, "frame": 80, "joint": 8, "joint-encoder": 8}.get(name, 2)
        for name in configs
    } | {"latent-flops": 9, "latent-time": 8}
    changed = {"generative": "kind", "discriminative": "kind"}
    changed |= {"masked-100": "num_masked", "masked-250": "num_masked"}
    for name, key in changed.items():
        ours, reference = vars(configs[name].objective), vars(configs["short"].objective)
        assert {k for k in ours if ours[k] != reference[k]} == {key}

    scratch = finetuning_config(plan, FineTuning(MODELS["patch-scratch"], "pitch", 3e-3, 1), out)
    ours = finetuning_config(plan, FineTuning(MODELS["patch"], "pitch", 3e-3, 1), out)
    assert scratch.finetune.checkpoint is None
    assert ours.finetune.checkpoint == str(out / "pretrain" / "patch")
    assert ours.train == scratch.train and ours.optim == scratch.optim
    assert ours.train.seed == 1 and ours.finetune.test is None


def test_the_hours_are_filled(plan):
    tuned, others = 9 * (2 + 1), 5 * 2  # two rates with seed 0, the chosen one with seed 1
    assert num_runs(plan, "pitch") == tuned + others
    rates, runs = {"pretrain": 100.0, "finetune": 50.0}, {"a": 10, "b": 20}
    steps, epochs = steps_and_epochs(2.0, rates, {"a": 100, "b": 200}, runs, 4)
    shares = sum(m.share * (4 if m.replicated else 1) for group in GROUPS for m in group)
    seconds = steps * shares * 48 / 100 + epochs * (1000 + 4000) / 50
    assert 0.75 * 7200 < seconds <= 0.8 * 7200
    with pytest.raises(ConfigError, match=r"--hours 0.01 is too short: one epoch .* 0.063 hours"):
        steps_and_epochs(0.01, rates, {"a": 100, "b": 200}, runs, 4)


def test_the_learning_rate_is_chosen_on_held_out_clips(plan, tmp_path):
    assert best_rate({1e-3: 0.5, 3e-3: 0.6}) == 3e-3
    assert best_rate({3e-3: 0.5, 1e-3: 0.5}) == 1e-3
    with pytest.raises(ConfigError, match="diverged with every one"):
        best_rate({})
    model = MODELS["patch"]
    fake(plan, tmp_path, "patch", "pitch", 1e-3, 0, 0.5, 9)
    assert chosen_rate(plan, model, "pitch", tmp_path) is None  # one is still to be tried
    fake(plan, tmp_path, "patch", "pitch", 3e-3, 0, 0.6, 1)
    assert chosen_rate(plan, model, "pitch", tmp_path) == 3e-3
    assert chosen_rate(plan, MODELS["generative"], "pitch", tmp_path) == 3e-3
    (FineTuning(model, "pitch", 3e-3, 0).folder(tmp_path) / "diverged.txt").touch()
    assert chosen_rate(plan, model, "pitch", tmp_path) == 1e-3


def test_gains_and_differences(plan, tmp_path):
    for model, rights in (("patch", (9, 8)), ("patch-scratch", (3, 4))):
        for rate in plan.rates:
            fake(plan, tmp_path, model, "pitch", rate, 0, 0.5, rights[0])
        fake(plan, tmp_path, model, "pitch", plan.rates[0], 1, 0.5, rights[1])
    cells = gather(plan, tmp_path)
    assert set(cells) == {("patch", "pitch"), ("patch-scratch", "pitch")}
    found = gain(cells, "patch", "patch", plan.tasks)
    assert found.by_task == {"pitch": pytest.approx(0.85 / 0.35 - 1)}
    assert gain(cells, "frame", "frame", plan.tasks) is None
    ours, theirs = cells["patch", "pitch"], cells["patch-scratch", "pitch"]
    assert significant_sign([ours], [theirs]) == 1 and significant_sign([theirs], [ours]) == -1
    assert significant_sign([ours], [ours]) == 0
    assert published_gain("patch") == pytest.approx(60.9, abs=0.1)
    plan.write(tmp_path)
    page = write_page(tmp_path, tmp_path / "docs").read_text()
    plus_minus = "\N{PLUS-MINUS SIGN}"
    interval = f"+142.9 {plus_minus} {100 * found.margin:.1f}"
    assert f"| 35.0 {plus_minus} 7.1 | 85.0 {plus_minus} 7.1 | {interval} |" in page
    assert "Not finished yet: patch, pretrained (tone); patch, from scratch (tone); " in page
    assert "The test clips of pitch are of 8 groups, hardly a sample" in page
    assert "**reproduced** (1 of 2 tasks are finished)" in page
    # From scratch pitch is below chance, 50 %; tone is finished with the pretrained model alone.
    assert "From scratch it is not above the largest class on pitch" not in page
    for rate in plan.rates:
        fake(plan, tmp_path, "patch", "tone", rate, 0, 0.5, 9)
    assert "(tone)" in write_page(tmp_path, tmp_path / "docs").read_text()


def test_the_work_is_shared(plan, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(
        Study, "pretrain", lambda self, model, seed=0: not done.append(model.run(seed))
    )
    monkeypatch.setattr(Study, "score", lambda self, model, task, rates, seed: True)
    monkeypatch.setattr(Study, "probe", lambda self, model: True)
    study = Study(plan, tmp_path)
    with pytest.raises(ConfigError, match="--only short: needs the learning rates of patch"):
        study.run(["frame", "short"])
    assert not done  # before any work
    for rate in plan.rates:
        fake(plan, tmp_path, "patch", "pitch", rate, 0, 0.5)
    study.run(["frame", "frame-scratch", "short"])
    assert done == ["frame", "short", "short", "short-seed1"]  # one for each seed


def test_a_test_clip_in_the_pretraining_is_refused(plan):
    assert check_no_leak(plan) == {"pretraining": 24, "test": 16}
    data = Path(plan.data)
    shutil.copy(data / "tone" / "eval" / "1_0.wav", data / "p" / "0_3.wav")
    with pytest.raises(DataError, match=r"tone_eval.json: .*1_0.wav is also in train.json, as"):
        check_no_leak(plan)


def test_weights_are_released_with_a_card(plan, tmp_path, capsys):
    plan.write(tmp_path)
    made = {"hours": 1.25, "num_clips": 24, "packages": {"tones": "1"}}
    Path(plan.data, "demo.json").write_text(json.dumps(made))
    for family in FAMILIES:
        config = pretraining_config(plan, MODELS[family], tmp_path)
        state = MSPM(config).state_dict()
        checkpoints = Checkpoints(tmp_path / "pretrain" / family / "checkpoints")
        weights = {f"weight/{name}": value for name, value in state.items()}
        checkpoints.save(weights, {"config": to_plain(config)}, step=plan.steps - 1)
    command = ["--out", str(tmp_path), "--checkpoints", str(tmp_path / "released")]
    with pytest.raises(CheckpointError, match="patch has 79 of 80 steps"):
        release(command)
    for family in FAMILIES:
        checkpoints = Checkpoints(tmp_path / "pretrain" / family / "checkpoints")
        tensors, meta = checkpoints.load(checkpoints.latest())
        checkpoints.save(tensors, meta, step=plan.steps)
        for rate in plan.rates:
            fake(plan, tmp_path, family, "pitch", rate, 0, 0.5, 9)
            fake(plan, tmp_path, f"{family}-scratch", "pitch", rate, 0, 0.5, 3)
    reports = [report("pitch", "untrained", 0.45, 0.4), report("pitch", "checkpoint", 0.9, 0.8)]
    write_probe(tmp_path, "patch", *reports)
    assert release([*command, "--only", "frame"]) == 0
    assert [Path(line).name for line in capsys.readouterr().out.splitlines()] == ["tiny_frame"]
    assert [path.name for path in (tmp_path / "released").iterdir()] == ["tiny_frame"]
    assert release(command) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in paths] == ["tiny_patch", "tiny_frame"]
    for path in paths:
        text = (path / "README.md").read_text()
        assert "| pitch: pitch | 50.0 | 30.0 (1 of 2) | 90.0 (1 of 2) |" in text
        assert "80 steps, batch size 48" in text and "1.2 h of 24 clips" in text
        model, config = load_pretrained(path)
        number = sum(p.numel() for p in model.parameters())
        assert f"{number / 1e6:.2f} M weights" in text
        layers = "| 1 | **90.0** |\n| 2 | 70.0 |\n| weighted | 80.0 |\n"
        layers += "| untrained, best layer | 45.0 |"
        assert (layers in text) == (path.name == "tiny_patch")
        assert ("layer 1: `ssast embed --layer 1`" in text) == (path.name == "tiny_patch")
        assert "| pretext accuracy | 0." in text
        assert config.model.patch == ((16, 16) if path.name == "tiny_patch" else (128, 2))


@pytest.mark.slow
def test_everything_once(plan, tmp_path, capsys, monkeypatch):
    where = ["--out", str(tmp_path / "run"), "--docs", str(tmp_path / "docs")]
    length = ["--steps", "8", "--epochs", "1", "--seeds", "1", "--rates", "1e-3"]
    command = ["--data", plan.data, *where, *length, "--tasks", "pitch"]
    command += ["--only", "patch", "patch-scratch", "--set", *SMALL]
    assert main(command) == 0
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "| pitch: pitch | 8 | 50.0 |" in page
    pictures = {"accuracy", "learning", "pretraining", "reconstructions-patch"}
    assert {path.stem for path in (tmp_path / "docs" / "results").iterdir()} == pictures
    assert "Relative gain" in page
    capsys.readouterr()
    only = ["--only", "patch", "patch-scratch"]
    assert main(["--data", plan.data, *where, *only]) == 0  # nothing again, and the plan is kept
    assert "pretrain patch" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*where, "--only", "pach"])
    assert "invalid choice: 'pach'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"plan.json has steps 8, got 9: resume without --steps"):
        main(["--data", plan.data, *where, "--steps", "9"])
