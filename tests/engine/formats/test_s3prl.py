"""Hidden states over time: the right ones, at the right rate."""

import pytest
import torch
from sounds import tone

from ssast.engine.api import save_published
from ssast.engine.config import from_plain
from ssast.engine.formats.s3prl import UpstreamExpert
from ssast.engine.model.encoder import NUM_EXTRA_TOKENS, layer_states, time_states
from ssast.engine.model.objective import MSPM
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


@kinds
@torch.no_grad()
def test_rate_and_shapes(kind, upstream):
    rate = upstream.get_downsample_rates("hidden_states")
    assert rate == {"patch": 2560, "frame": 320}[kind]
    for longest in (300, 5_000, 10_240, 10_241, 40_000):
        found = upstream([wave(200), wave(longest)])
        assert len(found["hidden_states"]) == 3
        assert {s.shape for s in found["hidden_states"]} == {(2, max(1, longest // rate), 192)}
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
    tokens = states[1][:, NUM_EXTRA_TOKENS:].reshape(3, rows, columns, 192)
    torch.testing.assert_close(time_states(encoder, states[1]), tokens.mean(1))


@pytest.mark.parametrize("kind", ["patch"])
@torch.no_grad()
def test_a_clip_does_not_depend_on_its_batch(kind, upstream):
    alone = upstream([wave(9_000, 1)])["last_hidden_state"]
    together = upstream([wave(9_000, 1), wave(30_000, 2)])["last_hidden_state"]
    torch.testing.assert_close(together[:1, : alone.shape[1]], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["frame"])
def test_it_can_be_fine_tuned(kind, upstream):
    upstream([wave(9_000)])["last_hidden_state"].square().sum().backward()
    assert upstream.encoder.embed.weight.grad.abs().sum() > 0
