"""Callbacks: what a run calls when, how one ends it, and what becomes of their errors."""

import re

import callback_jobs
import numpy as np
import pytest
from callback_jobs import Recorder, StopAt
from finetune_runs import data_overrides
from finetune_runs import overrides as finetune_overrides
from paths import ROOT
from runs import lines, overrides

from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.config import load_config
from ssast.engine.errors import TrainingError
from ssast.engine.finetune import FinetuneEngine
from ssast.engine.monitoring.monitor import read_metrics, scalars
from ssast.engine.pretrain import PretrainEngine, pretrain
from ssast.engine.train.callbacks import Callback

DOCS = ROOT / "docs/extending.md"
SMALL = {"train__steps": 6, "train__validate_every": 4, "train__save_every": 3}
SMALL |= {"train__log_every": 2}


def config_of(config_file, data, run, **changed):
    settings = overrides(**SMALL | changed)
    return load_config(config_file, [*settings, *data, f"run.folder={run}"])


class OwnMetric(Callback):
    """Logs the norm of the weights with each validation."""

    def on_validation(self, state, metrics):
        assert "valid/loss" in metrics and state.folder.is_dir() and state.world_size == 1
        norm = sum(p.detach().norm().item() for p in state.module.parameters())
        state.log(
            {"own/norm": np.float32(norm), "own/share": state.step / state.config.train.steps}
        )


def test_a_run_calls_each_method_when_it_says(config_file, data, tmp_path):
    run, recorder = tmp_path / "run", Recorder()
    engine = PretrainEngine(config_of(config_file, data, run))
    train, valid = (d.partition("=")[2] for d in data)
    engine.fit(train, valid, callbacks=[recorder, OwnMetric()])
    assert recorder.steps("on_start") == [0]
    assert recorder.steps("on_step") == [1, 2, 3, 4, 5, 6]
    assert recorder.steps("on_log") == [2, 4, 6] and recorder.steps("on_validation") == [0, 4, 6]
    assert recorder.calls[0][0] == "on_start" and recorder.calls[-1] == ("on_end", 6, None)
    written = recorder.given("on_checkpoint")
    assert [path.name for path in written] == [f"step{n:09}" for n in (3, 4, 6)]
    assert all(path.is_dir() for path in written)
    logged = read_metrics(run / "metrics.jsonl")
    for name, method in (("train/loss", "on_log"), ("valid/loss", "on_validation")):
        values = [
            (s, m[name])
            for s, m in zip(recorder.steps(method), recorder.given(method), strict=True)
        ]
        assert values == scalars(logged, name)
    assert [step for step, _ in scalars(logged, "own/norm")] == [0, 4, 6]
    assert scalars(logged, "own/share") == [(0, 0.0), (4, 4 / 6), (6, 1.0)]


def test_an_ended_run_is_validated_and_saved_and_goes_on_without_the_callback(
    config_file, data, tmp_path, capsys
):
    run = tmp_path / "run"
    config = config_of(config_file, data, run)
    assert pretrain(config, callbacks=[StopAt(2)]) == 0
    assert "ended at step 2 by the callback StopAt: far enough" in capsys.readouterr().out
    assert [line["step"] for line in lines(run, "valid")] == [0, 2]
    assert Checkpoints(run / "checkpoints").best().name == "step000000002"
    again = Recorder()
    assert pretrain(config, resume=True, callbacks=[StopAt(5), again]) == 0  # it is finished
    assert again.steps("on_step") == []
    assert pretrain(config, resume=True, callbacks=[again]) == 0
    assert again.steps("on_step") == [3, 4, 5, 6]


@pytest.mark.parametrize("method", ["on_start", "on_log", "on_validation"])
def test_any_method_may_end_a_run(method, config_file, data, tmp_path):
    config, recorder = config_of(config_file, data, tmp_path / "run"), Recorder()
    assert pretrain(config, callbacks=[StopAt(0, method=method), recorder]) == 0
    last = {"on_start": 1, "on_log": 2, "on_validation": 1}[method]
    assert recorder.steps("on_step")[-1] == last and recorder.calls[-1] == ("on_end", last, None)


def test_one_rank_ends_the_run_on_all(two_ranks, config_file, data, tmp_path):
    settings = [*overrides(**SMALL), *data]
    job = callback_jobs.stopped_on_one_rank
    found = two_ranks.run(job, config_file, settings, str(tmp_path / "run"))
    assert found == [([1, 2], ["step000000002"]), ([1, 2], [])]


def test_ranks_agree_that_a_run_was_ended_by_a_callback_of_one(
    two_ranks, config_file, data, tmp_path
):
    settings = [*overrides(**SMALL), *data]
    job = callback_jobs.resumed_with_the_callback_on_one_rank
    assert two_ranks.run(job, config_file, settings, str(tmp_path / "run")) == [[], []]


def test_ranks_share_a_metric_that_draws_at_random(two_ranks, recipe, splits, tmp_path):
    settings = [*finetune_overrides(finetune__epochs=2), *data_overrides(splits)]
    job = callback_jobs.fine_tuned_by_a_random_metric
    ours, theirs = two_ranks.run(job, recipe, settings, str(tmp_path / "run"))
    assert ours == theirs and len(set(ours)) == 3


def test_fine_tuning_that_is_ended_in_its_first_epoch_has_a_classifier(
    splits, recipe, tmp_path, capsys
):
    """There was no validation yet, by which weights are chosen."""
    config = load_config(recipe, [*finetune_overrides(), *data_overrides(splits)])
    engine = FinetuneEngine(config)
    engine.fit(splits["train"], splits["valid"], folder=tmp_path / "run", callbacks=[StopAt(1)])
    assert "ended at step 1" in capsys.readouterr().out
    assert (tmp_path / "run" / "report.md").is_file()
    assert 0 <= engine.evaluate(splits["test"])["accuracy"] <= 1


def test_the_documented_example_ends_a_run(config_file, data, tmp_path, capsys):
    (code,) = re.findall(r"^```python\n(.*?)^engine", DOCS.read_text(), re.M | re.S)
    names = {}
    exec(code, names)
    run, callback = tmp_path / "run", names["Plateau"](1)
    config = config_of(config_file, data, run, optim__lr=0.0, train__validate_every=1)
    assert pretrain(config, callbacks=[callback]) == 0
    assert callback.losses == [line["loss"] for line in lines(run, "valid")]
    assert len(callback.losses) == 2 and f"{run} ended at step 1" in capsys.readouterr().out
    counts = scalars(read_metrics(run / "metrics.jsonl"), "plateau/validations")
    assert counts == [(0, 0), (1, 1)]


class Wrong(Callback):
    def on_step(self, state):
        {}["no such key"]


def test_an_error_names_the_callback_and_ends_the_run(config_file, data, tmp_path):
    recorder = Recorder()
    with pytest.raises(TrainingError) as found:
        pretrain(config_of(config_file, data, tmp_path / "r"), callbacks=[recorder, Wrong()])
    assert str(found.value) == "callback Wrong.on_step at step 1: KeyError: 'no such key'"
    assert isinstance(found.value.__cause__, KeyError)
    name, step, error = recorder.calls[-1]
    assert (name, step) == ("on_end", 1) and error is found.value
