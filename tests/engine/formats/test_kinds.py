"""The table in docs/checkpoints.md: what can be done with each kind of model, cell by cell."""

import re

import numpy as np
import pytest
import torch
from paths import ROOT

from ssast.engine.checkpoints.adopt import adopt
from ssast.engine.checkpoints.classifier import build_classifier, fill_encoder, save_chosen
from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.checkpoints.weights import export_weights
from ssast.engine.cli.main import main
from ssast.engine.config import from_plain, load_config, to_plain
from ssast.engine.errors import CheckpointError
from ssast.engine.evaluation.features import embed
from ssast.engine.formats.huggingface import export_huggingface
from ssast.engine.formats.open import MissingMetadata, open_classifier, open_encoder, open_model
from ssast.engine.formats.published import save_published
from ssast.engine.model.objective import MSPM
from ssast.engine.train.pretraining import continue_from

PAGE = ROOT / "docs" / "checkpoints.md"
ACTIONS = ["predict", "embed", "finetune", "pretrain"]
ACTIONS += [f"export {form}" for form in ("published", "hf", "pt2", "weights")]
HEAD = f"| Model | {' | '.join(ACTIONS)} |"
ROWS = PAGE.read_text().partition(HEAD)[2].partition("\n\n")[0].strip().split("\n")[1:]
CELLS = [re.split(r" *\| *", row.strip("| ")) for row in ROWS]
SETTINGS = {
    "model": {"size": "tiny", "depth": 1},
    "audio": {"num_frames": 48},
    "objective": {"num_masked": 2},
}
OPTIONS = {"positions": "sincos", "extra_tokens": "cls", "norm": "post"}
METADATA = {"published, fine-tuned": MissingMetadata(num_frames=48, stride=(16, 16))}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One model of each kind, by the name of its row."""
    return make_models(tmp_path_factory.mktemp("kinds"), {})


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """The same of an encoder with other options; the published format has none."""
    return make_models(tmp_path_factory.mktemp("options"), OPTIONS)


def make_models(folder, options):
    torch.manual_seed(0)
    settings = SETTINGS | {"model": SETTINGS["model"] | options}
    config = from_plain(settings)
    tuned = from_plain(settings | {"finetune": {"pooling": "cls"}})
    model, classifier = MSPM(config), build_classifier(tuned, 3)
    weights = {f"weight/{name}": value for name, value in model.state_dict().items()}
    run = folder / "run"
    Checkpoints(run / "checkpoints").save(weights, {"config": to_plain(config), "step": 1}, step=1)
    weights = {f"weight/{name}": value for name, value in classifier.state_dict().items()}
    labels = ["a", "b", "c"]
    save_chosen(folder / "tuned", weights, step=1, config=tuned, classes=labels, facts={"step": 1})
    if not options:
        save_published(model, folder / "pretrained.pth")
        save_published(classifier, folder / "tuned.pth")
    return {
        "pretraining run": run,
        "exported weights": export_weights(model, config, 1, folder / "weights", torch.float16),
        "fine-tuned run": folder / "tuned",
        "published, pretrained": folder / "pretrained.pth",
        "published, fine-tuned": folder / "tuned.pth",
        "transformers, pretrained": export_huggingface(model.encoder, folder / "hf", config.audio),
        "transformers, fine-tuned": export_huggingface(
            classifier, folder / "hf-tuned", config.audio, labels, "ce"
        ),
    }


def test_every_kind_has_a_row(models):
    assert [row[0] for row in CELLS] == list(models)
    assert all(len(row) == 1 + len(ACTIONS) for row in CELLS)


TABLE = [
    (row[0], action, cell) for row in CELLS for action, cell in zip(ACTIONS, row[1:], strict=True)
]


@pytest.mark.parametrize(("kind", "action", "cell"), TABLE)
def test_each_cell(models, kind, action, cell, tmp_path):
    check_cell(models[kind], kind, action, cell, tmp_path)


@pytest.mark.parametrize(
    ("kind", "action", "cell"), [row for row in TABLE if not row[0].startswith("published")]
)
def test_each_cell_of_other_options(others, kind, action, cell, tmp_path, capsys):
    cell = "no" if action == "export published" else cell
    config = check_cell(others[kind], kind, action, cell, tmp_path)
    if config is not None:
        assert {key: getattr(config.model, key) for key in OPTIONS} == OPTIONS
    if action == "export published" and kind != "transformers, pretrained":
        assert "model.positions learned alone, got 'sincos'" in capsys.readouterr().err


def check_cell(path, kind, action, cell, tmp_path):
    """Do what a cell says; the configuration of a run that begins from the model, if one does."""
    metadata, config = METADATA.get(kind), None
    if action == "predict":
        if cell == "no":
            with pytest.raises(CheckpointError, match="expected a fine-tuned model"):
                assert open_classifier(path, metadata).num_classes
        else:
            assert open_classifier(path, metadata).num_classes == 3
    elif action == "embed":
        features = embed(open_model(path, metadata), np.zeros(8000, np.float32))
        assert features.shape == (192,)
    elif action == "finetune":
        loaded = open_encoder(path, metadata)
        config, _ = adopt(load_config("classifier"), loaded.config, str(path))
        classifier = build_classifier(config, 5)
        fill_encoder(classifier.encoder, loaded.encoder)
        assert config.audio.num_frames == 48 and config.model.depth == 1
        assert (loaded.model is loaded.encoder or loaded.is_classifier) == (cell == "encoder")
    elif action == "pretrain":
        loaded = open_encoder(path, metadata)
        config, _ = adopt(load_config("continue"), loaded.config, str(path))
        taken = continue_from(MSPM(config), loaded.model)
        assert taken == ("encoder, fresh heads" if cell == "encoder" else "encoder, heads")
        if cell == "encoder":  # no objective of its own: the published share of 24 patches
            assert config.objective.num_masked == 19
    else:
        given = [] if metadata is None else ["--frames", "48", "--stride", "16", "16"]
        form = action.removeprefix("export ")
        status = main(["export", str(path), "--to", form, str(tmp_path / "out"), *given])
        assert status == (2 if cell == "no" else 0)
    return config
