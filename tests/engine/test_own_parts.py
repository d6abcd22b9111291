"""Objectives, backbones and metrics of another package, that of ``examples/own_parts``."""

import importlib
import json
import math
import sys
import tomllib

import numpy as np
import pytest
import torch
from finetune_runs import data_overrides
from finetune_runs import overrides as finetune_overrides
from paths import ROOT
from runs import lines, overrides

from ssast.engine import api
from ssast.engine.config import load_config
from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.evaluation.evaluate import evaluate
from ssast.engine.evaluation.features import embed
from ssast.engine.evaluation.metrics import classification_metrics
from ssast.engine.evaluation.pretext import pretext_losses
from ssast.engine.finetune import FinetuneEngine
from ssast.engine.formats.huggingface import export_huggingface
from ssast.engine.formats.open import load_pretrained, open_model
from ssast.engine.formats.published import published_state
from ssast.engine.pretrain import pretrain
from ssast.engine.registry import BACKBONES, METRICS, OBJECTIVES
from ssast.engine.train.finetuning import Finetuning

EXAMPLE = ROOT / "examples/own_parts"
OWN = {"objective__kind": "own_parts.huber", "model__backbone": "own_parts.convolution"}
SMALL = {"train__steps": 4, "train__validate_every": 4, "train__save_every": 4}


def install(folder, groups):
    """What pip writes of a package's entry points."""
    info = folder / "own_parts-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own_parts\nVersion: 0.1\n")
    texts = (
        f"[{group}]\n" + "".join(f"{name} = {found}\n" for name, found in entries.items())
        for group, entries in groups.items()
    )
    (info / "entry_points.txt").write_text("\n".join(texts))


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The example, and beside it names that lead nowhere."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    groups = {group: dict(entries) for group, entries in project["entry-points"].items()}
    groups["ssast.objectives"] |= {
        "own_parts.gone": "no_such_module:X",
        "own_parts.no": "json:loads",
    }
    groups["ssast.backbones"] |= {"own_parts.no": "json:loads"}
    folder = tmp_path_factory.mktemp("site")
    install(folder, groups)
    sys.path[:0] = [str(folder), str(EXAMPLE)]
    importlib.invalidate_caches()
    yield
    sys.path.remove(str(folder))
    sys.path.remove(str(EXAMPLE))
    sys.modules.pop("own_parts", None)
    importlib.invalidate_caches()


@pytest.fixture(scope="module")
def run(installed, tmp_path_factory, data, config_file):
    """A pretraining with the objective and the backbone of the example."""
    run = tmp_path_factory.mktemp("own") / "run"
    settings = overrides(**SMALL, **OWN, audio__ignore_padding=True)
    assert pretrain(load_config(config_file, [*settings, *data, f"run.folder={run}"])) == 0
    return run


def test_a_run_trains_and_opens_with_parts_of_another_package(run, data):
    own_parts = sys.modules["own_parts"]
    model, config = load_pretrained(run)
    assert type(model) is own_parts.Huber and type(model.encoder) is own_parts.Convolution
    assert type(model.encoder.blocks[0]) is own_parts.ConvolutionBlock
    assert config.model.backbone == "own_parts.convolution"
    first, last = lines(run, "valid")
    assert last["loss"] < first["loss"]
    scored = pretext_losses(run, data[1].partition("=")[2])
    assert scored["loss"] == pytest.approx(last["loss"], rel=1e-5)
    with pytest.raises(ConfigError, match="heads of SSAST alone, got Huber"):
        published_state(model)
    with pytest.raises(ConfigError, match=r"transformer of SSAST alone, got model.backbone 'own"):
        export_huggingface(model.encoder, run / "hf", config.audio)


def test_masked_and_whole_passes_of_a_backbone_agree(run):
    model, _ = load_pretrained(run)
    fbank = torch.randn(2, 48, 32)
    masks = model.held_out_masks(torch.arange(2), torch.tensor([48, 48]))[0]
    some, _ = model.encoder(fbank, masks, masked_only=True)
    states, _ = model.encoder(fbank, masks)
    rows = torch.arange(2)[:, None]
    assert torch.equal(some, states[rows, masks.mask_ids + 2])
    model.encoder.train()
    model.encoder.activation_checkpoint_every = 1
    again, _ = model.encoder(fbank, masks)
    assert torch.allclose(again, states)
    assert embed(run, torch.randn(8000) / 10).shape == (192,)
    upstream = api.ssast_local(str(run))  # other frames and another stride
    states = upstream([torch.randn(16000) / 10])["hidden_states"]
    assert all(state.isfinite().all() for state in states)


