"""Prediction and embedding in bf16: near float32, and written in float32."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet
import pytest
import torch
from paths import ROOT
from sounds import tone, write, write_clips

from ssast.engine.api import ConfigError, embed, embed_recordings, open_model, predict
from ssast.engine.checkpoints.classifier import build_classifier, fill_encoder
from ssast.engine.cli.main import main
from ssast.engine.config import from_plain
from ssast.engine.evaluation import precision
from ssast.engine.evaluation.predict import score_clips
from ssast.engine.evaluation.probabilities import probabilities
from ssast.engine.formats.open import LoadedModel
from ssast.engine.model.classifier import embed_clips

TOLERANCE = 0.005
"""Of a probability under bf16; measured on the tiny model with 10 s of input: 0.0007."""

EMBEDDED = 0.06  # of an embedding, relative to its standard deviation


def published_tiny(path, pooling="avgtok") -> LoadedModel:
    """Return the released tiny weights with an input of 10 s and a head that is sure of itself."""
    config = from_plain(
        {
            "model": {"size": "tiny"},
            "audio": {"num_frames": 1024, "mean": -6.51, "std": 5.47},
            "finetune": {"pooling": pooling, "stride": [16, 16]},
        }
    )
    torch.manual_seed(0)
    model = build_classifier(config, 10).eval()
    fill_encoder(model.encoder, open_model(ROOT / "checkpoints" / "tiny_patch").encoder)
    torch.nn.init.normal_(model.head[1].weight, std=0.2)
    names = tuple(map(str, range(10)))
    return LoadedModel(model, config, path, "run", names, names)


def test_probabilities_of_the_published_size(tmp_path):
    loaded, cpu = published_tiny(tmp_path), torch.device("cpu")
    clips = write_clips(tmp_path, 3, samples=160_000)
    exact, _ = score_clips(loaded, clips, cpu)
    rounded, _ = score_clips(loaded, clips, cpu, precision="bf16")
    want, found = (probabilities(x, "ce") for x in (exact, rounded))
    assert want.max(1).min() > 0.25  # it has preferences
    error = np.abs(found - want).max()
    assert 1e-5 < error < TOLERANCE
    assert rounded.dtype == np.float64 and not np.array_equal(rounded, as_bf16(rounded))


def as_bf16(x):
    return torch.from_numpy(x).bfloat16().double().numpy()


@pytest.mark.parametrize("level", ["clip", "frame"])
@pytest.mark.parametrize("layer", ["last", 0, "all"])
def test_embeddings_are_float32(level, layer, tmp_path):
    loaded = published_tiny(tmp_path)
    loaded = replace(loaded, model=shortened(loaded))
    path, kinds = write(tmp_path / "a.wav", tone(9000)), {"level": level, "layer": layer}
    found = {}
    for name in ("fp32", "bf16"):
        out = tmp_path / f"{name}.npy"
        embed_recordings(loaded, path, out, precision=name, progress=False, **kinds)
        found[name] = np.load(out)
        table = out.with_suffix(".parquet")
        embed_recordings(loaded, path, table, precision=name, progress=False, **kinds)
        kept = pyarrow.parquet.read_table(table).column("embedding")[0].as_py()
        held = ~np.isnan(found[name][0])
        assert np.array_equal(np.ravel(kept), found[name][0][held])
        direct = embed(loaded, path, precision=name, **kinds)
        assert direct.dtype == torch.float32
    assert found["bf16"].dtype == np.float32 and found["fp32"].shape == found["bf16"].shape
    valid = ~np.isnan(found["fp32"])
    want, values = found["fp32"][valid], found["bf16"][valid]
    assert 0 < np.abs(values - want).max() < EMBEDDED * want.std()
    if level == "clip":  # a mean, which is not rounded
        assert not np.array_equal(values, as_bf16(values.astype(float)))


def shortened(loaded):
    """The classifier with two of its blocks."""
    loaded.model.encoder.blocks = loaded.model.encoder.blocks[:2]
    return loaded.model


def shown(capsys):
    return capsys.readouterr().out


def test_commands_take_it(finetuned, splits, tmp_path, capsys):
    run, folder = str(finetuned[0]), str(splits["test"].parent / "test")
    bf16 = ["--precision", "bf16"]
    for windows in ([], ["--window-s", "0.3"]):
        scores = []
        for options in ([], bf16):
            assert main(["predict", run, folder, "--json", *windows, *options]) == 0
            lines = [json.loads(line)["classes"] for line in shown(capsys).splitlines()]
            scores.append([dict(classes) for classes in lines])
        assert scores[0] != scores[1]
        for exact, rounded in zip(*scores, strict=True):
            assert rounded == pytest.approx(exact, abs=TOLERANCE)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for part, split in (("train", "train"), ("eval", "test")):
        (tasks / f"pitch_{part}.json").write_bytes(splits[split].read_bytes())
    commands = [
        ["evaluate", run, str(splits["test"])],
        ["evaluate", run, str(splits["test"]), "--probe", "--train", str(splits["train"])],
        ["probe", run, "--tasks", str(tasks), "--out", str(tmp_path / "out")],
        ["probe", run, "--tasks", str(tasks), "--layers", "--out", str(tmp_path / "layers")],
        ["embed", run, folder, "--out", str(tmp_path / "a.npy")],
    ]
    used = []
    autocast = precision.autocast_in

    def noted(name, device):
        used.append(name)
        return autocast(name, device)

    for command in commands:
        used.clear()
        with pytest.MonkeyPatch.context() as patch:
            for module in ("predict", "embedding", "probe", "layer_probe"):
                patch.setattr(f"ssast.engine.evaluation.{module}.autocast_in", noted)
            assert main([*command, *bf16]) == 0
        assert used and set(used) == {"bf16"}, command
    with pytest.raises(SystemExit):
        main(["predict", run, folder, "--precision", "fp16"])
    assert "invalid choice: 'fp16'" in capsys.readouterr().err


def test_a_model_of_transformers(tmp_path, capsys):
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=192,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=768,
        num_labels=4,
        max_length=64,
    )
    ASTForAudioClassification(config).save_pretrained(tmp_path / "model")
    ASTFeatureExtractor(max_length=64).save_pretrained(tmp_path / "model")
    path = write(tmp_path / "a.wav", tone(9000))
    exact, rounded = (
        dict(predict(tmp_path / "model", [path], precision=name, progress=False)[0].classes)
        for name in ("fp32", "bf16")
    )
    assert exact != rounded and rounded == pytest.approx(exact, abs=TOLERANCE)


def test_unknown_precisions_and_slow_devices(tmp_path, monkeypatch, caplog):
    loaded, cpu = published_tiny(tmp_path), torch.device("cpu")
    with pytest.raises(ConfigError, match="precision: expected fp32 or bf16, found 'fp16'"):
        predict(loaded, [write(tmp_path / "a.wav", tone(900))], precision="fp16")
    for native in (True, False):
        monkeypatch.setattr(precision, "multiplies_bf16", lambda native=native: native)
        precision._check_matmul.cache_clear()
        for _ in range(2):
            precision.autocast_in("fp32", cpu)
            precision.autocast_in("bf16", cpu)
        said = ["precision bf16: this CPU does not multiply bf16 natively: slower"]
        assert caplog.messages == ([] if native else said)
    precision._check_matmul.cache_clear()


@pytest.mark.parametrize("ignore_padding", [False, True])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_cls_needs_the_last_block_of_the_extra_tokens_alone(norm, ignore_padding):
    settings = {
        "model": {"size": "tiny", "depth": 2, "norm": norm},
        "audio": {"num_frames": 64, "ignore_padding": ignore_padding},
        "finetune": {"pooling": "cls"},
    }
    torch.manual_seed(0)
    encoder = build_classifier(from_plain(settings), 3).eval().encoder
    fbank, frames, lengths = torch.randn(2, 64, 128), torch.tensor([64, 40]), []
    for block in encoder.blocks:
        block.mlp.register_forward_hook(lambda m, given, out: lengths.append(given[0].shape[1]))
    want = embed_clips(encoder, fbank, "cls", frames).detach()
    with torch.no_grad():
        found = embed_clips(encoder, fbank, "cls", frames)
        mean = embed_clips(encoder, fbank, "avgtok", frames)
    assert lengths == [34, 34, 34, 2, 34, 34] and not torch.allclose(mean, want)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
