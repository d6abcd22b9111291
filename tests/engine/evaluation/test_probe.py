import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from shards import prepare
from sounds import write

from ssast.engine.api import save_published
from ssast.engine.checkpoints.classifier import save_chosen
from ssast.engine.cli.main import main
from ssast.engine.config import from_plain
from ssast.engine.evaluation.probe import (
    format_scores,
    pairwise_eer,
    probe,
    untrained_encoder,
    write_scores,
)
from ssast.engine.evaluation.probe_tasks import find_tasks
from ssast.engine.finetune_settings import Finetune
from ssast.engine.model.classifier import Classifier
from ssast.pipelines.clips.holdout import recordings_of
from ssast.pipelines.clips.manifest import write_manifest
from ssast.pipelines.errors import DataError

CONFIG = from_plain(
    {
        "model": {"size": "tiny", "depth": 1},
        "audio": {"num_frames": 48},
        "objective": {"num_masked": 5},
    }
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes that any encoder tells apart: a low and a high tone."""
    folder = tmp_path_factory.mktemp("tasks")
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("eval", 8)):
        paths, labels = [], []
        for k in range(count):
            pitch = (300, 3000)[k % 2] * random.uniform(0.9, 1.1)
            wave = 0.3 * np.sin(2 * np.pi * pitch * np.arange(8000) / 16000)
            wave += 0.01 * random.standard_normal(8000)
            paths.append(write(folder / f"{split}{k}.wav", wave.astype(np.float32)))
            labels.append((("low", "high")[k % 2],))
        write_manifest(folder / f"pitch_{split}.json", paths, labels)
    return folder


def test_a_simple_task_is_solved_and_counted(folder, tmp_path):
    encoders = {"untrained": untrained_encoder(CONFIG)}
    (score,) = probe(encoders, find_tasks(folder), CONFIG.audio, CPU)
    assert (score.task, score.weights) == ("pitch", "untrained")
    assert (score.num_train, score.num_eval, score.num_classes) == (12, 8, 2)
    assert (score.linear, score.knn, score.chance) == (1.0, 1.0, 0.5)
    assert score.eer < 0.5
    assert "100.0%" in format_scores([score])
    path = write_scores([score], tmp_path / "probe.json")
    assert json.loads(path.read_text()) == [vars(score)]


def test_pairs_of_clips_are_told_apart_by_their_angle():
    random = np.random.default_rng(0)
    labels = np.repeat(["a", "b", "c"], 40)
    places = np.repeat(np.eye(3), 40, axis=0)
    own = np.arange(120)
    assert pairwise_eer(places + 0.05 * random.standard_normal(places.shape), labels, own) == 0.0
    noise = random.standard_normal((120, 3))
    assert pairwise_eer(noise, labels, own) == pytest.approx(0.5, abs=0.05)
    assert np.isnan(pairwise_eer(places, np.repeat("a", 120), own))


def test_pairs_of_one_recording_are_left_out():
    """They are alike, and have the same label, whatever the label is."""
    random = np.random.default_rng(0)
    recordings = np.repeat(np.arange(80), 6)
    labels = recordings % 40
    alike = random.standard_normal((80, 8))[recordings]
    assert pairwise_eer(alike, labels, np.arange(480)) < 0.42
    assert pairwise_eer(alike, labels, recordings) == pytest.approx(0.5, abs=0.05)


def test_labels_at_random_are_not_learned(folder, tmp_path):
    random = np.random.default_rng(1)
    for split in ("train", "eval"):
        data = json.loads((folder / f"pitch_{split}.json").read_text())["data"]
        labels = [(str(random.integers(2)),) for _ in data]
        write_manifest(tmp_path / f"noise_{split}.json", [e["wav"] for e in data], labels)
    (score,) = probe({"any": untrained_encoder(CONFIG)}, find_tasks(tmp_path), CONFIG.audio, CPU)
    assert score.linear < 1.0


def test_the_untrained_encoder_is_where_a_run_begins():
    torch.manual_seed(5)  # whatever was drawn before
    one, other = untrained_encoder(CONFIG), untrained_encoder(CONFIG)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    train = dataclasses.replace(CONFIG.train, seed=1)
    third = untrained_encoder(dataclasses.replace(CONFIG, train=train))
    assert not torch.equal(one.embed.weight, third.embed.weight)


def test_unreadable_clips_are_left_out(folder, tmp_path):
    data = json.loads((folder / "pitch_train.json").read_text())["data"]
    bad = [tmp_path / "bad0.wav", tmp_path / "bad1.wav"]
    for path in bad:
        path.write_text("no audio")
    paths = [*(entry["wav"] for entry in data), *bad]
    labels = [*((entry["labels"],) for entry in data), ("low",), ("high",)]
    write_manifest(tmp_path / "pitch_train.json", paths, labels)
    (tmp_path / "pitch_eval.json").write_text((folder / "pitch_eval.json").read_text())
    data = json.loads((folder / "pitch_eval.json").read_text())["data"]
    write_manifest(
        tmp_path / "pitch_eval.json", [e["wav"] for e in data], [(e["labels"],) for e in data]
    )
    encoders, tasks = {"any": untrained_encoder(CONFIG)}, find_tasks(tmp_path)
    with pytest.raises(DataError, match=r"pitch_train.json: 2 of 14 clips cannot be read, .* 5%"):
        probe(encoders, tasks, CONFIG.audio, CPU)
    (score,) = probe(encoders, tasks, CONFIG.audio, CPU, 0.2)
    assert (score.num_train, score.all_train, score.linear) == (12, 14, 1.0)
    assert "12 of 14        8 of 8" in format_scores([score])


def test_bad_tasks_are_named(folder, tmp_path):
    with pytest.raises(DataError, match=r"no <task>_train\.json"):
        find_tasks(tmp_path)
    wav = folder / "train0.wav"
    encoders = {"any": untrained_encoder(CONFIG)}
    write_manifest(tmp_path / "x_eval.json", [wav], [("a",)])
    write_manifest(tmp_path / "x_train.json", [wav])
    with pytest.raises(DataError, match=r"x_train\.json: has no labels"):
        probe(encoders, find_tasks(tmp_path), CONFIG.audio, CPU)
    write_manifest(tmp_path / "x_train.json", [wav], [("a", "b")])
    with pytest.raises(DataError, match=r"train0\.wav has 2 labels"):
        probe(encoders, find_tasks(tmp_path), CONFIG.audio, CPU)


def test_any_checkpoint_is_probed_without_training(folder, tmp_path, capsys):
    """A published fine-tuned file, on clips alone or with others to train on."""
    classifier = Classifier(untrained_encoder(CONFIG), 4)
    save_published(classifier, tmp_path / "tuned.pth")
    evaluated = folder / "pitch_eval.json"
    arguments = ["evaluate", str(tmp_path / "tuned.pth"), str(evaluated), "--probe"]
    arguments += ["--frames", "48", "--stride", "16", "16", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "pitch_eval" in capsys.readouterr().out
    alone = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert [s["weights"] for s in alone] == ["untrained", "checkpoint"]
    assert all((s["num_train"], s["num_eval"]) == (8, 8) for s in alone)
    assert alone[1]["linear"] == 1.0
    arguments[-1] = str(tmp_path / "other")
    assert main([*arguments, "--train", str(folder / "pitch_train.json")]) == 0
    with_others = json.loads((tmp_path / "other" / "probe.json").read_text())
    assert (with_others[1]["num_train"], with_others[1]["linear"]) == (12, 1.0)


@pytest.mark.parametrize("layers", [[], ["--layers"]])
def test_a_run_keeps_the_scores_of_all_its_tasks(layers, folder, tmp_path, capsys):
    """And what is no run's folder is left as it is."""
    for name in ("high", "low"):
        tasks = tmp_path / name
        tasks.mkdir()
        for split in ("train", "eval"):
            shutil.copy(folder / f"pitch_{split}.json", tasks / f"{name}_{split}.json")
    run = tmp_path / "run"
    state = Classifier(untrained_encoder(CONFIG), 2).state_dict()
    weights = {f"weight/{name}": value for name, value in state.items()}
    config = dataclasses.replace(CONFIG, finetune=Finetune(stride=(16, 16)))
    save_chosen(run, weights, step=1, config=config, classes=["a", "b"], facts={})
    written = run / ("probe_layers.json" if layers else "probe.json")

    def probed(model, name):
        return main(["probe", str(model), "--tasks", str(tmp_path / name), *layers])

    for name in ("high", "low", "high"):
        assert probed(run, name) == 0
    found = json.loads(written.read_text())
    assert [(row["task"], row["weights"]) for row in found] == [
        (task, weights) for task in ("high", "low") for weights in ("untrained", "checkpoint")
    ]
    checkpoint = next(path.parent for path in run.rglob("meta.json"))
    before = sorted(checkpoint.iterdir())
    assert probed(checkpoint, "low") == 0
    assert sorted(checkpoint.iterdir()) == before
    written.write_text('{"mine": 1}')
    capsys.readouterr()
    assert probed(run, "low") == 2
    shown = capsys.readouterr()
    assert f"{written}: expected a list of scores by task" in shown.err and not shown.out
    assert written.read_text() == '{"mine": 1}'


def test_a_class_of_one_recording_cannot_be_taken_apart(folder, tmp_path):
    data = json.loads((folder / "pitch_eval.json").read_text())["data"]
    labels = [("a",), ("b",), *[("a",)] * 6]
    write_manifest(tmp_path / "x.json", [e["wav"] for e in data], labels)
    encoders = {"any": untrained_encoder(CONFIG)}
    with pytest.raises(
        DataError, match=r"x\.json: b has one recording alone, expected two or more"
    ):
        probe(encoders, {"x": (tmp_path / "x.json", None)}, CONFIG.audio, CPU)


def test_a_coin_for_each_recording_is_not_learned(tmp_path):
    """Clips of one recording sound alike: a fold must not be trained on others of its own."""
    random = np.random.default_rng(0)
    (tmp_path / "source").mkdir()
    paths = []
    for number in range(24):
        pitch = random.uniform(200, 4000)
        wave = 0.3 * np.sin(2 * np.pi * pitch * np.arange(6 * 8000) / 16000)
        wave += 0.01 * random.standard_normal(len(wave))
        path = tmp_path / f"source/{number}.wav"
        paths.append(write(path, wave.astype(np.float32), subtype="PCM_16"))
    found = []
    for turn in range(3):
        labels = [(str(k % 2),) for k in random.permutation(24)]
        write_manifest(tmp_path / f"source/{turn}.json", paths, labels)
        index = prepare(tmp_path / f"source/{turn}.json", tmp_path / str(turn), clip_s=0.5)
        assert len(index) == 144 and len(np.unique(recordings_of(index))) == 24
        tasks = {"coin": (tmp_path / str(turn), None)}
        found += probe({"any": untrained_encoder(CONFIG)}, tasks, CONFIG.audio, CPU)
    assert np.mean([score.linear for score in found]) == pytest.approx(0.5, abs=0.15)
    assert np.mean([score.knn for score in found]) == pytest.approx(0.5, abs=0.15)
    assert np.nanmean([score.eer for score in found]) == pytest.approx(0.5, abs=0.1)


def test_clips_of_one_class_train_nothing(folder, tmp_path):
    data = json.loads((folder / "pitch_train.json").read_text())["data"]
    write_manifest(tmp_path / "x.json", [e["wav"] for e in data], [("a",)] * len(data))
    encoders = {"any": untrained_encoder(CONFIG)}
    for pair in ((tmp_path / "x.json", None), (tmp_path / "x.json", folder / "pitch_eval.json")):
        with pytest.raises(DataError, match=r"x\.json: the clips to train on are all a, expected"):
            probe(encoders, {"x": pair}, CONFIG.audio, CPU)


def test_the_equal_error_rate_is_of_all_classes(tmp_path):
    """Manifests are often in the order of their classes."""
    draw = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 1000)
    x = np.eye(8)[labels] + 1.5 * draw.standard_normal((3000, 8))
    mixed = draw.permutation(3000)
    found, wanted = (pairwise_eer(x[rows], labels[rows], rows) for rows in (np.arange(3000), mixed))
    assert found == pytest.approx(wanted, abs=0.02) and 0.2 < found < 0.5
