"""Runs with latent targets: they train, resume, are opened, and end where they collapse."""

import json

import pytest
import torch
from runs import call_on_two_ranks, lines, overrides

from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.config import load_config
from ssast.engine.errors import CheckpointError, TrainingError
from ssast.engine.evaluation.pretext import pretext_losses
from ssast.engine.formats.open import load_pretrained, open_model
from ssast.engine.monitoring.guard import CollapseGuard
from ssast.engine.pretrain import pretrain

LATENT = {
    "objective__kind": "latent",
    "objective__mask": "inverse_blocks",
    "objective__clones": 2,
    "objective__decoder_depth": 1,
    "objective__teacher_decay": [0.5, 0.9],
    "objective__teacher_decay_steps": 4,
    "model__positions": "sincos",
    "model__extra_tokens": "cls",
    "model__norm": "post",
    "optim__schedule": "constant",
    "train__validate_every": 4,
    "train__steps": 8,
}

STATISTICS = {
    "target_std",
    "content_std",
    "prediction_std",
}  # over the patches of a rank's part of a batch


@pytest.fixture(scope="module")
def configure(data, config_file):
    def load(run, **changed):
        return load_config(
            config_file, [*overrides(**LATENT | changed), *data, f"run.folder={run}"]
        )

    return load


@pytest.fixture(scope="module")
def run(tmp_path_factory, configure):
    run = tmp_path_factory.mktemp("latent") / "run"
    assert pretrain(configure(run)) == 0
    return run


def test_metrics_and_checkpoints_of_a_run(run):
    train, valid = lines(run, "train"), lines(run, "valid")
    names = {"loss", "latent_loss", "cls_loss"} | STATISTICS
    assert all(names <= set(line) for line in train + valid)
    assert train[-1]["loss"] < train[0]["loss"]
    assert all(line["target_std"] > 0.1 for line in train)
    for line in train:
        assert line["loss"] == pytest.approx(line["latent_loss"] + line["cls_loss"])
    # No validation tells which weights are better: the latest are opened, with the teacher's.
    assert Checkpoints(run / "checkpoints").best() is None
    model, _ = load_pretrained(run)
    tensors, _ = Checkpoints.load(Checkpoints(run / "checkpoints").latest())
    for name, value in model.state_dict().items():
        assert torch.equal(value, tensors[f"ema/{name}"] if "mask_embed" not in name else value)
    assert (run / "curves.png").is_file()


def test_a_run_resumes_bit_for_bit(run, configure, tmp_path):
    """With other thresholds, which nothing that is trained depends on."""
    other = tmp_path / "other"
    assert pretrain(configure(other, train__steps=4)) == 0
    assert pretrain(configure(other, objective__min_target_std=0.01), resume=True) == 0
    assert lines(other, "train") == lines(run, "train")
    assert lines(other, "valid") == lines(run, "valid")
    ours, theirs = (
        Checkpoints.load(Checkpoints(folder / "checkpoints").latest())[0] for folder in (run, other)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.slow
def test_two_ranks_resume_bit_for_bit_and_train_as_one(run, data, config_file, tmp_path):
    def train(folder, *given, **changed):
        settings = overrides(**LATENT | {"train__zero_stage": 2} | changed)
        words = (*settings, *data, f"run.folder={folder}", *given)
        done = call_on_two_ranks("pretrain", config_file, *words)
        assert done.returncode == 0, done.stderr

    whole, other = tmp_path / "whole", tmp_path / "other"
    train(whole)
    train(other, train__steps=4)
    train(other, "--resume")
    for split in ("train", "valid"):
        assert lines(other, split) == lines(whole, split)
        for ours, theirs in zip(lines(whole, split), lines(run, split), strict=True):
            for name in ours.keys() - STATISTICS:
                assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=1e-5), name
    ours, theirs = (
        Checkpoints.load(Checkpoints(folder / "checkpoints").latest())[0]
        for folder in (whole, other)
    )
    assert ours.keys() == theirs.keys() and any(name.startswith("ema/") for name in ours)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_micro_batches_train_alike(run, configure, tmp_path):
    config = configure(tmp_path / "run", train__accumulation_steps=2, train__steps=3)
    assert pretrain(config) == 0
    for ours, theirs in zip(lines(tmp_path / "run", "train"), lines(run, "train"), strict=False):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_losses_of_an_opened_run_are_those_of_its_validation(run, data):
    source = data[1].partition("=")[2]
    found, last = pretext_losses(run, source), lines(run, "valid")[-1]
    for name in ("loss", "latent_loss", "cls_loss"):
        assert found[name] == pytest.approx(last[name], rel=1e-5)
    with pytest.raises(CheckpointError, match="expected raw and averaged weights, which are stu"):
        pretext_losses(open_model(run, weights="raw"), source)


def test_a_collapse_ends_a_run(configure, tmp_path):
    changed = {"objective__min_target_std": 10.0, "objective__collapse_reports": 3}
    with pytest.raises(TrainingError, match=r"collapsed at step 5.*target_std .* is below objecti"):
        pretrain(configure(tmp_path / "run", **changed))
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in metrics]
    assert max(steps) == 5, "two steps of warm-up, then three log lines"


def test_a_collapse_is_several_low_values_in_a_row():
    guard = CollapseGuard({"a": 0.1, "b": 0.5}, reports=2)
    low, fine, broken = {"a": 0.05, "b": 1.0}, {"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 0.4}
    assert [guard.collapsed(v) for v in (low, fine, low, broken)] == [None] * 4
    assert guard.collapsed({"a": float("nan"), "b": 0.4}) == "b"
    assert CollapseGuard({}, reports=1).collapsed({"loss": 0.0}) is None
