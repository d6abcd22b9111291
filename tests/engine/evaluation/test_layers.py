"""Features of a layer: what the blocks of the model give, by every way to ask for them."""

import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import torch
from sounds import tone

from ssast.engine.api import (
    ConfigError,
    LoadedModel,
    MtebEncoder,
    XaresEncoder,
    embed,
    embed_recordings,
    save_published,
)
from ssast.engine.cli.main import main
from ssast.engine.config import from_plain
from ssast.engine.evaluation import hear
from ssast.engine.evaluation.features import embed_batch
from ssast.engine.evaluation.harness import WaveformEncoder
from ssast.engine.model.classifier import Classifier
from ssast.engine.model.encoder import SpectrogramTransformer

DEPTH = 2
LAYERS = [0, 1, 2, "last", "all"]


def make(path, pooling=None, **audio) -> LoadedModel:
    torch.manual_seed(0)
    config = from_plain(
        {
            "model": {"size": "tiny", "depth": DEPTH},
            "audio": {"num_frames": 64, "mean": -5.0, "std": 4.0} | audio,
            "objective": {"num_masked": 8},
        }
    )
    model = SpectrogramTransformer(config.model, config.audio)
    # Blocks of fresh weights change little: layers must differ.
    for block in model.blocks:
        torch.nn.init.normal_(block.mlp.fc2.weight, std=0.5)
    if pooling is not None:
        model = Classifier(model, 3, pooling)
    return LoadedModel(model.eval(), config, path, "run")


def states(encoder: SpectrogramTransformer, fbank: torch.Tensor) -> list[torch.Tensor]:
    """The tokens before and after each block, written out."""
    masks = encoder.no_masks(len(fbank))
    x, _, _ = encoder.embed(fbank, masks)
    found = [x]
    for block in encoder.blocks:
        found.append(block(found[-1]))
    return [*found[:-1], encoder.norm(found[-1])]


@pytest.mark.parametrize("pooling", [None, "cls"])
def test_a_layer_is_the_output_of_its_block(pooling, tmp_path):
    loaded = make(tmp_path, pooling)
    fbank, frames = torch.randn(2, 64, 128) * 4 - 5, torch.tensor([64, 40])
    want = torch.stack(states(loaded.encoder, fbank), 1)  # [B, L, 2 + N, D]
    with torch.no_grad():
        clips, held = embed_batch(loaded, fbank, frames, "clip", "all")
        columns, _ = embed_batch(loaded, fbank, frames, "frame", "all")
    assert held.tolist() == [4, 3] and clips.shape == (2, DEPTH + 1, 192)
    grid = want[:, :, 2:].unflatten(2, (8, 4))  # [B, L, rows, columns, D]
    torch.testing.assert_close(columns[0], grid[0].mean(1))
    assert columns[1, :, 3:].isnan().all()
    pooled = want[:, :, :2].mean(2)
    if pooling is None:
        pooled = torch.stack([grid[0].mean((1, 2)), grid[1, :, :, :3].mean((1, 2))])
    torch.testing.assert_close(clips, pooled, rtol=1e-4, atol=1e-4)
    assert (clips[:, 1:] - clips[:, :-1]).abs().mean() > 0.05
    for layer in (0, 1, 2, "last"):
        row = DEPTH if layer == "last" else layer
        for level, every in (("clip", clips), ("frame", columns)):
            with torch.no_grad():
                one, _ = embed_batch(loaded, fbank, frames, level, layer)
            torch.testing.assert_close(one, every[:, row], equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("level", ["clip", "frame"])
def test_files_hold_what_python_gives(level, layer, tmp_path):
    """Also of padding that attention leaves out, and of waveforms longer than the input."""
    loaded = make(tmp_path, ignore_padding=True)
    (tmp_path / "in").mkdir()
    waves = [tone(samples, seed=samples) for samples in (6400, 2000)]
    for number, wave in enumerate(waves):
        soundfile.write(tmp_path / f"in/{number}.wav", wave, 16000, subtype="FLOAT")
    kinds = {"level": level, "layer": layer}
    embed_recordings(loaded, tmp_path / "in", tmp_path / "x.npy", **kinds)
    rows = np.load(tmp_path / "x.npy")
    layers, columns = ([3] if layer == "all" else []), ([4] if level == "frame" else [])
    assert rows.shape == (2, *layers, *columns, 192)
    for wave, row in zip(waves, rows, strict=True):
        found = embed(loaded, wave, **kinds).numpy()
        want = row[..., : found.shape[-2], :] if level == "frame" else row
        np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-3)
    embed_recordings(loaded, tmp_path / "in", tmp_path / "x.parquet", **kinds)
    table = pyarrow.parquet.read_table(tmp_path / "x.parquet").to_pydict()
    for stored, count, row in zip(table["embedding"], table["columns"], rows, strict=True):
        want = row[..., :count, :] if level == "frame" else row
        np.testing.assert_array_equal(np.array(stored, np.float32), want)
    long = tone(30000)
    found, parts = embed(loaded, long, **kinds), embed(loaded, np.stack([long, long]), **kinds)
    torch.testing.assert_close(parts[1], found, rtol=1e-4, atol=1e-4)
    if layer == "all":
        one = embed(loaded, long, level=level, layer=1)
        torch.testing.assert_close(found[1], one, rtol=1e-4, atol=1e-4)


