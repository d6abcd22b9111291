"""Classifiers from elsewhere: published files and folders of transformers."""

import copy
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from finetune_runs import make_sounds, manifest, overrides, pretrained_file
from golden_model import PATCHES, golden

from ssast.engine.api import ASTModel, save_published
from ssast.engine.checkpoints.classifier import save_chosen
from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.cli.main import main
from ssast.engine.config import from_plain, load_config, to_plain
from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.evaluation.predict import predict, score_clips
from ssast.engine.evaluation.timeline import timelines
from ssast.engine.finetune import FinetuneEngine, finetune
from ssast.engine.formats.huggingface import export_huggingface
from ssast.engine.formats.open import (
    MissingMetadata,
    open_classifier,
    open_encoder,
    open_model,
)
from ssast.engine.formats.published import read_published
from ssast.engine.model.classifier import Classifier
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.model.objective import MSPM
from ssast.pipelines.errors import DataError

CONFIG = from_plain(
    {
        "model": {"size": "tiny", "depth": 2},
        "audio": {"num_frames": 48, "mean": -6.0, "std": 4.0},
        "finetune": {"stride": [10, 10]},
    }
)
METADATA = MissingMetadata(48, (10, 10), "avgtok", -6.0, 4.0)
OPTIONS = ["--frames", "48", "--stride", "10", "10", "--mean", "-6", "--std", "4"]


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(3)
    return Classifier(SpectrogramTransformer(CONFIG.model, CONFIG.audio, (10, 10)), 3).eval()


@pytest.fixture
def published(classifier, tmp_path):
    save_published(classifier, tmp_path / "tuned.pth")
    return tmp_path / "tuned.pth"


