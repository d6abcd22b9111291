"""How a fine-tuning ends: patience, averages, signals, and what is left to a resumed run."""

import csv
import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from finetune_runs import load, manifest, plain_file
from runs import lines

from ssast.engine.errors import ConfigError
from ssast.engine.finetune import finetune
from ssast.engine.monitoring.monitor import read_metrics
from ssast.engine.train.finetuning import Finetuning
from ssast.engine.train.task import Progress
from ssast.engine.train.trainer import Trainer


def test_patience_goes_by_the_metric_alone(splits, tmp_path, monkeypatch, capsys):
    """A loss that falls at the same metric chooses weights, but goes on with no training."""
    honest, losses = Finetuning.validate, iter(range(99, 0, -1))

    def validate(self, engine):
        return honest(self, engine) | {self.metric: 0.5, "loss": float(next(losses))}

    monkeypatch.setattr(Finetuning, "validate", validate)
    config = load(plain_file(tmp_path), splits, tmp_path / "run", finetune__epochs=30,
                  finetune__patience=2, finetune__average_last_epochs=3,
                  train__log_every=2)  # fmt: skip
    assert finetune(config) == 0
    logged = lines(tmp_path / "run", "train")
    assert [line["step"] for line in logged] == [2, 4, 6, 8, 9]  # also the last steps
    rates = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if "perf/step_s" in row]
    assert [row["step"] for row in rates] == [2, 4, 6, 8] and all(r["perf/step_s"] for r in rates)
    assert ", 3 epochs of 24 clips" in (tmp_path / "run/report.md").read_text()
    assert [line["step"] for line in lines(tmp_path / "run", "valid")] == [0, 3, 6, 9]
    best = json.loads((tmp_path / "run/checkpoints/best.json").read_text())
    assert best["step"] == 9
    said = "finetune.average_last_epochs: nothing was averaged, as the run ended at step 9"
    assert said in capsys.readouterr().out


def test_an_equal_score_is_no_better():
    progress, counts = Progress(), []
    for score in (0.5, 0.5, 0.6, 0.4, 0.6, float("nan")):
        progress.update(score)
        counts.append(progress.since_best)
    assert counts == [0, 1, 0, 1, 2, 3]


def test_epochs_are_counted_with_one_batch_size(splits, tmp_path):
    config = load(plain_file(tmp_path), splits, tmp_path / "run", finetune__epochs=1)
    assert finetune(config) == 0
    other = load(plain_file(tmp_path), splits, tmp_path / "run", train__batch_size=4)
    with pytest.raises(ConfigError, match=r"train.batch_size was 8 when .*run began, now it is 4"):
        finetune(other, resume=True)


def test_settings_that_change_on_the_way_are_said(splits, tmp_path, capsys):
    config = load(plain_file(tmp_path), splits, tmp_path / "run", finetune__epochs=1)
    assert finetune(config) == 0
    other = load(plain_file(tmp_path), splits, tmp_path / "run", finetune__epochs=2,
                 optim__lr=0.0025, optim__weight_decay=0.25)  # fmt: skip
    capsys.readouterr()
    assert finetune(other, resume=True) == 0
    said = capsys.readouterr().out
    assert "warning: changed since the run began: " in said
    before = config.optim.lr, config.optim.weight_decay
    assert f"optim.lr ({before[0]}, now 0.0025)" in said
    assert f"optim.weight_decay ({before[1]}, now 0.25)" in said
    assert "average of" not in (tmp_path / "run/report.md").read_text()  # none was asked for


def test_a_signal_after_the_last_step_leaves_the_report_to_a_resumed_run(
    splits, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    config = load(plain_file(tmp_path), splits, run, finetune__epochs=1)

    def signalled(self):
        if not self.stop.signal:  # a second one would end the process
            signal.raise_signal(signal.SIGTERM)
            self.stop.requested(self.context.world)

    with monkeypatch.context() as late:
        late.setattr(Trainer, "tell_checkpoints", signalled)
        assert finetune(config) == signal.SIGTERM
    assert not (run / "report.md").exists()
    assert finetune(config, resume=True) == 0
    assert (run / "report.md").is_file()


def test_other_test_clips_are_evaluated_by_a_resumed_run(splits, tmp_path):
    run = tmp_path / "run"
    config = load(plain_file(tmp_path), splits, run, finetune__epochs=1)
    without = replace(config, finetune=replace(config.finetune, test=None))
    assert finetune(without) == 0 and not (run / "test").exists()
    trained = lines(run, "train")
    assert finetune(config, resume=True) == 0
    assert "| test | 9 of 9 |" in (run / "report.md").read_text()
    assert (run / "test" / "metrics.json").is_file() and lines(run, "train") == trained


def test_the_report_is_of_the_test_clips_that_are_named_now(splits, tmp_path):
    """Also after others were, and where the same file lists others."""
    run, other = tmp_path / "run", tmp_path / "test2.json"
    clips = sorted((splits["test"].parent / "test").glob("*.wav"))

    def tested(test):
        config = load(plain_file(tmp_path), splits | {"test": test}, run, finetune__epochs=1)
        assert finetune(config, resume=True) == 0
        named = {Path(row["wav"]) for row in csv.DictReader((run / "test/predictions.csv").open())}
        assert f"| test | {len(named)} of {len(named)} |" in (run / "report.md").read_text()
        return named

    assert tested(splits["test"]) == set(clips)
    assert tested(manifest(other, clips[:6])) == set(clips[:6])
    assert tested(manifest(other, clips[3:7])) == set(clips[3:7])
    assert tested(splits["test"]) == set(clips)
    before = (run / "test/metrics.json").stat().st_mtime_ns
    assert tested(splits["test"]) == set(clips)
    assert (run / "test/metrics.json").stat().st_mtime_ns == before
