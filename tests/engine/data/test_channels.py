"""Which channel of a recording is heard, wherever it is read."""

import io
import json

import numpy as np
import pytest
import soundfile
import torch
from sounds import tone

from ssast.engine.api import (
    LoadedModel,
    embed,
    export_huggingface,
    load_config,
    open_model,
    save_published,
)
from ssast.engine.checkpoints.adopt import adopt
from ssast.engine.cli.main import main
from ssast.engine.config import Config, from_plain
from ssast.engine.data.clips import fbank_spec, find_clips
from ssast.engine.errors import ConfigError
from ssast.engine.evaluation.timeline import Windows
from ssast.engine.formats.open import published_metadata
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.model.objective import MSPM
from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.audio.convert import Recipe, cut
from ssast.pipelines.audio.decode import Item, read_blocks
from ssast.pipelines.audio.encoded import read_clip
from ssast.pipelines.clips.manifest import read_clips
from ssast.pipelines.stream.stream import AudioStream

CHANNELS = ("mean", "left", "right")
channels = pytest.mark.parametrize("channel", CHANNELS)


def sounds(count):
    return np.stack([tone(8000, seed=seed) for seed in range(count)], 1)


def heard(samples, channel):
    return {"mean": samples.mean(1), "left": samples[:, 0], "right": samples[:, -1]}[channel]


@pytest.fixture(params=[1, 2, 3])
def recording(request, tmp_path):
    """A float file of one, two or three channels, of which `right` is the second."""
    samples = sounds(request.param)
    soundfile.write(tmp_path / "a.wav", samples, 16000, "FLOAT")
    return tmp_path / "a.wav", samples[:, :2] if request.param == 3 else samples, samples


@channels
def test_every_reader_hears_the_same(channel, recording):
    path, two, samples = recording
    want = heard(samples if channel == "mean" else two, channel)
    encoded = read_clip(str(path), FbankSpec(num_frames=48, channel=channel)).tobytes()
    found = np.frombuffer(encoded[44:], "<f4")
    np.testing.assert_allclose(found, want[: len(found)], atol=1e-7)
    blocks = [block for block, _ in read_blocks(Item("a", path), channel)]
    np.testing.assert_allclose(np.concatenate(blocks), want, atol=1e-7)
    ((_, window),) = Windows(8000, 8000).cut(path, FbankSpec(channel=channel))
    np.testing.assert_allclose(window, want, atol=1e-7)
    (part,) = cut(Item("a", path), Recipe(channel=channel))
    np.testing.assert_allclose(part.samples / 32767, want, atol=2e-5)


@channels
def test_what_dali_decodes_is_that_channel(channel, tmp_path):
    samples = sounds(2)
    soundfile.write(tmp_path / "both.flac", samples, 16000, "PCM_24")
    soundfile.write(tmp_path / "one.flac", heard(samples, channel), 16000, "PCM_24")
    spec = FbankSpec(num_frames=48, channel=channel)
    paths = [str(tmp_path / name) for name in ("both.flac", "one.flac")]
    (batch,) = AudioStream(paths, spec, batch_size=2, epochs=1, device=torch.device("cpu"))
    assert batch.valid.all()
    torch.testing.assert_close(batch.fbank[0], batch.fbank[1], rtol=1e-3, atol=2e-3)


def test_embeddings_of_a_file_follow_the_model(tmp_path):
    samples = sounds(2)
    soundfile.write(tmp_path / "a.wav", samples, 16000, "FLOAT")
    for channel in CHANNELS:
        config = from_plain({"model": {"size": "tiny", "depth": 1}, "audio": {"channel": channel}})
        torch.manual_seed(0)
        encoder = SpectrogramTransformer(config.model, config.audio).eval()
        loaded = LoadedModel(encoder, config, tmp_path, "run")
        want = embed(loaded, np.ascontiguousarray(heard(samples, channel)))
        torch.testing.assert_close(embed(loaded, tmp_path / "a.wav"), want)


def test_the_checkpoint_says_the_channel():
    theirs = from_plain({"audio": {"channel": "left"}})
    run = load_config("classifier")
    adopted, lines = adopt(run, theirs, "ckpt")
    assert fbank_spec(adopted.audio).channel == "left" and "channel left" in "".join(lines)
    given = load_config("classifier", ["audio.channel=right"])
    adopted, lines = adopt(given, theirs, "ckpt")
    assert adopted.audio.channel == "right" and "the checkpoint has left" in "".join(lines)
    assert Config().audio.channel == Recipe().channel == FbankSpec().channel == "mean"


def test_exports_say_the_channel(tmp_path):
    config = from_plain({"model": {"size": "tiny", "depth": 1}, "audio": {"channel": "left"}})
    encoder = SpectrogramTransformer(config.model, config.audio)
    export_huggingface(encoder, tmp_path / "hf", config.audio)
    assert json.loads((tmp_path / "hf/preprocessor_config.json").read_text())["channel"] == "left"
    assert open_model(tmp_path / "hf").audio.channel == "left"
    model = MSPM(config)
    loaded = LoadedModel(model, config, tmp_path, "run")
    save_published(model, tmp_path / "a.pth", config.audio, published_metadata(loaded))
    assert open_model(tmp_path / "a.pth").audio.channel == "left"


def test_prepared_shards_have_the_channel_that_was_asked_for(tmp_path, caplog, capsys):
    (tmp_path / "in").mkdir()
    samples = sounds(2)
    for number in range(4):
        samples = samples * 0.9
        soundfile.write(tmp_path / f"in/{number}.wav", samples, 16000, "FLOAT")
    for channel in ("mean", "left"):
        out = tmp_path / channel
        assert main(["data", "prepare", str(tmp_path / "in"), str(out), "--channel", channel]) == 0
        index = read_clips(out)
        assert index.channel() == channel
        found, _ = soundfile.read(io.BytesIO(index[0].read()))
        want = heard(sounds(2), channel)
        np.testing.assert_allclose(found / found.max(), want / want.max(), atol=2e-4)
    settings = [f"data.train={tmp_path}/left", "data.valid_share=0.5", "audio.channel=left"]
    find_clips(load_config("tiny_patch", settings))
    assert not caplog.text
    find_clips(load_config("tiny_patch", settings[:2]))
    assert "prepared with --channel left: audio.channel=mean makes no difference" in caplog.text


def test_an_unknown_channel_is_refused(capsys):
    with pytest.raises(ConfigError, match="channel must be one of mean, left, right, got 0"):
        load_config("tiny_patch", ["audio.channel=0"])
    with pytest.raises(ValueError, match="channel is 'both', it must be one of mean, left, right"):
        FbankSpec(channel="both")
