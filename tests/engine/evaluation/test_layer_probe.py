"""Probes by layer, against scikit-learn and plain float64; planted signals are found."""

import json

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from sounds import write

from ssast.engine.api import DataError, LoadedModel, embed, save_published
from ssast.engine.cli.main import main
from ssast.engine.config import from_plain
from ssast.engine.evaluation import layer_probe
from ssast.engine.evaluation.layer_probe import all_layers, bootstrap_interval, score_layers
from ssast.engine.evaluation.probe_head import Features, fit_head
from ssast.engine.model.classifier import Classifier
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.pipelines.clips.manifest import write_manifest

CONFIG = from_plain(
    {
        "model": {"size": "tiny", "depth": 2},
        "audio": {"num_frames": 48},
        "objective": {"num_masked": 5},
    }
)


def make(values, counts=None) -> Features:
    values = np.asarray(values, np.float32)
    counts = np.full(len(values), values.shape[2]) if counts is None else counts
    values[np.arange(values.shape[2]) >= counts[:, None, None].repeat(values.shape[1], 1)] = 0
    return Features(values, counts)


@pytest.fixture(scope="module")
def planted():
    """Noise of 5 layers and 4 columns; the mean of layer 2 carries the class, and no other."""
    random = np.random.default_rng(0)
    y = np.arange(240) % 3
    values = random.standard_normal((240, 5, 4, 6))
    values[:, 2, :, :3] += 0.8 * np.eye(3)[y][:, None]
    return make(values, random.integers(2, 5, 240)), np.array(["a", "b", "c"])[y]


@pytest.mark.parametrize("c", [0.1, 10.0])
def test_one_layer_is_the_logistic_regression_of_scikit_learn(c, planted):
    features, names = planted
    features = features.layer(2).mean()
    y = np.unique(names, return_inverse=True)[1]
    head = fit_head(features.take(np.arange(240)), y, 3, c, "mean")
    x = StandardScaler().fit_transform(features.values[:, 0, 0].astype(np.float64))
    want = LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(x, y)
    # The bias of both is free by a constant.
    found = head.weight.double().numpy(), (head.bias - head.bias.mean()).double().numpy()
    np.testing.assert_allclose(found[0], want.coef_, atol=5e-3)
    np.testing.assert_allclose(found[1], want.intercept_ - want.intercept_.mean(), atol=5e-3)
    assert (head.predict(features) == want.predict(x)).mean() > 0.99


def reference_loss(point, features, y, c, attentive):
    """The definition, in float64, clip by clip."""
    values, counts = torch.from_numpy(features.values).double(), features.counts
    layers, width = values.shape[1], values.shape[3]
    logits, query, rest = point[:layers], point[layers : layers + width], point[layers + width :]
    weight, bias = rest[: 3 * width].reshape(3, width), rest[3 * width :]
    valid = torch.cat([values[n, :, : counts[n]] for n in range(len(y))], 1)
    mean, std = valid.mean(1), valid.std(1, correction=0)
    share = logits.exp() / logits.exp().sum()
    total = (logits.square().sum() + weight.square().sum()) / (2 * c * len(y))
    if attentive:
        total = total + query.square().sum() / (2 * c * len(y))
    for n in range(len(y)):
        clip = (values[n, :, : counts[n]] - mean[:, None]) / std[:, None]
        columns = sum(share[k] * clip[k] for k in range(layers))
        attention = torch.softmax(columns @ query / width**0.5, 0) if attentive else None
        pooled = attention @ columns if attentive else columns.mean(0)
        total = total - torch.log_softmax(weight @ pooled + bias, 0)[y[n]] / len(y)
    return total


