"""Runs whose encoder has other positions, extra tokens and norms, from pretraining to exports."""

import json

import pytest
import torch
from finetune_runs import load as finetune_config
from runs import lines, overrides

from ssast.engine.checkpoints.adopt import adopt
from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.cli.main import main
from ssast.engine.config import load_config
from ssast.engine.errors import CheckpointError
from ssast.engine.finetune import finetune
from ssast.engine.formats.open import open_classifier, open_encoder
from ssast.engine.model.embedding import sincos_positions
from ssast.engine.pretrain import pretrain

OPTIONS = {"positions": "sincos", "extra_tokens": "cls", "norm": "post"}
CHANGED = {f"model__{key}": value for key, value in OPTIONS.items()}
STEPS = {"train__steps": 6, "train__save_every": 3, "train__validate_every": 6}
RUNS = {
    "bf16": {
        "train__precision": "bf16",
        "train__zero_stage": 2,
        "train__activation_checkpoint_every": 2,
        "audio__ignore_padding": True,
    },
    "sharded": {"train__zero_stage": 3, "model__depth": 2, "train__ema": 0.9},
}


def run_of(name, folder, config_file, data, **changed):
    settings = overrides(**STEPS | CHANGED | RUNS[name] | changed)
    return load_config(config_file, [*settings, *data, f"run.folder={folder}"])


@pytest.fixture(scope="module")
def run(tmp_path_factory, config_file, data):
    folder = tmp_path_factory.mktemp("options") / "run"
    assert pretrain(run_of("sharded", folder, config_file, data)) == 0
    return folder


def state(run, step):
    tensors, _ = Checkpoints.load(run / "checkpoints" / f"step{step:09d}")
    return tensors


@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains(name, request, config_file, data, tmp_path):
    if name == "sharded":
        whole = request.getfixturevalue("run")
    else:
        whole = tmp_path / "whole"
        assert pretrain(run_of(name, whole, config_file, data)) == 0
    valid = lines(whole, "valid")
    assert valid[-1]["loss"] < valid[0]["loss"]
    reached = state(whole, 6)
    assert not [key for key in reached if "pos_embed" in key or "dist_token" in key]
    if name == "sharded":  # and resumes bit for bit
        parts = tmp_path / "parts"
        assert pretrain(run_of(name, parts, config_file, data, train__steps=3)) == 0
        assert pretrain(run_of(name, parts, config_file, data), resume=True) == 0
        other = state(parts, 6)
        assert reached.keys() == other.keys()
        assert all(torch.equal(reached[key], other[key]) for key in reached)


def test_the_encoder_is_fine_tuned_on_another_grid(run, recipe, splits, tmp_path):
    """Its options are the checkpoint's, and stay with the classifier and its exports."""
    folder = tmp_path / "tuned"
    changed = {"finetune__epochs": 1, "finetune__pooling": "cls", "finetune__layer_decay": 0.5}
    changed |= {"model__depth": 2, "audio__num_frames": 80, "audio__mean": -4.2677393}
    assert finetune(finetune_config(recipe, splits, folder, **changed), run) == 0
    classifier = open_classifier(folder).classifier.float()
    encoder = classifier.encoder
    assert {key: getattr(encoder.settings, key) for key in OPTIONS} == OPTIONS
    assert encoder.embed.grid == (2, 5)
    assert encoder.embed.pos_embed.equal(sincos_positions((2, 5), 192, 1).float())
    x = torch.randn(2, 80, 32)
    with torch.no_grad():
        want = classifier(x)
    assert main(["export", str(folder), "--to", "pt2", str(tmp_path / "a.pt2")]) == 0
    found = torch.export.load(tmp_path / "a.pt2").module()(x)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    sound = json.loads(splits["test"].read_text())["data"][0]["wav"]
    assert main(["predict", str(folder), sound]) == 0


def test_what_is_not_the_checkpoints_is_refused(run, capsys, tmp_path, recipe):
    loaded = open_encoder(run)
    for key, other in (("positions", "learned"), ("extra_tokens", "cls_dist"), ("norm", "pre")):
        config = load_config(recipe, [f"model.{key}={other}", "model.depth=2"])
        with pytest.raises(CheckpointError, match=f"has model.{key} '{OPTIONS[key]}'.*'{other}'"):
            adopt(config, loaded.config, str(run))
    _, lines_ = adopt(load_config(recipe), loaded.config, str(run))
    assert "positions sincos, extra_tokens cls, norm post" in lines_[0]
    assert main(["export", str(run), "--to", "published", str(tmp_path / "a.pth")]) == 2
    message = "the published format holds models of model.positions learned alone, got 'sincos'"
    assert message in capsys.readouterr().err
