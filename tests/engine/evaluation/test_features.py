"""Features of waveforms in memory are those of the same recordings on disk."""

import numpy as np
import pytest
import soundfile
import soxr
import torch

from ssast.engine.api import ConfigError, DataError, LoadedModel, embed, embed_recordings
from ssast.engine.config import from_plain
from ssast.engine.evaluation.features import embed_waveforms
from ssast.engine.formats.s3prl import UpstreamExpert
from ssast.engine.model.classifier import Classifier
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.model.objective import MSPM

RATE_HZ = 16000
CONFIG = from_plain(
    {
        "model": {"size": "tiny", "depth": 1},
        "audio": {"num_frames": 64, "mean": -5.0, "std": 4.0},
        "objective": {"num_masked": 8},
    }
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> LoadedModel:
    torch.manual_seed(0)
    return LoadedModel(MSPM(CONFIG).eval(), CONFIG, tmp_path_factory.mktemp("run"), "run")


def wave(seconds: float, *, rate_hz: int = RATE_HZ, seed: int = 0) -> np.ndarray:
    """A slow sweep below 4 kHz over noise, so that resampling keeps it."""
    times = np.arange(round(seconds * rate_hz)) / rate_hz
    noise = np.random.default_rng(seed).standard_normal(len(times)) * 1e-3
    sweep = 0.3 * np.sin(2 * np.pi * (300 + 500 * seed) * times * (1 + 0.1 * times))
    return (sweep + noise).astype(np.float32)


@pytest.mark.parametrize("level", ["clip", "frame"])
def test_one_line_gives_what_the_command_writes(device, level, loaded, tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, wave(0.4), RATE_HZ, subtype="FLOAT")
    embed_recordings(loaded, path, tmp_path / "a.npy", level=level)
    want = torch.from_numpy(np.load(tmp_path / "a.npy"))[0]
    found = embed(loaded, path, level=level)
    if level == "frame":
        assert want[len(found) :].isnan().all()  # after the end of the clip
        want = want[: len(found)]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3)
    assert embed(loaded, wave(0.4), level=level).equal(found)


def test_a_misspelt_level(loaded, tmp_path):
    """It gave vectors of neither level."""
    message = "level: expected clip or frame, got 'columns'"
    for layer in ("last", "all"):
        with pytest.raises(ConfigError, match=message):
            embed(loaded, wave(0.4), level="columns", layer=layer)
    soundfile.write(tmp_path / "a.wav", wave(0.4), RATE_HZ)
    with pytest.raises(ConfigError, match=message):
        embed_recordings(loaded, tmp_path / "a.wav", tmp_path / "a.npy", level="columns")


def test_a_batch_is_its_rows(device, loaded):
    waves = torch.from_numpy(np.stack([wave(1.5, seed=seed) for seed in range(3)]))
    clips, frames = embed(loaded, waves), embed(loaded, waves, level="frame")
    assert clips.shape == (3, 192) and frames.shape == (3, 10, 192)
    for row, one, columns in zip(waves, clips, frames, strict=True):
        torch.testing.assert_close(embed(loaded, row.numpy()), one, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(embed(loaded, row, level="frame"), columns, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(columns.mean(0), one, rtol=1e-4, atol=1e-4)


def test_long_waveforms_are_cut_into_windows(loaded, monkeypatch):
    """As s3prl's upstream does, which is tested for itself."""
    monkeypatch.setattr("ssast.engine.formats.s3prl.open_model", lambda *_: loaded)
    long = wave(2.9)
    states = UpstreamExpert("x").eval()([torch.from_numpy(long)])["last_hidden_state"][0]
    found = embed(loaded, long, level="frame")
    assert len(states) == 19 and len(found) == 18  # s3prl counts a column that is not whole
    torch.testing.assert_close(found, states[:18], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("frames", "columns"), [(16, 2), (50, 5), (51, 5), (64, 5), (65, 7), (114, 10), (115, 12)]
)
def test_what_fits_the_input_is_one_window_where_patches_overlap(frames, columns, tmp_path):
    """5 columns 10 frames apart in 64 frames: the second window begins at frame 50."""
    torch.manual_seed(0)
    encoder = SpectrogramTransformer(CONFIG.model, CONFIG.audio, (10, 10)).eval()
    loaded = LoadedModel(encoder, CONFIG, tmp_path, "run")
    samples = torch.from_numpy(wave(2.0))[: 400 + 160 * (frames - 1)]
    found = embed(loaded, samples, level="frame")
    assert len(found) == columns
    if frames == 115:  # in a batch, the others end where they end alone
        lengths = torch.tensor([400 + 160 * (n - 1) for n in (115, 64, 65, 16)])
        rows = torch.stack([samples.where(torch.arange(len(samples)) < n, 0) for n in lengths])
        together, held = embed_waveforms(loaded, rows, lengths, "frame")
        assert held.tolist() == [12, 5, 7, 2]
        for row, n, count in zip(together, lengths, held, strict=True):
            alone = embed(loaded, samples[:n], level="frame")
            torch.testing.assert_close(row[:count], alone, rtol=1e-4, atol=1e-4)
            assert not row[count:].any()


def test_another_sample_rate_is_resampled(device, loaded):
    at_48 = wave(0.6, rate_hz=48000)
    want = embed(loaded, soxr.resample(at_48, 48000, RATE_HZ))
    torch.testing.assert_close(embed(loaded, at_48, 48000), want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(embed(loaded, at_48), want, rtol=1e-2, atol=1e-2)
    batch = embed(loaded, np.stack([at_48, at_48]), 48000)
    torch.testing.assert_close(batch[1], want, rtol=1e-4, atol=1e-4)


def test_a_classifier_pools_as_it_was_trained(tmp_path):
    torch.manual_seed(0)
    classifier = Classifier(SpectrogramTransformer(CONFIG.model, CONFIG.audio), 5, "cls").eval()
    loaded = LoadedModel(classifier, CONFIG, tmp_path, "run")
    one, other = wave(0.64), wave(0.64, seed=1)
    both = embed(loaded, np.concatenate([one, other]))
    # The second window has one column fewer: the last frame reaches into nothing.
    assert not torch.allclose(embed(loaded, one), embed(loaded, other), rtol=1e-2, atol=1e-2)
    assert both.shape == (192,) and both.isfinite().all()
    avgtok = LoadedModel(classifier.encoder, CONFIG, tmp_path, "run")
    assert not torch.allclose(embed(avgtok, one), embed(loaded, one), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (np.zeros(399, np.float32), "399 samples at 16000 Hz, expected at least 400, one frame"),
        (np.zeros(0, np.float32), "waveform: 0 samples"),
        (np.zeros(16000, np.int16), r"got \[16000\] torch.int16"),
        (np.zeros((1, 1, 16000), np.float32), r"expected \[S\] or \[B, S\] .*got \[1, 1, 16000\]"),
        (np.full(16000, np.nan, np.float32), "waveform: holds NaN or infinite samples"),
        ("none.wav", "none.wav: cannot be read: No such file"),
    ],
)
def test_what_cannot_be_embedded_is_named(audio, message, loaded):
    with pytest.raises(DataError, match=message):
        embed(loaded, audio)


def test_a_sample_rate_is_positive(loaded):
    with pytest.raises(DataError, match="sample_rate_hz: expected a positive number, got 0"):
        embed(loaded, wave(0.5), 0)
