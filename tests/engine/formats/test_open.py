"""Classifiers from elsewhere: published files and folders of transformers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from finetune_runs import make_sounds, manifest, overrides
from golden_model import PATCHES, golden

from ssast.engine.api import ASTModel, save_published
from ssast.engine.cli.main import main
from ssast.engine.config import from_plain, load_config
from ssast.engine.errors import CheckpointError, ConfigError
from ssast.engine.evaluation.predict import predict, score_clips
from ssast.engine.evaluation.timeline import timelines
from ssast.engine.finetune import FinetuneEngine, finetune
from ssast.engine.formats.huggingface import export_huggingface
from ssast.engine.formats.open import MissingMetadata, open_classifier, open_encoder
from ssast.engine.formats.published import read_published
from ssast.engine.model.classifier import Classifier
from ssast.engine.model.encoder import SpectrogramTransformer
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
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines())
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
