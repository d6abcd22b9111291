"""Runs that average their weights: what is trained, chosen, saved, resumed, opened, exported."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from finetune_runs import load as finetune_config
from runs import lines, overrides

from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.cli.main import main
from ssast.engine.config import Config, load_config
from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.finetune import finetune
from ssast.engine.formats.initial import adopt_from, open_initial, with_checkpoint
from ssast.engine.formats.open import open_classifier, open_encoder, open_model
from ssast.engine.pretrain import PretrainEngine, pretrain
from ssast.engine.train.optim import ema_decay

EMA = 0.9


@pytest.fixture(scope="module")
def configure(config_file, data):
    def configure(run: Path, **changed) -> Config:
        return load_config(config_file, [*overrides(**changed), *data, f"run.folder={run}"])

    return configure


@pytest.fixture(scope="module")
def run(tmp_path_factory, configure):
    """A run of 12 steps with an average, which no test may change."""
    run = tmp_path_factory.mktemp("runs") / "averaged"
    assert pretrain(configure(run, train__ema=EMA)) == 0
    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory, configure):
    """The same without."""
    run = tmp_path_factory.mktemp("runs") / "plain"
    assert pretrain(configure(run)) == 0
    return run


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, recipe, splits, run):
    """A classifier trained with an average on the averaged weights of a run."""
    folder = tmp_path_factory.mktemp("runs") / "classifier"
    assert finetune(finetune_config(recipe, splits, folder, **TUNED), run) == 0
    return folder


TUNED = {"train__ema": 0.7, "finetune__epochs": 2, "model__depth": 1, "audio__mean": -4.2677393}
TUNED |= {"train__save_every": 2}


def newest(run: Path) -> dict[str, torch.Tensor]:
    return Checkpoints.load(Checkpoints(run / "checkpoints").latest())[0]


def best(run: Path) -> dict[str, torch.Tensor]:
    return Checkpoints.load(Checkpoints(run / "checkpoints").best())[0]


def test_an_average_changes_nothing_that_is_trained(run, plain):
    for split in ("train", "valid"):
        assert lines(run, split) == lines(plain, split)
    ours, theirs = newest(run), newest(plain)
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())


def test_both_are_validated_and_the_averaged_weights_choose(run):
    found = lines(run, "ema")
    assert [line["step"] for line in found] == [6, 12]
    raw = {line["step"]: line for line in lines(run, "valid")}
    assert all(line.keys() == raw[6].keys() for line in found)
    assert all(line["loss"] != raw[line["step"]]["loss"] for line in found)
    marked = json.loads((run / "checkpoints/best.json").read_text())
    assert marked["value"] == min(line["loss"] for line in found)


def test_a_run_with_an_average_resumes_bit_for_bit(run, configure, tmp_path):
    again = shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(again / "checkpoints/step000000012")
    assert pretrain(configure(again, train__ema=EMA), resume=True) == 0
    ours, theirs = newest(again), newest(run)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
    assert lines(again, "ema") == lines(run, "ema")


def test_an_average_can_be_begun_and_dropped_on_the_way(run, plain, configure, tmp_path, capsys):
    begun, dropped = tmp_path / "begun", tmp_path / "dropped"
    for source, target, settings in ((plain, begun, {"train__ema": EMA}), (run, dropped, {})):
        shutil.copytree(source, target)
        assert pretrain(configure(target, train__steps=13, **settings), resume=True) == 0
    out = capsys.readouterr().out
    assert out.count("the average begins from the weights of the checkpoint, which has none") == 1
    assert out.count("train.ema is null: the averaged weights of the checkpoint are dropped") == 1
    assert not any(name.startswith("ema/") for name in newest(dropped))
    decay, name = min(EMA, 13 / 22), "encoder.norm.weight"
    expected = torch.lerp(
        newest(plain)[f"weight/{name}"], newest(begun)[f"weight/{name}"], 1 - decay
    )
    torch.testing.assert_close(newest(begun)[f"ema/{name}"], expected)
    assert open_model(begun).weights == "ema" and open_model(plain).weights is None


@pytest.mark.parametrize(("choice", "kind"), [(None, "ema"), ("ema", "ema"), ("raw", "weight")])
def test_a_run_is_opened_with_its_average_unless_told_otherwise(run, choice, kind, caplog):
    with caplog.at_level(logging.WARNING):
        loaded = open_model(run, weights=choice)
    (line,) = caplog.messages
    name = {"ema": "averaged", "weight": "raw"}[kind]
    assert line.startswith(f"{run}: its {name} weights ")
    tensors = best(run)
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, tensors[f"{kind}/{name}"])


def test_the_log_says_which_weights_a_run_begins_from(run, plain, configure, tmp_path):
    for source, expected in ((run, 1), (plain, 0)):
        _, notes = adopt_from(configure(tmp_path), open_encoder(source))
        line = f"{source}: its averaged weights (EMA) are used, not the raw ones"
        assert notes.count(line) == expected


@pytest.mark.parametrize(("choice", "kind"), [(None, "ema"), ("raw", "weight")])
def test_a_run_begins_from_the_average_unless_told_otherwise(
    run, configure, tmp_path, choice, kind
):
    config = with_checkpoint(configure(tmp_path), run, resume=False)
    loaded, tensors = open_initial(config, run, None, choice), best(run)
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, tensors[f"{kind}/{name}"])


@pytest.mark.parametrize("command", ["pretrain continue", "finetune classifier", "folds"])
def test_weights_of_the_checkpoint_of_a_run_are_chosen(command, plain, splits, tmp_path, capsys):
    data = [f"data.train={splits['train']}"]
    if command == "folds":
        command = "finetune classifier"
        for name in ("train_1", "eval_1", "train_2", "eval_2"):
            shutil.copy(splits["train"], tmp_path / f"{name}.json")
        data = [f"finetune.folds={tmp_path}"]
    given = [*command.split(), *data, f"run.folder={tmp_path / 'run'}", "--weights", "ema"]
    assert main([*given, "--checkpoint", str(plain)]) == 2
    assert "has no averaged weights" in capsys.readouterr().err
    assert main(given) == 2
    assert "--weights ema: expected a checkpoint" in capsys.readouterr().err


def test_averaged_weights_that_are_not_there_are_an_error(plain, checkpoint, capsys):
    with pytest.raises(CheckpointError, match=r"plain: has no averaged weights: .*train.ema null"):
        open_model(plain, weights="ema")
    with pytest.raises(CheckpointError, match="has one kind of weights, no averaged ones"):
        open_model(checkpoint, weights="ema")
    assert open_model(plain, weights="raw").weights is None
    assert main(["embed", str(plain), "x.wav", "--out", "x.npy", "--weights", "ema"]) == 2
    assert "has no averaged weights" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "kinds"), [([], {"ema", "weight"}), (["--weights", "raw"], {})])
def test_exported_weights_are_both_or_the_chosen_ones(run, flags, kinds, tmp_path, capsys):
    assert main(["export", str(run), "--to", "weights", str(tmp_path / "out"), *flags]) == 0
    capsys.readouterr()
    tensors, source = safetensors.torch.load_file(tmp_path / "out/state.safetensors"), best(run)
    assert {name.partition("/")[0] for name in tensors} == (kinds or {"weight"})
    assert all(torch.equal(value, source[name].half()) for name, value in tensors.items())
    assert open_model(tmp_path / "out").weights == ("ema" if kinds else None)


def test_an_engine_saves_both(run, configure, tmp_path):
    engine = PretrainEngine(configure(tmp_path))
    engine.trained = open_model(run)
    raw, source = open_model(engine.save(tmp_path / "out"), weights="raw"), best(run)
    assert (raw.weights, open_model(tmp_path / "out").weights) == ("raw", "ema")
    for name, value in raw.model.state_dict().items():
        assert torch.equal(value, source[f"weight/{name}"].half().float())


def test_transformers_opens_both(run, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    assert main(["export", str(run), "--to", "hf", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    tensors = best(run)
    for variant, kind in ((None, "ema"), ("non_ema", "weight")):
        model = transformers.AutoModel.from_pretrained(
            tmp_path / "out", variant=variant, trust_remote_code=True
        )
        state = {n.removeprefix("model."): v for n, v in model.state_dict().items()}
        norm = next(value for name, value in state.items() if name.endswith("layernorm.weight"))
        assert torch.equal(norm, tensors[f"{kind}/encoder.norm.weight"])
    # The raw weights alone, as transformers saves its variant.
    model.save_pretrained(tmp_path / "raw", variant="non_ema")
    preprocessor = tmp_path / "out/preprocessor_config.json"
    (tmp_path / "raw" / preprocessor.name).write_bytes(preprocessor.read_bytes())
    alone = open_model(tmp_path / "raw")
    assert alone.weights == "raw"
    assert torch.equal(alone.model.norm.weight, tensors["weight/encoder.norm.weight"])


def test_a_classifier_is_its_average(classifier, run, splits, capsys):
    log = (classifier / "report.md").read_text()
    assert "Weights: EMA of step " in log
    marked = json.loads((classifier / "checkpoints/best.json").read_text())
    averaged = {line["step"]: line for line in lines(classifier, "ema")}
    reported = json.loads((classifier / "valid/metrics.json").read_text())
    assert reported["accuracy"] == averaged[marked["step"]]["accuracy"]
    assert reported["loss"] == pytest.approx(averaged[marked["step"]]["loss"], rel=1e-5)
    loaded, raw = open_classifier(classifier), open_classifier(classifier, weights="raw")
    tensors = best(classifier)
    head = "head.1.weight"
    assert torch.equal(loaded.model.state_dict()[head], tensors[f"ema/{head}"])
    assert torch.equal(raw.model.state_dict()[head], tensors[f"weight/{head}"])


def test_a_report_is_written_again_with_the_averaged_weights(
    classifier, recipe, splits, run, tmp_path
):
    again = shutil.copytree(classifier, tmp_path / "again")
    (again / "report.md").unlink()
    shutil.rmtree(again / "test")
    config = finetune_config(recipe, splits, again, **TUNED)
    assert finetune(config, run, resume=True) == 0
    for split in ("valid", "test"):
        found, expected = (
            json.loads((folder / split / "metrics.json").read_text())
            for folder in (again, classifier)
        )
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, 2])
def test_a_decay_lies_between_0_and_1(value, configure, tmp_path):
    with pytest.raises(ConfigError, match=r"train\.ema must be between 1e-06 and 0\.999999, got"):
        configure(tmp_path, train__ema=value)


def test_the_decay_rises_to_its_value():
    assert [ema_decay(step, 0.99) for step in (0, 8, 890)] == [0.1, 0.5, 0.99]