def test_it_is_continued_by_another_objective_and_not_by_another_backbone(run, data, tmp_path):
    quick = ["train.steps=1", "train.batch_size=4", "train.validate_every=1", *data]
    quick += ["data.num_threads=1", f"run.folder={tmp_path / 'run'}"]
    config = load_config("continue", [*quick, "model.backbone=transformer"])
    with pytest.raises(CheckpointError, match=r"has model.backbone 'own_parts.convolution'"):
        pretrain(config, run)
    config = load_config("continue", [*quick, "objective.kind=generative"])
    assert pretrain(config, run) == 0
    model, stored = load_pretrained(tmp_path / "run")
    assert stored.model.backbone == "own_parts.convolution"
    assert type(model).__name__ == "MSPM"


def test_an_own_metric_chooses_the_weights(run, splits, recipe, tmp_path, monkeypatch, caplog):
    settings = finetune_overrides(finetune__epochs=2, finetune__metric="own_parts.recall")
    settings = [s for s in settings if not s.startswith(("model.", "audio."))]
    settings += data_overrides(splits)
    with pytest.raises(ConfigError, match=r"need model.backbone transformer.*own_parts.conv"):
        engine = FinetuneEngine(load_config(recipe, settings), checkpoint=run)
        engine.fit(splits["train"], splits["valid"], folder=tmp_path / "refused")
    config = load_config(recipe, [*settings, "finetune.drop_tokens=0"])
    engine = FinetuneEngine(config, checkpoint=run)
    engine.fit(splits["train"], splits["valid"], folder=tmp_path / "run")
    found = [line["own_parts.recall"] for line in lines(tmp_path / "run", "valid")]
    best = json.loads((tmp_path / "run/valid/metrics.json").read_text())
    assert best["own_parts.recall"] == pytest.approx(max(found[1:]))
    loaded = open_model(tmp_path / "run")
    assert loaded.encoder.backbone == "own_parts.convolution"
    scores = evaluate(loaded, splits["test"])
    # As many clips of each class: the mean over the classes is that over the clips.
    assert scores["own_parts.recall"] == pytest.approx(scores["accuracy"])
    monkeypatch.setattr(METRICS, "_installed", dict)
    assert "own_parts.recall" not in evaluate(loaded, splits["test"])
    assert "own_parts.recall is left out: its package is not installed" in caplog.text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.kind=own_parts.hubert", "one of joint, .*own_parts.huber.*; did you mean ow"),
        ("objective.kind=theirs.thing", "got 'theirs.thing'; is the package installed that"),
        ("objective.kind=own_parts.gone", "no_such_module:X cannot be imported: ModuleNotFound"),
        ("objective.kind=own_parts.no", "expected a subclass of PretrainingModel, got <function"),
        ("model.backbone=own_parts.no", "expected a subclass of Backbone, got <function"),
        ("model.backbone=resnet", "model.backbone must be one of transformer, own_parts.conv"),
    ],
)  # fmt: skip
def test_mistakes_name_what_there_is(override, message, installed, data, config_file, tmp_path):
    settings = [*overrides(**SMALL), *data, f"run.folder={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match=message) as error:
        pretrain(load_config(config_file, [*settings, override]))
    assert "\n" not in str(error.value)


def test_a_wrong_metric_is_named(splits, recipe):
    with pytest.raises(ConfigError, match=r"finetune.metric must be one of auto, accuracy, map"):
        load_config(recipe, [*data_overrides(splits), "finetune.metric=acuracy"])


@pytest.mark.parametrize(
    ("registry", "register"),
    [
        (OBJECTIVES, api.register_objective),
        (BACKBONES, api.register_backbone),
        (METRICS, api.register_metric),
    ],
)
def test_a_program_registers_its_own(registry, register, monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    register("mine", len)
    assert registry.load("mine") is len and "mine" in registry.names()
    with pytest.raises(ConfigError, match="is built in: choose another name"):
        register(registry.names()[0], len)


def test_a_metric_of_no_number_is_the_worst(monkeypatch, tmp_path):
    monkeypatch.setattr(METRICS, "_registered", {})
    api.register_metric("found", lambda logits, targets: float("nan"))
    scores = classification_metrics(np.zeros((2, 2)), np.eye(2), "ce", "found")
    assert "found" not in scores
    task = Finetuning.__new__(Finetuning)
    task.metric = "found"
    worst, best = task.criterion({"loss": 1.0}), task.criterion({"loss": 1.0, "found": -1e9})
    assert best < worst < math.inf and task.score({}) < task.score({"found": -1e9})
