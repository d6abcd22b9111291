"""Formats of other programs, for every combination of the encoder's options."""

import dataclasses
import itertools
import re

import pytest
import torch
from plain_encoder import plain_blocks, plain_tokens
from torch import Tensor
from transformers import AutoModel, AutoModelForAudioClassification

from ssast.engine.checkpoints.classifier import fill_encoder
from ssast.engine.config import from_plain
from ssast.engine.data.clips import fbank_spec
from ssast.engine.errors import ConfigError
from ssast.engine.formats.huggingface import export_huggingface, import_huggingface
from ssast.engine.formats.portable import Portable
from ssast.engine.formats.published import published_state, save_published
from ssast.engine.formats.s3prl import UpstreamExpert
from ssast.engine.model.classifier import Classifier
from ssast.engine.model.embedding import sincos_positions
from ssast.engine.model.encoder import SpectrogramTransformer, layer_states
from ssast.engine.model.objective import MSPM
from ssast.engine.settings import Audio, Model
from ssast.engine.train.pretraining import continue_from
from ssast.kernels.fbank import fbank

OPTIONS = {
    "positions": ("learned", "sincos"),
    "extra_tokens": ("cls_dist", "cls"),
    "norm": ("pre", "post"),
}
COMBINATIONS = [
    dict(zip(OPTIONS, chosen, strict=True)) for chosen in itertools.product(*OPTIONS.values())
]
every = pytest.mark.parametrize(
    "options", COMBINATIONS, ids=lambda chosen: "-".join(chosen.values())
)
AUDIO = Audio(num_frames=48, mean=-5.0, std=4.0)


def classifier(options: dict[str, str], pooling: str = "avgtok", **model: object) -> Classifier:
    torch.manual_seed(0)
    settings = Model(**{"size": "tiny", "depth": 2} | model | options)
    made = Classifier(SpectrogramTransformer(settings, AUDIO), 3, pooling).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return made


def clips(frames: int = 48) -> Tensor:
    return torch.randn(2, frames, 128, generator=torch.Generator().manual_seed(0)) * 4 - 5


def plain_hidden(encoder: SpectrogramTransformer, fbank: Tensor) -> Tensor:
    weights = {name: value.double() for name, value in encoder.named_parameters()}
    audio = dataclasses.replace(AUDIO, num_frames=fbank.shape[1])
    tokens = [plain_tokens(weights, encoder.settings, audio, x, [])[0] for x in fbank.double()]
    return torch.stack([plain_blocks(weights, encoder.settings, t, 3)[0] for t in tokens])


def assert_near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-4, atol=2e-5)


@every
@pytest.mark.compatible("transformers", "model.positions, model.extra_tokens, model.norm")
def test_transformers(options, tmp_path, modules) -> None:
    """Its model file has our numbers, also of another length, and what it saves opens here."""
    model = classifier(options, "cls")
    folder = export_huggingface(model, tmp_path / "a", AUDIO)
    stock = options == COMBINATIONS[0]
    assert (folder / "modeling_ssast.py").exists() != stock
    theirs = AutoModelForAudioClassification.from_pretrained(folder, trust_remote_code=True).eval()
    x, normalised = clips(), model.encoder.embed.normalise(clips())
    with torch.no_grad():
        want, states = model(x), layer_states(model.encoder, x)
        assert_near(states[-1], plain_hidden(model.encoder, x))
        found = theirs(normalised, output_hidden_states=True)
        assert_near(found.logits, want)
        for got, state in zip(found.hidden_states[:2], states, strict=False):
            assert_near(got, state)
        ours = import_huggingface(folder).model
        assert ours.encoder.settings == model.encoder.settings
        assert_near(ours(x), want)
        if not stock:
            whole = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
            assert_near(whole(normalised).last_hidden_state, states[-1])
            theirs.save_pretrained(tmp_path / "b")
            again = AutoModelForAudioClassification.from_pretrained(
                tmp_path / "b", trust_remote_code=True
            )
            assert again.eval()(normalised).logits.equal(found.logits)
            longer = SpectrogramTransformer(model.encoder.settings, Audio(num_frames=80))
            fill_encoder(longer, model.encoder)
            x = torch.randn(2, 80, 128)
            resized = whole(x, interpolate_pos_encoding=True).last_hidden_state
            assert_near(resized, layer_states(longer, longer.embed.std * 2 * x + Audio().mean)[-1])


@every
@pytest.mark.parametrize("pooling", ["avgtok", "cls"])
def test_portable(options, pooling) -> None:
    model = classifier(options, pooling)
    with torch.no_grad():
        assert_near(Portable(model).eval()(clips()), model(clips()))


@every
def test_another_grid(options) -> None:
    """Fixed positions are exactly those of the grid that an encoder is filled for."""
    encoder = classifier(options).encoder
    longer = SpectrogramTransformer(encoder.settings, Audio(num_frames=96), (8, 16))
    fill_encoder(longer, encoder)
    assert longer.embed.grid == (15, 6)
    for name, value in encoder.state_dict().items():
        assert name == "embed.pos_embed" or longer.state_dict()[name].equal(value)
    positions = longer.embed.pos_embed
    if options["positions"] == "sincos":
        want = sincos_positions((15, 6), 192, encoder.num_extra_tokens)
        assert positions.equal(want.float()) and not positions.requires_grad
    else:
        assert positions[:, : encoder.num_extra_tokens].equal(
            encoder.embed.pos_embed[:, : encoder.num_extra_tokens]
        )


@pytest.mark.parametrize(("positions", "how"), [("learned", "resized"), ("sincos", "recomputed")])
def test_continued_pretraining_says_what_became_of_the_positions(positions, how) -> None:
    plain = {"model": {"size": "tiny", "depth": 1, "positions": positions}}
    shorter, longer = (
        MSPM(from_plain(plain | {"audio": {"num_frames": n}, "objective": {"num_masked": 9}}))
        for n in (48, 64)
    )
    taken = continue_from(longer, shorter)
    assert taken == f"encoder, heads, position embedding {how} from 8 x 3 to 8 x 4"


@every
def test_published(options, tmp_path) -> None:
    model = classifier(options)
    if options == COMBINATIONS[0]:
        assert "module.v.dist_token" in published_state(model)
        return
    key = next(k for k in ("positions", "norm", "extra_tokens") if options[k] != OPTIONS[k][0])
    match = rf"^the published format holds models of model\.{key} {OPTIONS[key][0]} alone"
    if key == "extra_tokens":
        match = re.escape(
            "the published format holds models of model.extra_tokens cls in size base alone "
            "(base_nokd), got 'tiny'"
        )
    with pytest.raises(ConfigError, match=match):
        save_published(model, tmp_path / "a.pth", AUDIO)
    assert not (tmp_path / "a.pth").exists()


@every
def test_s3prl(options, tmp_path) -> None:
    encoder = classifier(options).encoder
    folder = export_huggingface(encoder, tmp_path / "a", AUDIO)
    upstream, spec = UpstreamExpert(folder).eval(), fbank_spec(AUDIO)
    wave = 0.1 * torch.randn(spec.num_samples, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        clip = fbank((wave - wave.mean())[None], torch.tensor([len(wave)]), spec)
        want = plain_hidden(encoder, clip)[:, encoder.num_extra_tokens :]
        found = upstream([wave])["last_hidden_state"][:, :3]
    assert_near(found, want.unflatten(1, encoder.embed.grid).mean(1))