@pytest.mark.parametrize("attentive", [False, True])
def test_weights_and_query_are_those_of_the_reference(attentive, planted):
    features, names = planted
    features, y = features.take(np.arange(60)), np.unique(names[:60], return_inverse=True)[1]
    if not attentive:
        features = features.mean()
    pooling = "attentive" if attentive else "mean"
    head = fit_head(features.take(np.arange(60)), y, 3, 1.0, pooling)
    learned = (head.layer_logits, head.query, head.weight.flatten(), head.bias)
    found = torch.cat(learned).double()

    def loss(point):
        flat = torch.from_numpy(point).requires_grad_()
        value = reference_loss(flat, features, y, 1.0, attentive)
        value.backward()
        return value.item(), flat.grad.numpy()

    best = minimize(loss, np.zeros(len(found)), jac=True, method="L-BFGS-B")
    value, gradient = loss(found.numpy())
    assert value == pytest.approx(best.fun, rel=2e-3) and np.abs(gradient).max() < 5e-3
    assert sum(head.layer_weights) == pytest.approx(1) and bool(head.query.any()) == attentive


def halves(y):
    rows = np.arange(len(y))
    return [(rows[: len(y) // 2], rows[len(y) // 2 :])]


def test_a_signal_of_an_intermediate_layer_is_found(planted):
    features, y = planted
    report = score_layers(features, y, np.arange(240), halves(y))
    by_layer = {score.layer: score for score in report.scores}
    assert report.best in ("2", "weighted") and report.best_accuracy > 0.6
    assert by_layer["2"].accuracy > 0.6 and by_layer["weighted"].accuracy > 0.6
    assert int(np.argmax(by_layer["weighted"].layer_weights)) == 2
    others = [by_layer[layer].accuracy for layer in ("0", "1", "3", "4")]
    assert np.mean(others) == pytest.approx(1 / 3, abs=0.1)
    low, high = report.gain_interval
    assert 0 < low < report.gain < high
    again = score_layers(features, y, np.arange(240), halves(y))
    assert again == report  # nothing is random


def test_a_signal_of_one_column_is_found_by_attention():
    """Its sign tells the class, a mark tells the column; the other columns are louder."""
    random = np.random.default_rng(0)
    y = np.arange(300) % 2
    values = random.standard_normal((300, 2, 6, 4))
    values[..., 0] = 4 * random.standard_normal((300, 2, 6))
    where = random.integers(0, 6, 300)
    values[np.arange(300), 1, where, 0] = 2 * (2 * y - 1)
    values[np.arange(300), 1, where, 1] = 8
    poolings = ("mean", "attentive")
    report = score_layers(make(values), y, np.arange(300), halves(y), poolings)
    found = {(score.layer, score.pooling): score.accuracy for score in report.scores}
    assert found["1", "attentive"] > 0.85 > 0.75 > found["1", "mean"]
    assert (report.best, report.best_pooling) in (("1", "attentive"), ("weighted", "attentive"))


def test_evaluation_clips_choose_nothing(planted):
    features, y = planted
    other = y.copy()
    other[120:] = np.roll(y[120:], 1)
    one, two = (score_layers(features, z, np.arange(240), halves(y)) for z in (y, other))
    assert one.best == two.best and one.best_accuracy != two.best_accuracy
    for a, b in zip(one.scores, two.scores, strict=True):
        assert (a.inner, a.c, a.layer_weights) == (b.inner, b.c, b.layer_weights)


def test_the_clips_of_a_recording_stay_together():
    """Features that tell the recording, and labels at random for each: inner accuracy is chance."""
    random = np.random.default_rng(0)
    recordings = np.repeat(np.arange(60), 6)
    y = random.permutation(60)[recordings] % 2
    values = random.standard_normal((60, 2, 1, 8))[recordings]
    report = score_layers(make(values), y, recordings, halves(y))
    assert np.mean([score.inner for score in report.scores]) == pytest.approx(0.5, abs=0.12)


def test_an_interval_resamples_recordings():
    right = np.repeat(np.arange(40) % 2, 10).astype(bool)
    low, high = bootstrap_interval(right, np.arange(400))
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 400**0.5, rel=0.15)
    low, high = bootstrap_interval(right, np.repeat(np.arange(40), 10))
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 40**0.5, rel=0.15)
    assert bootstrap_interval(right, np.zeros(400)) is None


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """A task of two tones, and a published fine-tuned model."""
    folder = tmp_path_factory.mktemp("tones")
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("eval", 8)):
        paths = []
        for k in range(count):
            pitch = (300, 3000)[k % 2] * random.uniform(0.9, 1.1)
            wave = 0.3 * np.sin(2 * np.pi * pitch * np.arange(6000 + 200 * k) / 16000)
            wave += 0.01 * random.standard_normal(len(wave))
            paths.append(write(folder / f"{split}{k}.wav", wave.astype(np.float32)))
        labels = [(("low", "high")[k % 2],) for k in range(count)]
        write_manifest(folder / f"pitch_{split}.json", paths, labels)
    torch.manual_seed(0)
    model = Classifier(SpectrogramTransformer(CONFIG.model, CONFIG.audio), 4).eval()
    save_published(model, folder / "tuned.pth")
    return folder, LoadedModel(model.encoder, CONFIG, folder, "run")