def test_harnesses_take_a_layer(tmp_path, monkeypatch):
    loaded, wave = make(tmp_path / "run"), torch.from_numpy(tone(9000))
    want = embed(loaded, wave, layer=1)
    items = [{"audio": {"array": wave.numpy(), "sampling_rate": 16000}}]
    loader = torch.utils.data.DataLoader(items)
    given = {"task_metadata": "toy", "hf_split": "test", "hf_subset": "default"}
    found = MtebEncoder(loaded, layer=1).encode(loader, show_progress_bar=False, **given)
    torch.testing.assert_close(torch.from_numpy(found)[0], want, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(hear, "open_model", lambda path, metadata: loaded)
    model = hear.load_model("x", layer=1)
    found = hear.get_scene_embeddings(wave[None], model)[0]
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    columns = embed(loaded, wave, level="frame", layer=1)
    found = XaresEncoder(loaded, layer=1)(wave[None])[0]
    torch.testing.assert_close(found, columns, rtol=1e-4, atol=1e-4)
    prints = {WaveformEncoder(loaded, layer=layer).fingerprint() for layer in (0, 1, "last")}
    assert len(prints) == 3  # kept features and scores of layers are not mixed up
    with pytest.raises(ConfigError, match="expected one layer, found 'all'"):
        WaveformEncoder(loaded, layer="all")


@pytest.mark.parametrize("layer", [-1, 3, 1.0, True, "first"])
def test_a_layer_that_is_not_there_is_named(layer, tmp_path):
    loaded = make(tmp_path)
    message = f"layer: expected 0 to 2, last or all, found {layer!r}: the model has 2 transformer"
    with pytest.raises(ConfigError, match=message):
        embed(loaded, tone(9000), layer=layer)
    with pytest.raises(ConfigError, match=message):
        WaveformEncoder(loaded, layer=layer)
    with pytest.raises(ConfigError, match=message):
        embed_recordings(loaded, tmp_path / "none", tmp_path / "x.npy", layer=layer)


def test_the_command_takes_a_layer_of_any_checkpoint(tmp_path, capsys):
    """A published fine-tuned file."""
    loaded = make(tmp_path, "avgtok")
    save_published(loaded.model, tmp_path / "tuned.pth", loaded.audio)
    soundfile.write(tmp_path / "a.wav", tone(9000), 16000)
    command = ["embed", str(tmp_path / "tuned.pth"), str(tmp_path / "a.wav"), "--frames", "64"]
    command += ["--stride", "16", "16", "--mean", "-5", "--std", "4", "--out"]
    assert main([*command, str(tmp_path / "x.npy"), "--layer", "all"]) == 0
    assert "x.npy: 1 x 3 x 192, 1 of 1 clips" in capsys.readouterr().out
    assert main([*command, str(tmp_path / "y.npy"), "--layer", "1"]) == 0
    both = np.load(tmp_path / "x.npy"), np.load(tmp_path / "y.npy")
    np.testing.assert_allclose(both[0][:, 1], both[1], rtol=1e-4, atol=1e-4)
    assert main([*command, str(tmp_path / "z.npy"), "--layer", "3"]) == 2
    assert "layer: expected 0 to 2, last or all, found 3" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, str(tmp_path / "z.npy"), "--layer", "top"])
    assert "expected a number, last or all, got 'top'" in capsys.readouterr().err
