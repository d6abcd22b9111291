"""Tuning: what it chooses, what it survives, and that what it writes can be trained with."""

import json
from dataclasses import replace
from types import SimpleNamespace as Memory

import pytest
from paths import ROOT
from runs import overrides, write_config

from ssast.engine.checkpoints.adopt import adopt
from ssast.engine.cli.main import main
from ssast.engine.config import load_config
from ssast.engine.errors import ConfigError
from ssast.engine.parallel import machine as machines
from ssast.engine.planning import tune as tuning
from ssast.engine.planning.trial import Trial, try_out
from ssast.engine.planning.tune import fastest, format_results, tune, write_tuned
from ssast.engine.registry import BACKBONES, OBJECTIVES
from ssast.engine.settings import Audio


@pytest.fixture
def config():
    return load_config("tiny_patch", ["train.batch_size=8"])


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(tuning, "usable_cores", lambda: 2)
    monkeypatch.setattr(tuning.torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(tuning.shutil, "which", lambda name: None)


def machine(overhead_s=0.1, clip_s=0.1, threads=2, fits=1 << 20, compiled=1.0, base_s=0.0):
    """A pretended machine, whose rate rises with the batch, and the batches tried on it."""
    tried = []

    def run(config, *, num_threads, **options):
        batch = config.train.batch_size
        tried.append(
            (batch, num_threads, config.train.compile, config.train.activation_checkpoint_every)
        )
        if batch > fits * (4 if config.train.activation_checkpoint_every else 1):
            return Trial("out of memory", "cannot allocate")
        step_s = (overhead_s + batch * clip_s) * (1 if num_threads == threads else 1.5)
        step_s *= compiled if config.train.compile else 1.0
        return Trial("ok", step_s=step_s, clips_per_s=batch / step_s, memory_gib=1.0)

    return run, tried


@pytest.mark.parametrize(
    ("registry", "setting"), [(OBJECTIVES, "objective.kind"), (BACKBONES, "model.backbone")]
)
def test_what_other_processes_do_not_know_is_refused(registry, setting, monkeypatch):
    monkeypatch.setattr(registry, "_registered", {"mine": object})
    config = load_config("tiny_patch", [f"{setting}=mine"])
    with pytest.raises(ConfigError, match=rf"{setting} 'mine' is registered in this process alone"):
        tune(config)
    monkeypatch.setattr(registry, "_installed", lambda: {"mine": object})
    run, _ = machine()
    monkeypatch.setattr("ssast.engine.planning.trial._run", lambda *_: run(config, num_threads=2))
    assert try_out(config).outcome == "ok"


def test_the_batch_grows_while_it_helps(config):
    run, tried = machine(overhead_s=1.6)
    best = fastest(tune(config, run=run))
    # 8: 3.3, 16: 5, 32: 6.7, 64: 8, 128: 8.9, 256: 9.41, 512: 9.70 clips/s, less than 3 % better
    assert best.config.train.batch_size == 256
    assert [batch for batch, *_ in tried] == [8, 8, 16, 32, 64, 128, 256, 512]


def test_a_smaller_batch_is_taken_where_it_is_as_fast(config):
    run, _ = machine(overhead_s=0.001)
    assert fastest(tune(config, run=run)).config.train.batch_size == 1


def test_threads_and_compilation_are_chosen(config, monkeypatch):
    monkeypatch.setattr(tuning.shutil, "which", lambda name: "/usr/bin/" + name)
    run, _ = machine(threads=1, compiled=0.7)
    best = fastest(tune(config, run=run))
    assert best.num_threads == 1 and best.config.train.compile


@pytest.mark.parametrize(
    ("given", "native", "chosen"),
    [("auto", True, "bf16"), ("auto", False, "auto"), ("fp32", True, "fp32")],
)
def test_bf16_is_tried_where_a_cpu_multiplies_it(given, native, chosen, config, monkeypatch):
    monkeypatch.setattr(tuning.torch.cpu, "get_capabilities", lambda: {"amx_bf16": native})
    run, _ = machine()

    def rounded(candidate, **options):
        trial = run(candidate, **options)
        factor = 1.5 if candidate.train.precision == "bf16" else 1.0
        return replace(trial, clips_per_s=factor * trial.clips_per_s)

    config = replace(config, train=replace(config.train, precision=given))
    results = tune(config, run=rounded)
    assert fastest(results).config.train.precision == chosen
    assert (", bf16" in format_results(results)) == (chosen == "bf16")


def test_what_is_tried_on_a_gpu_are_settings(config, monkeypatch):
    monkeypatch.setattr(tuning.torch.cuda, "is_available", lambda: True)
    run, _ = machine()
    tried = [candidate.config for candidate in tune(config, run=run)]
    assert all(one != other for i, one in enumerate(tried) for other in tried[:i])


def test_a_batch_that_does_not_fit_ends_nothing(config):
    run, tried = machine(overhead_s=5.0, fits=20)
    results = tune(config, run=run)
    assert tried[-1][0] == 32 and results[-1].trial.outcome == "out of memory"
    assert fastest(results).config.train.batch_size == 16
    assert "out of memory: cannot allocate" in format_results(results)


def test_a_batch_that_takes_too_long_is_quartered(config):
    def slow(candidate, **options):
        batch = candidate.train.batch_size
        ok = Trial("ok", step_s=1.0, clips_per_s=batch, memory_gib=1.0)
        return ok if batch <= 2 else Trial("too slow", "no result within 48 s")

    assert fastest(tune(config, run=slow)).config.train.batch_size == 2


def test_blocks_are_computed_again_where_nothing_fits(config):
    run, _ = machine(overhead_s=0.01, fits=4)
    best = fastest(tune(config, run=run))
    assert best.config.train.activation_checkpoint_every == 2 or best.config.train.batch_size <= 4


def test_nothing_is_started_when_time_is_up(config):
    now = [0.0]
    run, tried = machine()

    def slow(candidate, **options):
        now[0] += 50.0
        return run(candidate, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning.time, "monotonic", lambda: now[0])
        tune(config, seconds=120.0, run=slow)
    assert len(tried) == 3


def test_where_nothing_runs_the_reason_is_told(config):
    def broken(candidate, **options):
        return Trial("failed", "no driver")

    results = tune(config, run=broken)
    with pytest.raises(ConfigError, match="no setting ran: failed: no driver"):
        fastest(results)


def test_what_is_written_is_a_configuration(config, tmp_path):
    run, _ = machine(overhead_s=1.6, threads=1)
    results = tune(config, run=run)
    path = tmp_path / "new" / "tuned.yaml"
    write_tuned(config, results, path)
    text = path.read_text()
    assert "# to be run with OMP_NUM_THREADS=1" in text and "# train.batch_size was 8" in text
    written = load_config(path)
    best = fastest(results).config
    assert replace(written, run=best.run) == replace(best, run=best.run)


def test_what_nobody_set_is_left_to_the_checkpoint(tmp_path, capsys):
    """The tuned file of a continued run has no defaults that would override the checkpoint."""
    given = load_config("continue", ["model.size=tiny"])
    run, _ = machine(overhead_s=1.6)
    write_tuned(given, tune(given, run=run), tmp_path / "tuned.yaml")
    tuned = load_config(tmp_path / "tuned.yaml", ["train.checkpoint=runs/ckpt"])
    assert tuned.train.batch_size == 384 and tuned.optim == given.optim
    audio = Audio(num_frames=128, mean=-6.5, ignore_padding=True)
    theirs = replace(given, audio=audio, objective=replace(given.objective, num_masked=16))
    adopted, _ = adopt(tuned, theirs, "ckpt")
    assert adopted.audio == audio and adopted.objective.num_masked == 16
    path = tmp_path / "empty.yaml"
    path.write_text("finetune: {}\n")
    given = load_config(path)
    write_tuned(given, tune(given, run=run), path)
    assert load_config(path).finetune == given.finetune


@pytest.mark.parametrize("recipe", ["continue", "classifier"])
def test_a_plan_is_of_the_checkpoints_model(recipe, tmp_path, capsys):
    section = "train" if recipe == "continue" else "finetune"
    given = f"{section}.checkpoint={ROOT / 'checkpoints/tiny_patch'}"
    assert main(["plan", recipe, given, "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["model"].startswith("tiny, ") and "size tiny" in shown.err
    for command in ("plan", "tune"):
        assert main([command, recipe, f"{section}.checkpoint={tmp_path / 'none'}"]) == 2
        shown = capsys.readouterr()
        assert not shown.out and f"{tmp_path / 'none'}: " in shown.err


def test_mistakes_are_named(config, capsys):
    with pytest.raises(ConfigError, match="--seconds must be positive and finite, got 0"):
        tune(config, seconds=0)
    assert main(["tune", "tiny_patch", "train.accumulation_steps=7"]) == 2
    assert (
        "train.batch_size 120 cannot be divided by train.accumulation_steps 7"
        in capsys.readouterr().err
    )


@pytest.fixture
def small(tmp_path):
    return load_config(write_config(tmp_path), overrides(train__batch_size=2))


@pytest.mark.parametrize(("limit", "left_gib"), [("max", None), (f"{3 << 30}", 2.0)])
def test_a_limit_of_a_control_group_counts(tmp_path, monkeypatch, limit, left_gib):
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{1 << 30}\n")
    monkeypatch.setattr(machines, "CGROUP", tmp_path)
    monkeypatch.setattr(machines.psutil, "virtual_memory", lambda: Memory(available=5 << 30))
    assert machines.available_gib() == (left_gib or 5.0)


def test_a_real_trial(small):
    trial = try_out(small, seconds=0.5, max_steps=4, num_threads=1)
    assert trial.outcome == "ok", trial.reason
    assert trial.least_s > 0 and 0 < trial.step_s < 60
    assert trial.clips_per_s == pytest.approx(2 / trial.step_s)
    assert 0.1 < trial.base_gib <= trial.memory_gib < 5


def test_a_real_trial_out_of_memory_or_time(small):
    """It is the child that ends; the machine keeps its memory."""
    huge = replace(small, train=replace(small.train, batch_size=20_000_000))
    trial = try_out(huge, memory_gib=min(4.0, 0.5 * machines.available_gib()))
    assert trial.outcome == "out of memory", trial
    trial = try_out(small, timeout_s=0.5)
    assert trial.outcome == "too slow" and "0 s" in trial.reason