@pytest.mark.parametrize("columns", [False, True])
def test_features_are_those_of_embed(columns, tones):
    folder, loaded = tones
    paths = [str(folder / f"eval{k}.wav") for k in (0, 5)]
    cpu = torch.device("cpu")
    found = all_layers(loaded.encoder, paths, loaded.audio, cpu, columns=columns)
    for row, path in enumerate(paths):
        want = embed(loaded, path, layer="all").numpy()
        np.testing.assert_allclose(found.take([row]).mean().values[0, :, 0], want, atol=2e-3)


def test_any_checkpoint_is_probed_by_layer(tones, tmp_path, capsys):
    folder, _ = tones
    (tmp_path / "tasks").mkdir()
    for split in ("train", "eval"):
        data = json.loads((folder / f"pitch_{split}.json").read_text())["data"]
        paths, labels = [e["wav"] for e in data], [(e["labels"],) for e in data]
        write_manifest(tmp_path / f"tasks/pitch_{split}.json", paths, labels)
    given = ["--frames", "48", "--stride", "16", "16"]
    model, out = str(folder / "tuned.pth"), tmp_path / "out"
    tasks = ["--tasks", str(tmp_path / "tasks"), "--out", str(out)]
    assert main(["probe", model, *tasks, *given, "--layers", "--attentive"]) == 0
    shown = capsys.readouterr().out
    assert "best by inner folds: " in shown and "over the last layer's mean" in shown
    untrained, checkpoint = json.loads((out / "probe_layers.json").read_text())
    assert (untrained["weights"], checkpoint["weights"]) == ("untrained", "checkpoint")
    assert (checkpoint["task"], checkpoint["num_train"], checkpoint["num_eval"]) == ("pitch", 12, 8)
    kinds = [(score["layer"], score["pooling"]) for score in checkpoint["scores"]]
    layers = ["0", "1", "2", "weighted"]
    assert kinds == [(layer, pooling) for pooling in ("mean", "attentive") for layer in layers]
    assert checkpoint["best_accuracy"] == 1.0
    manifest = str(tmp_path / "tasks/pitch_eval.json")
    assert main(["evaluate", model, manifest, "--probe", "--layers", *given]) == 0
    shown = capsys.readouterr().out
    assert "8 training and 8 evaluation clips" in shown and "attentive" not in shown
    assert main(["evaluate", model, manifest, "--layers", *given]) == 2
    assert "--layers is for --probe" in capsys.readouterr().err
    assert main(["probe", model, *tasks[:2], "--attentive", *given]) == 2
    assert "--attentive is for --layers" in capsys.readouterr().err
    assert sorted(path.name for path in folder.glob("*.json")) == [
        "pitch_eval.json",
        "pitch_train.json",
    ]


def test_memory_is_bounded(tones, monkeypatch):
    folder, loaded = tones
    monkeypatch.setattr(layer_probe, "MAX_GIB", 1e-5)
    cpu, paths = torch.device("cpu"), [str(folder / "eval0.wav")] * 9
    with pytest.raises(DataError, match=r"of 9 clips take 0\.0 GiB, .*leave out --attentive"):
        all_layers(loaded.encoder, paths, loaded.audio, cpu, columns=True)


def test_one_recording_chooses_nothing(planted):
    features, y = planted
    with pytest.raises(DataError, match="of one recording, expected two or more"):
        score_layers(features, y, np.zeros(240, int), halves(y))