@pytest.fixture
def labels(tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text(
        "index,mid,display_name\n" + "".join(f"{i},pitch{i},Pitch {i}\n" for i in range(3))
    )
    return table


def test_a_published_file_predicts_and_is_evaluated(published, labels, tmp_path, capsys):
    paths = make_sounds(tmp_path / "sounds", 3, 2)
    clips = manifest(tmp_path / "clips.json", paths)
    arguments = [*OPTIONS, "--labels", str(labels)]
    assert main(["predict", str(published), str(clips), *arguments, "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["path"] for line in found] == list(map(str, paths))
    assert main(["evaluate", str(published), str(clips), *arguments]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    right = [
        line["classes"][0][0] == f"Pitch {line['path'].rpartition('/')[2][0]}" for line in found
    ]
    assert float(shown["accuracy"]) == pytest.approx(np.mean(right), abs=1e-4)


def test_a_published_file_goes_round_bit_for_bit(published, classifier, tmp_path):
    trained = open_classifier(published, METADATA)
    assert trained.classes == ("0", "1", "2")
    assert (trained.config.model, trained.config.audio) == (CONFIG.model, CONFIG.audio)
    x = torch.randn(2, 48, 128)
    with torch.no_grad():
        assert trained.classifier(x).equal(classifier(x))
    save_published(trained.classifier, tmp_path / "again.pth")
    before, after = read_published(published), read_published(tmp_path / "again.pth")
    assert before.keys() == after.keys()
    assert all(after[name].equal(value) for name, value in before.items())


@pytest.mark.parametrize("kind", ["patch", "frame"])
def test_the_published_logits_come_out_of_the_published_file(kind, tmp_path):
    """What the published model saved after fine-tuning, opened by the engine."""
    torch.save(golden(kind)["state_dict"], tmp_path / "pretrained.pth")
    case = golden(kind)["finetune"][0]
    stride = (case["fstride"], case["tstride"])
    model = ASTModel(
        case["label_dim"], *PATCHES[kind], *stride, 128, case["input_tdim"], "tiny", False,
        tmp_path / "pretrained.pth",
    )  # fmt: skip
    model.mlp_head.load_state_dict(case["mlp_head"])
    torch.save(torch.nn.DataParallel(model).state_dict(), tmp_path / "tuned.pth")
    metadata = MissingMetadata(case["input_tdim"], stride, "avgtok", 0.0, 0.5, "bce")
    engine = FinetuneEngine.from_checkpoint(tmp_path / "tuned.pth", metadata=metadata)
    assert engine.config.finetune.loss == "bce"
    logits = engine.trained.classifier.double()(case["input"].double())
    assert (logits - case["ft_avgtok"]).abs().max() < 1e-8 * case["ft_avgtok"].abs().max()


def test_a_folder_of_transformers_names_its_classes(classifier, tmp_path):
    export_huggingface(classifier, tmp_path / "hf", CONFIG.audio, ["a", "b", "c"])
    trained = open_classifier(tmp_path / "hf", MissingMetadata(loss="bce"), named=True)
    assert trained.classes == ("a", "b", "c") and trained.config.finetune.loss == "bce"
    engine = FinetuneEngine.from_checkpoint(tmp_path / "hf", 3)
    (path,) = make_sounds(tmp_path / "sounds", 1, 1)
    assert len(engine.predict([path])[0].classes) == 3


@pytest.mark.parametrize("given", [None, "ce", "bce"])
@pytest.mark.parametrize(
    ("kind", "found"),
    [(None, "ce"), ("single_label_classification", "ce"), ("multi_label_classification", "bce")],
)
def test_a_folder_of_transformers_says_which_loss_its_scores_follow(
    kind, found, given, classifier, tmp_path
):
    """As ``problem_type``; an option overrides it."""
    folder = export_huggingface(classifier, tmp_path / "hf", CONFIG.audio)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": kind}))
    loaded = open_classifier(folder, MissingMetadata(loss=given))
    assert loaded.loss == (given or found)
    (path,) = make_sounds(tmp_path / "sounds", 1, 1)
    shown = dict(predict(loaded, [path])[0].classes)
    (timeline,) = timelines(loaded, [path])
    logits, _ = score_clips(loaded, [path], torch.device("cpu"))
    logits = torch.from_numpy(logits[0])
    want = logits.softmax(0) if (given or found) == "ce" else logits.sigmoid()
    assert [shown[f"LABEL_{n}"] for n in range(3)] == pytest.approx(want.tolist())
    assert timeline.probabilities[0].tolist() == pytest.approx(want.tolist(), abs=1e-4)


def test_fine_tuning_begins_from_a_folder_of_transformers(classifier, tmp_path):
    """Its head is left out, its positions are fitted to the new grid."""
    export_huggingface(classifier, tmp_path / "hf", CONFIG.audio, ["a", "b", "c"])
    loaded = open_encoder(tmp_path / "hf")
    assert loaded.config.model == CONFIG.model
    for name, value in classifier.encoder.blocks.state_dict().items():
        assert loaded.encoder.blocks.state_dict()[name].equal(value)
    train = manifest(tmp_path / "train.json", make_sounds(tmp_path / "sounds", 2, 4))
    path = tmp_path / "plain.yaml"
    path.write_text("finetune: {}\n")
    given = [
        *overrides(audio__n_mels=128, finetune__epochs=1, data__valid_share=0.25),
        f"data.train={train}",
        f"run.folder={tmp_path / 'run'}",
    ]
    assert finetune(load_config(path, given), tmp_path / "hf") == 0


@pytest.fixture
def tuned_run(classifier, tmp_path):
    config = replace(CONFIG, finetune=replace(CONFIG.finetune, loss="bce", pooling="avgtok"))
    weights = {f"weight/{name}": value for name, value in classifier.state_dict().items()}
    facts = {"names": ["Dog, big", "b", "c"]}
    save_chosen(
        tmp_path / "tuned", weights, step=3, config=config, classes=["a", "b", "c"], facts=facts
    )
    return tmp_path / "tuned"


def test_an_exported_file_knows_what_the_published_format_does_not(tuned_run, tmp_path, caplog):
    """Frames, stride, mean, std, loss and classes come back, and what is given goes before."""
    assert main(["export", str(tuned_run), "--to", "published", str(tmp_path / "a.pth")]) == 0
    ours, again = open_model(tuned_run), open_model(tmp_path / "a.pth")
    assert (again.audio, again.config.finetune) == (ours.audio, ours.config.finetune)
    assert again.config.finetune.loss == "bce"
    assert (again.classes, again.names) == (("a", "b", "c"), ("Dog, big", "b", "c"))
    assert caplog.messages == [
        f"{tmp_path / 'a.pth'}: mean -6 and std 4 of the input, as stored in the file"
    ]
    changed = open_model(tmp_path / "a.pth", MissingMetadata(mean=1.0, std=2.0, loss="ce"))
    assert changed.audio == replace(ours.audio, mean=1.0, std=2.0)
    assert changed.config.finetune.loss == "ce"
    assert len(caplog.messages) == 1  # both were given
    # The published code takes the file, strictly; test_published says so of the names.
    assert not any("audio" in name for name in torch.load(tmp_path / "a.pth", weights_only=True))


def test_an_exported_pretrained_file_keeps_mean_and_std(tmp_path):
    config = from_plain(
        {
            "model": {"size": "tiny", "depth": 1},
            "audio": {"num_frames": 48, "mean": -7.0, "std": 3.0},
            "objective": {"num_masked": 2},
        }
    )
    weights = {f"weight/{name}": value for name, value in MSPM(config).state_dict().items()}
    run = tmp_path / "run"
    Checkpoints(run / "checkpoints").save(weights, {"config": to_plain(config)}, step=1)
    assert main(["export", str(run), "--to", "published", str(tmp_path / "a.pth")]) == 0
    assert open_model(tmp_path / "a.pth").audio == config.audio


def test_mean_and_std_are_never_assumed_in_silence(published, caplog):
    open_model(published, MissingMetadata(48, (10, 10)))
    (line,) = caplog.messages
    assert f"{published}: the file has no mean and std of its input, mean -4.26774" in line
    assert "std 4.569 are assumed" in line and "set --mean and --std" in line
    caplog.clear()
    open_model(published, MissingMetadata(48, (10, 10), mean=0.0))
    assert "mean 0 and std 4.569 are assumed" in caplog.messages[0]
    caplog.clear()
    open_model(published, METADATA)
    open_encoder(published, METADATA)  # whose input is normalised as the new run says
    open_encoder(published, MissingMetadata(48, (10, 10)))
    assert caplog.messages == []


@pytest.mark.parametrize("form", ["published", "hf"])
def test_an_export_never_writes_into_its_model(form, tuned_run, published, capsys):
    for model in (tuned_run, published):
        before = sorted(model.rglob("*")), model.stat().st_mtime_ns
        options = OPTIONS if model == published else []
        assert main(["export", str(model), "--to", form, str(model), *options]) == 2
        assert f"{model}: is an input of this command" in capsys.readouterr().err
        assert (sorted(model.rglob("*")), model.stat().st_mtime_ns) == before


def second_stage(tmp_path, checkpoint, *more):
    train = manifest(tmp_path / "train.json", make_sounds(tmp_path / "sounds", 2, 4))
    (tmp_path / "plain.yaml").write_text("finetune: {}\n")
    given = overrides(audio__n_mels=128, finetune__epochs=1, data__valid_share=0.25)
    return main(
        ["finetune", str(tmp_path / "plain.yaml"), "--checkpoint", str(checkpoint), *given,
         f"data.train={train}", f"run.folder={tmp_path / 'run'}", *more]
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["run", "checkpoint", "exported", "published", "transformers"])
def test_a_second_stage_begins_from_any_fine_tuned_model(
    kind, tuned_run, published, classifier, tmp_path, capsys
):
    """The encoder is taken, the head of other classes left out, and the first line says so."""
    source, more = published, ["--frames", "48", "--stride", "10", "10"]
    if kind != "published":
        more = []
        source = {"run": tuned_run, "checkpoint": tuned_run / "classifier/step000000003"}.get(kind)
    if source is None:
        source, form = tmp_path / kind, "published" if kind == "exported" else "hf"
        assert main(["export", str(tuned_run), "--to", form, str(source)]) == 0
    loaded = open_encoder(source, MissingMetadata(48, (10, 10)) if more else None)
    blocks = loaded.encoder.blocks.state_dict()
    assert all(blocks[name].equal(v) for name, v in classifier.encoder.blocks.state_dict().items())
    assert second_stage(tmp_path, source, *more) == 0
    first = capsys.readouterr().out.splitlines()[1 if source.name == kind else 0]
    assert f"{source} (fine-tuned: its head of 3 classes is left out), 6 training" in first
    assert open_classifier(tmp_path / "run").num_classes == 2


def test_a_second_stage_asks_for_what_a_published_file_lacks(published, tmp_path, capsys):
    assert second_stage(tmp_path, published) == 2
    assert "give --frames and --stride" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_not_said_is_asked_for(published, labels, tmp_path, capsys):
    assert main(["predict", str(published), "a.wav"]) == 2
    assert "give --frames and --stride" in capsys.readouterr().err
    assert main(["evaluate", str(published), "x.json", *OPTIONS]) == 2
    assert "does not name its classes: give --labels" in capsys.readouterr().err
    labels.write_text("index,mid,display_name\n0,a,a\n1,b,b\n")
    with pytest.raises(DataError, match=r"labels\.csv: 2 classes, expected the 3 of .*tuned\.pth"):
        open_classifier(published, replace(METADATA, labels=labels))
    with pytest.raises(CheckpointError, match="make 12 x 2 = 24 patches"):
        open_classifier(published, MissingMetadata(32, (10, 10)))
    torch.save(golden("patch")["state_dict"], tmp_path / "pretrained.pth")
    with pytest.raises(CheckpointError, match="expected a fine-tuned model, found a pretrained"):
        open_classifier(tmp_path / "pretrained.pth")
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match="knows its own settings and labels"):
        open_classifier(tmp_path / "run", MissingMetadata(labels=labels))


@pytest.mark.parametrize(
    ("given", "left_out"),
    [
        ({"pooling": "cls", "loss": "bce", "mean": -6.0}, "pooling=cls, loss=bce"),
        ({"num_frames": 64, "stride": (10, 10)}, "num_frames=64, stride=(10, 10)"),
        ({"labels": "classes.csv"}, "labels=classes.csv"),
    ],
)
def test_a_pretrained_file_is_told_nothing_of_a_classifier(given, left_out, tmp_path):
    path = pretrained_file(tmp_path)
    with pytest.raises(ConfigError, match=f"is pretrained, .*: leave out {re.escape(left_out)}$"):
        open_model(path, MissingMetadata(**given))
    assert open_model(path, MissingMetadata(mean=-6.0)).audio.mean == -6.0


def test_weights_that_are_no_numbers_are_refused(classifier, tmp_path):
    """NaN logits name the first class: damage looked like a perfect score."""
    damaged = copy.deepcopy(classifier)
    damaged.head[1].weight.data[1, 3] = float("nan")
    damaged.encoder.norm.bias.data[0] = float("inf")
    save_published(damaged, tmp_path / "damaged.pth")
    with pytest.raises(
        CheckpointError, match=r"damaged.pth: NaN or infinite weights: \['"
    ) as found:
        open_model(tmp_path / "damaged.pth", METADATA)
    assert "head.1.weight" in str(found.value) and "norm.bias" in str(found.value)
    export_huggingface(damaged, tmp_path / "folder", CONFIG.audio, ["a", "b", "c"])
    with pytest.raises(CheckpointError, match=r"folder/model.safetensors: NaN or infinite weights"):
        open_model(tmp_path / "folder")
    weights = {f"weight/{name}": value for name, value in damaged.state_dict().items()}
    classes = ["a", "b", "c"]
    save_chosen(tmp_path / "run", weights, step=3, config=CONFIG, classes=classes, facts={})
    with pytest.raises(CheckpointError, match=r"run: NaN or infinite weights"):
        open_model(tmp_path / "run")
