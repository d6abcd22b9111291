"""Hidden states over time: the right ones, at the right rate."""

import pytest
import torch
from golden_model import golden
from paths import GOLDEN
from sounds import tone

from ssast.engine import api
from ssast.engine.api import open_model, save_published
from ssast.engine.config import from_plain, to_plain
from ssast.engine.errors import ConfigError
from ssast.engine.formats import s3prl
from ssast.engine.formats.known_weights import PUBLISHED
from ssast.engine.formats.s3prl import UpstreamExpert, ssast_local
from ssast.engine.model.classifier import Classifier
from ssast.engine.model.encoder import (
    SpectrogramTransformer,
    layer_states,
    time_states,
)
from ssast.engine.model.objective import MSPM
from ssast.engine.settings import Audio, Model
from ssast.kernels.fbank import FbankSpec, fbank

PATCHES = {"patch": [16, 16], "frame": [128, 2]}
kinds = pytest.mark.parametrize("kind", PATCHES)


def make(kind, **audio):
    torch.manual_seed(0)
    settings = {
        "model": {"size": "tiny", "depth": 2, "patch": PATCHES[kind]},
        "audio": {"num_frames": 64, **audio},
        "objective": {"num_masked": 8, "mask": "random"},
    }
    config = from_plain(settings)
    return MSPM(config).eval(), config.audio


@pytest.fixture
def upstream(tmp_path, kind):
    model, audio = make(kind)
    save_published(model, tmp_path / "model.pth", audio)
    return UpstreamExpert(tmp_path / "model.pth").eval()


def wave(samples, seed=0):
    return torch.from_numpy(tone(samples, seed=seed))


@pytest.mark.compatible("s3prl", "get_downsample_rates, hidden_states, any length")
@kinds
@torch.no_grad()
def test_rate_and_shapes(kind, upstream):
    rate = upstream.get_downsample_rates("hidden_states")
    assert rate == {"patch": 2560, "frame": 320}[kind]
    for longest in (300, 5_000, 10_240, 10_241, 40_000):
        found = upstream([wave(200), wave(longest)])
        assert len(found["hidden_states"]) == 3
        assert {s.shape for s in found["hidden_states"]} == {(2, -(-longest // rate), 192)}
        assert found["last_hidden_state"].equal(found["hidden_states"][-1])
        assert all(state.isfinite().all() for state in found["hidden_states"])


@kinds
@torch.no_grad()
def test_states_are_those_of_the_encoder_on_the_same_window(kind, upstream):
    """Column k of the output is column k of the patches that begin at sample k * rate."""
    encoder, x = upstream.encoder, wave(30_000)
    states = upstream([x])["hidden_states"]
    columns, rate = encoder.embed.grid[1], upstream.get_downsample_rates()
    spec = FbankSpec(num_frames=64)
    for window in (0, 1):
        part = (x - x.mean())[None, window * columns * rate :][:, : spec.num_samples].contiguous()
        clips = fbank(part, torch.tensor([part.shape[1]]), spec)
        want = [time_states(encoder, s) for s in layer_states(encoder, clips)]
        for state, layer in zip(states, want, strict=True):
            place = slice(window * columns, (window + 1) * columns)
            torch.testing.assert_close(state[:, place], layer)


@kinds
@torch.no_grad()
def test_layers_end_with_the_hidden_states_of_the_model(kind):
    model, _ = make(kind, ignore_padding=True)
    encoder, x, lengths = model.encoder, torch.randn(3, 64, 128), torch.tensor([64, 40, 0])
    masks = encoder.no_masks(3, lengths)
    states = layer_states(encoder, x, lengths)
    assert len(states) == 3
    torch.testing.assert_close(states[-1], encoder(x, masks)[0])
    torch.testing.assert_close(states[0], encoder.embed(x, masks)[0])
    rows, columns = encoder.embed.grid
    tokens = states[1][:, encoder.num_extra_tokens :].reshape(3, rows, columns, 192)
    torch.testing.assert_close(time_states(encoder, states[1]), tokens.mean(1))


@pytest.mark.parametrize("kind", ["patch"])
@torch.no_grad()
def test_a_clip_does_not_depend_on_its_batch(kind, upstream):
    alone = upstream([wave(9_000, 1)])["last_hidden_state"]
    together = upstream([wave(9_000, 1), wave(30_000, 2)])["last_hidden_state"]
    torch.testing.assert_close(together[:1, : alone.shape[1]], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.compatible("s3prl", "fine-tuning the upstream")
@pytest.mark.parametrize("kind", ["frame"])
def test_it_can_be_fine_tuned(kind, upstream):
    upstream([wave(9_000)])["last_hidden_state"].square().sum().backward()
    assert upstream.encoder.embed.weight.grad.abs().sum() > 0


def published(tmp_path, kind):
    weights = golden(kind)["state_dict"]
    state = {name: value.to(value.dtype.to_real()) for name, value in weights.items()}
    torch.save(state, tmp_path / f"{kind}.pth")
    return tmp_path / f"{kind}.pth"


CASES = torch.load(GOLDEN / "s3prl_ssast.pt", weights_only=True)


@pytest.mark.compatible("s3prl", "SUPERB's SSAST: hidden states of its expert")
@pytest.mark.parametrize("case", CASES["cases"], ids=lambda c: f"{c['kind']}-{c['window_secs']:g}")
@torch.no_grad()
def test_superb_computes_what_the_expert_of_s3prl_does(case, tmp_path):
    path = published(tmp_path, case["kind"])
    upstream = ssast_local(path, window_secs=case["window_secs"])
    assert upstream.get_downsample_rates() == case["rate"]
    hidden = upstream([wav / 32768 for wav in CASES["waves"]])["hidden_states"]
    assert [list(state.shape) for state in hidden] == [case["shape"]] * 2
    for state, want in zip(hidden, case["states"], strict=True):
        torch.testing.assert_close(state.flatten()[:: case["every"]], want, rtol=2e-4, atol=2e-4)
    if case["window_secs"] == 1:  # the default
        same = UpstreamExpert(path, superb=True)([wav / 32768 for wav in CASES["waves"]])
        assert same["last_hidden_state"].equal(hidden[-1])


@pytest.mark.compatible("s3prl", "window_secs, stride, stack")
@kinds
@torch.no_grad()
def test_windows_and_strides_without_gaps(kind, tmp_path):
    path = published(tmp_path, kind)
    stride = [10, 10] if kind == "patch" else [128, 1]
    settings = {"window_secs": 1, "stride": stride}
    one = UpstreamExpert(path, **settings)
    rate = one.get_downsample_rates()
    assert rate == stride[1] * 160 and one.encoder.embed.grid[1] == (99 if kind == "frame" else 9)
    wavs = [wave(20_001), wave(15_000)]
    mean, stacked = (
        UpstreamExpert(path, **settings, stack=stack)(wavs)["last_hidden_state"]
        for stack in (None, True)
    )
    rows = one.encoder.embed.grid[0]
    assert mean.shape == (2, -(-20_001 // rate), 192)
    assert stacked.shape == (2, mean.shape[1], rows * 192)
    torch.testing.assert_close(stacked.unflatten(2, (rows, 192)).mean(2), mean)


@pytest.mark.compatible("s3prl", "model_config, refresh; other settings are refused")
@torch.no_grad()
def test_settings_are_read_from_a_file_of_s3prl(tmp_path):
    path, file = published(tmp_path, "patch"), tmp_path / "upstream.yaml"
    file.write_text("window_secs: 2.56\nstack: true\n")
    upstream = UpstreamExpert(path, model_config=file, refresh=False, stride=[16, 16], stack=False)
    assert not upstream.stack and upstream.spec.num_frames == 256
    assert upstream.encoder.embed.pos_embed.equal(open_model(path).encoder.embed.pos_embed)


@pytest.mark.compatible("s3prl", "published fine-tuned files")
@torch.no_grad()
def test_a_published_fine_tuned_file_is_opened(tmp_path):
    audio, stride, frames = Audio(num_frames=64), (10, 10), 64
    encoder = SpectrogramTransformer(Model(size="tiny", depth=2), audio, stride)
    save_published(Classifier(encoder, 5), tmp_path / "tuned.pth")
    upstream = UpstreamExpert(tmp_path / "tuned.pth", stride=stride, num_frames=frames)
    x = wave(frames * 160)
    found = upstream([x])["last_hidden_state"]
    clips = fbank((x - x.mean())[None], torch.tensor([len(x)]), FbankSpec(num_frames=frames))
    want = time_states(encoder, layer_states(encoder, clips)[-1])
    torch.testing.assert_close(found[:, : want.shape[1]], want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match=r"fine-tuned file: upstream\.stride is needed"):
        UpstreamExpert(tmp_path / "tuned.pth", num_frames=frames)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window_sec": 1}, "unknown key upstream.window_sec; did you mean upstream.window_secs"),
        ({"feature": "x"}, "unknown key upstream.feature"),
        ({"window_secs": "1 s"}, "upstream.window_secs must be a number, got '1 s'"),
        ({"window_secs": 0.1}, "a window of 10 frames of 10 ms, expected at least the 16"),
        ({"stride": 10}, "upstream.stride must be a list of 2, got 10"),
        ({"stack": "yes"}, "upstream.stack must be true or false, got 'yes'"),
        ({"refresh": True}, "refresh: .*patch.pth is downloaded once"),
        ({"model_config": "no.yaml"}, "no.yaml: cannot be read: .*No such file"),
    ],
)
def test_wrong_settings_are_refused(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        ssast_local(published(tmp_path, "patch"), **settings)


def test_another_sample_rate_is_refused(tmp_path):
    model, audio = make("patch", sample_rate_hz=32000)
    save_published(model, tmp_path / "a.pth", audio, {"audio": to_plain(audio)})
    with pytest.raises(ConfigError, match="its sample rate is 32000 Hz, expected the 16000 Hz"):
        UpstreamExpert(tmp_path / "a.pth")


def test_names_of_s3prl_are_the_published_weights(monkeypatch, tmp_path):
    path = published(tmp_path, "frame")
    opened = []
    monkeypatch.setattr(
        s3prl, "open_model", lambda name, *given: opened.append(name) or open_model(path, *given)
    )
    for name, weights in (("patch_base", "Base-Patch"), ("frame_tiny", "Tiny-Frame")):
        upstream = getattr(api, f"ssast_{name}")(ckpt=None, model_config=None, refresh=False)
        assert upstream.superb and opened.pop() == f"SSAST-{weights}-400" in PUBLISHED


@pytest.mark.compatible("s3prl", "S3PRLUpstream: a state for each downsample rate, rounded up")
@pytest.mark.parametrize("entry", [UpstreamExpert, ssast_local])
@kinds
@torch.no_grad()
def test_lengths_are_those_that_s3prl_expects(kind, entry, tmp_path):
    """As ``S3PRLUpstream`` calls an upstream, and what it asserts of the states."""
    upstream = entry(**{"refresh": False, "stack": True, "ckpt": published(tmp_path, kind)})
    rate = upstream.get_downsample_rates("hidden_states")
    for longest in (800, 2_560, 2_561, 5_119, 5_120, 17_000):
        states = upstream([wave(longest), wave(longest // 2)])["hidden_states"]
        expected = len(range(0, longest, rate))
        for state in states:
            assert state.shape[1] == expected or (
                entry is ssast_local and expected // state.shape[1] == 1
            )
